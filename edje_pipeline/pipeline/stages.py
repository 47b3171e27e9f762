"""A run as an ordered list of stages, and which machinery may run it. No ray here."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from edje_pipeline.pipeline.job import Job
from edje_pipeline.pipeline.workers import EncodeWorker, ReadDecodeWorker, Worker, WriteWorker

THREADS_PER_ENCODER = 8
"""On a CPU: torch's matrix products stop gaining beyond about this many threads."""


@dataclass(frozen=True)
class Stage:
    """One step: what makes its worker, and what a worker needs."""

    name: str
    make_worker: Callable[[Job], Worker]
    kind: Literal["task", "actor"]
    """An actor keeps its worker (loaded models); a task's worker is cheap to make."""
    batch_rows: int | None
    """Rows gathered for one call; None takes what comes."""
    num_workers: int
    """Workers at once: actors in all, or the most tasks that the CPUs allow."""
    num_cpus: float = 0.0
    num_gpus: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What a run may use."""

    num_cpus: int
    num_gpus: int = 0

    @property
    def num_encoders(self) -> int:
        """One an accelerator; on CPUs one for every THREADS_PER_ENCODER cores."""
        return self.num_gpus or max(1, self.num_cpus // THREADS_PER_ENCODER)

    @property
    def threads_per_encoder(self) -> int:
        """Torch threads of each; with GPUs they only feed the device."""
        if self.num_gpus:
            return max(1, min(4, self.num_cpus // self.num_gpus))
        return max(1, self.num_cpus // self.num_encoders)


def available_cpus() -> int:
    """Cores that this process may use, cgroup quota included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as stream:
            quota, period = stream.read().split()
        if quota != "max":
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores


def extract_stages(job: Job, machine: Machine) -> list[Stage]:
    """decode -> encode -> write.

    Without a GPU the encoders hold half of the CPUs as ray counts them (their threads use them all
    when there is work), so that decoding and writing always find room and nothing can block.
    """
    encode_cpus = 0.0 if machine.num_gpus else machine.num_cpus / 2 / machine.num_encoders
    decode_cpus = 1.0 if machine.num_gpus or machine.num_cpus >= 8 else 0.25
    return [
        Stage("decode", ReadDecodeWorker, "task", None, machine.num_cpus, num_cpus=decode_cpus),
        Stage(
            "encode",
            EncodeWorker,
            "actor",
            job.unit_rows,
            machine.num_encoders,
            num_cpus=encode_cpus,
            num_gpus=1.0 if machine.num_gpus else 0.0,
        ),
        write_stage(job, machine),
    ]


def write_stage(job: Job, machine: Machine) -> Stage:
    """Gathers rows to shards. A quarter of a CPU: it mostly waits for the disk."""
    num_writers = max(1, min(8, machine.num_cpus // 2))
    return Stage("write", WriteWorker, "task", job.shard_rows, num_writers, num_cpus=0.25)


def worker_counts(stages: Sequence[Stage]) -> dict[str, int]:
    """Workers at once, by stage name."""
    return {stage.name: stage.num_workers for stage in stages}
