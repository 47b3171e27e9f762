"""The frozen vision model behind one interface: pixels in, vision tokens and a pooled embedding out.

Shape letters: B batch, H W input size in pixels, N vision tokens, D width, P pooled width, De embedding width.

`describe(source)` plans (no memory for weights); `create_backbone(spec, weights)` builds. The trunks
themselves live in timm_backbone.py, open_clip_backbone.py and hf_weights/.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edje_pipeline.errors import ConfigError, ModelError, ShapeMismatchError
from edje_pipeline.models.families import EMBEDDING_KINDS, FAMILIES, TOKEN_LAYERS, EmbeddingKind, TokenLayer
from edje_pipeline.models.spec import BackboneSpec, PreprocessSpec
from edje_pipeline.models.tensor_files import load_exactly, read_tensors

KINDS = ("timm", "open_clip", "hf")
IMAGE_NDIM = 4
TRUNK_PREFIX = "trunk."
"""A weights file whose names start with this was written from a Backbone; others come from the trunk's library."""


class Trunk(Protocol):
    """What a family's module offers. It is also an `nn.Module`."""

    num_heads: int
    norm_eps: float

    def __call__(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> vision tokens (B, N, D) without prefix tokens, pooled (B, P) or None."""

    def convert_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the library that the trunk comes from -> this module's own names."""


@dataclass(frozen=True)
class TrunkPlan:
    """A trunk that has not been built: its preprocessing, and the recipe."""

    preprocess: PreprocessSpec
    options: dict[str, Any]
    """Every option resolved, so that the spec alone rebuilds the same module."""
    revision: str = ""


class Backbone(nn.Module):
    """A frozen trunk with its pixel normalisation and embedding head."""

    def __init__(self, spec: BackboneSpec, preprocess: PreprocessSpec, trunk: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.preprocess = preprocess
        self.trunk = trunk
        pooled_dim = int(spec.options.get("pooled_dim", 0))
        mapped = spec.options.get("embedding_map")
        self.embedding_map = nn.Linear(pooled_dim, int(mapped)) if mapped else None
        # A plain cache, not buffers: `.to(torch.bfloat16)` must leave the normalisation in float32.
        self._mean_std: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.requires_grad_(False)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Of the trunk's weights: what it computes in."""
        return next(self.trunk.parameters()).dtype

    def place_constants(self, device: torch.device) -> None:
        """Puts mean and std on a device. To be called before compiling: a trace that fills the cache is made twice."""
        if device in self._mean_std:
            return
        mean, std = self.preprocess.mean, self.preprocess.std
        self._mean_std[device] = (
            torch.tensor(mean, dtype=torch.float32, device=device).view(1, 3, 1, 1),
            torch.tensor(std, dtype=torch.float32, device=device).view(1, 3, 1, 1),
        )

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float32 (B, 3, H, W): (x / 255 - mean) / std, in torchvision's order of operations."""
        self.place_constants(pixels.device)
        constants = self._mean_std[pixels.device]
        values = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return values.sub_(constants[0]).div_(constants[1])

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """One pass gives both outputs.

        Args:
            pixels: uint8 (B, H, W, 3), or normalised float pixel_values (B, 3, H, W).

        Returns:
            vision_tokens (B, N, D) in the model's dtype, and the L2-normalised embedding (B, De) in
            float32, or None when the backbone has none.

        Raises:
            ShapeMismatchError: the pixels have another shape than the backbone's input.
        """
        height, width = self.preprocess.image_size
        is_uint8 = pixels.dtype == torch.uint8
        expected = (height, width, 3) if is_uint8 else (3, height, width)
        if pixels.ndim != IMAGE_NDIM or tuple(pixels.shape[1:]) != expected:
            raise ShapeMismatchError(
                f"backbone {self.spec.source} takes {'uint8' if is_uint8 else 'float'} images of shape "
                f"(batch, {', '.join(map(str, expected))}), got {tuple(pixels.shape)}"
            )
        values = self.normalise(pixels) if is_uint8 else pixels
        tokens, pooled = self.trunk(values.to(self.dtype))
        return tokens, self.embed(pooled)

    def embed(self, pooled: Tensor | None) -> Tensor | None:
        """Pooled vector (B, P) -> embedding (B, De), float32, unit length."""
        if pooled is None:
            return None
        if self.embedding_map is not None:
            pooled = self.embedding_map(pooled)
        return F.normalize(pooled.float(), dim=-1)


def parse_source(source: str) -> tuple[str, str, dict[str, Any]]:
    """`KIND:NAME?key=value&...` -> (kind, name, options). Values are JSON where they parse as such, else text."""
    kind, separator, rest = source.partition(":")
    if not separator or not rest:
        raise ConfigError(
            f"backbone {source!r} is not KIND:NAME; expected timm:NAME, open_clip:ARCH[/PRETRAINED], "
            f"hf:DIRECTORY_OR_ID or dinov2-onnx:FILE"
        )
    name, _, query = rest.partition("?")
    options: dict[str, Any] = {}
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"option {item!r} in backbone {source!r} is not key=value")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return kind, name, options


def describe(source: str, **options: Any) -> tuple[BackboneSpec, PreprocessSpec]:
    """What a backbone will be, without allocating its weights.

    Args:
        source: `timm:NAME`, `open_clip:ARCH[/PRETRAINED]`, or `hf:FAMILY` with sizes as options;
            `?key=value` options may follow the name.
        **options: Constructor arguments of the model (timm: `img_size`, `embed_dim`, `depth`, `num_heads`,
            `patch_size` ...; open_clip: `vision_cfg`, `text_cfg`, `embed_dim`, `img_size`), and
            `tokens` (final_norm | before_final_norm), `embedding` (pool | projection | cls | mean | cls_mean |
            none), `embedding_map` (width of a learned linear map behind the pooled vector).

    Returns:
        The spec (its weights_sha256 still empty) and the preprocessing.

    Raises:
        ConfigError: an unknown kind, model or option.
    """
    kind, name, inline = parse_source(source)
    requested = {**inline, **options}
    _check_choices(requested)
    mapped = requested.pop("embedding_map", None)
    plan = _plan(kind, name, requested)
    spec = BackboneSpec(
        source=f"{kind}:{name}",
        width=0,
        num_vision_tokens=0,
        embedding_dim=0,
        num_heads=0,
        revision=plan.revision,
        options=plan.options,
    )
    with torch.device("meta"), torch.no_grad():
        trunk = _build_trunk(spec)
        height, width = plan.preprocess.image_size
        tokens, pooled = trunk(torch.empty(1, 3, height, width))
    pooled_dim = 0 if pooled is None else int(pooled.shape[-1])
    resolved = {**plan.options, "pooled_dim": pooled_dim}
    if mapped is not None:
        if not pooled_dim:
            raise ConfigError(f"backbone {source!r} has no embedding, so embedding_map has nothing to map")
        resolved["embedding_map"] = int(mapped)
    described = cast("Trunk", trunk)
    spec = replace(
        spec, width=int(tokens.shape[2]), num_vision_tokens=int(tokens.shape[1]),
        embedding_dim=int(mapped) if mapped is not None else pooled_dim,
        num_heads=described.num_heads, norm_eps=described.norm_eps, options=resolved,
    )  # fmt: skip
    return spec, plan.preprocess


def create_backbone(
    spec: BackboneSpec, weights: str | Path | None = None, preprocess: PreprocessSpec | None = None
) -> Backbone:
    """Builds the module a spec describes.

    Args:
        spec: From `describe` or a model directory.
        weights: A backbone.safetensors of a model directory, or a weights file of the library the
            trunk comes from. None leaves the random initialisation of torch's current generator.
        preprocess: The model's own, when it differs from the family's.

    Raises:
        ModelError: the file cannot be read. ShapeMismatchError: it does not fit; lists every key.
    """
    kind, name, _ = parse_source(spec.source)
    if preprocess is None:
        preprocess = _plan(kind, name, _requested_options(spec)).preprocess
    backbone = Backbone(spec, preprocess, _build_trunk(spec))
    if weights is not None:
        load_weights(backbone, Path(weights))
    return backbone


def load_weights(backbone: Backbone, path: Path) -> None:
    """Loads a file into a backbone: our own names, or those of the library behind the trunk."""
    tensors = read_tensors(path)
    if any(name.startswith(TRUNK_PREFIX) for name in tensors):
        load_exactly(backbone, tensors, where=str(path))
    else:
        load_library_tensors(backbone, tensors, where=str(path))


def load_library_tensors(backbone: Backbone, tensors: dict[str, Tensor], *, where: str) -> None:
    """Loads a state dict of the library behind the trunk; an `embedding_map` keeps the values it has.

    Raises:
        ShapeMismatchError: names or shapes differ; lists them all.
    """
    load_exactly(backbone.trunk, cast("Trunk", backbone.trunk).convert_weights(tensors), where=where)


def _requested_options(spec: BackboneSpec) -> dict[str, Any]:
    return {key: value for key, value in spec.options.items() if key not in ("pooled_dim", "embedding_map")}


def _check_choices(options: dict[str, Any]) -> None:
    for key, allowed in (("tokens", TOKEN_LAYERS), ("embedding", EMBEDDING_KINDS)):
        if key in options and options[key] not in allowed:
            raise ConfigError(f"backbone option {key}={options[key]!r} is not one of {', '.join(allowed)}")


def _plan(kind: str, name: str, options: dict[str, Any]) -> TrunkPlan:
    """Imports the library of one kind only: timm is needed by all, open_clip by few."""
    if kind == "timm":
        from edje_pipeline.models import timm_backbone

        return timm_backbone.plan(name, options)
    if kind == "open_clip":
        from edje_pipeline.models import open_clip_backbone

        return open_clip_backbone.plan(name, options)
    if kind == "hf":
        return _plan_hf(name, options)
    raise ConfigError(f"backbone kind {kind!r} is not known; expected one of {', '.join(KINDS)}")


def _plan_hf(family: str, options: dict[str, Any]) -> TrunkPlan:
    from edje_pipeline.models.preprocess import FAMILY_DEFAULTS

    if family not in FAMILY_DEFAULTS or "image_size" not in options:
        raise ConfigError(
            f"hf:{family} needs a family of {', '.join(FAMILY_DEFAULTS)} and its sizes as options; "
            f"for a directory or a hub id use edje_pipeline.models.assemble.load_pretrained"
        )
    chosen = FAMILIES[family]
    resolved = {"tokens": chosen.hidden_layer, "embedding": chosen.embedding, **options}
    return TrunkPlan(FAMILY_DEFAULTS[family].at_size(int(options["image_size"])), resolved)


def _build_trunk(spec: BackboneSpec) -> nn.Module:
    kind, name, _ = parse_source(spec.source)
    options = _requested_options(spec)
    if kind == "timm":
        from edje_pipeline.models import timm_backbone

        return timm_backbone.TimmTrunk(name, options)
    if kind == "open_clip":
        from edje_pipeline.models import open_clip_backbone

        return open_clip_backbone.OpenClipTrunk(name, options)
    if kind == "hf":
        from edje_pipeline.models.hf_weights.trunk import HfTrunk

        return HfTrunk(name, options)
    raise ModelError(f"backbone kind {kind!r} in a model's config is not known; expected one of {', '.join(KINDS)}")


__all__ = [
    "Backbone",
    "EmbeddingKind",
    "TokenLayer",
    "Trunk",
    "TrunkPlan",
    "create_backbone",
    "describe",
    "load_library_tensors",
    "load_weights",
    "parse_source",
]
