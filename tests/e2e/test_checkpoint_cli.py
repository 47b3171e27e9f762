"""A checkpoint of the authors' through the command line: import, look, extract, score, export back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from edje_pipeline.cli.app import app

pytest.importorskip("transformers")


def _run(*args: str) -> str:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_import_extract_score_export(tmp_path: Path) -> None:
    import edje_pipeline.cli
    from edje_pipeline import Index, Reranker
    from tests.unit.models import official_reference as official

    assert edje_pipeline.cli.main
    torch.manual_seed(1)
    vocab = official.write_vocab(tmp_path / "vocab.txt")
    reference = official.Reference(official.reference_tokenizer(vocab), compressed=True)
    torch.save({"model": reference.state_dict(), "epoch": 16}, tmp_path / "checkpoint_16.pth")
    model = str(tmp_path / "model")
    heads = ["--joint-heads", "4", "--vision-heads", "4", "--interpolation", "bicubic"]
    _run("import-checkpoint", str(tmp_path / "checkpoint_16.pth"), "--out", model, "--tokenizer", str(vocab), *heads)
    info = json.loads(_run("model-info", model, "--verify", "--format", "json"))
    assert "edje" in json.dumps(info)

    generator = np.random.default_rng(0)
    side = official.PATCH * official.GRID
    (tmp_path / "images").mkdir()
    for number in range(6):
        # Photographs of the model's own size: no resize, so the authors' pixels are known exactly.
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    index_path = str(tmp_path / "index")
    _run("extract", str(tmp_path / "images"), "--index", index_path, "--model", model, "--executor", "local", "-q")
    texts = official.varied_texts(6)
    scores = Reranker.open(Index.open(index_path)).predict([(text, f"{n}.png") for n, text in enumerate(texts)])

    pixels = torch.stack(
        [torch.from_numpy(np.asarray(Image.open(tmp_path / "images" / f"{n}.png")).copy()) for n in range(6)]
    )
    from edje_pipeline.models.checkpoint import open_model

    expected = reference.logits(open_model(model).load_backbone().normalise(pixels), texts)
    # The stored tokens are float16; the bound of 1e-4 holds before that rounding (unit test).
    np.testing.assert_allclose(scores, expected.detach().numpy(), atol=2e-3)
    assert np.ptp(scores) > 1e-2

    _run("export-checkpoint", model, "--out", str(tmp_path / "back.pth"))
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert set(back) == set(reference.state_dict())
    for name, tensor in reference.state_dict().items():
        assert torch.equal(back[name], tensor), name
