"""The training runs behind the recall tables: which model, which data, which recipe. See recall_plan.py."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from edje_pipeline.training.recipe import LossWeights, NegativeSpec, Phase, Recipe

HELD_OUT_ARTIST = "noto"


@dataclass(frozen=True)
class Run:
    """One training run and what is measured with it."""

    name: str
    recipe: Recipe
    data: str = "artists4"
    """artists4: four artists, tested on the fifth and on unseen concepts; artists5; photos."""
    tokens: str = "64"
    """Compressed tokens, or `local`."""
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


@dataclass(frozen=True)
class Plans:
    """Plans by name."""

    plans: dict[str, list[Run]] = field(default_factory=lambda: {"smoke": smoke(), "explore": explore()})
