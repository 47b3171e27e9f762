"""What a training run does, as data: phases one after the other, read from a recipe's TOML file.

    seed = 0

    [[phase]]
    name = "warm-up"
    steps = 800
    batch-size = 128
    learning-rate = 3e-4
    weights = { contrastive = 1.0 }

    [[phase]]
    name = "easy-negatives"
    steps = 2000
    batch-size = 24
    weights = { itm = 1.0 }
    negatives = { num-hard = 0, num-random = 23 }

Unknown keys are errors, all reported at once.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from edje_pipeline.config import _suggest as suggest
from edje_pipeline.errors import ConfigError
from edje_pipeline.models.spec import fingerprint_of

MAX_RECIPE_BYTES = 1 << 20
T = TypeVar("T")

PLAIN_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    bool: ((bool,), "true or false"),
}

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class LossWeights:
    """The weight of each part of the objective; 0 switches it off and saves its work."""

    itm: float = 0.0
    mlm: float = 0.0
    recovery: float = 0.0
    distillation: float = 0.0
    contrastive: float = 0.0
    words: float = 0.0
    """Image tokens near the words of the caption; see `losses.words_loss`."""
    tokens: float = 0.0
    """Compressed tokens near the local teacher's, averaged; see `losses.token_loss`. Needs no joint encoder."""


@dataclass(frozen=True)
class NegativeSpec:
    """Which wrong texts and images stand against each right pair, in each direction."""

    num_hard: int = 1
    """Drawn from the `pool` most similar ones by the frozen embeddings, over the batch of all workers."""
    num_random: int = 0
    """Drawn from the rest."""
    pool: int = 1
    """1: the hardest only, as in the paper. Larger pools soften false negatives (near-synonyms)."""

    @property
    def num(self) -> int:
        """Negatives of one positive in one direction."""
        return self.num_hard + self.num_random


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one objective and one learning rate schedule."""

    name: str
    steps: int
    batch_size: int = 32
    """Pairs an optimizer step and worker, accumulation included."""
    accumulation: int = 1
    """Micro-batches a step; negatives come from inside one micro-batch (of all workers)."""
    learning_rate: float = 1e-4
    adapter_rate: float = 1.0
    """Learning rate of adapter and heads, as a multiple of the joint encoder's."""
    warmup_fraction: float = 0.05
    final_fraction: float = 0.05
    """Of the peak learning rate, reached at the end of a cosine."""
    weights: LossWeights = field(default_factory=lambda: LossWeights(itm=1.0, mlm=1.0, recovery=1.0))
    negatives: NegativeSpec = field(default_factory=NegativeSpec)
    neighbours: float = 0.0
    """Fraction of a batch chosen as near neighbours (by caption embedding) of the rest, so that a small
    batch holds hard negatives at all."""
    captions: Literal["all", "first"] = "all"
    """first: only an image's first caption, e.g. an unambiguous name before free texts."""
    token_dropout: float = 0.0
    """Up to this fraction of the vision tokens is left out of a step, a regulariser for small corpora."""
    dropout: float = 0.1
    temperature: float = 0.05
    """Of the contrastive loss."""
    freeze_words: bool = True
    """Keep the word embeddings as they are; a small corpus touches few of them."""
    quantize: str = ""
    """A codec spec: the joint encoder then sees dequantized tokens (straight-through); see quantization.py."""


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    phases: tuple[Phase, ...]
    seed: int = 0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    mask_fraction: float = 0.5
    """Of the text tokens, for MLM."""
    views: int = 1
    """Of each image: the image as it is, and `views` - 1 changed ones (augment.py); needs `images`, not an index."""
    neighbours_by: Literal["texts", "first-stage"] = "texts"
    """What makes neighbours of a batch: near captions alone, or half of them images that the first stage takes
    for the caption's own."""
    calibrate_adapter: bool = False
    """Fit a fresh adapter's scales to the vision tokens and the word embeddings first; see calibrate.py."""
    adapter_start: Literal["model", "local-teacher"] = "model"
    """local-teacher: a compressed adapter's weights are first made from the teacher's; see local_start.py."""
    precision: Precision = "auto"
    """auto: bfloat16 where the device computes it faster, float32 elsewhere; weights stay float32."""
    log_every: int = 10
    validate_every: int = 200
    checkpoint_every: int = 200
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        problems = [problem for phase in self.phases for problem in _phase_problems(phase)]
        if not self.phases:
            problems.append("there is no [[phase]]")
        if self.precision not in get_args(Precision):
            problems.append(f"precision {self.precision!r} is not one of {', '.join(get_args(Precision))}")
        if min(self.log_every, self.validate_every, self.checkpoint_every, self.keep_checkpoints) < 1:
            problems.append("log-every, validate-every, checkpoint-every and keep-checkpoints start at 1")
        if self.views < 1:
            problems.append(f"views is {self.views}, expected at least 1: the image as it is")
        if self.adapter_start not in ("model", "local-teacher"):
            problems.append(f"adapter-start is {self.adapter_start!r}, expected 'model' or 'local-teacher'")
        if self.adapter_start == "local-teacher" and self.calibrate_adapter:
            problems.append("adapter-start = 'local-teacher' already fits the scales; leave calibrate-adapter out")
        if self.neighbours_by not in ("texts", "first-stage"):
            problems.append(f"neighbours-by is {self.neighbours_by!r}, expected 'texts' or 'first-stage'")
        if not 0 < self.mask_fraction < 1:
            problems.append(f"mask-fraction is {self.mask_fraction}, expected a number between 0 and 1")
        if problems:
            raise ConfigError("the training recipe does not work: " + "; ".join(problems))

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides the result."""
        value = asdict(self)
        for key in ("log_every", "validate_every", "checkpoint_every", "keep_checkpoints"):
            del value[key]
        return fingerprint_of(value)

    def locate(self, step: int) -> tuple[int, int]:
        """Global step (0..total) -> (phase number, step inside it); the end belongs to the last phase."""
        for number, phase in enumerate(self.phases):
            if step < phase.steps:
                return number, step
            step -= phase.steps
        return len(self.phases) - 1, self.phases[-1].steps


def read_recipe(path: str | Path) -> Recipe:
    """Reads a recipe's TOML file.

    Raises:
        ConfigError: no such file, not TOML, or keys and values that do not work (all named).
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_RECIPE_BYTES:,} bytes; this is no recipe")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"the recipe {path} does not exist") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from error
    return recipe_from_dict(content, where=str(path))


