"""Scores query-candidate lists against an index: join, score by shard, regroup by query, publish.

    run_score(ScoreConfig(index="photos.edje", queries="q.parquet", candidates="c.parquet", out="scores"))

Killed at any moment, the same call goes on where it stopped; see `score_store` for what lies where.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

import edje_pipeline
from edje_pipeline.errors import ConfigError, InputFileError
from edje_pipeline.models.spec import fingerprint_of
from edje_pipeline.pipeline.metrics import peak_rss_bytes
from edje_pipeline.pipeline.score_journal import UnitJournal
from edje_pipeline.pipeline.score_output import write_results
from edje_pipeline.pipeline.score_pass import Workers, run_pass
from edje_pipeline.pipeline.score_plan import PlanInfo, PlanLimits, Queries, write_plan
from edje_pipeline.pipeline.score_rank import check_trec_ids
from edje_pipeline.pipeline.score_refine import refine
from edje_pipeline.pipeline.score_result import ScoreResult
from edje_pipeline.pipeline.score_store import ScoreStore
from edje_pipeline.pipeline.score_worker import WorkerSpec
from edje_pipeline.storage.arrow import gathered
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.parquet_io import hash_file

JOIN_CHUNK_PAIRS = 500_000
"""Candidates looked up in the index at a time."""
UNIT_PAIRS = {"cpu": 8192, "cuda": 65_536}


@dataclass(frozen=True)
class ScoreConfig:
    """Options of a scoring run."""

    index: str
    """Directory or URI of the index."""
    queries: str
    """query_id, text: Parquet, JSONL, CSV or TSV."""
    candidates: str
    """query_id, image_id [, first_stage_score]: Parquet, JSONL, CSV, TSV or a TREC run."""
    out: str
    """Folder of the results."""
    snapshot: str | None = None
    """Of the index; None: the current one."""
    model: str | None = None
    """None: the one the index was made with."""
    top_k: int | None = None
    """Ranks kept a query; None keeps all."""
    trec: str | None = None
    """File to write as a TREC run as well."""
    on_missing: str = "report"
    """`report` writes candidates that are not in the index to missing.parquet, `error` stops."""
    missing_warning: float = 0.01
    """Fraction of missing candidates above which the run ends with exit code 3."""
    precision: str = "auto"
    """`float32`, `bfloat16`, `int8` (CPU), or `auto`: bfloat16 on a GPU, float32 on a CPU."""
    compile: bool = False
    """`torch.compile` of the joint encoder: worth its minute on a GPU from a few million pairs."""
    kernels: str = "torch"
    """Layers on a GPU: `torch`, or `own`, an experiment for bfloat16 (docs/performance.md)."""
    refine_top: int = 0
    """Each query's best pairs scored again in float32; 0: none. Nothing to do where `precision` is float32."""
    device: str = "auto"
    num_workers: int | None = None
    """Ray actors; 0 scores in this process; None chooses by the number of pairs, GPUs and cores."""
    ray_address: str | None = None
    """A running cluster; implies Ray."""
    num_threads: int | None = None
    """Of one CPU worker; None: all cores in process, `CPUS_A_WORKER` in an actor."""
    unit_pairs: int | None = None
    """Pairs committed at a time, about; None: by device."""
    memory_pairs: int = 1_000_000
    """Pairs joined and sorted in memory at a time; more go through disk."""
    overwrite: bool = False
    """Replace finished results, and discard an unfinished run of other inputs."""
    quiet: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k is {self.top_k}, expected at least 1")
        if self.on_missing not in ("report", "error"):
            problems.append(f"on_missing is {self.on_missing!r}, expected report or error")
        if not 0 <= self.missing_warning <= 1:
            problems.append(f"missing_warning is {self.missing_warning}, expected a fraction from 0 to 1")
        if self.num_workers is not None and self.num_workers < 0:
            problems.append(f"num_workers is {self.num_workers}, expected 0 or more")
        if self.refine_top < 0:
            problems.append(f"refine_top is {self.refine_top}, expected 0 or more")
        for name in ("num_threads", "unit_pairs", "memory_pairs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} is {value}, expected at least 1")
        if problems:
            raise ConfigError("; ".join(problems))


