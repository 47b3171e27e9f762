"""One pass over a plan's units: in this process, or in Ray actors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edje_pipeline.pipeline.score_journal import ScoreReceipt, UnitJournal
from edje_pipeline.pipeline.score_plan import PlanInfo
from edje_pipeline.pipeline.score_worker import PEAK_BYTES, UnitScorer, WorkerSpec
from edje_pipeline.pipeline.stages import available_cpus
from edje_pipeline.progress import progress

if TYPE_CHECKING:
    from edje_pipeline.storage.index import Index

RAY_MIN_PAIRS = 200_000
"""Below this many pairs starting Ray costs more than a second worker saves."""
CPUS_A_WORKER = 4
"""Threads of one CPU worker, which compute batches side by side; Python's own steps take turns among them."""


@dataclass(frozen=True)
class Workers:
    """Who scores, as the user asked for it."""

    num_workers: int | None = None
    """Ray actors; 0: this process; None: by the number of pairs, GPUs and cores."""
    num_threads: int | None = None
    """Of one CPU worker; None: all cores in process, `CPUS_A_WORKER` in an actor."""
    ray_address: str | None = None
    quiet: bool = False

    def choose(self, num_pairs: int, device: str) -> int:
        """Ray actors to use; 0: this process, which fills one GPU or a few cores by itself."""
        if self.num_workers is not None:
            return self.num_workers
        if ":" in device and self.ray_address is None:  # one GPU by its number
            return 0
        if device.startswith("cuda"):
            import torch

            parallel = torch.cuda.device_count()
        else:
            parallel = available_cpus() // CPUS_A_WORKER
        if self.ray_address is not None:
            return max(1, parallel)
        return parallel if parallel > 1 and num_pairs >= RAY_MIN_PAIRS else 0


@dataclass(frozen=True)
class PassResult:
    """What one pass did."""

    num_workers: int
    num_pairs_scored_now: int
    stats: dict[str, float]
    """Sums over all units: images and bytes read, seconds inside workers; and the largest peak of a worker's memory."""


def run_pass(
    journal: UnitJournal, info: PlanInfo, spec: WorkerSpec, index: Index, workers: Workers, *, name: str = "score"
) -> PassResult:
    """Scores the units of a plan that have no receipt yet, or whose part is damaged.

    Args:
        journal: holds the plan; gets the receipts.
        spec: without the folder and the number of threads, which are set here.
        index: open on the snapshot to read.
        name: shown in the progress line.
    """
    journal.drop_damaged()
    todo = [unit for unit in range(info.num_units) if unit not in journal.receipts]
    num_workers = workers.choose(info.num_pairs, spec.device)
    threads = workers.num_threads or (CPUS_A_WORKER if num_workers else available_cpus())
    # An actor sees the one GPU that ray gave it, as number 0.
    device = spec.device.partition(":")[0] if num_workers else spec.device
    spec = replace(spec, run_dir=journal.run_dir.uri, num_threads=threads, device=device)
    receipts: Iterable[ScoreReceipt] = ()
    if todo and num_workers == 0:
        receipts = run_here(spec, index, todo)
    elif todo:
        from edje_pipeline.pipeline.score_ray import run_actors

        receipts = run_actors(spec, todo, num_workers, workers.ray_address)
    before = sum(receipt.num_pairs for receipt in journal.receipts.values())
    with progress(name, info.num_pairs, unit="pairs", quiet=workers.quiet, skipped=before) as report:
        for receipt in receipts:
            if journal.journal(receipt):
                report.update(receipt.num_pairs, missing=info.num_missing)
    new_pairs = sum(receipt.num_pairs for receipt in journal.receipts.values()) - before
    total: Counter[str] = Counter()
    for receipt in journal.receipts.values():
        total.update(receipt.stats)
    peaks = [receipt.stats.get(PEAK_BYTES, 0.0) for receipt in journal.receipts.values()]
    return PassResult(num_workers, new_pairs, {**total, PEAK_BYTES: max(peaks, default=0.0)})


def run_here(spec: WorkerSpec, index: Index, units: Sequence[int]) -> Iterator[ScoreReceipt]:
    """In this process, whose number of torch threads is the caller's again afterwards."""
    import torch

    threads = torch.get_num_threads()
    try:
        yield from UnitScorer(spec, index=index).run(units)
    finally:
        torch.set_num_threads(threads)