def recipe_from_dict(content: Mapping[str, Any], *, where: str = "the recipe") -> Recipe:
    """The inverse of a TOML file's content; keys with dashes or underscores."""
    problems: list[str] = []
    rest = dict(content)
    raw_phases = rest.pop("phase", [])
    if not isinstance(raw_phases, list) or not all(isinstance(value, dict) for value in raw_phases):
        raise ConfigError(f"{where}: `phase` must be an array of tables, written [[phase]]")
    phases = []
    for number, value in enumerate(raw_phases):
        label = f"[[phase]] {value.get('name', number + 1)}"
        nested = dict(value)
        for key, kind in (("weights", LossWeights), ("negatives", NegativeSpec)):
            if key in nested:
                nested[key] = _build(kind, nested[key], f"{label} {key}", problems)
        phases.append(_build(Phase, nested, label, problems))
    if "betas" in rest:
        betas = rest["betas"]
        if not (isinstance(betas, (list, tuple)) and len(betas) == 2 and all(isinstance(b, float) for b in betas)):
            raise ConfigError(f"{where}: betas is {betas!r}, expected two numbers such as [0.9, 0.98]")
        rest["betas"] = tuple(betas)
    recipe = _build(Recipe, {**rest, "phases": tuple(phase for phase in phases if phase)}, "the recipe", problems)
    if problems or recipe is None:
        raise ConfigError(f"{where}: " + "; ".join(problems))
    return recipe


def _build(kind: type[T], value: Any, label: str, problems: list[str]) -> T | None:
    if not isinstance(value, Mapping):
        problems.append(f"{label} is {value!r}, expected a table")
        return None
    values = {key.replace("-", "_"): entry for key, entry in value.items()}
    known = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    unknown = [key for key in values if key not in known]
    dashed = [name.replace("_", "-") for name in known]
    problems += [f"{label} has no key {key!r}{suggest(key, dashed)}" for key in unknown]
    wrong = _wrong_types(kind, values, label)
    problems += wrong
    if wrong:
        return None
    try:
        return kind(**{key: entry for key, entry in values.items() if key in known})
    except (TypeError, ConfigError) as error:
        problems.append(f"{label}: {error}")
        return None


def _wrong_types(kind: type[Any], values: Mapping[str, Any], label: str) -> list[str]:
    """A complaint for each plain value of another type; TOML's true is no number."""
    found = []
    for key, hint in get_type_hints(kind).items():
        value = values.get(key)
        if value is None or hint not in PLAIN_TYPES:
            continue
        allowed, word = PLAIN_TYPES[hint]
        if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
            found.append(f"{label}: {key.replace('_', '-')} is {value!r}, expected {word}")
    return found


def _phase_problems(phase: Phase) -> list[str]:
    problems = []
    if phase.steps < 1 or phase.batch_size < 1 or phase.accumulation < 1:
        problems.append("steps, batch-size and accumulation start at 1")
    elif phase.batch_size % phase.accumulation:
        problems.append(f"batch-size {phase.batch_size} is not a multiple of accumulation {phase.accumulation}")
    weights = asdict(phase.weights)
    if min(weights.values()) < 0 or not any(weights.values()):
        problems.append("at least one weight must be above 0, none below")
    negatives = phase.negatives
    if negatives.num_hard < 0 or negatives.num_random < 0 or negatives.num < 1 or negatives.pool < negatives.num_hard:
        problems.append("negatives need num-hard + num-random of at least 1, and a pool not below num-hard")
    problems += [
        f"{key.replace('_', '-')} is {getattr(phase, key)}, expected 0 or more and below 1"
        for key in ("neighbours", "token_dropout", "dropout", "warmup_fraction", "final_fraction")
        if not 0 <= getattr(phase, key) < 1
    ]
    if phase.learning_rate <= 0 or phase.adapter_rate <= 0 or phase.temperature <= 0:
        problems.append("learning-rate, adapter-rate and temperature must be above 0")
    if phase.captions not in ("all", "first"):
        problems.append(f"captions is {phase.captions!r}, expected 'all' or 'first'")
    return [f"phase {phase.name!r}: {problem}" for problem in problems]
