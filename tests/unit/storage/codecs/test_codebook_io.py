"""Codebooks at rest, and every way one can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from edje_pipeline.errors import CodecError, CorruptionError
from edje_pipeline.storage.codecs import ProductCodec, load_codec, read_codec_file, resolve, save_codec, train_pq
from edje_pipeline.storage.codecs.codebook_io import codebook_path, codec_to_bytes
from edje_pipeline.storage.location import Location


@pytest.fixture(scope="module")
def codec() -> ProductCodec:
    return train_pq(np.random.default_rng(0).normal(size=(20, 4, 8)).astype(np.float32), 2, "opq")


def test_bytes_are_the_same_every_time(codec: ProductCodec, tmp_path: Path) -> None:
    assert codec_to_bytes(codec) == codec_to_bytes(codec)
    entry = save_codec(codec, Location.parse(tmp_path))
    file = tmp_path / "codecs" / f"{codec.fingerprint}.safetensors"
    assert file.read_bytes() == codec_to_bytes(codec)
    assert json.loads(json.dumps(entry)) == entry


def test_plain_codecs_write_no_file(tmp_path: Path) -> None:
    save_codec(resolve("int8", num_tokens=2, dim=4), Location.parse(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_missing_codebook(codec: ProductCodec, tmp_path: Path) -> None:
    with pytest.raises(CorruptionError, match="is missing"):
        load_codec(codec.to_dict(), Location.parse(tmp_path))
    with pytest.raises(CodecError, match="train-codec"):
        read_codec_file(Location.parse(tmp_path / "none.safetensors"))


def test_any_flipped_bit_is_found(codec: ProductCodec, tmp_path: Path) -> None:
    entry = save_codec(codec, Location.parse(tmp_path))
    file = tmp_path / codebook_path(codec.fingerprint)
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    rng = np.random.default_rng(0)
    for position in [0, 7, header, len(good) - 1, *rng.integers(header, len(good), 20).tolist()]:
        bad = bytearray(good)
        bad[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(bad))
        with pytest.raises(CorruptionError):
            load_codec(entry, Location.parse(tmp_path))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x" * 7,
        b"\xff" * 64,
        (2**40).to_bytes(8, "little") + b"{}",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        save({"centroids": np.zeros((2, 256, 4), np.float32)}),
        save({"a": np.zeros(1, np.float32)}, {"edje_codec": "[]"}),
        save({"a": np.zeros(1, np.float32)}, {"edje_codec": '{"name": "pq99999999999", "num_tokens": 1, "dim": 1}'}),
        save({"a": np.zeros(1, np.float32)}, {"edje_codec": '{"name": "float16", "num_tokens": 1, "dim": 1}'}),
    ],
)
def test_foreign_files_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "book").write_bytes(data)
    with pytest.raises(CorruptionError):
        read_codec_file(Location.parse(tmp_path / "book"))


def test_another_codebook_under_the_name(codec: ProductCodec, tmp_path: Path) -> None:
    entry = save_codec(codec, Location.parse(tmp_path))
    other = train_pq(np.random.default_rng(1).normal(size=(20, 4, 8)).astype(np.float32), 2, "opq")
    (tmp_path / codebook_path(codec.fingerprint)).write_bytes(codec_to_bytes(other))
    with pytest.raises(CorruptionError, match="not the manifest's"):
        load_codec(entry, Location.parse(tmp_path))


@pytest.mark.parametrize("fingerprint", ["../../etc/passwd", "A" * 64, "0" * 63, "", "/" * 64])
def test_fingerprints_cannot_leave_the_index(codec: ProductCodec, tmp_path: Path, fingerprint: str) -> None:
    with pytest.raises(CorruptionError, match="64 hexadecimal"):
        load_codec({**codec.to_dict(), "fingerprint": fingerprint}, Location.parse(tmp_path))


def test_incomplete_entries(tmp_path: Path) -> None:
    with pytest.raises(CorruptionError, match="incomplete"):
        load_codec({"name": "float16"}, Location.parse(tmp_path))
    wrong = {**resolve("int8", num_tokens=2, dim=4).to_dict(), "name": "int4"}
    with pytest.raises(CorruptionError, match="not the manifest's"):
        load_codec(wrong, Location.parse(tmp_path))
