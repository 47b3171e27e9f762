"""The tables of an evaluation, as text, JSON and Markdown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

METRICS = ("R@1", "R@5", "R@10", "MRR")


@dataclass(frozen=True)
class Interval:
    """A mean over queries with its bootstrap confidence interval; percent for recall, 0..100 for MRR too."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:5.1f} [{self.low:4.1f}, {self.high:4.1f}]"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    direction: str
    stage: str
    """`first stage`, or `reranked`."""
    pool: int
    """k; 0 for the first stage."""
    fusion_weight: float
    metrics: dict[str, Interval]
    gain: Interval | None
    """R@1 minus the first stage's, points, paired by query."""


@dataclass(frozen=True)
class EvaluateResult:
    """The tables."""

    index: str
    model: str
    num_images: int
    num_texts: int
    rows: tuple[Row, ...]
    wall_s: float
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        """A table of at most 80 columns; the intervals of all metrics are in the other formats."""
        lines = [f"{self.num_texts:,} texts, {self.num_images:,} images, {self.index}", ""]
        lines.append(f"{'':4} {'':12} {'k':>4} {'fusion':>6}  {'R@1':>20} {'R@5':>6} {'R@10':>6} {'MRR':>6}  gain")
        for row in self.rows:
            means = "".join(f" {row.metrics[name].mean:6.1f}" for name in METRICS[1:])
            pool = str(row.pool) if row.pool else "-"
            gain = f"{row.gain.mean:+.1f}" if row.gain else ""
            weight = f"{row.fusion_weight:g}" if row.pool else "-"
            lines.append(
                f"{row.direction:4} {row.stage:12} {pool:>4} {weight:>6}  {row.metrics['R@1']!s:>20}{means}  {gain}"
            )
        lines.append("\n[low, high]: 95 % confidence by bootstrap over queries. gain: R@1, points.")
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The full table for a document."""
        lines = [
            f"| direction | stage | k | fusion weight | {' | '.join(METRICS)} | gain in R@1 |",
            "|---|---|---|---|" + "---|" * (len(METRICS) + 1),
        ]
        for row in self.rows:
            values = " | ".join(str(row.metrics[name]).strip() for name in METRICS)
            gain = str(row.gain).strip() if row.gain else ""
            lines.append(
                f"| {row.direction} | {row.stage} | {row.pool or ''} | {row.fusion_weight:g} | {values} | {gain} |"
            )
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class EvaluateResults:
    """Several indexes measured in the same way, for a comparison."""

    results: tuple[EvaluateResult, ...]
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {"results": [result.to_dict() for result in self.results]}

    def to_text(self) -> str:
        return "\n\n".join(result.to_text() for result in self.results)

    def to_markdown(self) -> str:
        """One table an index, its name above."""
        return "\n".join(
            f"{result.num_texts:,} texts, {result.num_images:,} images, index `{result.index}`, "
            f"model `{result.model}`\n\n{result.to_markdown()}"
            for result in self.results
        )
