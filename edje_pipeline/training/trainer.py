"""The loop: pairs of a step, losses, gradients, optimizer, metrics, checkpoints. The same code runs alone
and on every worker of Ray Train; only the `Collective` differs.

Nothing random is stored: batch, negatives, masks and dropout of a step follow from (seed, step).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from edje_pipeline.errors import TrainingError
from edje_pipeline.storage.codecs import Codec
from edje_pipeline.training.batches import Corpus
from edje_pipeline.training.checkpoints import CheckpointStore
from edje_pipeline.training.collective import Collective
from edje_pipeline.training.metrics_log import MetricsLog, plot_metrics, read_metrics
from edje_pipeline.training.objective import Learner, SpecialIds, Teacher, compute_losses, total_loss
from edje_pipeline.training.recipe import Phase, Recipe
from edje_pipeline.training.sampler import PairBatch, PairSampler
from edje_pipeline.training.schedule import create_optimizer, set_rate
from edje_pipeline.training.validation import Validator

CodecFitter = Callable[[Learner, Phase], Codec | None]
SEED_STRIDE = 1_000_003


@dataclass
class TrainState:
    """What a run is made of, besides its recipe."""

    learner: Learner
    corpus: Corpus
    sampler: PairSampler
    out: Path
    fingerprints: dict[str, str]
    """recipe, corpus, model: a checkpoint of others is refused."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    collective: Collective = field(default_factory=Collective)
    teacher: Teacher | None = None
    validator: Validator | None = None
    fit_codec: CodecFitter | None = None
    """Makes the codec of a phase with `quantize`, from the adapter as it then is."""
    report: Callable[[dict[str, Any]], None] | None = None
    """Called with every metrics record (progress display, Ray Train)."""
    stop_after: int | None = None
    """Stop at this step as if killed; the next run resumes. For tests and time limits."""


