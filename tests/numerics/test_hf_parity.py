"""Our towers against transformers' on the same random weights, through directories as the Hub has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edje_pipeline.errors import ModelError, ShapeMismatchError
from edje_pipeline.models.assemble import BackboneSource, LoadedBackbone, load_backbone

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
TINY = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION = {**TINY, "image_size": 48, "patch_size": 16}
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "green", "apple", "pear", "on", "the", "table", "two", "tiny", "dogs"]
TEXTS = ["a red apple", "two tiny dogs on the table", "the green pear", "zebra", "a " * 40]


def randomise(model: Any, seed: int) -> Any:
    """Larger weights than an initialisation gives, norms and biases included, so that every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 + (1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0))
    return model.eval()


def word_tokenizer(path: Path, *, first: str = "", last: str = "</s>") -> Any:
    """A whole-word tokenizer.json with the end-of-text behaviour of the family."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single = " ".join(filter(None, [first, "$A", last]))
    special = [(word, ids[word]) for word in {first, last} if word]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer.save(str(path))
    return tokenizer


def reference_ids(tokenizer: Any, length: int, pad_id: int) -> torch.Tensor:
    tokenizer.enable_truncation(max_length=length)
    tokenizer.enable_padding(length=length, pad_id=pad_id)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(TEXTS)])


def pixels(batch: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def unit(tensor: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(tensor.float(), dim=-1).detach().numpy()


def check_vision(
    loaded: LoadedBackbone, reference: torch.Tensor, embedding: torch.Tensor, images: torch.Tensor
) -> None:
    with torch.inference_mode():
        tokens, ours = loaded.backbone(images)
    assert tokens.shape == reference.shape
    assert ours is not None
    assert reference.abs().max() > 0.5
    np.testing.assert_allclose(tokens.numpy(), reference.detach().numpy(), atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(ours.numpy(), unit(embedding), atol=TOLERANCE, rtol=0)
    spec = loaded.backbone.spec
    assert (spec.num_vision_tokens, spec.width) == tuple(reference.shape[1:])
    assert spec.embedding_dim == embedding.shape[1]


@pytest.fixture
def siglip_directory(tmp_path: Path) -> tuple[Path, Any, Any]:
    text = {**TINY, "vocab_size": len(WORDS), "max_position_embeddings": 10, "projection_size": 32}
    config = transformers.SiglipConfig(
        vision_config=dict(VISION), text_config=text | {"bos_token_id": 1, "eos_token_id": 1}
    )
    model = randomise(transformers.SiglipModel(config), 1)
    model.save_pretrained(tmp_path)
    return tmp_path, model, word_tokenizer(tmp_path / "tokenizer.json")


@pytest.fixture
def clip_directory(tmp_path: Path) -> tuple[Path, Any, Any]:
    text = {**TINY, "vocab_size": len(WORDS), "max_position_embeddings": 12, "eos_token_id": 1, "bos_token_id": 0}
    config = transformers.CLIPConfig(vision_config=dict(VISION), text_config=text, projection_dim=24)
    model = randomise(transformers.CLIPModel(config), 2)
    model.save_pretrained(tmp_path)
    return tmp_path, model, word_tokenizer(tmp_path / "tokenizer.json")


class TestSiglip:
    def test_vision_tokens_are_after_the_final_norm_and_the_embedding_is_the_attention_pool(
        self, siglip_directory: tuple[Path, Any, Any]
    ) -> None:
        directory, model, _ = siglip_directory
        loaded = load_backbone(BackboneSource(f"hf:{directory}"))
        images = pixels(3, 48)
        with torch.inference_mode():
            output = model.vision_model(pixel_values=loaded.backbone.normalise(images))
        check_vision(loaded, output.last_hidden_state, output.pooler_output, images)
        assert loaded.backbone.preprocess.resize_mode == "squash"

    def test_text_tower(self, siglip_directory: tuple[Path, Any, Any]) -> None:
        directory, model, tokenizer = siglip_directory
        tower = load_backbone(BackboneSource(f"hf:{directory}")).text_tower
        assert tower is not None
        with torch.inference_mode():
            ids = reference_ids(tokenizer, 10, 0)
            reference = model.text_model(input_ids=ids).pooler_output
        np.testing.assert_allclose(tower.encode(TEXTS), unit(reference), atol=TOLERANCE, rtol=0)

    def test_a_missing_and_an_extra_tensor_are_both_named(self, siglip_directory: tuple[Path, Any, Any]) -> None:
        from safetensors.torch import load_file, save_file

        directory, _, _ = siglip_directory
        tensors = load_file(directory / "model.safetensors")
        del tensors["vision_model.post_layernorm.bias"]
        tensors["vision_model.surprise.weight"] = torch.zeros(2)
        save_file(tensors, directory / "model.safetensors")
        with pytest.raises(ShapeMismatchError, match=r"model\.norm\.bias.*surprise\.weight"):
            load_backbone(BackboneSource(f"hf:{directory}"))


class TestClip:
    def test_vision_tokens_are_before_the_final_norm_and_the_embedding_is_projected(
        self, clip_directory: tuple[Path, Any, Any]
    ) -> None:
        directory, model, _ = clip_directory
        loaded = load_backbone(BackboneSource(f"hf:{directory}"))
        images = pixels(2, 48)
        with torch.inference_mode():
            output = model.vision_model(pixel_values=loaded.backbone.normalise(images))
            projected = model.visual_projection(output.pooler_output)
        check_vision(loaded, output.last_hidden_state[:, 1:], projected, images)

    def test_text_tower(self, clip_directory: tuple[Path, Any, Any]) -> None:
        directory, model, tokenizer = clip_directory
        tower = load_backbone(BackboneSource(f"hf:{directory}")).text_tower
        assert tower is not None
        with torch.inference_mode():
            ids = reference_ids(tokenizer, 12, 0)
            reference = model.text_projection(model.text_model(input_ids=ids).pooler_output)
        np.testing.assert_allclose(tower.encode(TEXTS), unit(reference), atol=TOLERANCE, rtol=0)

    def test_old_configurations_pool_at_the_highest_id(self, tmp_path: Path) -> None:
        from edje_pipeline.models.hf_weights.clip import text_config

        assert text_config({"eos_token_id": 2})["pool_type"] == "argmax"
        assert text_config({})["pool_type"] == "eos"


class TestDinov2:
    @pytest.mark.parametrize("swiglu", [False, True])
    def test_vision_tokens_and_embedding(self, tmp_path: Path, swiglu: bool) -> None:
        config = transformers.Dinov2Config(
            **{**VISION, "image_size": 64, "mlp_ratio": 2}, use_swiglu_ffn=swiglu, layerscale_value=0.7
        )
        model = randomise(transformers.Dinov2Model(config), 3)
        model.save_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text(
            '{"size": {"shortest_edge": 72}, "crop_size": {"height": 48, "width": 48}, "do_center_crop": true, '
            '"resample": 3, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}'
        )
        loaded = load_backbone(BackboneSource(f"hf:{tmp_path}"))
        images = pixels(2, 48)
        with torch.inference_mode():
            hidden = model(pixel_values=loaded.backbone.normalise(images)).last_hidden_state
        # The position table of 4 x 4 patches is resized to 3 x 3, as the reference does on the fly.
        check_vision(loaded, hidden[:, 1:], torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], dim=1), images)
        assert loaded.backbone.preprocess.crop_pct == pytest.approx(48 / 72)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(ModelError, match="model_type 'siglip2'; supported: clip"):
        load_backbone(BackboneSource(f"hf:{tmp_path}"))