def run_score(config: ScoreConfig) -> ScoreResult:
    """Runs or resumes a scoring run and publishes its results.

    Raises:
        InputFileError: queries or candidates cannot be used, or some are missing and `on_missing` is `error`.
        IndexStateError, ShapeMismatchError, ModelError: index and model do not go together.
        ResumeMismatchError, IndexLockedError: `out` is in use by or for another run.
        CorruptionError: the index is damaged.
        WorkerError: a Ray worker failed more often than the run allows.
    """
    from edje_pipeline.reranker import open_fitting_model
    from edje_pipeline.stages.score_pairs import check_kernels, resolve_device, resolve_precision

    clock = Clock()
    index = Index.open(config.index, snapshot=config.snapshot)
    directory = open_fitting_model(index, config.model)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    check_kernels(config.kernels, device, precision, compiled=config.compile)
    refine_top = 0 if precision == "float32" else config.refine_top
    inputs = [Location.parse(config.queries), Location.parse(config.candidates)]
    with clock.stage("hash"):
        fingerprints = {
            "index": fingerprint_of([index.snapshot, index.manifest.fingerprints]),
            "model": directory.fingerprints["joint_encoder"],
            "queries": hash_input(inputs[0], "query"),
            "candidates": hash_input(inputs[1], "candidate"),
            "precision": precision,
            "kernels": config.kernels,
            "refine_top": str(refine_top),
        }
    options = {key: value for key, value in asdict(config).items() if key not in ("quiet", "overwrite")}
    out = Location.parse(config.out)
    with ScoreStore.begin(out, fingerprints=fingerprints, config=options, overwrite=config.overwrite) as store:
        if store.published is not None:
            store.tidy(store.published)
            return ScoreResult.from_manifest(store.published, str(out), config.missing_warning)

        def tokenize(texts: list[str]) -> list[list[int]]:
            return directory.load_tokenizer().encode(texts)

        limits = PlanLimits(config.unit_pairs or UNIT_PAIRS[device.type], memory_pairs=config.memory_pairs)
        with clock.stage("join"):
            info = make_plan(store.units, index, config, tokenize, limits)
        if config.on_missing == "error" and info.num_missing:
            raise InputFileError(
                f"{info.num_missing:,} candidates name {info.num_missing_images:,} images that {index.location} "
                f"does not hold, such as {', '.join(map(repr, info.missing_images[:3]))}; "
                "extract them, or use --on-missing report"
            )
        spec = WorkerSpec(
            index=index.location.uri,
            snapshot=index.snapshot,
            model=config.model,
            precision=precision,
            device=str(device),
            compiled=config.compile,
            kernels=config.kernels,
        )
        workers = Workers(config.num_workers, config.num_threads, config.ray_address, quiet=config.quiet)
        with clock.stage("score"):
            done = run_pass(store.units, info, spec, index, workers)
        refined = None
        if refine_top and info.num_pairs:
            with clock.stage("refine"):
                plan, again = refine(
                    store,
                    info,
                    index=index,
                    read_queries=lambda: load_queries(config),
                    tokenize=tokenize,
                    limits=limits,
                    spec=spec,
                    workers=workers,
                    top=refine_top,
                )
            refined = {"top": refine_top, "num_pairs": plan.num_pairs, "stats": again.stats}
        with clock.stage("regroup"):
            written = write_results(store, info, memory_pairs=config.memory_pairs, top_k=config.top_k, trec=config.trec)
        manifest = store.publish(
            {
                "code_version": edje_pipeline.__version__,
                "config": options,
                "index": {"location": str(index.location), "snapshot": index.snapshot},
                "model": directory.spec.name,
                "plan": info.to_dict(),
                "num_pairs_scored_now": done.num_pairs_scored_now,
                "num_workers": done.num_workers,
                "device": str(device),
                "precision": precision,
                "refined": refined,
                "stats": done.stats,
                "driver_peak_bytes": peak_rss_bytes(),
                "timings": clock.seconds,
                **written,
            }
        )
        return ScoreResult.from_manifest(manifest, str(out), config.missing_warning)


class Clock:
    """Seconds by stage of the run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[f"{name}_s"] = self.seconds.get(f"{name}_s", 0.0) + time.perf_counter() - started


def hash_input(location: Location, what: str) -> str:
    """sha256 of an input file, or of all files of a folder.

    Raises:
        InputFileError: it does not exist.
    """
    if not location.exists():
        raise InputFileError(f"the {what} file {location} does not exist")
    if not location.is_dir():
        return hash_file(location).sha256
    names = [entry.path for entry in location.list_files()]
    return fingerprint_of([[name, hash_file(location.child(name)).sha256] for name in names])


def make_plan(journal: UnitJournal, index: Index, config: ScoreConfig, tokenize: Any, limits: PlanLimits) -> PlanInfo:
    """The stored plan of a resumed run, else a new one."""
    from edje_pipeline.storage.text_inputs import iter_candidates

    found = journal.plan_info
    if found is not None:
        return PlanInfo(**found)
    queries = load_queries(config)
    pieces = iter_candidates(config.candidates)
    if config.trec:
        check_trec_ids(queries.query_ids, "query_id")
        pieces = trec_checked(pieces)
    info = write_plan(
        journal.plan_dir, index, queries, gathered(pieces, JOIN_CHUNK_PAIRS), tokenize=tokenize, limits=limits
    )
    journal.set_plan_info(info.to_dict())
    return info


def load_queries(config: ScoreConfig) -> Queries:
    """The query file as numbers."""
    from edje_pipeline.storage.text_inputs import read_queries

    return Queries.from_table(read_queries(config.queries))


def trec_checked(candidates: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same tables; raises ConfigError at an image_id that a TREC run cannot hold."""
    for piece in candidates:
        check_trec_ids(piece.column("image_id"), "image_id")
        yield piece
