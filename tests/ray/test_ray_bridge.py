"""What the bridge asks of ray, and what it says of the machine."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from edje_pipeline.pipeline import ray_bridge
from edje_pipeline.pipeline.stages import Stage
from edje_pipeline.pipeline.workers import UNIT_SCHEMA

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::Warning")]


class PassOn:
    """A worker that needs nothing."""

    def __init__(self, job: Any) -> None:
        del job

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        yield table


def test_decoding_finds_a_cpu_on_a_machine_with_as_many_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray only counts the GPU: nothing of it is used. Where the actor took the one CPU, this waited for ever."""
    monkeypatch.setattr(ray_bridge, "NO_PROGRESS_S", 90.0)  # then it fails
    units = pa.table({"unit": [0, 1, 2], "ranges": [[0, 1], [1, 2], [2, 3]]}, UNIT_SCHEMA)
    stages = [
        Stage("decode", PassOn, "task", None, 1, num_cpus=1.0),
        Stage("encode", PassOn, "actor", 1, 1, num_gpus=1.0),
        Stage("write", PassOn, "task", 1, 1, num_cpus=0.25),
    ]
    job: Any = "no job"
    with ray_bridge.session(num_cpus=1, num_gpus=1) as cluster:
        assert (cluster.machine.num_cpus, cluster.machine.num_gpus) == (1, 1)
        tables = list(ray_bridge.run_stages(stages, job, units, block_bytes=1 << 20))
    assert sorted(unit for table in tables for unit in table.column("unit").to_pylist()) == [0, 1, 2]


def test_little_shared_memory_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    with caplog.at_level(logging.WARNING, "edje_pipeline"):
        ray_bridge.warn_of_small_shared_memory(1 << 30)
    assert "/dev/shm has 67.1 MB free, ray wants 1.1 GB" in caplog.text
    caplog.clear()
    ray_bridge.warn_of_small_shared_memory(32 << 20)
    assert not caplog.text
