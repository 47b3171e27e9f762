"""`explain` through the command line, on models with a planted answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import edje_pipeline.cli.explain  # noqa: F401 (registers the command)
from edje_pipeline.cli.app import app
from edje_pipeline.models.checkpoint import ModelDirectory, save_model
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.stages.decode import decode_image

RUNNER = CliRunner()
RESNET = {"backbone": "timm:resnet10t"}


def plant(directory: Path, random: ModelDirectory, image: Path, place: int, word: str) -> ModelDirectory:
    """A copy of a model: each token is the embedding of `word`, and token 2 looks at one patch of the image."""
    adapter, encoder, backbone = random.load_adapter(), random.load_joint_encoder(), random.load_backbone()
    width = random.spec.adapter.input_dim
    pixels = np.empty((*random.spec.preprocess.image_size, 3), np.uint8)
    decode_image(image.read_bytes(), random.spec.preprocess, pixels)
    word_id = random.load_tokenizer().encode([word])[0][1]
    with torch.no_grad():
        vision = backbone(torch.from_numpy(pixels)[None])[0][0]
        adapter.projection.weight.zero_()
        adapter.projection.bias.copy_(2 * encoder.word_embeddings.weight[word_id])
        adapter.key.weight.copy_(torch.eye(width))
        adapter.attention.in_proj_weight[: 2 * width].copy_(torch.cat([torch.eye(width)] * 2))
        adapter.query[0, 1] = 500 * torch.nn.functional.normalize(vision[place] - vision.mean(dim=0), dim=0)
        adapter.mlp.fc1.bias += 0.01  # as training would
    return save_model(
        directory, random.spec, backbone=backbone, adapter=adapter, joint_encoder=encoder,
        tokenizer=random.load_tokenizer(), text_tower=random.load_text_tower(), card="# planted\n",
    )  # fmt: skip


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture whose patches all differ."""
    path = tmp_path_factory.mktemp("images") / "patches.png"
    pixels = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((96, 96), Image.Resampling.NEAREST).save(path)
    return path


def invoke(*arguments: object, code: int = 0):
    result = RUNNER.invoke(app, ["explain", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize(
    ("options", "place", "expected"), [({}, 6, (2, 3)), (RESNET, 8, (2, 3))], ids=["transformer", "convolution"]
)
def test_planted_word_and_patch_are_found_and_drawn(options, place, expected, tmp_path: Path, image: Path) -> None:
    model = plant(tmp_path / "model", write_random_model(tmp_path / "random", **options), image, place, "castle")
    shown = invoke(
        image, "--model", model.path, "--out", tmp_path / "p", "--text", "a red apple", "--top-k", 3, "--format", "json"
    )
    found = json.loads(shown.stdout)
    assert found["is_untrained"] is False
    assert found["exit_code"] == 0
    (one,) = found["images"]
    assert [token["words"][0] for token in one["tokens"]] == [{"text": "castle", "cosine": pytest.approx(1.0)}] * 4
    assert all(len(token["words"]) == 3 for token in one["tokens"])
    assert one["named_most"] == [{"word": "castle", "num_tokens": 4}]
    peak = one["tokens"][1]["peak"]
    assert (peak["row"], peak["column"]) == expected
    assert peak["weight"] > 0.9
    assert peak["times_even"] == pytest.approx(peak["weight"] * one["num_vision_tokens"])
    assert abs(one["logit"]) < 100
    assert any(token["logit_change"] for token in one["tokens"])

    picture = Path(one["picture"])
    assert picture == tmp_path / "p" / "patches-tokens.png"
    with Image.open(picture) as sheet:
        drawn = np.asarray(sheet.convert("L"), np.float32)
    rows, columns = one["grid"]
    # Panels of 208 pixels: the image, the text's evidence, tokens 1 and 2; three in a row or four, by their number.
    number = 1 + 1 + any(token["logit_change"] > 0 for token in one["tokens"])
    per_row = (drawn.shape[1] - 32 + 14) // 222
    top = drawn.shape[0] - 16 + 14 - -(-(len(one["tokens"]) + number - 1) // per_row) * (208 + 2 * 19 + 14)
    left, upper = 16 + number % per_row * 222, top + number // per_row * 260
    panel = drawn[upper : upper + 208, left : left + 208]
    edges = [np.linspace(0, 208, num + 1).round().astype(int) for num in (rows, columns)]
    means = [
        [panel[edges[0][r] : edges[0][r + 1], edges[1][c] : edges[1][c + 1]].mean() for c in range(columns)]
        for r in range(rows)
    ]
    assert np.unravel_index(np.argmax(means), (rows, columns)) == (expected[0] - 1, expected[1] - 1)


def test_bad_files_are_reported_and_the_others_done(tmp_path: Path, image: Path) -> None:
    write_random_model(tmp_path / "model")
    (tmp_path / "bad.jpg").write_text("this is no image")
    base = ["--model", tmp_path / "model", "--out", tmp_path / "out"]
    shown = invoke(tmp_path / "bad.jpg", image, image, tmp_path / "none.jpg", *base, code=3)
    assert "rejected:" in shown.stdout
    assert "unknown_format: no decoder recognises the bytes" in " ".join(shown.stdout.split())
    assert "missing: there is no such file" in " ".join(shown.stdout.split())
    assert "its words and its attention mean nothing" in " ".join(shown.stdout.split())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["patches-2-tokens.png", "patches-tokens.png"]
    assert "nearest words (cosine)" in shown.stdout
    assert all(len(line) <= 80 or str(image.parent.parent) in line for line in shown.stdout.splitlines())
    assert json.loads(invoke(tmp_path / "bad.jpg", *base, "--format", "json", code=1).stdout)["images"] == []


def test_a_local_adapter_has_its_words_on_the_patches(tmp_path: Path, image: Path) -> None:
    write_random_model(tmp_path / "model", adapter_kind="local")
    target = tmp_path / "one.png"
    shown = invoke(image.name, "--corpus", image.parent, "--model", tmp_path / "model", "--out", target, "--pieces")
    assert "16 tokens over 4 x 4 patches" in shown.stdout
    assert [f"row  {number}" in shown.stdout for number in range(1, 6)] == [True] * 4 + [False]
    assert "patch:" not in shown.stdout
    with Image.open(target) as picture:
        assert picture.size == (2 * 16 + 4 * 74, 2 * 16 + 4 * 74 + 19 + 7)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "absent"], 1, "no model 'absent'"),
        (["--model", "random-tiny", "--top-k", "0"], 2, "--top-k is 0"),
        (["--model", "random-tiny", "--device", "tpu"], 2, "device"),
        (["--model", "random-tiny", "--corpus", "absent"], 1, "does not exist"),
    ],
)
def test_wrong_options_get_one_clear_line(arguments, code, message, image: Path) -> None:
    result = invoke(image, *arguments, code=code)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
