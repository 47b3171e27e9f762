"""Plans of training runs: recipes that work, needs that are met in time."""

from __future__ import annotations

import pytest

from benchmarks.recall_runs import Plans, Run, no_token_dropout, only_after, shortened, without
from benchmarks.recall_tables import OBJECTIVES
from edje_pipeline.storage.codecs import resolve
from edje_pipeline.training.recipe import LossWeights, Phase, Recipe, recipe_from_dict

PLANS = Plans().plans
RUNS = [pytest.param(plan, run, id=f"{plan}-{run.name}") for plan, runs in PLANS.items() for run in runs]
GIVEN = {"compress": {"local"}}
"""Runs of another plan that a plan's own words ask for."""
TRAINED_CODECS = ("pq", "opq")


@pytest.mark.parametrize(("plan", "run"), RUNS)
def test_a_run_can_be_done(plan: str, run: Run) -> None:
    assert run.recipe.total_steps > 0
    assert run.data in {"artists4", "artists5", "photos"}
    assert run.tokens == "local" or int(run.tokens) > 0
    assert run.image_size % 14 == 0  # DINOv2's patches
    for phase in run.recipe.phases:
        micro_batch = phase.batch_size // phase.accumulation
        if phase.weights.itm or phase.weights.distillation:
            assert phase.negatives.num < micro_batch, f"{plan} {run.name} {phase.name}"
        if phase.weights.distillation or phase.weights.tokens or run.recipe.adapter_start == "local-teacher":
            assert run.teacher, f"{plan} {run.name} {phase.name} imitates nobody"
        if run.tokens == "local":
            assert phase.token_dropout == 0
    for codec in () if run.tokens == "local" else run.codecs:
        if not codec.startswith(TRAINED_CODECS):
            resolve(codec, num_tokens=int(run.tokens), dim=384)


@pytest.mark.parametrize("plan", PLANS)
def test_what_a_run_needs_is_there_before(plan: str) -> None:
    runs = {run.name: run for run in PLANS[plan]}
    assert len(runs) == len(PLANS[plan]), "two runs of one name"
    local = {run.name: run for run in PLANS["final"]}["local"]
    for run in runs.values():
        for need in filter(None, (run.teacher, run.start)):
            if need in GIVEN.get(plan, set()):
                other = local
            else:
                assert runs[need].stage < run.stage, f"{run.name} needs {need}"
                other = runs[need]
            assert other.num_layers == run.num_layers or need == run.teacher
            if need == run.teacher:
                assert (other.tokens, other.image_size) == ("local", run.image_size)


def test_all_final_recipes_differ_where_they_are_compared() -> None:
    compared = [run for run in PLANS["final"] if run.name in OBJECTIVES]
    assert {run.name for run in compared} == set(OBJECTIVES)
    assert len({run.recipe.fingerprint for run in compared}) == len(compared)
    assert {run.start for run in compared} == {"", "local"}
    assert {(run.tokens, run.num_layers, run.image_size, run.data) for run in compared} == {("16", 3, 112, "artists4")}


RECIPE = Recipe((
    Phase("warm-up", 9, weights=LossWeights(contrastive=1.0, words=0.5)),
    Phase("pairs", 1, weights=LossWeights(itm=1.0, words=0.3, contrastive=0.3), neighbours=0.5, token_dropout=0.3),
))  # fmt: skip


def test_changes_of_a_recipe() -> None:
    assert [phase.steps for phase in shortened(RECIPE, 0.4).phases] == [4, 1]
    assert [phase.weights.words for phase in without(RECIPE, "words").phases] == [0, 0]
    assert [phase.weights.contrastive for phase in only_after(RECIPE, contrastive=0.0).phases] == [1.0, 0]
    near = only_after(RECIPE, neighbours=0.0)
    assert (near.phases[1].neighbours, near.phases[1].weights) == (0, RECIPE.phases[1].weights)
    assert [phase.weights.words for phase in without(RECIPE, "words", after=1).phases] == [0.5, 0]
    assert [phase.token_dropout for phase in no_token_dropout(RECIPE).phases] == [0, 0]
    assert recipe_from_dict({"phase": [{"name": "p", "steps": 1}]}).phases[0].token_dropout == 0
