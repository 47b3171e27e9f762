"""Which model, adapter and codec a run uses: settled on the driver, from specs alone, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edje_pipeline.errors import CodecError, ConfigError, ShapeMismatchError
from edje_pipeline.models.spec import fingerprint_of
from edje_pipeline.models.spec_json import spec_to_dict
from edje_pipeline.storage.codecs import (
    VARIANTS,
    Codec,
    Variant,
    load_codec,
    needs_codebook,
    payload_bytes_for,
    read_codec_file,
    resolve,
)
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.manifest import HeadFields, Manifest, TokenSpec

if TYPE_CHECKING:
    from edje_pipeline.models.checkpoint import ModelDirectory

NO_ADAPTER = "none"


@dataclass(frozen=True)
class Choice:
    """A model and what is stored of it."""

    model: ModelDirectory
    location: str
    """The model as later commands find it: an absolute directory, a Hub id, or a bundled name."""
    variant: str
    codec_spec: str
    codec: Codec | None
    """None: its codebook is still to be trained."""
    use_adapter: bool

    @property
    def num_tokens(self) -> int:
        """M, or N for vision tokens."""
        spec = self.model.spec
        return spec.adapter.num_compressed_tokens if self.use_adapter else spec.backbone.num_vision_tokens

    @property
    def dim(self) -> int:
        """E, or D for vision tokens."""
        return self.model.spec.adapter.output_dim if self.use_adapter else self.model.spec.backbone.width

    @property
    def embedding_dim(self) -> int:
        return self.model.spec.backbone.embedding_dim

    @property
    def payload_bytes(self) -> int:
        return payload_bytes_for(self.codec_spec, num_tokens=self.num_tokens, dim=self.dim)

    @property
    def fingerprints(self) -> dict[str, str]:
        """By part: backbone, preprocess, adapter, codec."""
        parts = self.model.fingerprints
        untrained = fingerprint_of(["to be trained", self.codec_spec, self.num_tokens, self.dim])
        return {
            "backbone": parts["backbone"],
            "preprocess": parts["preprocess"],
            "adapter": parts["adapter"] if self.use_adapter else NO_ADAPTER,
            "codec": self.codec.fingerprint if self.codec is not None else untrained,
        }

    def head(
        self, codec: Codec, *, fingerprints: dict[str, str], source: dict[str, Any], config: dict[str, Any],
        timings: dict[str, float],
    ) -> HeadFields:  # fmt: skip
        """What the manifest says of this run."""
        from edje_pipeline import __version__

        return HeadFields(
            fingerprints={**fingerprints, "codec": codec.fingerprint},
            tokens=TokenSpec(codec.num_tokens, codec.dim, "float32", codec.payload_bytes, codec.name),
            embedding_dim=self.embedding_dim,
            codec=codec.to_dict(),
            model={
                **spec_to_dict(self.model.spec),
                "location": self.location,
                "tokens": "compressed" if self.use_adapter else "vision",
            },
            source=source,
            config={**config, "model": self.location, "variant": self.variant},
            timings=timings,
            code_version=__version__,
        )


def choose(
    model_text: str, variant: str | None, *, codebook: str | None = None, existing: Manifest | None = None,
    index: Location | None = None,
) -> Choice:  # fmt: skip
    """Opens the model's spec and fits variant and codec to it.

    Args:
        model_text: as a user types it.
        variant: a name of `VARIANTS` or a codec spec; None: what the model's adapter is made for.
        codebook: file of a trained codec.
        existing: manifest of an index whose trained codec is to be used on.
        index: where that manifest's codebook lies.

    Raises:
        ConfigError: no such variant, or one that the model's adapter cannot give.
        ShapeMismatchError: parts of the model, or model and codebook, do not fit.
        ModelError, CodecError: see `open_model`, `read_codec_file`.
    """
    from edje_pipeline.models.checkpoint import open_model

    model = open_model(model_text)
    model.spec.validate()
    kind = model.spec.adapter.kind
    name = variant or ("49kb" if kind == "compressed" else "local")
    chosen = _variant(name, kind)
    if chosen.adapter is not None and chosen.adapter != kind:
        raise ConfigError(
            f"variant {name} needs a {chosen.adapter} adapter, the model {model_text} has a {kind} one; choose "
            + ("--variant local or raw" if kind == "local" else "one of 49kb, int8, int4, 1kb, raw")
        )
    plain = Choice(model, _location(model_text), name, chosen.codec, None, use_adapter=chosen.adapter is not None)
    if codebook is not None:
        codec = read_codec_file(Location.parse(codebook))
        if (codec.num_tokens, codec.dim) != (plain.num_tokens, plain.dim):
            raise ShapeMismatchError(
                f"the codebook {codebook} is for {codec.num_tokens} x {codec.dim} tokens, "
                f"the model {model_text} gives {plain.num_tokens} x {plain.dim}; train one with `train-codec`"
            )
        if variant is not None and codec.name != chosen.codec:
            raise ConfigError(f"variant {name} means codec {chosen.codec}, the codebook {codebook} is for {codec.name}")
    elif not needs_codebook(chosen.codec):
        codec = resolve(chosen.codec, num_tokens=plain.num_tokens, dim=plain.dim)
    elif existing is not None and index is not None and existing.tokens.codec == chosen.codec:
        codec = load_codec(existing.codec, index)
    else:
        payload_bytes_for(chosen.codec, num_tokens=plain.num_tokens, dim=plain.dim)  # refuses widths that do not fit
        return plain
    return Choice(model, plain.location, name, codec.name, codec, plain.use_adapter)


def _variant(name: str, adapter_kind: Any) -> Variant:
    if name in VARIANTS:
        return VARIANTS[name]
    try:
        needs_codebook(name)
    except CodecError:
        raise ConfigError(
            f"there is no variant {name!r}; choose {', '.join(VARIANTS)}, or a codec such as pq48"
        ) from None
    return Variant(None, adapter_kind, name)


def _location(text: str) -> str:
    path = Path(text).expanduser()
    return str(path.resolve()) if not text.startswith("hf:") and path.is_dir() else text
