"""`verify` finds each kind of damage, and finds nothing in good indexes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edje_pipeline.errors import EdjeError
from edje_pipeline.storage import codecs
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.manifest import FileRef, Manifest, read_manifest
from edje_pipeline.storage.shards import ShardEntry, write_shard
from edje_pipeline.storage.snapshot_files import lookup_parts, read_rejects, read_shards, read_tombstones, write_lists
from edje_pipeline.storage.verify import VerifyReport, verify
from tests.index_factory import default_codec, run_extract, shard_table

IDS = [f"img/{number:03d}.jpg" for number in range(60)]


@pytest.fixture(scope="module")
def good_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good") / "index"
    run_extract(root, IDS, rejected=IDS[5:8], part_rows=25, row_group_rows=8)
    run_extract(root, ["new", IDS[20]], mode="add", version=1)
    return root


@pytest.fixture
def index(good_index: Path, tmp_path: Path) -> Path:
    shutil.copytree(good_index, tmp_path / "index")
    return tmp_path / "index"


def check(root: Path, *, quick: bool = False) -> VerifyReport:
    return verify(Location.parse(root), quick=quick)


def shards_of(root: Path) -> list[ShardEntry]:
    location = Location.parse(root)
    return read_shards(location, read_manifest(location))


def shard_paths(root: Path) -> list[Path]:
    return [root / entry.path for entry in shards_of(root)]


def rewrite(root: Path, **lists: object) -> Manifest:
    """Writes lists of the current snapshot anew, consistently up to the manifest: damage by a program, not a disk."""
    location = Location.parse(root)
    manifest = read_manifest(location)
    current: dict[str, object] = {
        "shards": read_shards(location, manifest),
        "rejects": read_rejects(location, manifest),
        "parts": lookup_parts(location, manifest),
        "tombstones": read_tombstones(location, manifest),
    }
    files = write_lists(location, f"snapshots/{manifest.snapshot}", **{**current, **lists})  # type: ignore[arg-type]
    changed = replace(manifest, files=files)
    save(root, changed)
    return changed


def save(root: Path, manifest: Manifest) -> None:
    for path in (root / "manifest.json", root / "snapshots" / manifest.snapshot / "head.json"):
        path.write_bytes(manifest.to_bytes())


def kinds(report: VerifyReport) -> set[str]:
    assert report.exit_code == (1 if report.problems else 0)
    for problem in report.problems:
        assert "\n" not in problem.to_text()
    json.dumps(report.to_dict())
    return {problem.kind for problem in report.problems}


def test_good(index: Path) -> None:
    assert kinds(check(index)) == set()
    assert kinds(check(index, quick=True)) == set()


def test_any_flipped_bit_in_a_shard(index: Path) -> None:
    rng = np.random.default_rng(7)
    path = shard_paths(index)[1]
    original = path.read_bytes()
    places = [0, 4, len(original) - 1, len(original) - 6, *rng.integers(0, len(original), 60)]
    for place in places:
        damaged = bytearray(original)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        report = check(index)
        assert report.problems, f"bit flip at byte {place} of {len(original)} was not found"
        assert all(
            problem.kind in {"shard", "tokens", "lookup", "embedding", "duplicate"} for problem in report.problems
        )
    path.write_bytes(original)
    assert kinds(check(index)) == set()


@pytest.mark.parametrize("quick", [False, True])
def test_truncated_missing_and_extra(index: Path, quick: bool) -> None:
    path = shard_paths(index)[0]
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    assert "shard" in kinds(check(index, quick=quick))
    path.unlink()
    report = check(index, quick=quick)
    assert any("is missing" in problem.message for problem in report.problems)
    path.write_bytes(data)
    extra = path.with_name("stray.parquet")
    extra.write_bytes(data)
    assert kinds(check(index, quick=quick)) == {"extra"}
    extra.unlink()
    assert kinds(check(index, quick=quick)) == set()


@pytest.mark.parametrize("quick", [False, True])
def test_swapped_shards(index: Path, quick: bool) -> None:
    first, second = shard_paths(index)[1:3]
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    assert "shard" in kinds(check(index, quick=quick))


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("key", ["listed", "accepted", "rejected", "shards", "tombstones", "shard_bytes"])
def test_counts_that_lie(index: Path, key: str, quick: bool) -> None:
    manifest = read_manifest(Location.parse(index))
    counts = replace(manifest.counts, **{key: getattr(manifest.counts, key) + 1})
    save(index, replace(manifest, counts=counts))
    assert "counts" in kinds(check(index, quick=quick))


def test_manifest_that_differs_from_its_head(index: Path) -> None:
    manifest = read_manifest(Location.parse(index))
    (index / "manifest.json").write_bytes(replace(manifest, created_at="2020-01-01").to_bytes())
    assert kinds(check(index, quick=True)) == {"manifest"}


def test_lying_counts_in_the_lists(index: Path) -> None:
    entries = shards_of(index)
    rewrite(index, shards=[replace(entries[0], num_live_rows=3), *entries[1:]])
    assert "counts" in kinds(check(index, quick=True))
    rewrite(index, shards=[replace(entries[0], num_rows=entries[0].num_rows + 1), *entries[1:]])
    assert "shard" in kinds(check(index, quick=True))
    rejects = read_rejects(Location.parse(index), rewrite(index, shards=entries))
    rewrite(index, rejects=[replace(rejects[0], by_reason={"missing": 3})])
    assert "counts" in kinds(check(index))


def replace_shard(root: Path, number: int, table: pa.Table, *, grow: bool = False) -> None:
    """Swaps a shard's content and every count and checksum with it."""
    entries = shards_of(root)
    entry = write_shard(Location.parse(root), entries[number].path, table, row_group_rows=8)
    entries[number] = entry.with_live_rows(entries[number].live_rows + (table.num_rows - entries[number].num_rows))
    rewrite(root, shards=entries)
    manifest = read_manifest(Location.parse(root))
    counts = replace(manifest.counts, shard_bytes=sum(item.size_bytes for item in entries))
    save(root, replace(manifest, counts=counts))


