"""What a model is made of, as data: the content of a model directory's `config.json`.

Every part is a frozen dataclass with a `fingerprint`; `ModelSpec.validate` finds widths that do not
fit before anything is loaded. No torch here: the driver reads this to plan.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from edje_pipeline.errors import ShapeMismatchError


def fingerprint_of(value: Any) -> str:
    """sha256 (hex) of a JSON-able value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class PreprocessSpec:
    """How an image becomes the backbone's input; equals the torchvision transform of that backbone."""

    image_size: tuple[int, int]
    """(height, width) of the backbone's input, pixels."""
    resize_mode: Literal["squash", "shortest", "longest"] = "squash"
    """With scale size = floor(image_size / crop_pct): squash resizes both sides to it; shortest the short side;
    longest the long side. Then a centre crop to image_size, padded with `fill` (longest) or black where smaller."""
    crop_pct: float = 1.0
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    fill: int | tuple[int, int, int] = 0
    """Padding of `longest`: one grey value or RGB (timm pads with its mean, open_clip with a grey value)."""
    rgb_conversion: Literal["first", "last"] = "first"
    """When the image becomes RGB: "first" (timm's datasets, transformers), or "last", after resize and crop,
    as open_clip's transform does; they differ for palette, alpha, CMYK and 16-bit images."""

    @property
    def pixel_bytes(self) -> int:
        """Bytes of one decoded image: uint8 (H, W, 3)."""
        return self.image_size[0] * self.image_size[1] * 3

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(asdict(self))


@dataclass(frozen=True)
class BackboneSpec:
    """The frozen vision model."""

    source: str
    """`timm:NAME`, `open_clip:ARCH[/PRETRAINED]`, `hf:FAMILY` mapped onto timm (family and sizes in `options`)."""
    width: int
    """D, the width of a vision token."""
    num_vision_tokens: int
    """N, prefix tokens not counted."""
    embedding_dim: int
    """Width of the pooled, L2-normalised embedding; 0 when the backbone has none."""
    num_heads: int
    norm_eps: float = 1e-6
    weights_sha256: str = ""
    """Of the weights file; for random weights `random:SEED`."""
    revision: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(asdict(self))


@dataclass(frozen=True)
class AdapterSpec:
    """The token adapter (paper section 3.2; DESIGN of the authors' `vision_projection`)."""

    kind: Literal["compressed", "local"]
    input_dim: int
    output_dim: int
    num_compressed_tokens: int
    """M; for `local` the number of vision tokens N."""
    num_heads: int = 16
    mlp_dim: int = 8192
    norm_eps: float = 1e-6
    num_key_positions: int = 0
    """N: every vision token has a learned vector added to its key, by its place (not in the paper, for backbones
    whose last tokens have forgotten where they were). 0: none."""
    weights_sha256: str = ""

    @property
    def fingerprint(self) -> str:
        values = asdict(self)
        if not self.num_key_positions:  # as before there were any: indexes keep their adapter
            del values["num_key_positions"]
        return fingerprint_of(values)


@dataclass(frozen=True)
class JointEncoderSpec:
    """A BERT encoder with a pooler and one logit."""

    width: int = 384
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 1536
    vocab_size: int = 30523
    """WordPiece vocabulary plus `<image>`."""
    max_positions: int = 512
    norm_eps: float = 1e-12
    max_text_tokens: int = 64
    """Of the sequence `[CLS] text [SEP] ... [SEP]`, special tokens counted, image tokens not: 61 word pieces."""
    weights_sha256: str = ""

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(asdict(self))


@dataclass(frozen=True)
class TextTowerSpec:
    """Maps a query text to the embedding space of the backbone, for first-stage retrieval."""

    kind: Literal["open_clip", "hf", "sentence_map"]
    embedding_dim: int
    options: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(asdict(self))


@dataclass(frozen=True)
class ModelSpec:
    """Everything of a model but its weights."""

    name: str
    backbone: BackboneSpec
    preprocess: PreprocessSpec
    adapter: AdapterSpec
    joint_encoder: JointEncoderSpec
    text_tower: TextTowerSpec | None = None
    tokenizer_sha256: str = ""

    def validate(self) -> None:
        """Raises ShapeMismatchError naming every pair of parts whose widths differ, all at once."""
        problems = []
        if self.adapter.input_dim != self.backbone.width:
            problems.append(
                f"the backbone ({self.backbone.source}) gives tokens of width {self.backbone.width}, "
                f"the adapter expects {self.adapter.input_dim}"
            )
        if self.adapter.kind == "local" and self.adapter.num_compressed_tokens != self.backbone.num_vision_tokens:
            problems.append(
                f"the backbone gives {self.backbone.num_vision_tokens} tokens, "
                f"the local adapter expects {self.adapter.num_compressed_tokens}"
            )
        if self.adapter.num_key_positions not in (0, self.backbone.num_vision_tokens):
            problems.append(
                f"the backbone gives {self.backbone.num_vision_tokens} tokens, "
                f"the adapter's keys have {self.adapter.num_key_positions} positions"
            )
        if self.adapter.output_dim != self.joint_encoder.width:
            problems.append(
                f"the adapter writes tokens of width {self.adapter.output_dim}, "
                f"the joint encoder expects {self.joint_encoder.width}"
            )
        if self.text_tower is not None and self.text_tower.embedding_dim != self.backbone.embedding_dim:
            problems.append(
                f"the backbone's embedding has width {self.backbone.embedding_dim}, "
                f"the text tower's {self.text_tower.embedding_dim}"
            )
        if problems:
            raise ShapeMismatchError(f"model {self.name!r} does not fit together: " + "; ".join(problems))
