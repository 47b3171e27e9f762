"""Kill the driver, an encode actor, a decode task of a real Ray run; then the same command again."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import psutil
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

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_IMAGES, NUM_BAD, UNIT = 158, 2, 8
NUM_LISTED = NUM_IMAGES + NUM_BAD


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """A corpus, a model, and the contents of an index made without interruption and without ray."""
    root = tmp_path_factory.mktemp("killray")
    corpus = write_corpus(root / "corpus", NUM_IMAGES, NUM_BAD)
    write_random_model(root / "model", size="tiny")
    ended = run_cli(*command(corpus, root / "model", root / "reference"), "--executor", "local")
    assert ended.returncode == 3, ended.stderr
    return corpus, root / "model", contents(root / "reference")


def command(corpus: Path, model: Path, index: Path, address: str | None = None) -> list[object]:
    joined = ["--ray-address", address] if address else []
    return [
        "extract", corpus, "--index", index, "--model", model, "--num-cpus", 2, "--batch-size", UNIT,
        "--shard-rows", UNIT, "--format", "json", *joined,
    ]  # fmt: skip


def finish_it(arguments: list[object], index: Path, expected: dict[str, str]) -> None:
    """Runs the same command again and checks that only the missing part is computed."""
    finished_rows = journalled_rows(index)
    was_published = (index / "manifest.json").exists()
    ended = run_cli(*arguments, timeout_s=180)
    assert ended.returncode in (0, 3), ended.stderr
    if was_published:
        assert ended.result["num_accepted"] in (0, NUM_IMAGES)
        assert ended.result["num_computed"] <= NUM_BAD
    else:
        assert ended.result["num_resumed"] == finished_rows
        assert ended.result["num_computed"] == NUM_LISTED - finished_rows
    assert_sound(index, expected, NUM_BAD)


@pytest.mark.parametrize(
    ("point", "rows_at_least"), [("journal.begin:3", UNIT), ("journal.done:5", UNIT), ("publish.swapped:1", 0)]
)
def test_driver_killed_at_a_point(
    world: tuple[Path, Path, dict[str, str]], ray_address: str, tmp_path: Path, point: str, rows_at_least: int
) -> None:
    corpus, model, expected = world
    arguments = command(corpus, model, tmp_path / "index", ray_address)
    killed = run_cli(*arguments, env={"EDJE_CRASH_AT": point}, timeout_s=180)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert journalled_rows(tmp_path / "index") >= rows_at_least
    finish_it(arguments, tmp_path / "index", expected)


@pytest.mark.parametrize("seed", range(4))
def test_driver_killed_at_a_random_moment(
    world: tuple[Path, Path, dict[str, str]], ray_address: str, tmp_path: Path, seed: int
) -> None:
    corpus, model, expected = world
    index = tmp_path / "index"
    arguments = command(corpus, model, index, ray_address)
    rng = random.Random(seed)
    wanted = [0, UNIT, NUM_LISTED // 3, NUM_LISTED // 2][seed]
    process = start_cli(*arguments)
    wait_until(lambda: bool(list(index.glob("staging/*/plan_info.json"))), process)
    wait_until(lambda: journalled_rows(index) >= wanted, process)
    time.sleep(rng.random() * (6 if wanted == 0 else 0.1))
    kill_group(process)
    finish(process)
    finish_it(arguments, index, expected)


def _workers(index: Path, name: str) -> list[psutil.Process]:
    """Ray workers of this machine whose title has `name`, newest first."""
    found = []
    for process in psutil.process_iter(["name", "cmdline", "create_time"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::") and name in title:
            found.append(process)
    return sorted(found, key=lambda process: -process.info["create_time"])


@pytest.mark.parametrize("name", ["MapWorker", "MapBatches"])
def test_a_killed_worker_costs_nothing(
    world: tuple[Path, Path, dict[str, str]], ray_address: str, tmp_path: Path, name: str
) -> None:
    """An encode actor (MapWorker) or a task process dies in the middle: ray starts another one."""
    corpus, model, expected = world
    index = tmp_path / "index"
    process = start_cli(*command(corpus, model, index, ray_address))
    victims: list[int] = []

    def kill_one() -> bool:
        for worker in _workers(index, name):
            if worker.is_running() and (name != "MapBatches" or "MapWorker" not in " ".join(worker.cmdline())):
                victims.append(worker.pid)
                worker.kill()
                return True
        return False

    assert wait_until(lambda: bool(list(index.glob("staging/*/plan_info.json"))), process)
    if name == "MapWorker":
        assert wait_until(lambda: journalled_rows(index) >= UNIT, process)
    assert wait_until(kill_one, process), "no such worker was seen"
    ended = finish(process, 180)
    assert victims
    assert ended.returncode == 3, ended.stderr
    assert ended.result["num_computed"] == NUM_LISTED
    assert_sound(index, expected, NUM_BAD)


def test_a_worker_that_always_dies_ends_the_run_and_loses_nothing(
    world: tuple[Path, Path, dict[str, str]], ray_address: str, tmp_path: Path
) -> None:
    corpus, model, expected = world
    index = tmp_path / "index"
    arguments = command(corpus, model, index, ray_address)
    ended = run_cli(*arguments, env={"EDJE_CRASH_AT": "stage.write:1"}, timeout_s=240)
    assert ended.returncode == 1, ended.stdout
    assert "run the same command again" in ended.error_line
    finish_it(arguments, index, expected)


def test_a_cluster_of_its_own_ends_with_the_run(world: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    corpus, model, expected = world
    index = tmp_path / "index"
    arguments = command(corpus, model, index)
    process = start_cli(*arguments)
    assert wait_until(lambda: journalled_rows(index) >= UNIT, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(signal.SIGINT)
    ended = finish(process, 60)
    if ended.returncode != 3:
        assert ended.returncode == 130, ended.stderr
        assert "interrupted; run the same command again" in ended.error_line
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    finish_it(arguments, index, expected)
