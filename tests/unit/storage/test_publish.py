"""Publish: what becomes visible, what replaces what, and what a kill at any moment leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from edje_pipeline.errors import CorruptionError, DuplicateIdError, IndexStateError
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.manifest import find_manifest
from edje_pipeline.storage.publish import publish
from edje_pipeline.storage.staging import Staging
from edje_pipeline.storage.verify import verify
from tests.index_factory import default_codec, fingerprints_of, head_of, run_extract, tokens_of, write_chunk

REPO = Path(__file__).parents[3]


def all_files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def assert_good(root: Path) -> None:
    report = verify(Location.parse(root))
    assert report.problems == (), report.to_text()


def test_new_then_add_then_new(tmp_path: Path) -> None:
    first = [f"x{number:03d}" for number in range(95)]
    run_extract(tmp_path, first, rejected=["x010", "x011"], part_rows=30)
    old = Index.open(tmp_path)
    assert len(old) == 93
    assert old.ids() == sorted(set(first) - {"x010", "x011"})
    removed = pa.table({"image_id": ["x020", "x011"], "reason": ["missing", "missing"]})
    manifest = run_extract(
        tmp_path,
        ["z001", "x005", "x010", "x006"],
        mode="add",
        rejected=["x006"],
        version=1,
        removed=removed,
        part_rows=30,
    )
    index = Index.open(tmp_path)
    # x010 was a reject and is now live, x011 was a reject and is gone, x006 was live and is now a reject.
    assert index.ids() == sorted((set(old.ids()) | {"z001", "x010"}) - {"x020", "x006"})
    assert manifest.counts.rejected == 1
    assert manifest.counts.listed == manifest.counts.accepted + 1
    assert manifest.counts.tombstones == 3
    np.testing.assert_array_equal(index.tokens(["x005"])[0], tokens_of("x005", 1).astype(np.float32))
    np.testing.assert_array_equal(old.tokens(["x005"])[0], tokens_of("x005", 0).astype(np.float32))
    seen = [
        text for view in index.iter_shards() for _, table in view.tables(["image_id"]) for text in table[0].to_pylist()
    ]
    assert sorted(seen) == index.ids()
    assert_good(tmp_path)
    run_extract(tmp_path, ["a", "b"])
    assert Index.open(tmp_path).ids() == ["a", "b"]
    assert "x020" in old.ids()
    assert_good(tmp_path)


def test_duplicate_ids_across_shards_are_an_error_and_publish_nothing(tmp_path: Path) -> None:
    with pytest.raises(DuplicateIdError, match=r"'same'.*shards/.*shards/"):
        run_extract(tmp_path, ["a", "same", "b", "same"], chunk=2)
    assert find_manifest(Location.parse(tmp_path)) is None


def test_untouched_lookup_files_are_named_again(tmp_path: Path) -> None:
    run_extract(tmp_path, [f"x{number:04d}" for number in range(400)], part_rows=100, chunk=100)
    run_extract(tmp_path, ["x0399b"], mode="add", part_rows=100)
    folders = {path.split("/")[1][:6] for path in all_files(tmp_path / "snapshots") | {"0/0"} if "ids-" in path}
    index = Index.open(tmp_path)
    assert len(index.ids()) == 401
    written = [path for path in all_files(tmp_path / "snapshots") if path.startswith("000002") and "ids-" in path]
    assert len(written) == 1, (written, folders)
    assert_good(tmp_path)


def test_refuses_rows_that_are_missing(tmp_path: Path) -> None:
    codec = default_codec()
    with Staging.begin(Location.parse(tmp_path), fingerprints=fingerprints_of(codec), config={}) as staging:
        staging.set_plan_info({"num_rows": 4})
        staging.journal([write_chunk(staging, ["a", "b"], 0, codec)])
        with pytest.raises(IndexStateError, match="2 of 4 rows still to do, the first is row 2"):
            publish(staging, head=head_of(codec), mode="new")


def test_add_refuses_tokens_of_another_kind(tmp_path: Path) -> None:
    run_extract(tmp_path, ["a"])
    with pytest.raises(IndexStateError, match="codec"):
        run_extract(tmp_path, ["b"], mode="add", codec=default_codec("int8"))
    assert Index.open(tmp_path).ids() == ["a"]


def test_many_parts_need_no_more_memory_than_a_few(tmp_path: Path) -> None:
    ids = [f"{number * 7919 % 100_003:06d}" for number in range(3000)]
    run_extract(tmp_path, ids, part_rows=200, chunk=500, row_group_rows=256)
    index = Index.open(tmp_path)
    assert index.ids() == sorted(ids)
    asked = [ids[5], "nope", ids[2999], ids[5]]
    shards, _rows = index.locate(asked)
    assert (shards >= 0).tolist() == [True, False, True, True]
    assert len(list((tmp_path / "snapshots").glob("*/ids-*.parquet"))) >= 10
    assert_good(tmp_path)


def run_process(root: Path, mode: str, crash_at: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.crash_run", str(root), "60", mode],
        cwd=REPO,
        env={**os.environ, "EDJE_CRASH_AT": crash_at},
        capture_output=True,
        text=True,
        timeout=120,
    )


CRASHES = [
    ("new", "staging.created:1"),
    ("new", "write.begin:2"),
    ("new", "write.middle:2"),
    ("new", "journal.begin:2"),
    ("new", "journal.done:3"),
    ("new", "publish.begin:1"),
    ("new", "publish.rejects:1"),
    ("new", "publish.lists:1"),
    ("new", "publish.head:1"),
    ("new", "publish.swapped:1"),
    ("new", "publish.cleaned:1"),
    ("add", "write.done:1"),
    ("add", "publish.lookup:1"),
    ("add", "publish.swapped:1"),
    ("add", "publish.cleaning:1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "crash_at"), CRASHES)
def test_a_kill_at_any_point_then_the_same_command(tmp_path: Path, mode: str, crash_at: str) -> None:
    base = [f"x{number:04d}" for number in range(60)]
    before: list[str] = []
    if mode == "add":
        before = run_extract(tmp_path, base, rejected=["x0007", "x0030"], part_rows=25) and Index.open(tmp_path).ids()
    killed = run_process(tmp_path, mode, crash_at)
    assert killed.returncode == -9, killed.stderr
    # A reader sees the old state or the new one, never anything between.
    if before or find_manifest(Location.parse(tmp_path)):
        assert len(Index.open(tmp_path)) in (58, 116)
        assert Index.open(tmp_path).ids()
    # After the last step nothing is unfinished, so running again is a new run, not a resume.
    again = run_process(tmp_path, mode)
    assert again.returncode == 0, again.stderr
    index = Index.open(tmp_path)
    plan = base if mode == "new" else [f"y{number:04d}" for number in range(60)]
    lost = {"x0007", "x0030", "y0007", "y0030"}
    assert index.ids() == sorted(({*plan, *before}) - lost)
    expected = np.stack([tokens_of(text).astype(np.float32) for text in index.ids()])
    np.testing.assert_array_equal(index.tokens(index.ids()), expected)
    assert_good(tmp_path)
    if crash_at != "publish.cleaned:1":
        assert len(list((tmp_path / "snapshots").iterdir())) == (1 if mode == "new" else 2)
    assert not list((tmp_path / "staging").iterdir())
    assert not list(tmp_path.rglob(".tmp-*"))


def test_receipts_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    codec = default_codec()
    with Staging.begin(Location.parse(tmp_path), fingerprints=fingerprints_of(codec), config={}) as staging:
        receipt = write_chunk(staging, ["a", "b"], 0, codec)
        broken = type(receipt)(((0, 3),), receipt.shard)
        with pytest.raises(CorruptionError, match="covers 3 rows"):
            staging.journal([broken])


@pytest.mark.slow
@pytest.mark.parametrize("crash_at", ["publish.lookup:1", "publish.head:1", "publish.swapped:1"])
def test_a_deletion_that_is_killed(tmp_path: Path, crash_at: str) -> None:
    base = [f"x{number:04d}" for number in range(60)]
    run_extract(tmp_path, base, rejected=["x0007", "x0030"], part_rows=25)
    killed = run_process(tmp_path, "delete", crash_at)
    assert killed.returncode == -9, killed.stderr
    again = run_process(tmp_path, "delete")
    assert again.returncode == 0, again.stderr
    assert Index.open(tmp_path).ids() == sorted({*base} - {"x0003", "x0007", "x0030", "x0059"})
    assert len(list((tmp_path / "snapshots").iterdir())) == 2
    assert not list((tmp_path / "staging").iterdir())
    assert_good(tmp_path)
