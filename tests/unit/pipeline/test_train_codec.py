"""A codebook from an index: the sample, the error that is reported, the file that is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import edje_pipeline.cli.codec  # noqa: F401 (registers the command)
from edje_pipeline.cli.app import app
from edje_pipeline.errors import CodecError
from edje_pipeline.models.checkpoint import ModelDirectory, open_model
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.pipeline.train_codec import (
    default_sample_images,
    reconstruction_error,
    sample_tokens,
    train_and_write,
    train_from_index,
    train_from_tokens,
)
from edje_pipeline.storage.codecs import read_codec_file
from edje_pipeline.storage.location import Location
from tests.index_util import random_tokens, write_index


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_random_model(folder)
    return open_model(folder)


def sizes(model: ModelDirectory) -> tuple[int, int]:
    return model.spec.adapter.num_compressed_tokens, model.spec.adapter.output_dim


def test_sample_holds_stored_images_once_and_is_repeatable(model: ModelDirectory, tmp_path: Path) -> None:
    tokens = random_tokens(120, *sizes(model))
    index = write_index(tmp_path / "index", model, num_images=120, tokens=tokens, shard_rows=50)
    stored = {row.tobytes() for row in tokens.astype(np.float32)}
    sample = sample_tokens(index, 60, seed=1)
    drawn = [row.tobytes() for row in sample]
    assert len(drawn) == 60 == len(set(drawn))
    assert set(drawn) <= stored
    np.testing.assert_array_equal(sample, sample_tokens(index, 60, seed=1))
    assert not np.array_equal(sample, sample_tokens(index, 60, seed=2))
    assert len(sample_tokens(index, 1000)) == 120


def test_sample_leaves_dead_rows_out(model: ModelDirectory, tmp_path: Path) -> None:
    old, new = random_tokens(40, *sizes(model), seed=1), random_tokens(20, *sizes(model), seed=2)
    ids = [f"{number:03d}" for number in range(40)]
    write_index(tmp_path / "index", model, ids=ids, tokens=old)
    index = write_index(tmp_path / "index", model, ids=ids[:20], tokens=new, mode="add")
    live = {row.tobytes() for row in np.concatenate([new, old[20:]]).astype(np.float32)}
    assert {row.tobytes() for row in sample_tokens(index, 100)} == live


def test_error_is_that_of_images_not_trained_on(model: ModelDirectory, tmp_path: Path) -> None:
    tokens = random_tokens(100, *sizes(model))
    out = tmp_path / "codebook.safetensors"
    result = train_and_write(tokens, "pq4", str(out), seed=5)
    assert (result.num_images_trained, result.num_images_measured) == (90, 10)
    assert not result.measured_on_trained
    codec = read_codec_file(Location.parse(out))
    assert codec.fingerprint == result.fingerprint
    held_out = tokens[np.random.default_rng(5).permutation(100)[:10]]
    assert result.error == reconstruction_error(codec, held_out)
    assert result.error.relative > reconstruction_error(codec, tokens).relative


def test_small_samples_say_so() -> None:
    codec = train_from_tokens(random_tokens(3, 4, 8), "opq2")
    assert reconstruction_error(codec, random_tokens(3, 4, 8)).relative < 0.2
    assert train_from_tokens(random_tokens(3, 4, 8), "int8").name == "int8"


def test_reconstruction_error_by_hand() -> None:
    codec = train_from_tokens(np.ones((1, 1, 4), np.float32), "int4")
    tokens = np.array([[[7.0, 0.4, 0.0, 0.0]]], np.float32)
    found = reconstruction_error(codec, tokens)
    norm = np.sqrt(49 + 0.16)
    assert found.relative == pytest.approx(0.4 / norm, rel=1e-5)
    assert found.cosine == pytest.approx(7.0 / norm, rel=1e-5)


def test_refuses_a_coarser_source(model: ModelDirectory, tmp_path: Path) -> None:
    write_index(tmp_path / "index", model, num_images=30, codec="int4")
    dim = sizes(model)[1]
    with pytest.raises(CodecError, match="coarser than"):
        train_from_index(str(tmp_path / "index"), f"pq{dim}", str(tmp_path / "x"))
    with pytest.raises(CodecError, match="needs no training"):
        train_from_index(str(tmp_path / "index"), "float16", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("num_tokens", "images"), [(64, 2048), (576, 256), (8, 4096), (1, 4096)])
def test_default_sample(num_tokens: int, images: int) -> None:
    assert default_sample_images(num_tokens) == images


class TestCommand:
    def test_from_an_index(self, model: ModelDirectory, tmp_path: Path) -> None:
        write_index(tmp_path / "index", model, num_images=60)
        out = tmp_path / "book.safetensors"
        command = ["train-codec", str(tmp_path / "index"), "--codec", "opq4", "--out", str(out)]
        shown = CliRunner().invoke(app, command)
        assert shown.exit_code == 0, shown.output
        assert max(len(line) for line in shown.output.splitlines() if str(out) not in line) <= 80
        as_json = json.loads(CliRunner().invoke(app, [*command, "--format", "json"]).output)
        assert as_json["fingerprint"] == read_codec_file(Location.parse(out)).fingerprint
        assert as_json["fingerprint"][:16] in shown.output

    def test_from_a_corpus(self, model: ModelDirectory, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        (tmp_path / "images").mkdir()
        for number in range(6):
            pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        out = tmp_path / "book.safetensors"
        source = ["--corpus", str(tmp_path / "images"), "--model", str(model.path), "--num-images", "5"]
        shown = CliRunner().invoke(
            app, ["train-codec", *source, "--codec", "pq4", "--out", str(out), "--format", "json", "--quiet"]
        )
        assert shown.exit_code == 0, shown.output
        result = json.loads(shown.stdout)
        assert (result["num_images_trained"], result["measured_on_trained"]) == (5, True)
        codec = read_codec_file(Location.parse(out))
        assert (codec.num_tokens, codec.dim) == sizes(model)

    @pytest.mark.parametrize(
        "arguments", [[], ["INDEX", "--corpus", "x"], ["--corpus", "x"], ["INDEX", "--model", "m"]]
    )
    def test_usage(self, arguments: list[str]) -> None:
        assert CliRunner().invoke(app, ["train-codec", *arguments]).exit_code == 2
