"""The main job on real images in one call: render, extract, retrieve, score, show.

Everything goes through the same functions as the commands of the same names; the demo adds the
corpus, a few queries and a table.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.errors import ConfigError
from edje_pipeline.pipeline.openmoji import list_drawings, write_image_folder
from edje_pipeline.progress import format_bytes, format_duration, progress

DEFAULT_QUERIES = (
    "red apple",
    "fox",
    "hot beverage",
    "rocket",
    "umbrella with rain drops",
    "guitar",
    "crescent moon",
    "bicycle",
)
POOL_SIZE = 10
SHOWN = 3
RANDOM_NOTE = (
    "The model {model!r} has fixed random weights: it was never trained, and the order\n"
    "below means nothing. The demo shows the machinery; give a trained one with --model."
)


@dataclass(frozen=True)
class DemoConfig:
    """Options of the demo."""

    directory: str = "edje-demo"
    """Everything the demo writes lies below."""
    model: str | None = None
    """None: the bundled one."""
    queries: tuple[str, ...] = DEFAULT_QUERIES
    """Shown in the table."""
    num_measured: int = 200
    """Names, evenly spread over all of them, for which the place of the named drawing is counted."""
    quiet: bool = False


@dataclass(frozen=True)
class QueryRow:
    """One line of the table."""

    query: str
    first_stage: list[str]
    reranked: list[str]


@dataclass(frozen=True)
class DemoResult:
    """What the demo found."""

    directory: str
    model: str
    is_random: bool
    num_images: int
    num_rejected: int
    bytes_per_image: float
    num_pairs: int
    images_per_s: float
    pairs_per_s: float
    num_measured: int
    recall_at_1: dict[str, float]
    """`first_stage` and `reranked`: fraction of the measured names whose drawing came first."""
    rows: list[QueryRow] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def exit_code(self) -> int:
        return 0

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": [row.__dict__ for row in self.rows]}

    def to_text(self) -> str:
        width = 25
        rule = f"{'-' * width}  {'-' * width}  {'-' * width}"
        lines = [f"{'query':<{width}}  {'first stage':<{width}}  {'reranked':<{width}}", rule]
        for row in self.rows:
            pairs = zip(row.first_stage, row.reranked, strict=True)
            for place, (before, after) in enumerate(pairs):
                query = row.query if place == 0 else ""
                lines.append(f"{_cut(query, width):<{width}}  {_cut(before, width):<{width}}  {_cut(after, width)}")
            lines.append("")
        first, reranked = self.recall_at_1["first_stage"], self.recall_at_1["reranked"]
        lines.append(
            f"named drawing first, of {self.num_measured} names: first stage {first:.1%}, reranked {reranked:.1%}"
        )
        lines.append(
            f"{self.num_images:,} images of {format_bytes(self.bytes_per_image)} ({self.images_per_s:,.0f} images/s), "
            f"{self.num_pairs:,} pairs ({self.pairs_per_s:,.0f} pairs/s), {format_duration(self.wall_s)}"
        )
        if self.is_random:
            lines += ["", RANDOM_NOTE.format(model=self.model)]
        root = self.directory
        lines += [
            "",
            "Go on from here:",
            f"  edje-pipeline inspect {root}/index",
            f"  edje-pipeline verify {root}/index",
            f"  ls {root}        # images, names, index, queries, candidates, scores",
        ]
        return "\n".join(lines)


def run_demo(config: DemoConfig) -> DemoResult:
    """Renders the drawings and runs extract, retrieve and score over them.

    Raises:
        ConfigError: the extra `[demo]` is not installed, or `directory` holds something else.
    """
    from edje_pipeline.models.checkpoint import open_model
    from edje_pipeline.pipeline.extract import DEFAULT_MODEL, ExtractConfig, run_extract
    from edje_pipeline.pipeline.retrieve import RetrieveConfig, run_retrieve
    from edje_pipeline.pipeline.score import ScoreConfig, run_score

    started = time.monotonic()
    root = Path(config.directory)
    if root.exists() and any(root.iterdir()) and not (root / "names.jsonl").exists():
        raise ConfigError(f"{root} is not empty and was not made by the demo; choose another --dir")
    num_drawings = len(list_drawings())
    with progress("render", num_drawings, quiet=config.quiet) as report:
        write_image_folder(root / "images", on_progress=report.update)
    model = config.model or DEFAULT_MODEL
    extracted = run_extract(
        ExtractConfig(corpus=str(root / "images"), index=str(root / "index"), model=model, quiet=config.quiet)
    )
    names = _write_queries(root, config)
    run_retrieve(
        RetrieveConfig(
            index=str(root / "index"),
            queries=str(root / "queries.jsonl"),
            out=str(root / "candidates.parquet"),
            top_k=POOL_SIZE,
            quiet=config.quiet,
        )
    )
    scored = run_score(
        ScoreConfig(
            index=str(root / "index"),
            queries=str(root / "queries.jsonl"),
            candidates=str(root / "candidates.parquet"),
            out=str(root / "scores"),
            overwrite=True,
            quiet=config.quiet,
        )
    )
    first_stage = _ranked(pq.read_table(root / "candidates.parquet"))
    reranked = _ranked(pa.concat_tables([pq.read_table(root / "scores" / path) for path in scored.result_paths]))
    return DemoResult(
        directory=str(root),
        model=model,
        is_random=open_model(model).spec.backbone.weights_sha256.startswith("random") or model.startswith("random"),
        num_images=extracted.num_images,
        num_rejected=extracted.num_rejected,
        bytes_per_image=extracted.payload_bytes,
        num_pairs=scored.num_pairs,
        images_per_s=extracted.num_computed / max(extracted.timings.get("compute_s", 0.0), 1e-9),
        pairs_per_s=scored.pairs_per_s,
        num_measured=len(names),
        recall_at_1={
            "first_stage": _first_place(first_stage, names),
            "reranked": _first_place(reranked, names),
        },
        rows=[
            QueryRow(query, _shown(first_stage[f"show-{number}"]), _shown(reranked[f"show-{number}"]))
            for number, query in enumerate(config.queries)
        ],
        wall_s=time.monotonic() - started,
    )


def _write_queries(root: Path, config: DemoConfig) -> dict[str, str]:
    """Writes queries.jsonl; returns query_id -> image_id of the measured names."""
    drawings = list_drawings()
    step = max(1, len(drawings) // max(1, config.num_measured))
    measured = drawings[::step][: config.num_measured]
    queries = [{"query_id": f"show-{number}", "text": text} for number, text in enumerate(config.queries)]
    queries += [{"query_id": f"name-{number}", "text": drawing.name} for number, drawing in enumerate(measured)]
    (root / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries), encoding="utf-8")
    return {f"name-{number}": drawing.image_id for number, drawing in enumerate(measured)}


def _ranked(table: pa.Table) -> dict[str, list[str]]:
    ordered = table.sort_by([("query_id", "ascending"), ("rank", "ascending")])
    lists: dict[str, list[str]] = {}
    for query_id, image_id in zip(
        ordered.column("query_id").to_pylist(), ordered.column("image_id").to_pylist(), strict=True
    ):
        lists.setdefault(query_id, []).append(image_id)
    return lists


def _first_place(lists: dict[str, list[str]], names: dict[str, str]) -> float:
    return sum(lists[query_id][0] == image_id for query_id, image_id in names.items()) / max(1, len(names))


def _shown(image_ids: list[str]) -> list[str]:
    return [image_id.removesuffix(".png") for image_id in image_ids[:SHOWN]]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
