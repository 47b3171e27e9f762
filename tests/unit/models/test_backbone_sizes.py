"""Published models at their true size: described without memory for weights."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch

from edje_pipeline.models.backbone import create_backbone, describe

LARGE = {"width": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096}
BASE = {"width": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072}
SIGLIP = {"patch_size": 16, "activation": "gelu_pytorch_tanh"}
CLIP = {"activation": "quick_gelu", "norm_eps": 1e-5}

PUBLISHED: list[tuple[str, dict[str, Any], int, int, int, int]] = [
    # source, options, tokens, width, embedding, heads
    ("open_clip:ViT-L-16-SigLIP2-384/webli", {}, 576, 1024, 1024, 16),
    ("open_clip:ViT-B-16-SigLIP2-384/webli", {}, 576, 768, 768, 12),
    ("open_clip:ViT-B-16/openai", {}, 196, 768, 512, 12),
    ("open_clip:ViT-L-14-336/openai", {}, 576, 1024, 768, 16),
    ("open_clip:ViT-L-14/dfn2b", {}, 256, 1024, 768, 16),
    ("open_clip:ViT-L-14/metaclip_400m", {}, 256, 1024, 768, 16),
    ("timm:vit_large_patch16_siglip_384", {}, 576, 1024, 1024, 16),
    ("timm:vit_small_patch14_dinov2", {}, 1369, 384, 384, 6),
    ("hf:siglip", {**LARGE, **SIGLIP, "image_size": 384}, 576, 1024, 1024, 16),
    ("hf:siglip", {**BASE, **SIGLIP, "image_size": 384}, 576, 768, 768, 12),
    ("hf:clip", {**BASE, **CLIP, "image_size": 224, "patch_size": 16, "projection_dim": 512}, 196, 768, 512, 12),
    ("hf:clip", {**LARGE, **CLIP, "image_size": 336, "patch_size": 14, "projection_dim": 768}, 576, 1024, 768, 16),
    ("hf:clip", {**LARGE, **CLIP, "image_size": 224, "patch_size": 14, "projection_dim": 768}, 256, 1024, 768, 16),
]


@pytest.mark.parametrize(("source", "options", "tokens", "width", "embedding", "heads"), PUBLISHED)
def test_token_specs(source: str, options: dict[str, Any], tokens: int, width: int, embedding: int, heads: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spec, preprocess = describe(source, **options)
    assert (spec.num_vision_tokens, spec.width, spec.embedding_dim, spec.num_heads) == (tokens, width, embedding, heads)
    # A large tower has 1.2 GB of weights; a description allocates none of them (imports may take 400 MB).
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000
    with torch.device("meta"):
        backbone = create_backbone(spec, None, preprocess)
    count = sum(parameter.numel() for parameter in backbone.parameters())
    assert 20e6 < count < 330e6


@pytest.mark.parametrize(
    ("source", "is_quick"),
    [
        ("open_clip:ViT-B-16/openai", True),
        ("open_clip:ViT-L-14/dfn2b", True),
        ("open_clip:ViT-L-14/metaclip_400m", True),
        ("open_clip:ViT-B-16/laion2b_s34b_b88k", False),
    ],
)
def test_the_activation_is_the_one_the_weights_were_trained_with(source: str, is_quick: bool) -> None:
    assert describe(source)[0].options["quick_gelu"] is is_quick


@pytest.mark.parametrize(
    ("source", "mode", "crop_pct", "interpolation"),
    [
        ("open_clip:ViT-L-16-SigLIP2-384/webli", "squash", 1.0, "bicubic"),
        ("open_clip:ViT-B-16/openai", "shortest", 1.0, "bicubic"),
        ("timm:vit_tiny_patch16_224", "shortest", 0.9, "bicubic"),
        ("timm:vit_small_patch14_dinov2", "shortest", 1.0, "bicubic"),
    ],
)
def test_preprocessing_is_the_published_one(source: str, mode: str, crop_pct: float, interpolation: str) -> None:
    _, preprocess = describe(source)
    assert (preprocess.resize_mode, preprocess.crop_pct, preprocess.interpolation) == (mode, crop_pct, interpolation)
