"""How the bundled model is made: wheels, published weights, small trials."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from edje_pipeline.models.assemble import BackboneSource, load_backbone
from edje_pipeline.models.tensor_files import write_tensors
from edje_pipeline.training.recipe import NegativeSpec, Phase, Recipe, read_recipe
from recipes.bundled_model import (
    efficientnet_tensors,
    pictures,
    smaller,
    squashed,
    unpack,
    write_captions,
)

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.toml"))


def wheel_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_wheel_is_unpacked(tmp_path: Path) -> None:
    wheel = wheel_of(tmp_path / "a.whl", {"models/": b"", "models/deep/a.pth": b"weights", "b.txt": b"text"})
    unpack(wheel, tmp_path / "out")
    assert (tmp_path / "out" / "models" / "deep" / "a.pth").read_bytes() == b"weights"
    assert (tmp_path / "out" / "b.txt").read_bytes() == b"text"


@pytest.mark.parametrize(
    "name", ["../outside.txt", "a/../../outside.txt", "/{root}/outside.txt", "../out-side/outside.txt"]
)
def test_a_member_outside_is_refused(tmp_path: Path, name: str) -> None:
    name = name.replace("/{root}", str(tmp_path))
    wheel = wheel_of(tmp_path / "a.whl", {name: b"bad"})
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="which is outside of it"):
        unpack(wheel, tmp_path / "out")
    assert list(tmp_path.rglob("outside.txt")) == []


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return dict(timm.create_model("efficientnet_lite0", pretrained=False).state_dict())


def test_published_weights_are_mapped_by_order(tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    published = {f"layer_{place}": torch.full_like(value, place) for place, value in enumerate(expected.values())}
    torch.save(published, tmp_path / "a.pth")
    found = efficientnet_tensors(tmp_path / "a.pth")
    assert list(found) == list(expected)
    for place, (name, value) in enumerate(found.items()):
        assert value.shape == expected[name].shape
        assert bool((value == place).all())
    write_tensors(tmp_path / "b.safetensors", expected)
    again = efficientnet_tensors(tmp_path / "b.safetensors")
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_another_architecture_is_refused(tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    first, *rest = expected
    changed = {
        "missing": {name: expected[name] for name in rest},
        "shape": {**{f"x.{name}": value for name, value in expected.items()}, f"x.{first}": torch.zeros(2)},
        "same-names": {**expected, first: torch.zeros(2)},
        "order": {f"x.{name}": expected[name] for name in [*rest, first]},
    }
    for name, tensors in changed.items():
        torch.save(tensors, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match="does not hold EfficientNet-Lite0"):
            efficientnet_tensors(tmp_path / f"{name}.pth")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
@pytest.mark.parametrize("largest", [2, 5, 64, 1000])
def test_smaller_recipes_are_valid(path: Path, largest: int) -> None:
    whole = read_recipe(path)
    options = argparse.Namespace(steps_share=0.001, largest_batch=largest)
    tried = Recipe(tuple(smaller(phase, options) for phase in whole.phases))
    for phase, before in zip(tried.phases, whole.phases, strict=True):
        assert phase.steps == max(1, round(before.steps * 0.001))
        assert phase.batch_size == min(before.batch_size, largest)
        assert phase.negatives.num < max(2, phase.batch_size)
        assert phase.weights == before.weights


def test_smaller_counts_hard_negatives_and_micro_batches() -> None:
    phase = Phase("p", 100, batch_size=32, accumulation=4, negatives=NegativeSpec(2, 5, 7))
    tried = smaller(phase, argparse.Namespace(steps_share=0.5, largest_batch=14))
    assert (tried.steps, tried.batch_size, tried.accumulation) == (50, 12, 4)
    assert tried.negatives.num <= 2
    Recipe((tried,))


def emoji_tar(path: Path) -> Path:
    rows = [("fluent-1", "cat", ["pet"] * 9), ("noto-1", "cat", ["pet"]), ("noto-2", "dog", [])]
    with tarfile.open(path, "w") as archive:
        for number, (key, name, keywords) in enumerate(rows):
            stream = io.BytesIO()
            Image.new("RGB", (20, 10), (80 * number, 0, 0)).save(stream, "PNG")
            described = json.dumps({"name": name, "keywords": keywords, "style": key.split("-")[0]}).encode()
            for suffix, content in (("png", stream.getvalue()), ("json", described)):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def test_pictures_and_captions_of_a_tar(tmp_path: Path) -> None:
    for split in ("train", "val"):
        emoji_tar(tmp_path / f"{split}.tar")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "embedding": "mean"}
    source = BackboneSource("timm:vit_tiny_patch16_224", weights="random:0", options=options)
    backbone = squashed(load_backbone(source).backbone)
    asked: list[str] = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return np.eye(len(texts), dtype=np.float32)

    found = pictures(tmp_path / "train.tar", backbone, encode)
    assert asked == ["cat", "dog"]
    assert found.texts.tolist() == [0, 0, 1]
    assert found.pixels.shape == (3, 32, 32, 3)
    # Squashed, not cropped, and in the tar's order.
    assert [int(picture[..., 0].mean()) for picture in found.pixels] == [0, 80, 160]
    paths = write_captions(argparse.Namespace(out=tmp_path, emoji=tmp_path))
    rows = [json.loads(line) for line in Path(paths["val"]).read_text().splitlines()]
    assert [row["image_id"] for row in rows] == ["fluent-1", "noto-1", "noto-2"]
    assert rows[0]["captions"] == ["cat", "cat, pet, pet, pet, pet, pet, pet"]
    assert rows[2]["captions"] == ["dog"]
