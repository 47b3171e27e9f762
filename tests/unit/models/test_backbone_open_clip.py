"""open_clip models at tiny sizes: vision and text towers against the whole model of the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP

from edje_pipeline.errors import ConfigError, ModelError
from edje_pipeline.models.assemble import BackboneSource, load_backbone
from edje_pipeline.models.open_clip_backbone import model_config

TEXTS = ["a red apple", "", "two dogs in the snow " * 30, "Füße & 漢字!"]
TINY_CLIP: dict[str, Any] = {
    "vision_cfg": {"image_size": 32, "width": 64, "layers": 2, "patch_size": 16},
    "text_cfg": {"width": 32, "heads": 2, "layers": 2},
    "embed_dim": 24,
}
TINY_SIGLIP: dict[str, Any] = {
    "vision_cfg": {
        "image_size": 32,
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "avg",
        "timm_proj": "linear",
    },
    "text_cfg": {"width": 32, "heads": 2, "layers": 1, "vocab_size": 30, "context_length": 9},
    "embed_dim": 24,
}


def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


def tiny_clip(quick_gelu: bool) -> CLIP:
    config = model_config("ViT-B-16", TINY_CLIP)
    torch.manual_seed(1)
    return CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"], quick_gelu=quick_gelu).eval()


@pytest.mark.parametrize(("tag", "quick_gelu"), [("openai", True), ("laion2b_s34b_b88k", False)])
def test_both_towers_equal_open_clip(tmp_path: Path, tag: str, quick_gelu: bool) -> None:
    model = tiny_clip(quick_gelu)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    source = BackboneSource(f"open_clip:ViT-B-16/{tag}", str(tmp_path / "clip.pt"), TINY_CLIP)
    loaded = load_backbone(source)
    values = loaded.backbone.normalise(images())
    with torch.inference_mode():
        tokens, embedding = loaded.backbone(images())
        expected = model.encode_image(values, normalize=True)
        model.visual.output_tokens = True
        normed = model.visual(values)[1]
        ids = open_clip.get_tokenizer("ViT-B-16")(TEXTS)
        text = model.encode_text(ids, normalize=True)
        # The tokens stand before the last norm, as Hugging Face's last_hidden_state does.
        torch.testing.assert_close(model.visual.ln_post(tokens), normed, atol=1e-5, rtol=0)
    torch.testing.assert_close(embedding, expected, atol=1e-6, rtol=0)
    assert loaded.text_tower is not None
    np.testing.assert_allclose(loaded.text_tower.encode(TEXTS), text.numpy(), atol=1e-6)


def test_tokens_after_the_final_norm_on_request(tmp_path: Path) -> None:
    model = tiny_clip(quick_gelu=True)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "clip.pt")
    options = {**TINY_CLIP, "tokens": "final_norm"}
    loaded = load_backbone(
        BackboneSource("open_clip:ViT-B-16/openai", str(tmp_path / "clip.pt"), options, text_tower=False)
    )
    assert loaded.text_tower is None
    model.visual.output_tokens = True
    with torch.inference_mode():
        expected = model.visual(loaded.backbone.normalise(images()))[1]
        torch.testing.assert_close(loaded.backbone(images())[0], expected)


def test_a_timm_tower_inside_open_clip_with_a_tokenizer_file(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = model_config("ViT-B-16-SigLIP2", {**TINY_SIGLIP, "img_size": 32})
    config["vision_cfg"]["image_size"] = 224
    torch.manual_seed(2)
    model = CustomTextCLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"]).eval()
    model.visual.set_input_size(32)
    torch.save(model.state_dict(), tmp_path / "siglip.pt")
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "a", "red", "apple", "dogs", "snow"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    options = {**TINY_SIGLIP, "img_size": 32}
    without = BackboneSource("open_clip:ViT-B-16-SigLIP2", str(tmp_path / "siglip.pt"), options)
    with pytest.raises(ModelError, match=r"needs the tokenizer.json of timm/ViT-B-16-SigLIP2; give its path"):
        load_backbone(without)
    loaded = load_backbone(
        BackboneSource(
            "open_clip:ViT-B-16-SigLIP2", str(tmp_path / "siglip.pt"), options, True, tmp_path / "tokenizer.json"
        )
    )
    with torch.inference_mode():
        tokens, embedding = loaded.backbone(images())
        values = loaded.backbone.normalise(images())
        expected = model.encode_image(values, normalize=True)
        hidden = model.visual.trunk.forward_features(values)[:, 1:]
        # Canonicalising drops punctuation and capitals before the vocabulary is asked.
        ids = torch.tensor([[2, 3, 4, 0, 0, 0, 0, 0, 0]])
        text = model.encode_text(ids, normalize=True)
    torch.testing.assert_close(embedding, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(tokens, hidden, atol=1e-6, rtol=0)
    assert loaded.text_tower is not None
    np.testing.assert_allclose(loaded.text_tower.encode(["A red, apple!"]), text.numpy(), atol=1e-6)


def test_a_file_that_is_not_open_clips(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"hold no name starting with 'visual\.'"):
        load_backbone(BackboneSource("open_clip:ViT-B-16/openai", str(tmp_path / "x.pt"), TINY_CLIP))


def test_only_its_own_embedding() -> None:
    from edje_pipeline.models.backbone import describe

    with pytest.raises(ConfigError, match="gives its own embedding only"):
        describe("open_clip:ViT-B-16/openai", **TINY_CLIP, embedding="mean")
