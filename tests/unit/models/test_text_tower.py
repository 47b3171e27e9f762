"""The sentence encoder as text tower, against transformers; saving and loading of towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edje_pipeline.errors import ConfigError, ShapeMismatchError
from edje_pipeline.models.spec import TextTowerSpec
from edje_pipeline.models.tensor_files import read_tensors, write_tensors
from edje_pipeline.models.text_sources import sentence_text_tower
from edje_pipeline.models.text_tower import create_text_tower
from edje_pipeline.models.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", "dog", "##s", "in", "snow"]
TEXTS = ["a red apple", "", "dogs in snow", "unknown words", "a dog " * 60]


@pytest.fixture(scope="module")
def bert_directory(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("sentence")
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=40,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(Tokenizer.from_vocab(WORDS).to_json())
    return path, model


def mean_pooled(model: Any, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
    return torch.nn.functional.normalize(hidden, dim=0).numpy()


def test_sentence_embeddings_are_the_mean_of_the_tokens(bert_directory: tuple[Path, Any]) -> None:
    path, model = bert_directory
    tower = sentence_text_tower(path)
    ids = Tokenizer.from_vocab(WORDS, max_text_tokens=41).encode(TEXTS)
    assert max(len(row) for row in ids) == 40
    expected = np.stack([mean_pooled(model, row) for row in ids])
    np.testing.assert_allclose(tower.encode(TEXTS), expected, atol=1e-5)


def test_a_tower_is_one_file(bert_directory: tuple[Path, Any], tmp_path: Path) -> None:
    tower = sentence_text_tower(bert_directory[0])
    write_tensors(tmp_path / "text_tower.safetensors", tower.state_dict())
    again = create_text_tower(tower.spec, tmp_path / "text_tower.safetensors")
    assert json.loads(again.tokenizer_text)["model"]["type"] == "WordPiece"
    np.testing.assert_array_equal(again.encode(TEXTS), tower.encode(TEXTS))


def test_a_linear_map_changes_the_width(bert_directory: tuple[Path, Any], tmp_path: Path) -> None:
    plain = sentence_text_tower(bert_directory[0])
    spec = TextTowerSpec("sentence_map", 7, {**plain.spec.options, "map": True})
    weight, bias = torch.randn(7, 32), torch.randn(7)
    write_tensors(tmp_path / "t.safetensors", {**plain.state_dict(), "map.weight": weight, "map.bias": bias})
    mapped = plain.encode(TEXTS) @ weight.numpy().T + bias.numpy()
    mapped /= np.linalg.norm(mapped, axis=1, keepdims=True)
    np.testing.assert_allclose(create_text_tower(spec, tmp_path / "t.safetensors").encode(TEXTS), mapped, atol=1e-5)


def test_many_texts_keep_their_order(bert_directory: tuple[Path, Any]) -> None:
    tower = sentence_text_tower(bert_directory[0])
    many = [TEXTS[number % 4] for number in range(150)]
    np.testing.assert_allclose(tower.encode(many), np.tile(tower.encode(TEXTS[:4]), (38, 1))[:150], atol=1e-6)
    assert tower.encode([]).shape == (0, 32)
    with pytest.raises(TypeError, match="got one string"):
        tower.encode("a red apple")


def test_what_does_not_fit_is_named(bert_directory: tuple[Path, Any], tmp_path: Path) -> None:
    tower = sentence_text_tower(bert_directory[0])
    tensors = {**tower.state_dict()}
    del tensors["model.embedding_norm.bias"]
    write_tensors(tmp_path / "t.safetensors", tensors)
    with pytest.raises(ShapeMismatchError, match=r"1 missing: model\.embedding_norm\.bias"):
        create_text_tower(tower.spec, tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match="without map cannot give 9"):
        create_text_tower(TextTowerSpec("sentence_map", 9, tower.spec.options), tokenizer_json=tower.tokenizer_text)
    assert "tokenizer_json" in read_tensors(tmp_path / "t.safetensors")
