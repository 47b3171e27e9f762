"""The loop: resume after a kill, gradient accumulation, NaN, checkpoints of other runs."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from edje_pipeline.errors import CorruptionError, ResumeMismatchError, TrainingError
from edje_pipeline.models.checkpoint import ModelDirectory
from edje_pipeline.training.metrics_log import read_metrics
from edje_pipeline.training.recipe import LossWeights, NegativeSpec, Phase, Recipe
from edje_pipeline.training.trainer import Trainer
from tests.training_helpers import ArrayTokens, tiny_model, tiny_recipe, tiny_state


def curve(out: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(out / "metrics.jsonl")]


@dataclasses.dataclass(frozen=True)
class Finished:
    """One uninterrupted run that several tests compare with."""

    model: ModelDirectory
    out: Path
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("whole")
    model = tiny_model(folder / "model")
    state = tiny_state(model, folder / "out")
    assert Trainer(tiny_recipe(), state).run() == 20
    return Finished(model, folder / "out", state.learner.state_dict())


@pytest.mark.parametrize("stop", [8, 13])
def test_killed_and_resumed_gives_the_same_curve_and_weights(tmp_path: Path, whole: Finished, stop: int) -> None:
    # 8 is the border of two phases (and the checkpoint before it is at 5), 13 lies inside the second.
    Trainer(tiny_recipe(), tiny_state(whole.model, tmp_path, stop_after=stop)).run()
    second = tiny_state(whole.model, tmp_path)
    torch.manual_seed(12345)  # a resumed process has another random state
    Trainer(tiny_recipe(), second).run()
    assert curve(tmp_path) == curve(whole.out)
    for name, tensor in second.learner.state_dict().items():
        assert torch.equal(tensor, whole.weights[name]), name
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_trained_again(whole: Finished) -> None:
    again = tiny_state(whole.model, whole.out)
    assert Trainer(tiny_recipe(), again).run() == 20
    assert len(curve(whole.out)) == 20
    weight = "encoder.classifier.weight"
    assert torch.equal(again.learner.state_dict()[weight], whole.weights[weight])


def test_other_recipe_is_refused_and_damage_is_passed_over(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    Trainer(tiny_recipe(), tiny_state(model, tmp_path, stop_after=10)).run()
    other = dataclasses.replace(tiny_state(model, tmp_path), fingerprints={"recipe": "another"})
    with pytest.raises(ResumeMismatchError, match="another recipe"):
        Trainer(tiny_recipe(), other).run()
    newest, older = tmp_path / "checkpoints/step-00000010.pt", tmp_path / "checkpoints/step-00000005.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    seen: list[int] = []
    resumed = tiny_state(model, tmp_path, report=lambda record: seen.append(record["step"]))
    Trainer(tiny_recipe(), resumed).run()
    assert seen[0] == 6
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"short")
    assert not older.exists()
    with pytest.raises(CorruptionError, match="--restart"):
        Trainer(tiny_recipe(), tiny_state(model, tmp_path)).run()


def test_nan_stops_names_the_batch_and_keeps_the_state(tmp_path: Path) -> None:
    state = tiny_state(tiny_model(tmp_path / "model"), tmp_path / "out")
    phase = Phase("itm", 6, batch_size=4, weights=LossWeights(itm=1.0), negatives=NegativeSpec(0, 1), dropout=0.0)
    bad = state.sampler.batch(phase, 0, 2, 4).images[0]
    tokens = state.corpus.source.tokens(np.arange(12)).copy()
    tokens[bad] = np.nan
    early = {int(image) for step in (0, 1) for image in state.sampler.batch(phase, 0, step, 4).images}
    assert bad not in early
    state.corpus.source = ArrayTokens(state.corpus.captions.image_ids, tokens)
    with pytest.raises(TrainingError, match=r"step 3 .* not finite: itm, loss") as caught:
        Trainer(Recipe((phase,)), state).run()
    assert state.corpus.captions.image_ids[bad] in str(caught.value)
    kept = torch.load(io.BytesIO((tmp_path / "out/checkpoints/step-00000002.pt").read_bytes()[32:]))
    assert kept["step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in kept["state"]["learner"].values())


def test_batch_smaller_than_negatives(tmp_path: Path) -> None:
    phase = Phase("itm", 2, batch_size=4, weights=LossWeights(itm=1.0), negatives=NegativeSpec(2, 2, pool=2))
    with pytest.raises(TrainingError, match="4 negatives were asked for"):
        Trainer(Recipe((phase,)), tiny_state(tiny_model(tmp_path / "model"), tmp_path)).run()


def test_accumulated_gradients_are_the_mean(tmp_path: Path) -> None:
    """Two micro-batches of a loss that is a mean over its pairs give the whole batch's gradient."""
    model = tiny_model(tmp_path / "model")
    grads = []
    for accumulation in (1, 2):
        state = tiny_state(model, tmp_path / str(accumulation))
        weights = LossWeights(recovery=1.0)
        phase = Phase("p", 1, batch_size=8, accumulation=accumulation, weights=weights, dropout=0.0)
        trainer = Trainer(Recipe((phase,)), state)
        trainer._begin_phase(phase)
        trainer._gradients(phase, 0, 0, state.sampler.batch(phase, 0, 0, 8))
        grads.append(state.learner.encoder.layers[0].qkv.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], atol=1e-7, rtol=1e-5)


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    for precision in ("float32", "bfloat16"):
        state = tiny_state(model, tmp_path / precision, stop_after=10)
        Trainer(tiny_recipe(precision=precision), state).run()
        assert next(state.learner.parameters()).dtype == torch.float32
    exact, rounded = (np.array(curve(tmp_path / name))[:, 1] for name in ("float32", "bfloat16"))
    np.testing.assert_allclose(rounded[:2], exact[:2], rtol=0.03)
    assert not np.array_equal(rounded, exact)
