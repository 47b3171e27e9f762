"""Ray Train: one worker gives the in-process curve, two workers share the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edje_pipeline.models.assemble import BackboneSource, ModelParts, make_model
from edje_pipeline.models.checkpoint import open_model
from edje_pipeline.training.metrics_log import read_metrics
from edje_pipeline.training.recipe import LossWeights, NegativeSpec, Phase, Recipe
from edje_pipeline.training.run import TrainJob, train
from tests.training_helpers import draw_shapes, write_tiny_bert

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "embedding": "mean"}


def job_in(folder: Path, batch_size: int) -> TrainJob:
    bert = write_tiny_bert(folder / "bert")
    captions = draw_shapes(folder / "images", num_copies=1)
    source = BackboneSource("timm:vit_tiny_patch16_224", weights="random:0", options=dict(TINY))
    make_model(folder / "start", "tiny", source, ModelParts(bert, 4, adapter_mlp_dim=64, sentence_encoder=bert))
    # No dropout and no random negatives: what several workers compute is then what one computes.
    phase = Phase("itm", 4, batch_size=batch_size, learning_rate=1e-3, dropout=0.0,
                  weights=LossWeights(itm=1.0, recovery=1.0), negatives=NegativeSpec(1))  # fmt: skip
    recipe = Recipe((phase,), log_every=1, checkpoint_every=2)
    return TrainJob(str(folder / "start"), str(folder / "out"), (str(captions),), recipe, images=str(folder / "images"))


def losses(job: TrainJob) -> np.ndarray:
    return np.array([record["loss"] for record in read_metrics(Path(job.out) / "metrics.jsonl")])


def test_two_workers_compute_what_one_does(tmp_path: Path) -> None:
    from edje_pipeline.training.ray_train import train_with_ray

    alone = replace(job_in(tmp_path, 8), out=str(tmp_path / "alone"))
    train(alone)
    half = replace(alone.recipe.phases[0], batch_size=4)
    halves = replace(alone, out=str(tmp_path / "out"), recipe=replace(alone.recipe, phases=(half,)))
    result = train_with_ray(halves, num_workers=2)
    assert result.steps == 4
    np.testing.assert_allclose(losses(halves), losses(alone), rtol=2e-3)
    open_model(result.model).verify()
