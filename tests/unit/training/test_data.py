"""Captions from every format, and errors that say where."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edje_pipeline.errors import InputFileError, TrainingError
from edje_pipeline.training.data import Captions, read_captions

PAIRS = {"a.jpg": ("a red apple", "fruit"), "b.jpg": ("a dog",)}


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_jsonl_list_and_rows_of_one(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(
        '{"image_id": "a.jpg", "captions": ["a red apple"]}\n\n{"image_id": "b.jpg", "caption": "a dog"}\n'
        '{"image_id": "a.jpg", "text": "fruit"}\n'
    )
    found = read_captions(str(path))
    assert dict(zip(found.image_ids, found.captions, strict=True)) == PAIRS
    assert found.texts == ("a red apple", "fruit", "a dog")
    assert [numbers.tolist() for numbers in found.text_numbers] == [[0, 1], [2]]


def test_parquet_beside_image_bytes(tmp_path: Path) -> None:
    table = pa.table(
        {"key": list(PAIRS), "captions": [list(group) for group in PAIRS.values()], "jpg": [b"\xff", b"\xd8"]}
    )
    pq.write_table(table, tmp_path / "c.parquet")
    found = read_captions(str(tmp_path / "c.parquet"))
    assert dict(zip(found.image_ids, found.captions, strict=True)) == PAIRS


def test_webdataset_json_txt_and_templates(tmp_path: Path) -> None:
    path = tmp_path / "c.tar"
    row = {"name": "joker", "keywords": ["card", "game"], "image_id": "not this"}
    write_tar(path, {"x/1.json": json.dumps(row).encode(), "x/1.webp": b"image", "x.2.txt": b"a dog\n"})
    with pytest.raises(InputFileError, match=r"1\.json has no caption; .*columns \(.*keywords, name"):
        read_captions(str(path))
    write_tar(path, {"x/1.json": json.dumps(row).encode(), "x/1.webp": b"image"})
    found = read_captions(str(path), templates=("{name}", "{name}: {keywords}"))
    assert found == Captions(("x/1",), (("joker", "joker: card, game"),))
    write_tar(path, {"x.2.txt": b"a dog\n"})
    assert read_captions(str(path)) == Captions(("x.2",), (("a dog",),))


def test_karpathy_splits(tmp_path: Path) -> None:
    images = [
        {"filename": "1.jpg", "split": "train", "sentences": [{"raw": "one"}]},
        {"filename": "2.jpg", "split": "test", "filepath": "val2014", "sentences": [{"raw": "two"}, {"raw": "deux"}]},
    ]
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    assert read_captions(str(path), split="test") == Captions(("val2014/2.jpg",), (("two", "deux"),))
    assert len(read_captions(str(path))) == 2


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text('image_id,caption\na.jpg,"a red, ripe apple"\n')
    assert read_captions(str(tmp_path / "c.csv")).captions == (("a red, ripe apple",),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image_id": "a", "captions": ["x", "  "]}', "c.jsonl:1: image 'a' has an empty caption"),
        ('{"image_id": "a", "captions": []}', "c.jsonl:1: image 'a' has an empty caption"),
        ('{"caption": "x"}', "c.jsonl:1 names no image"),
        ('{"image_id": "a"}', "c.jsonl:1 has no caption"),
        ('{"image_id": "a", "captions": 3}', "expected a text or a list of texts"),
        ('{"image_id": "a", "capt', "c.jsonl:1 is not JSON"),
        ("[1]", "c.jsonl:1 holds a list"),
    ],
)
def test_bad_rows(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "c.jsonl").write_text(line + "\n")
    with pytest.raises(InputFileError, match=message):
        read_captions(str(tmp_path / "c.jsonl"))


def test_empty_captions_can_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"image_id": "a", "captions": ["", "x"]}\n{"image_id": "b", "caption": " "}\n')
    assert read_captions(str(tmp_path / "c.jsonl"), on_empty="skip") == Captions(("a",), (("x",),))


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="does not exist"):
        read_captions(str(tmp_path / "no.jsonl"))
    with pytest.raises(InputFileError, match="unknown kind of caption file"):
        read_captions(str(tmp_path / "no.docx"))
    (tmp_path / "bad.parquet").write_bytes(b"nonsense")
    with pytest.raises(InputFileError, match="not a Parquet file"):
        read_captions(str(tmp_path / "bad.parquet"))


def test_unknown_images() -> None:
    captions = Captions(("a", "b", "c"), (("x",), ("y",), ("z",)))
    with pytest.raises(InputFileError, match="2 of 3 captioned images are not in INDEX: 'b', 'c'"):
        captions.keep(["a"], where="INDEX")
    assert captions.keep(["a"], where="INDEX", on_unknown="skip") == Captions(("a",), (("x",),))


def test_corpora_nothing_can_be_learned_from() -> None:
    with pytest.raises(TrainingError, match="1 image"):
        Captions(("a",), (("x", "y"),)).require_trainable()
    with pytest.raises(TrainingError, match="same caption"):
        Captions(("a", "b"), (("x",), ("x",))).require_trainable()
