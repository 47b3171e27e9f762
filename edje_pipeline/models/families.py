"""The backbone families that are supported, as data: what their tokens and embeddings mean.

A family is chosen by a configuration file's own declaration (`model_type` of a Hugging Face
config.json, the prefix of a source), never by a piece of a model's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TokenLayer = Literal["final_norm", "before_final_norm"]
"""Which hidden state the vision tokens are: after the trunk's last LayerNorm, or the one that enters it."""

EmbeddingKind = Literal["pool", "projection", "cls", "mean", "cls_mean", "none"]
"""What the pooled embedding is before L2 normalisation (and before `embedding_map`, if the model has one).

pool: the model's own pooling (attention pool, [CLS] or average, then its head norm).
projection: the final-norm [CLS] token through the contrastive projection matrix.
cls: the final-norm [CLS] token. mean: the mean vision token.
cls_mean: [CLS] and mean vision token, concatenated: twice the width. none: no embedding.
"""

EMBEDDING_KINDS: tuple[EmbeddingKind, ...] = ("pool", "projection", "cls", "mean", "cls_mean", "none")
TOKEN_LAYERS: tuple[TokenLayer, ...] = ("final_norm", "before_final_norm")


@dataclass(frozen=True)
class Family:
    """One row of the table of supported backbones."""

    name: str
    sources: str
    """Source strings that lead here."""
    prefix_tokens: str
    """How many tokens stand before the patch tokens; they are removed."""
    hidden_layer: TokenLayer
    """What Hugging Face calls `last_hidden_state` for this family."""
    embedding: EmbeddingKind
    text_tower: str
    """Where a query's embedding comes from."""
    norm_eps: float


SIGLIP = Family("siglip", "hf: (SigLIP, SigLIP 2 fixed resolution)", "0", "final_norm", "pool", "own", 1e-6)
CLIP = Family("clip", "hf: (CLIP, DFN, MetaCLIP)", "1 ([CLS])", "before_final_norm", "projection", "own", 1e-5)
DINOV2 = Family("dinov2", "hf:, dinov2-onnx:", "1 ([CLS])", "final_norm", "cls_mean", "sentence map", 1e-6)
TIMM = Family("timm", "timm:NAME", "as the model says", "final_norm", "pool", "sentence map", 1e-6)
OPEN_CLIP = Family(
    "open_clip",
    "open_clip:ARCH[/PRETRAINED]",
    "1, or 0 for SigLIP architectures",
    "before_final_norm",
    "projection",
    "own",
    1e-5,
)

FAMILIES: dict[str, Family] = {family.name: family for family in (SIGLIP, CLIP, DINOV2, TIMM, OPEN_CLIP)}
