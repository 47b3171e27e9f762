"""Whole model directories in fewer bytes: opened, run, refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import edje_pipeline.cli.model  # noqa: F401 (registers the commands)
from edje_pipeline.cli.app import app
from edje_pipeline.errors import ConfigError, ModelError
from edje_pipeline.models.checkpoint import open_model, save_model
from edje_pipeline.models.compact_model import compact_model
from edje_pipeline.models.compact_weights import SCALE_SUFFIX
from edje_pipeline.models.random_model import write_random_model
from tests.unit.models.test_checkpoint import edit_tensors

STORAGES = {"joint_encoder": "int8", "text_tower": "int8", "adapter": "float16", "backbone": "float16"}
PARTS = tuple(STORAGES)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("full") / "tiny")


@pytest.fixture(scope="module")
def small(full):
    compact_model(full, full.path.parent / "small", STORAGES)
    return open_model(str(full.path.parent / "small"))


def logits_of(model):
    """(12,) logits of one text and images of noise, and the text's embedding."""
    backbone, adapter, encoder = model.load_backbone(), model.load_adapter(), model.load_joint_encoder()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        tokens = adapter(backbone(pixels)[0])
        ids = torch.tensor(model.load_tokenizer().encode(["a red apple"]) * 12)
        return encoder.forward_dense(ids, tokens).numpy(), model.load_text_tower().encode(["a red apple"])


def test_a_compact_model_opens_runs_and_says_nearly_the_same(full, small):
    small.verify()
    assert small.spec.name == full.spec.name
    assert small.size_bytes < 0.45 * full.size_bytes
    changed = {part for part, value in small.fingerprints.items() if full.fingerprints[part] != value}
    assert changed == set(PARTS)
    for part in (small.load_backbone(), small.load_adapter(), small.load_joint_encoder(), small.load_text_tower()):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    (before, text_before), (after, text_after) = logits_of(full), logits_of(small)
    # Logits of 2 to 3. Most of the change is the same for every image, which no ranking sees.
    change = after - before
    assert np.abs(change).max() < 0.06
    assert np.abs(change - change.mean()).max() < 0.15 * before.std()
    assert float(text_before[0] @ text_after[0]) > 0.999


def test_the_storage_can_be_chosen_when_a_model_is_saved(full, tmp_path):
    parts = {part: full.file(f"{part}.safetensors") for part in PARTS}
    tokenizer = full.file("tokenizer.json")
    saved = save_model(tmp_path / "m", full.spec, **parts, tokenizer=tokenizer, compact={"joint_encoder": "int8"})
    assert any(name.endswith(SCALE_SUFFIX) for name in load_file(saved.file("joint_encoder.safetensors")))
    assert saved.fingerprints["backbone"] == full.fingerprints["backbone"]
    assert saved.fingerprints["joint_encoder"] != full.fingerprints["joint_encoder"]
    modules = {part: getattr(full, f"load_{part}")() for part in ("backbone", "adapter", "joint_encoder")}
    again = save_model(tmp_path / "n", saved.spec, **modules, text_tower=parts["text_tower"], tokenizer=tokenizer,
                       compact={"joint_encoder": "int8"})  # fmt: skip
    assert again.fingerprints["joint_encoder"] == saved.fingerprints["joint_encoder"]
    with pytest.raises(ConfigError, match="there is no text_tower to store as int8"):
        save_model(tmp_path / "o", full.spec, **{k: v for k, v in parts.items() if k != "text_tower"},
                   tokenizer=tokenizer, compact={"text_tower": "int8"})  # fmt: skip


def test_only_the_parts_asked_for_change_and_further_files_come_along(full, tmp_path):
    model = save_model(
        tmp_path / "with", full.spec, **{part: full.file(f"{part}.safetensors") for part in PARTS},
        tokenizer=full.file("tokenizer.json"), card="# mine\n", extra={"notes.json": b"{}"},
    )  # fmt: skip
    summary = compact_model(model, tmp_path / "small", {"joint_encoder": "float16"})
    small = open_model(tmp_path / "small")
    assert small.files["notes.json"] == model.files["notes.json"]
    assert small.file("MODEL_CARD.md").read_text() == "# mine\n"
    assert small.files["adapter.safetensors"] == model.files["adapter.safetensors"]
    parts = {part.part: part for part in summary.parts}
    assert parts["adapter"].storage == "as it was"
    assert parts["adapter"].largest_error == 0
    assert 0 < parts["joint_encoder"].largest_error < 1e-3
    assert parts["joint_encoder"].size_bytes < 0.6 * parts["joint_encoder"].size_bytes_before


@pytest.mark.parametrize(
    ("storages", "message"),
    [({"joint_encoder": "int4"}, "no storage int4"), ({"head": "int8"}, "has no head; it has backbone, adapter")],
)
def test_wrong_requests(full, tmp_path, storages, message):
    with pytest.raises(ConfigError, match=message):
        compact_model(full, tmp_path / "x", storages)
    assert not (tmp_path / "x").exists()


def test_scales_that_do_not_fit_are_found_when_the_model_is_opened(full, tmp_path):
    compact_model(full, tmp_path / "small", STORAGES)

    def shorten(tensors):
        tensors["pooler.dense.weight" + SCALE_SUFFIX] = tensors["pooler.dense.weight" + SCALE_SUFFIX][:5].clone()

    edit_tensors(tmp_path / "small", "joint_encoder.safetensors", shorten)
    with pytest.raises(ModelError, match=r"joint_encoder.safetensors: pooler.dense.weight@row_scale is F16 \(5, 1\)"):
        open_model(tmp_path / "small")


def test_a_bare_int8_matrix_is_refused(full, tmp_path):
    compact_model(full, tmp_path / "small", STORAGES)
    path = tmp_path / "small" / "joint_encoder.safetensors"
    tensors = load_file(path)
    del tensors["pooler.dense.weight" + SCALE_SUFFIX]
    save_file(tensors, path)
    edit_tensors(tmp_path / "small", "joint_encoder.safetensors", lambda tensors: None)
    with pytest.raises(ModelError, match=r"pooler\.dense\.weight is I8, expected F32, F16 or BF16"):
        open_model(tmp_path / "small")


def test_the_command(full, tmp_path):
    runner = CliRunner()
    arguments = ["compact-model", str(full.path), "--out", str(tmp_path / "out"), "--joint-encoder", "int8"]
    done = runner.invoke(app, [*arguments, "--text-tower", "int8", "--adapter", "float16", "--backbone", "float16"])
    assert done.exit_code == 0, done.output
    assert all(len(line) <= 80 or str(tmp_path) in line for line in done.stdout.splitlines())
    assert "joint_encoder int8" in done.stdout
    again = runner.invoke(app, [*arguments, "--format", "json"])
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    nothing = runner.invoke(app, ["compact-model", str(full.path), "--out", str(tmp_path / "none")])
    assert nothing.exit_code == 2
    assert "nothing to compact" in nothing.stderr
    other = runner.invoke(app, [*arguments[:3], str(tmp_path / "json"), "--adapter", "float16", "--format", "json"])
    assert json.loads(other.stdout)["parts"][1]["storage"] == "float16"
