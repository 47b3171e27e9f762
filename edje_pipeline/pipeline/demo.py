"""The main job on real images in one call: render, extract, retrieve, score, show.

Everything goes through the same functions as the commands of the same names; the demo adds the
corpus, a few queries and a table.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.hub import EMOJI_MODEL, default_model
from edje_pipeline.pipeline.demo_result import SHOWN, DemoResult, Measured, QueryRow
from edje_pipeline.pipeline.openmoji import Drawing, list_drawings, slug, write_image_folder
from edje_pipeline.pipeline.runner import ExecutorOptions
from edje_pipeline.progress import progress

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


@dataclass(frozen=True)
class DemoConfig:
    """Options of the demo."""

    directory: str = "edje-demo"
    """Everything the demo writes lies below."""
    model: str | None = None
    """None: the bundled one."""
    queries: tuple[str, ...] = DEFAULT_QUERIES
    """Shown in the table."""
    num_measured: int | None = None
    """Names, evenly spread over all of them, for which the place of the named drawing is counted; None: all."""
    fusion_weight: float = 0.0
    """Reranked by logit + weight x first-stage similarity; 0: by the joint encoder alone."""
    executor: ExecutorOptions = field(default_factory=ExecutorOptions)
    """Where extraction runs."""
    quiet: bool = False


def run_demo(config: DemoConfig) -> DemoResult:
    """Renders the drawings and runs extract, retrieve and score over them.

    Raises:
        ConfigError: the extra `[demo]` is not installed, or `directory` holds something else.
    """
    from edje_pipeline.models.checkpoint import open_model
    from edje_pipeline.pipeline.extract import ExtractConfig, run_extract
    from edje_pipeline.pipeline.retrieve import RetrieveConfig, run_retrieve
    from edje_pipeline.pipeline.score import ScoreConfig, run_score

    started = time.monotonic()
    root = Path(config.directory)
    if root.exists() and any(root.iterdir()) and not (root / "names.jsonl").exists():
        raise ConfigError(f"{root} is not empty and was not made by the demo; choose another --dir")
    drawings = list_drawings()
    with progress("render", len(drawings), quiet=config.quiet) as report:
        write_image_folder(root / "images", drawings, on_progress=report.update)
    name = config.model or default_model()
    model = open_model(name)
    _forget_other_models(root / "index", model.fingerprints)
    extracted = run_extract(
        ExtractConfig(
            corpus=str(root / "images"),
            index=str(root / "index"),
            model=name,
            executor=config.executor,
            quiet=config.quiet,
        )
    )
    measured = _measured(drawings, config.num_measured)
    _write_queries(root, config.queries, measured)
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
    scores = pa.concat_tables([pq.read_table(root / "scores" / path) for path in scored.result_paths])
    reranked = _ranked(_fused(scores, config.fusion_weight))
    known = {drawing.image_id for drawing in drawings}
    kept_apart = {drawing.image_id for drawing in drawings if name == EMOJI_MODEL and not drawing.is_trained_on}
    apart = {query_id: drawing for query_id, drawing in measured.items() if not drawing.is_trained_on}
    return DemoResult(
        directory=str(root),
        model=name,
        is_random=model.spec.backbone.weights_sha256.startswith("random") or name.startswith("random"),
        num_images=extracted.num_images,
        num_rejected=extracted.num_rejected,
        bytes_per_image=extracted.payload_bytes,
        pool_size=POOL_SIZE,
        num_pairs=scored.num_pairs,
        images_per_s=extracted.num_computed / max(extracted.timings.get("compute_s", 0.0), 1e-9),
        pairs_per_s=scored.pairs_per_s,
        fusion_weight=config.fusion_weight,
        recall_at_1=_recall(measured, first_stage, reranked),
        not_trained_on=_recall(apart, first_stage, reranked) if name == EMOJI_MODEL and apart else None,
        rows=[
            QueryRow(
                query,
                _shown(first_stage[f"show-{number}"]),
                _shown(reranked[f"show-{number}"]),
                wanted=slug(query) if f"{slug(query)}.png" in known else None,
                is_trained_on=f"{slug(query)}.png" not in kept_apart,
            )
            for number, query in enumerate(config.queries)
        ],
        wall_s=time.monotonic() - started,
    )


def _forget_other_models(index: Path, fingerprints: dict[str, str]) -> None:
    """Removes the index of an earlier demo with another model: its tokens cannot be mixed with the new ones."""
    from edje_pipeline.storage.location import Location
    from edje_pipeline.storage.manifest import find_manifest

    existing = find_manifest(Location.parse(index)) if index.is_dir() else None
    parts = ("backbone", "preprocess", "adapter")
    if existing is not None and any(existing.fingerprints.get(part) != fingerprints[part] for part in parts):
        shutil.rmtree(index)


def _measured(drawings: list[Drawing], num_measured: int | None) -> dict[str, Drawing]:
    """query_id -> drawing whose name is that query, evenly spread."""
    step = max(1, len(drawings) // num_measured) if num_measured else 1
    return {f"name-{number}": drawing for number, drawing in enumerate(drawings[::step][:num_measured])}


def _write_queries(root: Path, shown: tuple[str, ...], measured: dict[str, Drawing]) -> None:
    queries = [{"query_id": f"show-{number}", "text": text} for number, text in enumerate(shown)]
    queries += [{"query_id": query_id, "text": drawing.name} for query_id, drawing in measured.items()]
    (root / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries), encoding="utf-8")


def _fused(scores: pa.Table, weight: float) -> pa.Table:
    """The score table with `rank` by score + weight x first_stage_score within each query, ties by image_id."""
    if weight == 0:
        return scores
    fused = pc.add(scores["score"], pc.multiply(scores["first_stage_score"], weight))
    order = [("query_id", "ascending"), ("fused", "descending"), ("image_id", "ascending")]
    ordered = scores.drop_columns(["rank"]).append_column("fused", fused).sort_by(order)
    return ordered.append_column("rank", pa.array(range(len(ordered)), pa.int64()))


def _ranked(table: pa.Table) -> dict[str, list[str]]:
    ordered = table.sort_by([("query_id", "ascending"), ("rank", "ascending")])
    lists: dict[str, list[str]] = {}
    for query_id, image_id in zip(
        ordered.column("query_id").to_pylist(), ordered.column("image_id").to_pylist(), strict=True
    ):
        lists.setdefault(query_id, []).append(image_id)
    return lists


def _recall(wanted: dict[str, Drawing], *stages: dict[str, list[str]]) -> Measured:
    first_stage, reranked = (
        sum(lists[query_id][0] == drawing.image_id for query_id, drawing in wanted.items()) / max(1, len(wanted))
        for lists in stages
    )
    return Measured(len(wanted), first_stage, reranked)


def _shown(image_ids: list[str]) -> list[str]:
    return [image_id.removesuffix(".png") for image_id in image_ids[:SHOWN]]
