"""Resume, mismatch, damaged receipts, and the lock."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from pathlib import Path

import pytest

from edje_pipeline.errors import (
    FormatVersionError,
    IndexLockedError,
    IndexStateError,
    ResumeMismatchError,
    StorageError,
)
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.lock import IndexLock
from edje_pipeline.storage.staging import Receipt, Staging
from edje_pipeline.storage.verify import verify
from tests.index_factory import default_codec, fingerprints_of, run_extract, write_chunk

CODEC = default_codec()


def begin(root: Path, *, restart: bool = False, **changes: str) -> Staging:
    return Staging.begin(
        Location.parse(root), fingerprints={**fingerprints_of(CODEC), **changes}, config={"limit": 3}, restart=restart
    )


def start_run(root: Path) -> list[Receipt]:
    with begin(root) as staging:
        staging.set_plan_info({"num_rows": 6})
        return staging.journal(
            [
                write_chunk(staging, ["a", "b"], 0, CODEC),
                write_chunk(staging, ["c", "d"], 2, CODEC, rejected=frozenset("d")),
            ]
        )


def test_resume_knows_what_is_done(tmp_path: Path) -> None:
    taken = start_run(tmp_path)
    with begin(tmp_path) as staging:
        assert staging.is_resumed
        assert staging.receipts == taken
        assert staging.covered.missing(6) == [(4, 6)]
        assert staging.plan_info == {"num_rows": 6}
        assert staging.verify_staged() == []
    report = verify(Location.parse(with_published_files(tmp_path)))
    assert report.unfinished_runs == (staging.run_id,)
    assert report.problems == ()


def with_published_files(root: Path) -> Path:
    """`root` with the files of another, published index beside its unfinished run."""
    other = root.parent / "other"
    run_extract(other, ["z"])
    for path in other.rglob("*"):
        target = root / path.relative_to(other)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif path.name != ".lock":
            target.write_bytes(path.read_bytes())
    return root


def test_a_receipt_for_covered_rows_is_not_taken(tmp_path: Path) -> None:
    start_run(tmp_path)
    with begin(tmp_path) as staging:
        again = write_chunk(staging, ["b", "c"], 1, CODEC)
        fresh = write_chunk(staging, ["e", "f"], 4, CODEC)
        twin = write_chunk(staging, ["e", "f"], 4, CODEC)
        assert staging.journal([again, fresh, twin]) == [fresh]
        staging.forget_receipts([again, twin])
        assert staging.covered.missing(6) == []
    assert len(list((tmp_path / "shards").iterdir())) == 3


@pytest.mark.parametrize("part", ["corpus", "backbone", "preprocess", "adapter", "codec", "joint_encoder"])
def test_another_input_is_refused_and_named(tmp_path: Path, part: str) -> None:
    start_run(tmp_path)
    with pytest.raises(ResumeMismatchError, match=rf"another {part} .*--restart"):
        begin(tmp_path, **{part: "0" * 64})
    with begin(tmp_path, restart=True, **{part: "0" * 64}) as staging:
        assert not staging.is_resumed
        assert staging.covered.num_rows == 0
    assert list((tmp_path / "shards").iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_staged_file_costs_its_rows_only(tmp_path: Path, damage: str) -> None:
    taken = start_run(tmp_path)
    assert taken[1].rejects is not None
    path = tmp_path / taken[1].rejects.path
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[40] ^= 1
        path.write_bytes(bytes(data[:-1] if damage == "truncate" else data))
    with begin(tmp_path) as staging:
        assert staging.verify_staged(full=damage == "flip") == [taken[1]]
        assert staging.covered.missing(6) == [(2, 6)]
    with begin(tmp_path) as staging:
        assert staging.covered.missing(6) == [(2, 6)]


@pytest.mark.parametrize("text", ["", "{", '{"receipts": 5}', '{"receipts": [{"shard": 3}]}', "[" * 100_000])
def test_a_damaged_journal_file_costs_its_rows_only(tmp_path: Path, text: str) -> None:
    start_run(tmp_path)
    with begin(tmp_path) as staging:
        staging.journal([write_chunk(staging, ["e", "f"], 4, CODEC)])
    first = next(tmp_path.glob("staging/*/receipts/00000000.json"))
    first.write_text(text)
    with begin(tmp_path) as staging:
        assert staging.covered.missing(6) == [(0, 4)]


def test_a_receipt_that_leaves_the_index_is_not_believed(tmp_path: Path) -> None:
    start_run(tmp_path)
    first = next(tmp_path.glob("staging/*/receipts/00000000.json"))
    first.write_text(first.read_text().replace('"path": "shards/', '"path": "../../shards/'))
    with begin(tmp_path) as staging:
        assert staging.covered.num_rows == 0


def test_the_second_run_is_refused_by_name(tmp_path: Path) -> None:
    with begin(tmp_path), pytest.raises(IndexLockedError, match=rf"process {os.getpid()} on .*\(extract\)"):
        begin(tmp_path)
    with begin(tmp_path):
        pass


def _hold(root: str, ready: object, go: object) -> None:
    with IndexLock(Location.parse(root), purpose="other"):
        ready.set()  # type: ignore[attr-defined]
        go.wait(60)  # type: ignore[attr-defined]


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready, go))
    process.start()
    assert ready.wait(60)
    with pytest.raises(IndexLockedError, match=rf"process {process.pid} .*\(other\)"):
        begin(tmp_path)
    process.kill()
    process.join()
    begin(tmp_path).release()


def test_a_read_only_target_is_one_clear_line(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("not a directory")
    with pytest.raises(StorageError) as caught:
        begin(target / "index")
    assert re.match(r"cannot write .*file/index", str(caught.value))


def test_a_newer_index_is_not_written_to(tmp_path: Path) -> None:
    run_extract(tmp_path, ["a"])
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(FormatVersionError, match="version 2, this program reads version 1"):
        begin(tmp_path)
    with pytest.raises(FormatVersionError):
        Index.open(tmp_path)


def test_a_run_killed_while_tidying_up_is_known_as_published(tmp_path: Path) -> None:
    manifest = run_extract(tmp_path, ["a", "b"])
    folder = tmp_path / "staging" / manifest.run_id / "receipts"
    folder.mkdir(parents=True)
    with begin(tmp_path) as staging:
        assert staging.already_published == manifest
        with pytest.raises(IndexStateError, match="is published"):
            staging.journal([])
    assert list((tmp_path / "staging").iterdir()) == []
    with begin(tmp_path) as staging:
        assert staging.already_published is None


def test_a_codebook_trained_on_the_way_does_not_hide_a_published_run(tmp_path: Path) -> None:
    """The run began with the codec's name as its fingerprint; the manifest has the trained one."""
    manifest = run_extract(tmp_path, ["a", "b"])
    folder = tmp_path / "staging" / manifest.run_id
    folder.mkdir(parents=True)
    begun = {**fingerprints_of(CODEC), "codec": "untrained"}
    run = {"run_id": manifest.run_id, "kind": "run", "fingerprints": begun}
    (folder / "run.json").write_text(json.dumps(run))
    with begin(tmp_path, codec="untrained") as staging:
        assert staging.already_published == manifest
