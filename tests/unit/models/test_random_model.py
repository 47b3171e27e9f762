"""Random models: complete, deterministic, of the sizes asked for."""

from __future__ import annotations

import pytest
import torch

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.random_model import SIZES, write_random_model


def test_same_seed_same_bytes_and_torch_is_left_alone(tmp_path):
    torch.manual_seed(5)
    first = write_random_model(tmp_path / "a", seed=3)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    second = write_random_model(tmp_path / "b", seed=3)
    assert {name: record.sha256 for name, record in first.files.items()} == {
        name: record.sha256 for name, record in second.files.items()
    }


@pytest.mark.parametrize("num_tokens", [1, 16, 64])
def test_number_of_compressed_tokens(tmp_path, num_tokens):
    model = write_random_model(tmp_path / "m", num_compressed_tokens=num_tokens)
    assert model.load_adapter()(torch.randn(2, 16, 48)).shape == (2, num_tokens, 32)
    assert model.spec.joint_encoder.max_positions == 64 + num_tokens


def test_local_adapter_keeps_all_tokens(tmp_path):
    model = write_random_model(tmp_path / "m", adapter_kind="local", image_size=48)
    assert model.spec.adapter.num_compressed_tokens == model.spec.backbone.num_vision_tokens == 36


def test_another_backbone(tmp_path):
    model = write_random_model(tmp_path / "m", backbone="timm:resnet10t")
    height, width = model.spec.preprocess.image_size
    with torch.inference_mode():
        tokens, embedding = model.load_backbone()(torch.zeros(1, height, width, 3, dtype=torch.uint8))
    assert tokens.shape[1:] == (model.spec.backbone.num_vision_tokens, model.spec.backbone.width)
    assert torch.isfinite(tokens).all()
    assert embedding.shape == (1, model.spec.backbone.embedding_dim)


@pytest.mark.parametrize("size", sorted(SIZES))
def test_every_size_gives_scores_that_differ(tmp_path, size):
    model = write_random_model(tmp_path / "m", size=size)
    generator = torch.Generator().manual_seed(0)
    height, width = model.spec.preprocess.image_size
    pixels = torch.randint(0, 256, (4, height, width, 3), dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        tokens = model.load_adapter()(model.load_backbone()(pixels)[0])
        texts = model.load_tokenizer().encode(["a red apple", "two dogs running"])
        logits = torch.stack(
            [model.load_joint_encoder().forward_dense(torch.tensor([ids] * 4), tokens) for ids in texts]
        )
    assert logits.std(dim=1).min() > 0.05
    assert (logits[0] - logits[1]).abs().max() > 0.05


def test_unknown_size(tmp_path):
    with pytest.raises(ConfigError, match="no random model of size 'huge'; expected one of tiny, demo"):
        write_random_model(tmp_path / "m", size="huge")
