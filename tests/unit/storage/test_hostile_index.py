"""Indexes made to do harm: nothing leaves the directory, memory stays bounded, every answer is one line."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edje_pipeline.errors import CorruptionError, EdjeError, IndexNotFoundError
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.manifest import Manifest, parse_json, read_manifest
from edje_pipeline.storage.pages import check_pages
from edje_pipeline.storage.parquet_io import hash_file
from edje_pipeline.storage.shards import SHARD_LIST_SCHEMA
from edje_pipeline.storage.snapshot_files import LOOKUP_LIST_SCHEMA, write_list
from edje_pipeline.storage.snapshots import prune
from edje_pipeline.storage.verify import verify
from tests.index_factory import run_extract

IDS = [f"x{number:03d}" for number in range(40)]
REPO = Path(__file__).parents[3]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    run_extract(tmp_path / "index", IDS)
    return tmp_path / "index"


def edit_manifest(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((root / "manifest.json").read_text())
    change(value)
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (root / "manifest.json").write_text(text)
    (root / "snapshots" / value["snapshot"] / "head.json").write_text(text)


@pytest.mark.parametrize(
    "path", ["../../etc/passwd", "/etc/passwd", "snapshots/../../x", "a\\..\\b", "file:///etc/passwd", "", "a\0b", 7]
)
def test_paths_in_the_manifest_stay_inside(root: Path, path: object) -> None:
    edit_manifest(root, lambda value: value["files"]["shards"].update(path=path))
    with pytest.raises(CorruptionError, match=r"files\.shards\.path"):
        Index.open(root)
    assert not verify(Location.parse(root)).is_good


@pytest.mark.parametrize("name", ["../x", "a/b", "/x"])
def test_snapshot_names_stay_inside(root: Path, name: str) -> None:
    edit_manifest_only(root, {"snapshot": name})
    with pytest.raises(CorruptionError, match="is not a name"):
        Index.open(root)
    with pytest.raises(IndexNotFoundError):
        Index.open(root, snapshot=name)


def edit_manifest_only(root: Path, changes: dict[str, Any]) -> None:
    value = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**value, **changes}))


def rewrite_list(root: Path, key: str, schema: pa.Schema, column: str, value: object) -> Manifest:
    location = Location.parse(root)
    manifest = read_manifest(location)
    table = pq.read_table(root / manifest.files[key].path)
    number = table.schema.get_field_index(column)
    values = [value, *table[column].to_pylist()[1:]]
    table = table.set_column(number, schema.field(column), pa.array(values, schema.field(column).type))
    ref = write_list(location, manifest.files[key].path, table, schema)
    changed = replace(manifest, files={**manifest.files, key: ref})
    for path in (root / "manifest.json", root / "snapshots" / manifest.snapshot / "head.json"):
        path.write_bytes(changed.to_bytes())
    return changed


@pytest.mark.parametrize("path", ["../secret.parquet", "/etc/passwd", "manifest.json", "shards/../../x"])
def test_paths_in_the_lists_stay_inside(root: Path, path: str) -> None:
    rewrite_list(root, "shards", SHARD_LIST_SCHEMA, "path", path)
    with pytest.raises(CorruptionError, match="refused"):
        Index.open(root)
    assert not verify(Location.parse(root)).is_good
    other = root.parent / "other"
    run_extract(other, IDS)
    rewrite_list(other, "ids", LOOKUP_LIST_SCHEMA, "path", path)
    with pytest.raises(CorruptionError, match="refused"):
        Index.open(other).ids()


@pytest.mark.parametrize(
    ("column", "value"), [("num_rows", 10**9), ("row_group_rows", 2**31 - 1), ("num_live_rows", -5)]
)
def test_impossible_counts_in_the_shard_list(root: Path, column: str, value: int) -> None:
    rewrite_list(root, "shards", SHARD_LIST_SCHEMA, column, value)
    with pytest.raises(CorruptionError):
        Index.open(root).tokens(IDS)
    assert not verify(Location.parse(root)).is_good


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 100_000,
        "1" * 10_000,
        "[]",
        "null",
        "{",
        '{"format": "edje-index"}',
        "\xff\xfe",
        "9" * 5000,
    ],
    ids=["brackets", "objects", "number", "list", "null", "cut", "bare", "bytes", "digits"],
)
def test_json_that_is_no_manifest(root: Path, text: str) -> None:
    (root / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptionError):
        Index.open(root)


def test_huge_json_is_not_read(root: Path) -> None:
    with (root / "manifest.json").open("wb") as stream:
        stream.truncate(1 << 40)  # a sparse file of a terabyte
    with pytest.raises(CorruptionError, match="more than the"):
        Index.open(root)


def test_numbers_of_many_digits_are_refused() -> None:
    with pytest.raises(CorruptionError):
        parse_json(b'{"a": ' + b"9" * 10_000 + b"}", "x")


def test_wrong_types_everywhere(root: Path) -> None:
    good = json.loads((root / "manifest.json").read_text())
    for key in good:
        for bad in (None, [], {}, "x" * 10, -1, True, 10**30):
            if key == "parent" and bad is None:
                continue
            (root / "manifest.json").write_text(json.dumps({**good, key: bad}))
            with contextlib.suppress(EdjeError):  # anything else fails the test
                Index.open(root).tokens(IDS[:1])


def lying_footer(path: Path, claim: int) -> None:
    """Rewrites the footer's row counts: Thrift zigzag varints of the true count become those of `claim`."""
    data = path.read_bytes()
    (length,) = struct.unpack("<I", data[-8:-4])
    footer = data[-8 - length : -8]
    true_rows = pq.read_metadata(path).num_rows
    assert true_rows < 64
    # FileMetaData field 3 (num_rows, i64): delta 1 after the schema list -> 0x16, then the value.
    old, new = bytes([0x16, true_rows * 2]), b"\x16" + varint(claim * 2)
    assert old in footer
    changed = footer.replace(old, new)
    path.write_bytes(data[: -8 - length] + changed + struct.pack("<I", len(changed)) + b"PAR1")


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def test_a_footer_of_a_billion_rows(root: Path) -> None:
    path = root / Index.open(root).shards[0].path
    lying_footer(path, 10**9)
    with pytest.raises(CorruptionError):
        Index.open(root).tokens(IDS)
    # The same, when the shard list tells the same lie about bytes.
    rewrite_list(root, "shards", SHARD_LIST_SCHEMA, "size_bytes", path.stat().st_size)
    with pytest.raises(CorruptionError, match="rows"):
        Index.open(root).tokens(IDS)
    assert not verify(Location.parse(root)).is_good