def test_duplicate_id_across_shards(index: Path) -> None:
    table = pq.read_table(shard_paths(index)[1])
    other = pq.read_table(shard_paths(index)[2])["image_id"][3].as_py()
    ids = table["image_id"].to_pylist()
    ids[4] = other
    replace_shard(index, 1, table.set_column(0, table.field(0), pa.array(ids)))
    report = check(index)
    assert any(problem.kind == "duplicate" and repr(other) in problem.message for problem in report.problems)


def test_id_that_the_lookup_does_not_know(index: Path) -> None:
    table = pq.read_table(shard_paths(index)[1])
    ids = table["image_id"].to_pylist()
    ids[4] = ids[4] + "x"
    replace_shard(index, 1, table.set_column(0, table.field(0), pa.array(ids)))
    assert "lookup" in kinds(check(index))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tokens_that_are_not_finite(index: Path, value: float) -> None:
    codec = default_codec()
    path = shard_paths(index)[1]
    table = pq.read_table(path)
    payload = np.stack([np.frombuffer(item.as_py(), np.float16) for item in table["tokens"]]).copy()
    payload[3, 5] = value
    column = pa.array([row.tobytes() for row in payload], pa.binary(codec.payload_bytes))
    replace_shard(index, 1, table.set_column(1, table.field(1), column))
    report = check(index)
    assert kinds(report) == {"tokens"}
    assert "NaN" in report.problems[0].message


