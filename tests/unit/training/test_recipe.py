"""Recipes as TOML: what is read, and complaints that name everything at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from edje_pipeline.errors import ConfigError
from edje_pipeline.training.recipe import LossWeights, NegativeSpec, Phase, Recipe, read_recipe, recipe_from_dict
from edje_pipeline.training.schedule import rate_factor

TOML = """
seed = 4
weight-decay = 0.1

[[phase]]
name = "warm-up"
steps = 100
batch-size = 64
weights = { contrastive = 1.0 }

[[phase]]
name = "itm"
steps = 50
learning-rate = 2e-5
weights = { itm = 1.0, mlm = 0.5 }
negatives = { num-hard = 2, num-random = 5, pool = 16 }
captions = "first"
"""


def test_read(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(TOML)
    recipe = read_recipe(tmp_path / "r.toml")
    assert (recipe.seed, recipe.weight_decay, recipe.total_steps) == (4, 0.1, 150)
    assert recipe.phases[0] == Phase("warm-up", 100, batch_size=64, weights=LossWeights(contrastive=1.0))
    assert recipe.phases[1].negatives == NegativeSpec(2, 5, 16)
    assert [recipe.locate(step) for step in (0, 99, 100, 149, 150)] == [(0, 0), (0, 99), (1, 0), (1, 49), (1, 50)]


def test_every_problem_is_named() -> None:
    content = {
        "sead": 1,
        "phase": [
            {"name": "a", "steps": 0, "weigths": {}},
            {"name": "b", "steps": 2, "weights": {"itm": 1.0, "style": 2.0}, "batch-size": 3, "accumulation": 2},
            {"name": "c"},
        ],
    }
    with pytest.raises(ConfigError) as caught:
        recipe_from_dict(content)
    for part in ("sead", "weigths", "did you mean 'weights'", "style", "[[phase]] c", "steps"):
        assert part in str(caught.value)


def test_values_that_do_not_work() -> None:
    with pytest.raises(ConfigError, match="multiple of accumulation"):
        Recipe((Phase("p", 1, batch_size=3, accumulation=2),))
    with pytest.raises(ConfigError, match="no \\[\\[phase\\]\\]"):
        Recipe(())
    with pytest.raises(ConfigError, match="at least one weight"):
        Recipe((Phase("p", 1, weights=LossWeights()),))
    with pytest.raises(ConfigError, match="pool not below num-hard"):
        Recipe((Phase("p", 1, negatives=NegativeSpec(3, 0, 1)),))


def test_views_and_what_makes_neighbours(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('views = 8\nneighbours-by = "first-stage"\n' + TOML)
    recipe = read_recipe(tmp_path / "r.toml")
    assert (recipe.views, recipe.neighbours_by) == (8, "first-stage")
    (tmp_path / "plain.toml").write_text(TOML)
    plain = read_recipe(tmp_path / "plain.toml")
    assert (plain.views, plain.neighbours_by) == (1, "texts")
    assert len({recipe.fingerprint, plain.fingerprint, Recipe(plain.phases, seed=4, views=2).fingerprint}) == 3
    with pytest.raises(ConfigError) as caught:
        recipe_from_dict({"views": 0, "neighbours-by": "luck", "phase": [{"name": "a", "steps": 1}]})
    assert "views is 0, expected at least 1" in str(caught.value)
    assert "neighbours-by is 'luck', expected 'texts' or 'first-stage'" in str(caught.value)
    with pytest.raises(ConfigError, match=r"no key 'view' \(did you mean 'views'"):
        recipe_from_dict({"view": 2, "phase": [{"name": "a", "steps": 1}]})
    with pytest.raises(ConfigError):
        recipe_from_dict({"views": "many", "phase": [{"name": "a", "steps": 1}]})


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_recipe(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        read_recipe(tmp_path / "bad.toml")


def test_logging_does_not_change_the_fingerprint() -> None:
    phase = Phase("p", 10)
    assert Recipe((phase,)).fingerprint == Recipe((phase,), log_every=3, checkpoint_every=7).fingerprint
    assert Recipe((phase,)).fingerprint != Recipe((phase,), seed=1).fingerprint


def test_rate_warms_up_and_decays() -> None:
    phase = Phase("p", 100, warmup_fraction=0.1, final_fraction=0.2)
    assert rate_factor(0, phase) == pytest.approx(0.1)
    assert rate_factor(9, phase) == rate_factor(10, phase) == pytest.approx(1.0)
    assert rate_factor(55, phase) == pytest.approx(0.6)
    assert rate_factor(100, phase) == pytest.approx(0.2)


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.toml")), ids=str)
def test_committed_recipes_are_valid(path: Path) -> None:
    assert read_recipe(path).total_steps > 0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("views = 1.5", "views is 1.5, expected a whole number"),
        ("views = true", "views is True, expected a whole number"),
        ('seed = "x"', "seed is 'x', expected a whole number"),
        ("calibrate-adapter = 1", "calibrate-adapter is 1, expected true or false"),
        ("betas = 3", "betas is 3, expected two numbers"),
    ],
)
def test_a_value_of_another_type_names_its_key(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text + '\n[[phase]]\nname = "p"\nsteps = 1\nweights = { itm = 1 }\n')
    with pytest.raises(ConfigError, match=complaint):
        read_recipe(path)


def test_steps_of_another_type(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[[phase]]\nname = "p"\nsteps = 2.5\n')
    with pytest.raises(ConfigError, match=r"phase\]\] p: steps is 2.5, expected a whole number"):
        read_recipe(path)
