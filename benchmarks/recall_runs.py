"""The training runs behind the recall tables: which model, which data, which recipe. See recall_plan.py."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edje_pipeline.training.recipe import LossWeights, NegativeSpec, Phase, Recipe, read_recipe

HELD_OUT_ARTIST = "noto"
RECIPE = Path(__file__).parents[1] / "recipes" / "emoji.toml"
ABLATION_SHARE = 0.45
"""Of the recipe's steps, for the runs that leave a part out and the run they are compared with."""


@dataclass(frozen=True)
class Run:
    """One training run and what is measured with it."""

    name: str
    recipe: Recipe
    data: str = "artists4"
    """artists4: four artists, tested on the fifth and on unseen concepts; artists5; photos."""
    tokens: str = "64"
    """Compressed tokens, or `local`."""
    key_positions: bool = False
    image_size: int = 112
    num_layers: int = 6
    teacher: str = ""
    """Name of the run whose model it is distilled from."""
    start: str = ""
    """Name of the run whose model it goes on from; empty: an untrained start."""
    codecs: tuple[str, ...] = ("float16",)
    pools: tuple[int, ...] = (10,)
    stage: int = 0
    """Runs of a later stage begin when all before are done."""


def warm_up(steps: int = 1200, **changes: object) -> Phase:
    """The image tokens read as a sentence."""
    phase = Phase(
        "warm-up", steps, batch_size=256, learning_rate=3e-4, adapter_rate=2.0, token_dropout=0.3, dropout=0.1,
        weights=LossWeights(contrastive=1.0, words=0.5), temperature=0.05,
    )  # fmt: skip
    return replace(phase, **changes)  # type: ignore[arg-type]


def matrix(steps: int = 2500, **changes: object) -> Phase:
    """The whole matrix of pairs of a batch, half of it neighbours."""
    phase = Phase(
        "matrix", steps, batch_size=32, learning_rate=1.5e-4, adapter_rate=2.0, token_dropout=0.3, dropout=0.1,
        weights=LossWeights(itm=1.0, contrastive=0.3, words=0.3), negatives=NegativeSpec(0, 31),
        neighbours=0.5, captions="first",
    )  # fmt: skip
    return replace(phase, **changes)  # type: ignore[arg-type]


def full(steps: int = 1000, **changes: object) -> Phase:
    """All parts of the objective."""
    phase = replace(
        matrix(steps), name="full", learning_rate=5e-5, neighbours=0.75, captions="all",
        weights=LossWeights(itm=1.0, mlm=0.1, recovery=0.1, contrastive=0.3, words=0.3),
    )  # fmt: skip
    return replace(phase, **changes)  # type: ignore[arg-type]


def recipe(*phases: Phase, views: int = 8, **changes: object) -> Recipe:
    """What all runs have in common."""
    common = Recipe(
        phases, calibrate_adapter=True, views=views, neighbours_by="first-stage", log_every=50, validate_every=500,
        checkpoint_every=100_000, keep_checkpoints=1,
    )  # fmt: skip
    return replace(common, **changes)  # type: ignore[arg-type]


def explore() -> list[Run]:
    """Short runs with 16 tokens, to choose a recipe."""
    phases = (warm_up(800), matrix(1500), full(500))
    photos = (warm_up(500, learning_rate=2e-4), matrix(700, captions="all"), full(200))
    high = (phases[0], replace(phases[1], learning_rate=4e-4), phases[2])
    all_captions = (phases[0], replace(phases[1], captions="all"), phases[2])
    return [
        Run("base", recipe(*phases), tokens="16"),
        Run("224px", recipe(*phases, views=4), tokens="16", image_size=224),
        Run("one-view", recipe(*phases, views=1), tokens="16"),
        Run("three-layers", recipe(*phases), tokens="16", num_layers=3),
        Run("high-rate", recipe(*high), tokens="16"),
        Run("all-captions", recipe(*all_captions), tokens="16"),
        Run("text-neighbours", recipe(*phases, neighbours_by="texts"), tokens="16"),
        Run("photos", recipe(*photos), data="photos", tokens="16", image_size=224),
        Run("photos-after-emoji", recipe(*photos[1:], calibrate_adapter=False), data="photos", tokens="16", stage=1,
            image_size=224, start="224px"),
    ]  # fmt: skip


def smoke() -> list[Run]:
    """Seconds on a CPU: shows that the program works."""
    tiny = (warm_up(2, batch_size=8), matrix(2, batch_size=4, negatives=NegativeSpec(0, 3)),
            full(2, batch_size=4, negatives=NegativeSpec(0, 3)))  # fmt: skip
    no_drop = tuple(replace(phase, token_dropout=0.0) for phase in tiny)
    return [
        Run("smoke-local", recipe(*no_drop, views=2), tokens="local", num_layers=1),
        Run("smoke", recipe(*tiny, views=2), tokens="8", num_layers=1, teacher="smoke-local",
            codecs=("float16", "int8"),
            stage=1),
        Run("smoke-photos", recipe(*tiny, views=1), data="photos", tokens="8", num_layers=1, stage=1),
    ]  # fmt: skip


