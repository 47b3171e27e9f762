"""A user's way from captioned images to a trained model, an index and a recall table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edje_pipeline.cli import extract as _extract  # noqa: F401
from edje_pipeline.cli import train as _train  # noqa: F401
from edje_pipeline.cli.app import app
from edje_pipeline.models.assemble import BackboneSource, ModelParts, make_model
from edje_pipeline.models.checkpoint import open_model
from edje_pipeline.training.metrics_log import read_metrics
from tests.training_helpers import draw_shapes, write_tiny_bert

RECIPE = """
log-every = 5
validate-every = 20
[[phase]]
name = "warm-up"
steps = 20
batch-size = 12
learning-rate = 1e-3
weights = { contrastive = 1.0 }
[[phase]]
name = "itm"
steps = 20
batch-size = 6
learning-rate = 1e-3
weights = { itm = 1.0, mlm = 0.2, recovery = 0.2 }
negatives = { num-hard = 1, num-random = 2, pool = 3 }
[[phase]]
name = "quantized"
steps = 5
batch-size = 6
weights = { itm = 1.0 }
negatives = { num-hard = 0, num-random = 2 }
quantize = "pq16"
"""
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "embedding": "mean"}


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    bert = write_tiny_bert(folder / "bert")
    draw_shapes(folder / "images")
    source = BackboneSource("timm:vit_tiny_patch16_224", weights="random:0", options=dict(TINY))
    make_model(folder / "start", "tiny", source, ModelParts(bert, 4, adapter_mlp_dim=64, sentence_encoder=bert))
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def test_train_extract_evaluate(place: Path) -> None:
    common = ("--captions", place / "captions.jsonl", "--images", place / "images", "--recipe", place / "recipe.toml")
    out = place / "run"
    found = json.loads(
        run("train", "--model", place / "start", *common, "--val-captions", place / "captions.jsonl", "--out", out,
            "--name", "shapes", "--format", "json", "--quiet")
    )  # fmt: skip
    assert found["steps"] == 45
    model = open_model(out / "model")
    model.verify()
    assert model.spec.name == "shapes"
    # The ridge map was fitted: random weights would not find colours and shapes.
    assert found["last"]["val_first_stage_r1"] > 50
    assert [record["step"] for record in read_metrics(out / "metrics.jsonl") if "val_rerank_r1" in record] == [
        20,
        40,
        45,
    ]
    start = open_model(place / "start")
    assert not np.array_equal(
        start.load_adapter().projection.weight.detach(), model.load_adapter().projection.weight.detach()
    )
    index = place / "index"
    run(
        "extract",
        place / "images",
        "--index",
        index,
        "--model",
        out / "model",
        "--variant",
        "float16",
        "--quiet",
        "--executor",
        "local",
    )
    table = json.loads(
        run("evaluate", "--index", index, "--captions", place / "captions.jsonl", "--pool", "5", "--resamples", "50",
            "--fusion-weight", "0", "--fusion-weight", "100000", "--format", "json", "--markdown", place / "t.md")
    )["results"][0]  # fmt: skip
    rows = [row for row in table["rows"] if row["direction"] == "t2i"]
    first, alone, fused = (row["metrics"]["R@1"]["mean"] for row in rows)
    assert first > 50
    # A weight this large leaves nothing of the logit: the first stage's own order.
    assert fused == first
    assert 0 <= alone <= 100
    assert (place / "t.md").read_text().count("\n| t2i") == 3


def test_training_from_an_index_of_raw_tokens(place: Path) -> None:
    raw = place / "raw"
    run(
        "extract",
        place / "images",
        "--index",
        raw,
        "--model",
        place / "start",
        "--variant",
        "raw",
        "--quiet",
        "--executor",
        "local",
    )
    weights = "weights = { itm = 1.0, words = 1.0 }\nnegatives = { num-hard = 2, pool = 2 }\n"
    (place / "short.toml").write_text(f'log-every = 1\n[[phase]]\nname = "a"\nsteps = 3\nbatch-size = 6\n{weights}')
    common = ("--captions", place / "captions.jsonl", "--recipe", place / "short.toml", "--quiet", "--format", "json")
    by_image = run("train", "--model", place / "start", *common, "--images", place / "images", "--out", place / "i")
    by_index = run("train", "--model", place / "start", *common, "--raw-index", raw, "--out", place / "x")
    curves = [[record["loss"] for record in read_metrics(place / name / "metrics.jsonl")] for name in "ix"]
    assert json.loads(by_image)["steps"] == json.loads(by_index)["steps"]
    assert len(curves[0]) == 3
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-3)


def test_errors_are_one_line(place: Path) -> None:
    result = CliRunner().invoke(
        app, ["train", "--model", str(place / "start"), "--out", str(place / "no"), "--recipe", str(place / "no.toml"),
              "--captions", "x.jsonl", "--images", "x"],
    )  # fmt: skip
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "does not exist" in result.stderr
