"""A run killed anywhere, then the same command again: nothing lost, nothing doubled, nothing done twice.

The exact points are killed with the local executor (same workers, journal and publish as with ray);
the same promise with ray, its actors and tasks stands in tests/ray/test_kill_ray.py.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edje_pipeline.models.random_model import write_random_model
from tests.extract_util import (
    assert_sound,
    contents,
    finish,
    journalled_rows,
    kill_group,
    run_cli,
    start_cli,
    wait_until,
    write_corpus,
)

NUM_IMAGES, NUM_BAD, UNIT = 44, 2, 8
NUM_LISTED = NUM_IMAGES + NUM_BAD

LISTING = ["staging.created:1", "listing.batch:4", "listing.done:1"]
WORKING = ["stage.decode:2", "stage.encode:1", "stage.encode:3", "stage.write:5"]
WRITING = ["write.begin:2", "write.middle:4", "write.done:5"]
JOURNALLING = ["journal.begin:4", "journal.done:1", "journal.done:6"]
PUBLISHING = [
    "publish.begin:1", "publish.lookup:1", "publish.lists:1", "publish.head:1", "publish.swapped:1",
    "publish.cleaning:1", "publish.cleaned:1",
]  # fmt: skip
POINTS = LISTING + WORKING + WRITING + JOURNALLING + PUBLISHING


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """A corpus, a model, and the contents of an index made without interruption."""
    root = tmp_path_factory.mktemp("kill")
    corpus = write_corpus(root / "corpus", NUM_IMAGES, NUM_BAD)
    write_random_model(root / "model", size="tiny")
    ended = run_cli(*command(corpus, root / "model", root / "reference"))
    assert ended.returncode == 3, ended.stderr
    assert ended.result["num_computed"] == NUM_LISTED
    expected = contents(root / "reference")
    assert_sound(root / "reference", expected, NUM_BAD)
    return corpus, root / "model", expected


def command(corpus: Path, model: Path, index: Path) -> list[object]:
    return [
        "extract", corpus, "--index", index, "--model", model, "--executor", "local", "--num-cpus", 2,
        "--batch-size", UNIT, "--shard-rows", UNIT, "--format", "json",
    ]  # fmt: skip


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point_then_run_again(world: tuple[Path, Path, dict[str, str]], tmp_path: Path, point: str) -> None:
    corpus, model, expected = world
    index = tmp_path / "index"
    killed = run_cli(*command(corpus, model, index), env={"EDJE_CRASH_AT": point})
    assert killed.returncode == -signal.SIGKILL, (killed.returncode, killed.stderr)
    assert killed.stdout == ""
    finished_rows = journalled_rows(index)
    was_swapped = (index / "manifest.json").exists()
    assert was_swapped == (point in PUBLISHING[4:])
    ended = run_cli(*command(corpus, model, index))
    result = ended.result
    if point.startswith("publish.cleaned"):
        # Nothing is left of the run: the command is a new one, which only tries the rejects again.
        assert ended.returncode == 3, ended.stderr
        assert (result["num_computed"], result["num_rejected"]) == (NUM_BAD, NUM_BAD)
        assert result["num_unchanged"] == NUM_IMAGES
    elif was_swapped:
        # Only the clean-up is left.
        assert result["num_computed"] == 0
        assert ended.returncode == 3, ended.stderr
    else:
        assert ended.returncode == 3, ended.stderr
        assert result["num_resumed"] == finished_rows
        assert result["num_computed"] == NUM_LISTED - finished_rows
        assert result["num_accepted"] + result["num_rejected"] == result["num_listed"] == NUM_LISTED
    if point in PUBLISHING[:-1]:
        assert result["num_computed"] == 0
    assert_sound(index, expected, NUM_BAD)


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments_until_it_is_done(
    world: tuple[Path, Path, dict[str, str]], tmp_path: Path, seed: int
) -> None:
    corpus, model, expected = world
    index = tmp_path / "index"
    rng = random.Random(seed)
    done_before = 0
    for _ in range(3):
        process = start_cli(*command(corpus, model, index))
        wanted = rng.randrange(NUM_LISTED // 2)
        wait_until(lambda: journalled_rows(index) >= min(wanted, done_before + UNIT), process)  # noqa: B023
        time.sleep(rng.random() * 0.2)
        kill_group(process)
        finish(process)
        if not list(index.glob("staging/*/run.json")):
            break  # it was faster than its killer
        assert journalled_rows(index) >= done_before
        done_before = journalled_rows(index)
    ended = run_cli(*command(corpus, model, index))
    assert ended.returncode in (0, 3), ended.stderr
    if ended.result["num_listed"] == NUM_LISTED and ended.result["num_unchanged"] == 0:
        assert ended.result["num_resumed"] >= done_before
    assert_sound(index, expected, NUM_BAD)


def test_a_damaged_staged_shard_is_computed_again(world: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    corpus, model, expected = world
    index = tmp_path / "index"
    run_cli(*command(corpus, model, index), env={"EDJE_CRASH_AT": "journal.done:4"})
    finished_rows = journalled_rows(index)
    shards = sorted((index / "shards").glob("*.parquet"))
    data = bytearray(shards[0].read_bytes())
    data[len(data) // 2] ^= 1
    shards[0].write_bytes(data)
    shards[1].unlink()
    ended = run_cli(*command(corpus, model, index))
    assert ended.returncode == 3, ended.stderr
    assert any("damaged" in note for note in ended.result["notes"])
    assert finished_rows - 3 * UNIT <= ended.result["num_resumed"] < finished_rows
    assert_sound(index, expected, NUM_BAD)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_is_clean_and_resumable(
    world: tuple[Path, Path, dict[str, str]], tmp_path: Path, number: int
) -> None:
    corpus, model, expected = world
    index = tmp_path / "index"
    process = start_cli(*command(corpus, model, index))
    assert wait_until(lambda: journalled_rows(index) >= UNIT, process)
    process.send_signal(number)
    ended = finish(process)
    if ended.returncode == 3:
        pytest.skip("the run ended before the signal arrived")
    assert ended.returncode == 130, ended.stderr
    assert "run the same command again" in ended.error_line
    finished_rows = journalled_rows(index)
    again = run_cli(*command(corpus, model, index))
    assert again.result["num_resumed"] == finished_rows > 0
    assert_sound(index, expected, NUM_BAD)


def test_the_second_of_two_runs_refuses(world: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    corpus, model, expected = world
    index = tmp_path / "index"
    first = start_cli(*command(corpus, model, index))
    try:
        assert wait_until(lambda: bool(list(index.glob("staging/*/run.json"))), first)
        first.send_signal(signal.SIGSTOP)
        second = run_cli(*command(corpus, model, index))
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert f"in use by process {first.pid}" in second.error_line
    assert finish(first).returncode == 3
    assert_sound(index, expected, NUM_BAD)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 kB that is really full when it is full."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", mount], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"cannot mount a small tmpfs here: {made.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=False)


def test_a_full_disk_is_one_line_and_resumable(world: tuple[Path, Path, dict[str, str]], small_disk: Path) -> None:
    corpus, model, expected = world
    index = small_disk / "index"
    filler = small_disk / "filler"
    filler.write_bytes(b"0" * (80 << 10))
    ended = run_cli(*command(corpus, model, index))
    assert ended.returncode == 1, ended.stdout
    assert "the disk is full" in ended.error_line
    finished_rows = journalled_rows(index)
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    again = run_cli(*command(corpus, model, index))
    assert again.returncode == 3, again.stderr
    assert again.result["num_resumed"] == finished_rows
    assert_sound(index, expected, NUM_BAD)


def test_a_file_size_limit_is_reported(world: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    """Where no file system can be mounted, a limit on file sizes shows the same path."""
    corpus, model, _ = world
    index = tmp_path / "index"
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("needs bash for ulimit")
    from tests.extract_util import COMMAND

    script = 'ulimit -f 1; trap "" XFSZ; exec "$@"'
    process = subprocess.run(
        [shell, "-c", script, "bash", os.sys.executable, "-c", COMMAND, *map(str, command(corpus, model, index))],  # type: ignore[attr-defined]
        capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.returncode == 1, process.stdout
    assert "error: cannot write" in process.stderr
    assert "Traceback" not in process.stderr
