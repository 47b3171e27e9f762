"""Backbones: one interface over timm, open_clip and Hugging Face weights."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from edje_pipeline.errors import ConfigError, ModelError, ShapeMismatchError
from edje_pipeline.models.backbone import create_backbone, describe, parse_source
from edje_pipeline.models.tensor_files import write_tensors

TINY_VIT = ("timm:vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2})
TINY_DINO = ("timm:vit_small_patch14_reg4_dinov2", {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2})
TINY_SIGLIP = ("timm:vit_base_patch16_siglip_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2})


def images(size: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("source", "options", "tokens", "embedding_dim"),
    [
        (*TINY_VIT, (4, 32), 32),
        (*TINY_DINO, (4, 32), 32),
        (*TINY_SIGLIP, (4, 32), 32),
        (TINY_DINO[0], {**TINY_DINO[1], "embedding": "cls_mean"}, (4, 32), 64),
        (TINY_DINO[0], {**TINY_DINO[1], "embedding": "cls_mean", "embedding_map": 24}, (4, 32), 24),
        (TINY_VIT[0], {**TINY_VIT[1], "embedding": "mean"}, (4, 32), 32),
        (TINY_VIT[0], {**TINY_VIT[1], "embedding": "none"}, (4, 32), 0),
        (TINY_VIT[0], {**TINY_VIT[1], "tokens": "before_final_norm"}, (4, 32), 32),
        ("timm:resnet10t", {}, (36, 512), 512),
        ("timm:efficientnet_lite0", {}, (49, 1280), 1280),
        ("timm:convnext_atto", {}, (49, 320), 320),
        (
            "timm:swin_tiny_patch4_window7_224?img_size=64&depths=[1,1,1,1]&window_size=2&embed_dim=24",
            {},
            (4, 192),
            192,
        ),
    ],
)
def test_description_tells_what_the_module_gives(
    source: str, options: dict[str, Any], tokens: tuple[int, int], embedding_dim: int
) -> None:
    spec, preprocess = describe(source, **options)
    assert ((spec.num_vision_tokens, spec.width), spec.embedding_dim) == (tokens, embedding_dim)
    assert spec.width % spec.num_heads == 0
    backbone = create_backbone(spec)
    assert backbone.preprocess == preprocess
    with torch.inference_mode():
        given, embedding = backbone(images(preprocess.image_size[0]))
    assert given.shape == (2, *tokens)
    assert torch.isfinite(given).all()
    if embedding_dim:
        assert embedding is not None
        assert embedding.shape == (2, embedding_dim)
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))
    else:
        assert embedding is None


def test_vit_tokens_are_timms_without_the_prefix_and_the_embedding_its_head() -> None:
    spec, _ = describe(TINY_DINO[0], **TINY_DINO[1])
    backbone = create_backbone(spec)
    values = backbone.normalise(images(28))
    with torch.inference_mode():
        tokens, embedding = backbone(images(28))
        model = backbone.trunk.model
        hidden = model.forward_features(values)
        head = model.forward_head(hidden, pre_logits=True)
    assert hidden.shape[1] == 5 + 4
    torch.testing.assert_close(tokens, hidden[:, 5:], atol=0, rtol=0)
    torch.testing.assert_close(embedding, torch.nn.functional.normalize(head, dim=-1), atol=0, rtol=0)


def test_the_final_norm_of_the_tokens_before_it_gives_the_tokens_after_it() -> None:
    torch.manual_seed(0)
    before = create_backbone(describe(TINY_VIT[0], **TINY_VIT[1], tokens="before_final_norm")[0])
    after = create_backbone(describe(TINY_VIT[0], **TINY_VIT[1])[0])
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        before.trunk.model.norm.weight.mul_(3)
        after.trunk.model.norm.weight.mul_(3)
    with torch.inference_mode():
        first, second = before(images(32)), after(images(32))
        torch.testing.assert_close(before.trunk.model.norm(first[0]), second[0])
        torch.testing.assert_close(first[1], second[1])
    assert (first[0] - second[0]).abs().max() > 0.1


def test_feature_maps_become_tokens_row_by_row() -> None:
    backbone = create_backbone(describe("timm:resnet10t", embedding="mean")[0])
    side = backbone.preprocess.image_size[0]
    with torch.inference_mode():
        tokens, embedding = backbone(images(side, batch=1))
        feature_map = backbone.trunk.model.forward_features(backbone.normalise(images(side, batch=1)))
    assert feature_map.shape == (1, 512, 6, 6)
    torch.testing.assert_close(tokens[0, 6 * 2 + 3], feature_map[0, :, 2, 3])
    torch.testing.assert_close(embedding, torch.nn.functional.normalize(feature_map.mean((2, 3)), dim=-1))


def test_normalisation_equals_torchvision_bit_for_bit() -> None:
    source = "timm:vit_small_patch14_dinov2"
    spec, preprocess = describe(source, img_size=28, embed_dim=32, depth=1, num_heads=2)
    config = resolve_data_config(
        {"img_size": 28, "crop_pct": 1.0}, pretrained_cfg=timm.get_pretrained_cfg(source[5:]).to_dict()
    )
    transform = create_transform(**config)
    pixels = images(28, batch=1)
    reference = transform(Image.fromarray(pixels[0].numpy()))
    backbone = create_backbone(spec)
    assert torch.equal(backbone.normalise(pixels)[0], reference)
    # In half precision the model computes in bfloat16; the normalisation does not.
    half = create_backbone(spec).to(torch.bfloat16)
    assert torch.equal(half.normalise(pixels)[0], reference)
    tokens, embedding = half(pixels)
    assert tokens.dtype == torch.bfloat16
    assert embedding is not None
    assert embedding.dtype == torch.float32
    assert preprocess.mean == (0.485, 0.456, 0.406)


def test_normalised_float_input_gives_the_same() -> None:
    backbone = create_backbone(describe(TINY_VIT[0], **TINY_VIT[1])[0])
    with torch.inference_mode():
        first, second = backbone(images(32))[0], backbone(backbone.normalise(images(32)))[0]
    assert torch.equal(first, second)


def test_weights_round_trip_through_our_file_and_through_timms_names(tmp_path: Path) -> None:
    spec, _ = describe(TINY_VIT[0], **TINY_VIT[1])
    backbone = create_backbone(spec)
    write_tensors(tmp_path / "own.safetensors", backbone.state_dict())
    classifier = {"head.weight": torch.zeros(7, 32), "head.bias": torch.zeros(7)}
    torch.save({"state_dict": {**backbone.trunk.model.state_dict(), **classifier}}, tmp_path / "timm.pth")
    with torch.inference_mode():
        expected = backbone(images(32))[0]
        for name in ("own.safetensors", "timm.pth"):
            assert torch.equal(create_backbone(spec, tmp_path / name)(images(32))[0], expected)


def test_timm_weights_of_another_resolution_get_their_positions_resized(tmp_path: Path) -> None:
    larger = create_backbone(describe(TINY_VIT[0], **{**TINY_VIT[1], "img_size": 64})[0])
    torch.save(larger.trunk.model.state_dict(), tmp_path / "64.pth")
    spec, _ = describe(TINY_VIT[0], **TINY_VIT[1])
    loaded = create_backbone(spec, tmp_path / "64.pth")
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, pretrained=True, **TINY_VIT[1],
        pretrained_cfg_overlay={"state_dict": larger.trunk.model.state_dict()},
    )  # fmt: skip
    assert torch.equal(loaded.trunk.model.pos_embed, model.pos_embed)


def test_a_file_of_another_model_is_refused_with_every_key(tmp_path: Path) -> None:
    other = create_backbone(describe(TINY_VIT[0], **{**TINY_VIT[1], "depth": 3})[0])
    tensors = other.state_dict()
    tensors["trunk.model.norm.weight"] = torch.zeros(9)
    write_tensors(tmp_path / "w.safetensors", tensors)
    with pytest.raises(ShapeMismatchError) as caught:
        create_backbone(describe(TINY_VIT[0], **TINY_VIT[1])[0], tmp_path / "w.safetensors")
    assert "12 unknown: trunk.model.blocks.2.attn.proj.bias" in str(caught.value)
    assert "trunk.model.norm.weight is (9,), expected (32,)" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x04\x95"])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=r"w\.(pth|safetensors) (is not|holds)"):
        create_backbone(describe(TINY_VIT[0], **TINY_VIT[1])[0], tmp_path / name)


def test_pixels_of_another_size_are_refused() -> None:
    backbone = create_backbone(describe(TINY_VIT[0], **TINY_VIT[1])[0])
    with pytest.raises(
        ShapeMismatchError, match=r"takes uint8 images of shape \(batch, 32, 32, 3\), got \(2, 48, 48, 3\)"
    ):
        backbone(images(48))
    with pytest.raises(ShapeMismatchError, match=r"takes float images of shape \(batch, 3, 32, 32\)"):
        backbone(images(32).float())


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("resnet18", {}, "is not KIND:NAME"),
        ("timm:vit_tiny_patch16_224?img_size", {}, "is not key=value"),
        ("timm:vit_tiny_patch16_224", {"colour": 1}, "does not take the options"),
        ("timm:resnet18", {"embedding": "cls"}, "no .CLS. token"),
        ("timm:resnet18", {"tokens": "before_final_norm"}, "no final LayerNorm"),
        ("timm:resnet18", {"tokens": "raw"}, "tokens='raw' is not one of final_norm, before_final_norm"),
        ("timm:resnet18", {"embedding": "none", "embedding_map": 8}, "embedding_map has nothing to map"),
        ("open_clip:RN50", {}, "ModifiedResNet vision tower, which gives no tokens"),
        ("hf:blip", {}, "needs a family of siglip, clip, dinov2"),
    ],
)
def test_wrong_sources(source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        describe(source, **options)


def test_source_options_are_parsed() -> None:
    assert parse_source("timm:vit?img_size=96&act=gelu&sizes=[1,2]") == (
        "timm", "vit", {"img_size": 96, "act": "gelu", "sizes": [1, 2]},
    )  # fmt: skip


def test_describing_the_same_twice_gives_the_same_fingerprint_and_it_pickles() -> None:
    first, second = describe(TINY_VIT[0], **TINY_VIT[1]), describe(TINY_VIT[0], **TINY_VIT[1])
    assert first[0].fingerprint == second[0].fingerprint
    backbone = create_backbone(first[0])
    backbone.normalise(images(32))
    copy = pickle.loads(pickle.dumps(backbone))
    assert torch.equal(copy(images(32))[0], backbone(images(32))[0])


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives() -> None:
    backbone = create_backbone(describe(*TINY_SIGLIP[:1], **TINY_SIGLIP[1])[0])
    with torch.inference_mode():
        tokens, embedding = backbone(images(32))
        gpu_tokens, gpu_embedding = backbone.to("cuda")(images(32).to("cuda"))
    np.testing.assert_allclose(gpu_tokens.cpu().numpy(), tokens.numpy(), atol=1e-3)
    np.testing.assert_allclose(gpu_embedding.cpu().numpy(), embedding.numpy(), atol=1e-3)
    with torch.inference_mode():
        half = backbone.to(torch.bfloat16)(images(32).to("cuda"))[0]
    assert half.dtype == torch.bfloat16