def final() -> list[Run]:
    """The runs behind the tables."""
    whole = read_recipe(RECIPE)
    local = no_token_dropout(whole)
    short = shortened(whole, ABLATION_SHARE)
    phases = {phase.name: phase for phase in short.phases}
    hard = replace(phases["matrix"], negatives=NegativeSpec(1, 0), neighbours=0.0)
    changed = {
        "base": short,
        "no-mlm": without(short, "mlm"),
        "no-recovery": without(short, "recovery"),
        "no-contrastive-after-warm-up": only_after(short, contrastive=0.0),
        "no-words": without(short, "words"),
        "no-warm-up": replace(short, phases=short.phases[1:]),
        "no-neighbours": only_after(short, neighbours=0.0),
        "one-hard-negative": replace(short, phases=(phases["warm-up"], hard, replace(hard, name="full", steps=300))),
    }
    photos = replace(shortened(whole, 0.4), validate_every=200)
    tuned = replace(
        photos, calibrate_adapter=False,
        phases=tuple(replace(phase, learning_rate=phase.learning_rate / 2, captions="all")
                     for phase in photos.phases[1:]),
    )  # fmt: skip
    runs = [Run("local", local, tokens="local", num_layers=3)]
    runs += [Run(name, recipe, tokens="16", num_layers=3) for name, recipe in changed.items()]
    return [
        *runs,
        Run("photos", photos, data="photos", tokens="16", num_layers=3, image_size=224),
        Run("photos-after-emoji", tuned, data="photos", tokens="16", num_layers=3, image_size=224, start="base",
            stage=1),
        *(replace(run, stage=run.stage + 1, pools=(5, 10, 20, 50) if run.name == "from-local-64" else run.pools)
          for run in compress()),
    ]  # fmt: skip


def compress() -> list[Run]:
    """Compressed adapters behind the local model's joint encoder, in a size for a CPU: needs WORK/runs/local/model."""
    imitate = warm_up(
        300, name="tokens", batch_size=128, learning_rate=2e-4, adapter_rate=1.0, token_dropout=0.0, dropout=0.0,
        weights=LossWeights(tokens=1.0),
    )  # fmt: skip
    pairs = matrix(
        200, batch_size=12, learning_rate=2e-5, adapter_rate=2.0, token_dropout=0.0, dropout=0.0,
        negatives=NegativeSpec(0, 11), weights=LossWeights(itm=1.0, distillation=1.0, tokens=0.3),
    )  # fmt: skip
    plan = recipe(imitate, pairs, views=2, precision="bfloat16", validate_every=100, calibrate_adapter=False,
                  adapter_start="local-teacher")  # fmt: skip
    finish = replace(
        pairs, name="quantized", steps=400, quantize="opq16", learning_rate=3e-5,
        weights=LossWeights(distillation=1.0, tokens=0.3),
    )  # fmt: skip
    photos = matrix(
        240, batch_size=12, learning_rate=3e-5, token_dropout=0.0, negatives=NegativeSpec(0, 11), captions="all",
    )  # fmt: skip
    shared: dict[str, Any] = {"num_layers": 3, "teacher": "local", "key_positions": True}
    first: dict[str, Any] = {"tokens": "16", "start": "local", **shared}
    tail = replace(plan, adapter_start="model", phases=(finish,))
    alone = recipe(photos, views=2, precision="bfloat16", validate_every=60, calibrate_adapter=False)
    return [
        Run("from-local-64", plan, start="local", codecs=("float16", "int8", "int4", "opq16"), **shared),
        Run("from-local-32", plan, **{**first, "tokens": "32"}),
        Run("from-local-16", plan, **first),
        *(Run(f"from-local-16-no-{loss}", without(plan, loss, after=1), **first) for loss in ("itm", "distillation")),
        Run("from-local-16-tokens-only", replace(plan, phases=plan.phases[:1]), **first),
        Run("from-local-16-no-start", replace(plan, adapter_start="model", calibrate_adapter=True), **first),
        Run("photos-from-local", alone, data="photos", tokens="local", num_layers=3, start="local"),
        Run("from-local-64-quantized", tail, start="from-local-64", codecs=("float16", "opq16"), stage=1, **shared),
    ]  # fmt: skip


def shortened(recipe: Recipe, share: float) -> Recipe:
    """The same phases with fewer steps."""
    phases = tuple(replace(phase, steps=max(1, round(phase.steps * share))) for phase in recipe.phases)
    return replace(recipe, phases=phases)


def no_token_dropout(recipe: Recipe) -> Recipe:
    """The local adapter wants all its tokens."""
    return replace(recipe, phases=tuple(replace(phase, token_dropout=0.0) for phase in recipe.phases))


def without(recipe: Recipe, loss: str, *, after: int = 0) -> Recipe:
    """The recipe with one loss off, from phase number `after` on."""
    changed = [replace(phase, weights=replace(phase.weights, **{loss: 0.0})) for phase in recipe.phases[after:]]
    return replace(recipe, phases=(*recipe.phases[:after], *changed))


def only_after(recipe: Recipe, *, contrastive: float | None = None, neighbours: float | None = None) -> Recipe:
    """Changes every phase but the warm-up."""
    changed = [recipe.phases[0]]
    for phase in recipe.phases[1:]:
        weights = phase.weights if contrastive is None else replace(phase.weights, contrastive=contrastive)
        near = phase.neighbours if neighbours is None else neighbours
        changed.append(replace(phase, weights=weights, neighbours=near))
    return replace(recipe, phases=tuple(changed))


@dataclass(frozen=True)
class Plans:
    """Plans by name."""

    plans: dict[str, list[Run]] = field(
        default_factory=lambda: {"smoke": smoke(), "explore": explore(), "final": final(), "compress": compress()}
    )