def test_damaged_lookup_and_rejects(index: Path) -> None:
    location = Location.parse(index)
    manifest = read_manifest(location)
    for path, kind in (
        (lookup_parts(location, manifest)[0].path, "lookup"),
        (read_rejects(location, manifest)[0].path, "rejects"),
        *((manifest.files[key].path, "list") for key in ("shards", "rejects", "ids", "tombstones")),
    ):
        file = index / path
        data = file.read_bytes()
        for place in (20, len(data) // 2, len(data) - 10):
            damaged = bytearray(data)
            damaged[place] ^= 0x10
            file.write_bytes(bytes(damaged))
            assert kind in kinds(check(index)), (path, place)
        file.unlink()
        assert kind in kinds(check(index, quick=True)), path
        file.write_bytes(data)
    assert kinds(check(index)) == set()


def test_lookup_that_points_at_another_row(index: Path) -> None:
    location = Location.parse(index)
    parts = lookup_parts(location, read_manifest(location))
    file = index / parts[0].path
    table = pq.read_table(file)
    rows = table["row"].to_pylist()
    rows[2], rows[3] = rows[3], rows[2]
    from edje_pipeline.storage.snapshot_files import LOOKUP_SCHEMA, write_list

    ref: FileRef = write_list(
        location, parts[0].path, table.set_column(2, table.field(2), pa.array(rows, pa.int32())), LOOKUP_SCHEMA
    )
    rewrite(index, parts=[replace(parts[0], size_bytes=ref.size_bytes, sha256=ref.sha256), *parts[1:]])
    assert "duplicate" in kinds(check(index))


def test_manifest_that_is_no_manifest(index: Path) -> None:
    (index / "manifest.json").write_text("{")
    assert kinds(check(index)) == {"manifest"}


def test_a_codebook_that_is_not_the_manifests(tmp_path: Path) -> None:
    sample = np.random.default_rng(0).standard_normal((300, 4, 8)).astype(np.float32)
    first, second = (
        codecs.train_pq(sample, 2, kind="pq", seed=seed)  # type: ignore[attr-defined]
        for seed in (0, 1)
    )
    location = Location.parse(tmp_path)
    codecs.save_codec(first, location)
    run_extract(tmp_path, IDS, codec=first)
    assert kinds(check(tmp_path)) == set()
    path = next((tmp_path / "codecs").iterdir())
    other = Location.parse(tmp_path / "other")
    codecs.save_codec(second, other)
    path.write_bytes(next((tmp_path / "other" / "codecs").iterdir()).read_bytes())
    assert "codec" in kinds(check(tmp_path))
    path.unlink()
    assert "codec" in kinds(check(tmp_path, quick=True))


@pytest.mark.slow
def test_no_false_alarm_on_a_hundred_good_indexes(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    names = ["float16", "int8", "int4"]
    for number in range(100):
        root = tmp_path / str(number)
        num = int(rng.integers(1, 40))
        ids = [f"{'ü/' * int(rng.integers(3))}{value:x}" for value in rng.permutation(1000)[:num]]
        options = {
            "codec": default_codec(names[number % 3]),
            "chunk": int(rng.integers(1, 20)),
            "row_group_rows": int(rng.integers(1, 20)),
            "embedding_dim": int(rng.choice([0, 3])),
            "part_rows": int(rng.integers(3, 60)),
        }
        rejected = [text for text in ids if rng.random() < rng.choice([0, 0.1, 1])]
        run_extract(root, ids, rejected=rejected, **options)
        if number % 4 == 0:
            more = [*ids[: num // 2], *(f"new{n}" for n in range(int(rng.integers(0, 5))))]
            if more:
                run_extract(root, more, mode="add", rejected=more[:1], version=1, **options)
        report = check(root, quick=bool(number % 5 == 0))
        assert report.problems == (), (number, options, report.to_text())
        assert Index.open(root).ids() is not None


def test_a_report_reads_well(index: Path) -> None:
    path = shard_paths(index)[0]
    path.unlink()
    text = check(index).to_text()
    assert text.startswith("problem: ")
    assert "1 problems" in text or "problems" in text
    with pytest.raises(EdjeError, match="missing"):
        Index.open(index).tokens([IDS[0]])
    assert shard_table([IDS[0]], default_codec()).num_rows == 1
