"""A student is its teacher with another adapter."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import edje_pipeline.cli.model  # noqa: F401 (registers the commands)
from edje_pipeline.cli.app import app
from edje_pipeline.errors import ConfigError, ModelError
from edje_pipeline.models.checkpoint import open_model
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.models.student import make_student


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("teacher") / "local", adapter_kind="local")


def test_everything_but_the_adapter_is_the_teachers(teacher, tmp_path):
    student = make_student(tmp_path / "student", "small", teacher, num_compressed_tokens=2)
    student.verify()
    changed = {part for part, value in student.fingerprints.items() if teacher.fingerprints[part] != value}
    assert changed == {"adapter"}
    spec, local = student.spec.adapter, teacher.spec.adapter
    assert (spec.kind, spec.num_compressed_tokens, spec.mlp_dim) == ("compressed", 2, local.mlp_dim)
    assert spec.num_key_positions == local.num_compressed_tokens
    assert student.load_adapter().key_positions is not None
    again = make_student(tmp_path / "again", "small", teacher, num_compressed_tokens=2)
    assert again.fingerprints == student.fingerprints


def test_command(teacher, tmp_path):
    out = tmp_path / "student"
    arguments = ["make-student", str(teacher.path), "--tokens", "3", "--no-key-positions", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--mlp-dim", "24"])
    assert result.exit_code == 0, result.output
    spec = open_model(str(out)).spec
    assert (spec.name, spec.adapter.num_key_positions, spec.adapter.mlp_dim) == ("student", 0, 24)
    assert "train it before use" in (out / "MODEL_CARD.md").read_text()


def test_what_cannot_be(teacher, tmp_path):
    with pytest.raises(ConfigError, match="99 tokens are more than the"):
        make_student(tmp_path / "many", "many", teacher, num_compressed_tokens=99)
    student = make_student(tmp_path / "student", "small", teacher, num_compressed_tokens=2)
    with pytest.raises(ConfigError, match="has a compressed adapter; a student needs a model with a local one"):
        make_student(tmp_path / "of-student", "smaller", student, num_compressed_tokens=1)
    with pytest.raises(ModelError, match="exists already"):
        make_student(tmp_path / "student", "small", teacher, num_compressed_tokens=2)