def test_a_footer_of_a_gigabyte(root: Path) -> None:
    path = root / Index.open(root).shards[0].path
    data = path.read_bytes()
    path.write_bytes(data[:-8] + struct.pack("<I", 2**31) + b"PAR1")
    with pytest.raises(CorruptionError):
        Index.open(root).tokens(IDS)


BOMB = """
import sys
from edje_pipeline.errors import CorruptionError
from edje_pipeline.pipeline.metrics import peak_rss_bytes
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.verify import verify
index = Index.open(sys.argv[1])
for action in (lambda: index.read_row_group(0, 0), lambda: index.embeddings(["x000"])):
    try:
        action()
    except CorruptionError as error:
        print("refused", error)
    else:
        sys.exit("not refused")
print(len(verify(Location.parse(sys.argv[1])).problems))
assert peak_rss_bytes() < 700_000_000, peak_rss_bytes()
"""


def test_a_page_that_unpacks_to_gigabytes(root: Path) -> None:
    """A page header that claims 2 GB, in a shard whose size and checksum its list knows."""
    path = root / Index.open(root).shards[0].path
    metadata = pq.read_metadata(path)
    column = metadata.row_group(0).column(2)
    assert column.path_in_schema == "embedding"
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    # PageHeader: field 1 type (0x15 0x00), field 2 uncompressed_page_size (0x15 varint).
    assert data[start : start + 3] == b"\x15\x00\x15"
    size = column.total_uncompressed_size
    end = start + 3
    while data[end] & 0x80:
        end += 1
    width = end + 1 - (start + 3)
    biggest = bytearray([0xFF] * (width - 1) + [0x7E])  # the largest zigzag value of the same width
    data[start + 3 : end + 1] = biggest
    path.write_bytes(bytes(data))
    file = pq.ParquetFile(path)
    with path.open("rb") as raw, pytest.raises(CorruptionError, match=r"page that claims|outside|damaged page"):
        check_pages(file, pa.PythonFile(raw), "x")
    assert size < 2000
    rewrite_list(root, "shards", SHARD_LIST_SCHEMA, "sha256", hash_file(Location.parse(path)).sha256)
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(root)], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused") == 2


def test_page_headers_of_random_bytes_never_hang_or_crash(root: Path) -> None:
    path = root / Index.open(root).shards[0].path
    file = pq.ParquetFile(path)
    rng = np.random.default_rng(5)
    original = path.read_bytes()
    for _ in range(200):
        data = bytearray(original)
        for place in rng.integers(0, 1500, 30):
            data[place] = int(rng.integers(256))
        with contextlib.suppress(CorruptionError):
            assert check_pages(file, pa.BufferReader(bytes(data)), "x") < 1 << 28


def test_a_compressed_bomb_in_a_list(root: Path) -> None:
    """Two million equal rows take some kilobytes in Parquet; the head's row count stops them."""
    location = Location.parse(root)
    manifest = read_manifest(location)
    path = root / manifest.files["tombstones"].path
    rows = 2_000_000
    table = pa.table(
        {
            name: pa.array(["x"] * rows) if name in ("image_id", "reason") else pa.array(np.zeros(rows, np.int32))
            for name in ("image_id", "shard", "row", "reason")
        }
    )
    pq.write_table(table, path, compression="zstd")
    written = hash_file(Location.parse(path))
    assert written.size_bytes < 40_000
    edit_manifest(
        root, lambda value: value["files"]["tombstones"].update(size_bytes=written.size_bytes, sha256=written.sha256)
    )
    assert not verify(location).is_good
    edit_manifest(root, lambda value: value["files"]["tombstones"].update(num_rows=10**11))
    with pytest.raises(CorruptionError, match="too many"):
        next(Index.open(root).iter_shards()).tables().__next__()


def test_links_are_not_followed_for_deletion(root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "precious.parquet").write_text("x")
    (root / "shards" / "link.parquet").symlink_to(outside / "precious.parquet")
    (root / "shards" / "dir").symlink_to(outside)
    (root / "staging" / "20200101-dead").symlink_to(outside)
    run_extract(root, ["a"], mode="add")
    prune(Location.parse(root))
    assert (outside / "precious.parquet").read_text() == "x"
    assert not (root / "shards" / "link.parquet").is_symlink()
    folder = root / "rejects"
    if folder.exists():
        folder.rmdir()
    folder.symlink_to(outside)
    run_extract(root, ["b"])
    prune(Location.parse(root))
    assert (outside / "precious.parquet").read_text() == "x"
