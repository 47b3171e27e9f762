"""Rollback, prune, delete, inspect: the library and the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import edje_pipeline.cli.index  # noqa: F401 - registers the commands
from edje_pipeline.cli.app import app
from edje_pipeline.errors import CorruptionError, IndexLockedError, IndexNotFoundError, IndexStateError
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.lock import IndexLock
from edje_pipeline.storage.snapshots import delete, prune, rollback
from edje_pipeline.storage.verify import verify
from tests.index_factory import run_extract, tokens_of

IDS = [f"x{number:03d}" for number in range(50)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "index"
    run_extract(path, IDS, rejected=["x001"])
    return path


def is_good(root: Path) -> bool:
    report = verify(Location.parse(root))
    assert report.problems == (), report.to_text()
    return True


def test_delete_rollback_and_forward(root: Path) -> None:
    location = Location.parse(root)
    before = Index.open(root)
    result = delete(location, ["x003", "x001", "x003", "who"])
    assert (result.num_deleted, result.num_unknown, result.unknown, result.exit_code) == (2, 1, ("who",), 3)
    index = Index.open(root)
    assert index.ids() == [text for text in IDS if text not in ("x001", "x003")]
    assert index.manifest.counts.rejected == 0
    assert len(before.ids()) == 49
    assert is_good(root)
    back = rollback(location)
    assert back.current == before.snapshot
    assert (root / "manifest.json").read_bytes() == (root / "snapshots" / back.current / "head.json").read_bytes()
    assert Index.open(root).ids() == before.ids()
    assert is_good(root)
    with pytest.raises(IndexStateError, match="is the first snapshot"):
        rollback(location)
    rollback(location, result.snapshot)
    assert "x003" not in Index.open(root)
    with pytest.raises(IndexNotFoundError, match="has no snapshot 'zzz'; there are: 000001"):
        rollback(location, "zzz")
    with pytest.raises(IndexNotFoundError):
        rollback(location, "../../etc")


def test_deleting_nothing_known_publishes_nothing(root: Path) -> None:
    before = (root / "manifest.json").read_bytes()
    result = delete(Location.parse(root), ["who", "what"])
    assert (result.num_deleted, result.num_unknown) == (0, 2)
    assert (root / "manifest.json").read_bytes() == before
    assert len(list((root / "snapshots").iterdir())) == 1
    assert is_good(root)


def test_prune_keeps_what_is_needed(root: Path) -> None:
    location = Location.parse(root)
    run_extract(root, ["y1", "y2"], mode="add")
    run_extract(root, ["a", "b", "c"])
    assert len(list((root / "shards").iterdir())) == 5
    dry = prune(location, keep=1, dry_run=True)
    assert len(dry.dropped) == 1
    assert len(list((root / "snapshots").iterdir())) == 3
    prune(location, keep=1)
    assert len(list((root / "shards").iterdir())) == 5
    assert is_good(root)
    rollback(location)
    assert len(Index.open(root)) == 51
    assert is_good(root)
    result = prune(location)
    assert len(result.kept) == 1
    assert len(list((root / "shards").iterdir())) == 4
    np.testing.assert_array_equal(Index.open(root).tokens(["x004"])[0], tokens_of("x004").astype(np.float32))
    assert is_good(root)


def test_prune_keeps_lookup_files_that_a_later_snapshot_names(tmp_path: Path) -> None:
    run_extract(tmp_path, [f"{number:04d}" for number in range(300)], part_rows=100)
    run_extract(tmp_path, ["9"], mode="add", part_rows=100)
    prune(Location.parse(tmp_path))
    index = Index.open(tmp_path)
    assert len(index.ids()) == 301
    assert len({path.parent.name for path in tmp_path.glob("snapshots/*/ids-*.parquet")}) == 2
    assert is_good(tmp_path)
    run_extract(tmp_path, ["only"])
    prune(Location.parse(tmp_path))
    assert len(list((tmp_path / "snapshots").iterdir())) == 1


def test_rollback_to_a_damaged_snapshot_changes_nothing(root: Path) -> None:
    run_extract(root, ["a"])
    first = Index.open(root, min(path.name for path in (root / "snapshots").iterdir()))
    (root / first.shards[0].path).unlink()
    with pytest.raises(CorruptionError, match="gone; nothing was changed"):
        rollback(Location.parse(root))
    assert Index.open(root).ids() == ["a"]


def test_a_locked_index_is_not_changed(root: Path) -> None:
    location = Location.parse(root)
    with IndexLock(location, purpose="extract"):
        for action in (lambda: delete(location, ["x003"]), lambda: prune(location), lambda: rollback(location)):
            with pytest.raises(IndexLockedError):
                action()


def run_cli(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.output


def test_commands(root: Path, tmp_path: Path) -> None:
    code, text = run_cli("verify", str(root), "--quiet")
    assert code == 0
    assert "good" in text
    code, text = run_cli("inspect", str(root))
    assert code == 0
    assert "49 accepted, 1 rejected, 50 listed" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    code, text = run_cli("inspect", str(root), "--format", "json")
    assert json.loads(text)["manifest"]["counts"]["accepted"] == 49
    ids = tmp_path / "gone.txt"
    ids.write_text("x010\nx011\n")
    code, text = run_cli("delete", str(root), "--ids", str(ids), "--format", "json")
    assert (code, json.loads(text)["num_deleted"]) == (0, 2)
    code, text = run_cli("rollback", str(root))
    assert code == 0, text
    code, text = run_cli("prune", str(root))
    assert code == 0
    assert "Dropped 1 snapshots" in text
    next((root / "shards").iterdir()).unlink()
    code, text = run_cli("verify", str(root), "--quick", "--format", "json")
    assert code == 1
    assert json.loads(text)["problems"][0]["kind"] == "shard"
    code, text = run_cli("verify", str(root / "nope"))
    assert code == 1
    assert "does not exist" in text


@pytest.mark.parametrize("name", ["verify", "inspect", "rollback", "prune", "delete"])
def test_help_has_examples(name: str) -> None:
    code, text = run_cli(name, "--help")
    assert code == 0
    assert f"edje-pipeline {name}" in text
