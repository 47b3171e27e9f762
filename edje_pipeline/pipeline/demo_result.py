"""What the demo found, as text of 80 columns and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from edje_pipeline.progress import format_bytes, format_duration

SHOWN = 3
UNTRAINED_MARK = "*"
MARK = ">"
QUERY_WIDTH, IMAGE_WIDTH = 24, 24
NOTES = {
    "random": (
        "The model {model!r} has fixed random weights: it was never trained, and\n"
        "the order above means nothing. The demo shows the machinery; give a trained\n"
        "one with --model."
    ),
    "emoji": (
        "The model {model!r} was trained on emoji drawings, most of these among\n"
        "them; for photographs train or import another one. Its card:\n"
        "  edje-pipeline model-info {model} --card"
    ),
}


@dataclass(frozen=True)
class QueryRow:
    """One query of the table."""

    query: str
    first_stage: list[str]
    """Names of the first `SHOWN` drawings."""
    reranked: list[str]
    wanted: str | None = None
    """The drawing of that name, where there is one."""
    is_trained_on: bool = True
    """False: the concept was kept apart when the bundled model was trained."""


@dataclass(frozen=True)
class Measured:
    """How often the drawing of a name came first."""

    num_names: int
    first_stage: float
    """Fraction of the names; the pool's best."""
    reranked: float

    def __str__(self) -> str:
        return f"{self.num_names:>6,} {self.first_stage:>11.1%} {self.reranked:>9.1%}"


@dataclass(frozen=True)
class DemoResult:
    """What the demo found."""

    directory: str
    model: str
    is_random: bool
    num_images: int
    num_rejected: int
    bytes_per_image: float
    pool_size: int
    """Drawings a query that the first stage gives and the joint encoder puts in order."""
    num_pairs: int
    images_per_s: float
    pairs_per_s: float
    fusion_weight: float
    """Reranked by logit + weight x first-stage similarity."""
    recall_at_1: Measured
    not_trained_on: Measured | None = None
    """The same for concepts kept apart when the bundled model was trained; None for other models."""
    rows: list[QueryRow] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def exit_code(self) -> int:
        return 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        heads = ("query", "  first stage", "  reranked")
        widths = (QUERY_WIDTH, IMAGE_WIDTH + 2, IMAGE_WIDTH + 2)
        lines = [_columns(heads), _columns(tuple("-" * width for width in widths))]
        for row in self.rows:
            for place, pair in enumerate(zip(row.first_stage, row.reranked, strict=True)):
                marked = (f"{MARK if name == row.wanted else ' '} {_cut(name, IMAGE_WIDTH)}" for name in pair)
                mark = "" if row.is_trained_on else f" {UNTRAINED_MARK}"
                query = _cut(row.query, QUERY_WIDTH - len(mark)) + mark if place == 0 else ""
                lines.append(_columns((query, *marked)))
            lines.append("")
        lines += [
            f"{MARK} the drawing of that name"
            + ("" if all(row.is_trained_on for row in self.rows) else f"   {UNTRAINED_MARK} not trained on"),
            *([f"  reranked by logit + {self.fusion_weight:g} x first-stage similarity"] if self.fusion_weight else []),
            "",
            f"{'the named drawing comes first':31} {'names':>6} {'first stage':>11} {'reranked':>9}",
            f"{'all names' if self.recall_at_1.num_names == self.num_images else 'a sample':31} {self.recall_at_1}",
        ]
        if self.not_trained_on is not None:
            lines.append(f"{'concepts it was not trained on':31} {self.not_trained_on}")
        stored = format_bytes(self.bytes_per_image)
        lines += [
            "",
            f"{self.num_images:,} images of {stored} ({self.images_per_s:,.0f} images/s)",
            f"{self.num_pairs:,} pairs ({self.pairs_per_s:,.0f} pairs/s), {format_duration(self.wall_s)} in all",
        ]
        if self.is_random or self.not_trained_on is not None:
            lines += ["", NOTES["random" if self.is_random else "emoji"].format(model=self.model)]
        root = self.directory
        lines += [
            "",
            "Go on from here:",
            f"  edje-pipeline inspect {root}/index",
            f"  edje-pipeline verify {root}/index",
            f"  ls {root}        # images, names, index, queries, candidates, scores",
        ]
        return "\n".join(lines)


def _columns(cells: tuple[str, ...]) -> str:
    query, first_stage, reranked = cells
    return f"{query:<{QUERY_WIDTH}}  {first_stage:<{IMAGE_WIDTH + 2}}  {reranked}".rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
