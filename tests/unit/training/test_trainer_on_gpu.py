"""Twenty steps of the tiny recipe on a GPU in the precision that `auto` chooses there."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from edje_pipeline.training.metrics_log import read_metrics
from edje_pipeline.training.trainer import Trainer
from tests.training_helpers import tiny_model, tiny_recipe, tiny_state


@pytest.mark.gpu
def test_training_on_a_gpu_follows_the_cpu(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    recipe = tiny_recipe()
    # A GPU draws other random numbers for dropout.
    recipe = dataclasses.replace(recipe, phases=tuple(dataclasses.replace(p, dropout=0.0) for p in recipe.phases))
    losses = {}
    for device in ("cpu", "cuda"):
        state = tiny_state(model, tmp_path / device, device=torch.device(device))
        trainer = Trainer(recipe, state)
        assert trainer.dtype == (torch.bfloat16 if device == "cuda" else torch.float32)
        assert trainer.run() == 20
        assert all(value.device.type == device for value in state.learner.parameters())
        losses[device] = [record["loss"] for record in read_metrics(tmp_path / device / "metrics.jsonl")]
    assert all(math.isfinite(loss) for loss in losses["cuda"])
    for ours, theirs in zip(losses["cuda"][:8], losses["cpu"][:8], strict=True):
        assert ours == pytest.approx(theirs, rel=0.05)