class Trainer:
    """See the module docstring."""

    def __init__(self, recipe: Recipe, state: TrainState) -> None:
        self.recipe = recipe
        self.state = state
        tokenizer = state.corpus.tokenizer
        self.ids = SpecialIds(tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
        self.store = CheckpointStore(state.out / "checkpoints", recipe.keep_checkpoints)
        self.dtype = training_dtype(recipe.precision, state.device)
        self.codec: Codec | None = None
        self.optimizer: torch.optim.AdamW | None = None
        self._saved_step = 0

    def run(self) -> int:
        """Trains to the end of the recipe and returns the number of finished steps.

        Raises:
            TrainingError: a loss is not finite, or a batch cannot be made. The last good state is kept.
            ResumeMismatchError: the checkpoints there belong to another run.
        """
        state, recipe = self.state, self.recipe
        state.learner.to(state.device)
        step = self._resume()
        log = MetricsLog(state.out / "metrics.jsonl", resume_step=step) if self._is_main else None
        end = recipe.total_steps if state.stop_after is None else min(state.stop_after, recipe.total_steps)
        begun, pairs_done = time.monotonic(), 0
        while step < end:
            number, inner = recipe.locate(step)
            phase = recipe.phases[number]
            if inner == 0 or self.optimizer is None:
                self._begin_phase(phase)
            assert self.optimizer is not None
            rate = set_rate(self.optimizer, phase, inner)
            pairs = state.sampler.batch(phase, number, inner, phase.batch_size * state.collective.num_workers)
            found = self._gradients(phase, number, step, pairs)
            torch.nn.utils.clip_grad_norm_(state.learner.parameters(), recipe.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            step += 1
            pairs_done += len(pairs.images)
            is_last = step == recipe.total_steps
            if log is not None and (step % recipe.log_every == 0 or step == 1 or is_last):
                speed = round(pairs_done / (time.monotonic() - begun), 1)
                record = {"step": step, "phase": phase.name, "learning_rate": rate, "pairs_per_s": speed, **found}
                self._record(log, record)
            if log is not None and state.validator is not None and (step % recipe.validate_every == 0 or is_last):
                with self._autocast():
                    scores = state.validator.run(state.learner, state.device, self.codec)
                self._record(log, {"step": step, "phase": phase.name, **scores})
            if step % recipe.checkpoint_every == 0 or is_last:
                self._save(step)
        if self._is_main:
            plot_metrics(read_metrics(state.out / "metrics.jsonl"), state.out / "metrics.png")
        return step

    @property
    def _is_main(self) -> bool:
        return self.state.collective.rank == 0

    def _record(self, log: MetricsLog, record: dict[str, Any]) -> None:
        log.write(record)
        if self.state.report is not None:
            self.state.report(record)

    def _begin_phase(self, phase: Phase) -> None:
        self.state.learner.set_dropout(phase.dropout)
        self.state.learner.train()
        self.optimizer = create_optimizer(self.state.learner, self.recipe, phase)
        self.codec = None
        if phase.quantize:
            if self.state.fit_codec is None:
                raise TrainingError(
                    f"phase {phase.name!r} quantizes with {phase.quantize}, but no codec can be made here"
                )
            self.codec = self.state.fit_codec(self.state.learner, phase)

    def _gradients(self, phase: Phase, number: int, step: int, pairs: PairBatch) -> dict[str, float]:
        """Accumulates gradients of all micro-batches; returns the mean losses."""
        state, collective = self.state, self.state.collective
        sums: dict[str, Tensor] = {}
        for micro in range(phase.accumulation):
            part = pairs.part(micro, phase.accumulation)
            seed = ((self.recipe.seed * SEED_STRIDE + step) * phase.accumulation + micro) * collective.num_workers
            generator = torch.Generator().manual_seed(seed + collective.rank)
            torch.manual_seed(seed + collective.rank)
            batch = state.corpus.micro_batch(part, collective, state.device)
            with self._autocast(), attention_kernels(state.device):
                found = compute_losses(
                    state.learner, batch, phase, self.ids, generator,
                    mask_fraction=self.recipe.mask_fraction, teacher=state.teacher, codec=self.codec,
                )  # fmt: skip
                found["loss"] = total_loss(found, phase)
            is_bad = not math.isfinite(float(found["loss"].detach()))
            if collective.any(is_bad, state.device):
                self._stop_for_nan(number, step, part, found, is_bad=is_bad)
            torch.autograd.backward(found["loss"] / phase.accumulation)
            for name, loss in found.items():
                sums[name] = sums.get(name, 0) + loss.detach().float() / phase.accumulation
        collective.average_gradients(state.learner.parameters())
        values = collective.mean(torch.stack(list(sums.values()))).tolist()
        return dict(zip(sums, (round(value, 6) for value in values), strict=True))

    def _stop_for_nan(self, number: int, step: int, part: PairBatch, found: dict[str, Tensor], *, is_bad: bool) -> None:
        # The weights have not been touched by this step: the state before it is the last good one.
        self._save(step)
        bad = [name for name, loss in found.items() if not math.isfinite(float(loss.detach()))]
        where = ", ".join(bad) if is_bad else "on another worker"
        raise TrainingError(
            f"the loss of step {step + 1} (phase {self.recipe.phases[number].name!r}) is not finite: {where}; "
            f"its batch: {self.state.corpus.describe(part)}. The state before it is kept in {self.store.path(step)}. "
            "Look at those images and captions, or lower the learning-rate"
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.state.device.type, dtype=self.dtype)

    def _save(self, step: int) -> None:
        if not self._is_main or self.optimizer is None or step == self._saved_step:
            return
        content = {"learner": self.state.learner.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.store.save(step, content, self.state.fingerprints)
        self._saved_step = step

    def _resume(self) -> int:
        found = self.store.load_latest(self.state.fingerprints)
        if found is None:
            return 0
        step, content = found
        number, inner = self.recipe.locate(step)
        self.state.learner.load_state_dict(content["learner"])
        self._saved_step = step
        if inner and step < self.recipe.total_steps:
            self._begin_phase(self.recipe.phases[number])
            assert self.optimizer is not None
            self.optimizer.load_state_dict(content["optimizer"])
        return step


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the forward pass computes in; weights and optimizer stay float32."""
    if precision == "bfloat16" or (precision == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return torch.float32


@contextlib.contextmanager
def attention_kernels(device: torch.device) -> Iterator[None]:
    """On a CPU the fused attention's backward pass is several times slower at these short sequences than plain
    matrix products (docs/training.md has the figures)."""
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
