"""First stage: the images whose stored embeddings lie nearest to each query, as a candidate list.

`exact` multiplies the queries with the stored embeddings block by block: memory does not grow with
the index. `faiss` builds an inverted-file index in memory first and looks at a part of it: for many
queries over many images.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.errors import ConfigError, IndexStateError, InputFileError
from edje_pipeline.pipeline.score_plan import Queries
from edje_pipeline.pipeline.score_rank import check_trec_ids, trec_lines
from edje_pipeline.pipeline.top_k import TopK, queries_at_once
from edje_pipeline.progress import format_duration, progress
from edje_pipeline.storage.arrow import numpy_from_fixed_binary
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.parquet_io import write_parquet

BLOCK_IMAGES = 16_384
EXACT_LIMIT = 2e15
"""Multiplications (queries x images x width) up to which `auto` searches exactly: hours of two cores."""
FAISS_SAMPLE = 262_144
TREC_SUFFIXES = (".trec", ".run", ".txt")
RESULT_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("first_stage_score", pa.float32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class RetrieveConfig:
    """Options of a first-stage search."""

    index: str
    queries: str
    """query_id, text; with an `embedding` column (list of numbers) no text tower is needed."""
    out: str
    """Candidate file: Parquet, or a TREC run when its name ends in .trec, .run or .txt."""
    top_k: int = 100
    snapshot: str | None = None
    model: str | None = None
    """None: the one the index was made with."""
    embeddings: str | None = None
    """A .npy file (Q, De) with the query embeddings, in the order of the query file."""
    method: str = "auto"
    """`exact`, `faiss` or `auto`."""
    num_probes: int = 32
    """Lists that `faiss` looks at for each query."""
    quiet: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.top_k < 1:
            problems.append(f"top_k is {self.top_k}, expected at least 1")
        if self.method not in ("auto", "exact", "faiss"):
            problems.append(f"method is {self.method!r}, expected auto, exact or faiss")
        if self.num_probes < 1:
            problems.append(f"num_probes is {self.num_probes}, expected at least 1")
        if problems:
            raise ConfigError("; ".join(problems))


@dataclass(frozen=True)
class RetrieveResult:
    """Summary of a search."""

    out: str
    num_queries: int
    num_images: int
    num_candidates: int
    method: str
    encode_s: float
    search_s: float

    @property
    def exit_code(self) -> int:
        return 0

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def to_text(self) -> str:
        total = format_duration(self.encode_s + self.search_s)
        return (
            f"retrieved {self.num_candidates:,} candidates for {self.num_queries:,} queries "
            f"over {self.num_images:,} images in {total}\n"
            f"  method    {self.method}\n"
            f"  seconds   texts {self.encode_s:.1f}, search {self.search_s:.1f}\n"
            f"candidates: {self.out}"
        )


def run_retrieve(config: RetrieveConfig) -> RetrieveResult:
    """Searches and writes the candidate file.

    Raises:
        InputFileError: the queries or their embeddings cannot be used.
        IndexStateError: the index stores no embeddings, or was made with another model.
        ModelError: the model has no text tower and no embeddings were given.
    """
    from edje_pipeline.storage.text_inputs import read_queries

    index = Index.open(config.index, snapshot=config.snapshot)
    width = index.manifest.embedding_dim
    if not width:
        raise IndexStateError(
            f"{index.location} stores no embeddings: its backbone has none; "
            "give `score` candidates of another first stage"
        )
    started = time.perf_counter()
    embeddings = given_embeddings(config, width)
    queries = Queries.from_table(read_queries(config.queries))
    as_trec = config.out.lower().endswith(TREC_SUFFIXES)
    if as_trec:
        check_trec_ids(queries.query_ids, "query_id")
    num_queries = len(queries.query_ids)
    if embeddings is None:
        embeddings = tower_embeddings(index, config, queries)
    if embeddings.shape != (num_queries, width):
        raise InputFileError(
            f"the query embeddings have the shape {embeddings.shape}, expected ({num_queries}, {width}): "
            "one row a query, as wide as the index's embeddings"
        )
    if not np.isfinite(embeddings).all():
        raise InputFileError("the query embeddings hold values that are not finite")
    embeddings = np.ascontiguousarray(embeddings, np.float32)
    encode_s = time.perf_counter() - started
    started = time.perf_counter()
    method = config.method
    if method == "auto":
        method = "exact" if float(num_queries) * len(index) * width <= EXACT_LIMIT else "faiss"
    search = search_exact if method == "exact" else search_faiss
    table = search(index, embeddings, queries.query_ids, config)
    search_s = time.perf_counter() - started
    out = Location.parse(config.out)
    if as_trec:
        named = table.rename_columns(["query_id", "image_id", "score", "rank"])
        out.write_bytes(trec_lines(named, tag="edje-first-stage"))
    else:
        write_parquet(out, [table], RESULT_SCHEMA, row_group_rows=131_072, dictionary_columns=("query_id", "image_id"))
    return RetrieveResult(str(out), num_queries, len(index), table.num_rows, method, encode_s, search_s)


def given_embeddings(config: RetrieveConfig, width: int) -> np.ndarray | None:
    """Embeddings from a .npy file or from the `embedding` column of a Parquet query file; None without."""
    if config.embeddings is not None:
        try:
            return np.load(Path(config.embeddings), allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputFileError(f"cannot read the query embeddings {config.embeddings}: {error}") from error
    location = Location.parse(config.queries)
    if not location.path.endswith(".parquet") or not location.exists() or location.is_dir():
        return None
    with location.open_input() as stream:
        file = pq.ParquetFile(stream)
        if "embedding" not in file.schema_arrow.names:
            return None
        column = file.read(columns=["embedding"]).column("embedding").combine_chunks()
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(check(column.type) for check in is_list):
        raise InputFileError(f"the column embedding of {location} is {column.type}; expected a list of {width} numbers")
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    if column.null_count or len(values) != len(column) * width:
        raise InputFileError(f"the column embedding of {location} does not hold {width} numbers in every row")
    return values.reshape(len(column), width)


def tower_embeddings(index: Index, config: RetrieveConfig, queries: Queries) -> np.ndarray:
    """The queries through the model's text tower, each distinct text once: float32 (Q, De)."""
    from edje_pipeline.models.checkpoint import open_model
    from edje_pipeline.reranker import model_name_of

    model = open_model(model_name_of(index, config.model))
    ours, stored = model.spec.backbone.fingerprint, index.manifest.fingerprints["backbone"]
    if ours != stored:
        raise IndexStateError(
            f"the index holds embeddings of another backbone than model {model.spec.name!r}: {stored[:12]} in the "
            f"index, {ours[:12]} in the model; give the model the index was made with"
        )
    return model.load_text_tower().encode(queries.distinct_texts)[queries.texts]


def blocks(index: Index) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """All live images: ids and float32 (n, De), up to about `BLOCK_IMAGES` at a time."""
    ids: list[pa.Array] = []
    parts: list[np.ndarray] = []
    num_held = 0
    for shard in index.iter_shards():
        for _, table in shard.tables(["image_id", "embedding"]):
            ids += table.column("image_id").chunks
            parts.append(numpy_from_fixed_binary(table.column("embedding")).view(np.float16).astype(np.float32))
            num_held += table.num_rows
            if num_held >= BLOCK_IMAGES:
                yield pa.concat_arrays(ids), np.concatenate(parts)
                ids, parts, num_held = [], [], 0
    if num_held:
        yield pa.concat_arrays(ids), np.concatenate(parts)


def search_exact(index: Index, embeddings: np.ndarray, query_ids: pa.Array, config: RetrieveConfig) -> pa.Table:
    """Every image against every query; equal scores by image_id."""
    step = queries_at_once(BLOCK_IMAGES)
    best = [TopK(len(embeddings[start : start + step]), config.top_k) for start in range(0, len(embeddings), step)]
    with progress("retrieve", len(index), quiet=config.quiet) as report:
        for ids, stored in blocks(index):
            for number, kept in enumerate(best):
                kept.add(embeddings[number * step : (number + 1) * step] @ stored.T, ids)
            report.update(len(ids))
    tables = []
    for number, kept in enumerate(best):
        rows, images, scores, ranks = kept.result()
        tables.append(pa.table([query_ids.take(pa.array(rows + number * step)), images, scores, ranks], RESULT_SCHEMA))
    return pa.concat_tables([RESULT_SCHEMA.empty_table(), *tables])


def search_faiss(index: Index, embeddings: np.ndarray, query_ids: pa.Array, config: RetrieveConfig) -> pa.Table:
    """An inverted file over float16 embeddings, held in memory: 2 De bytes an image."""
    import faiss

    width, num_images = embeddings.shape[1], len(index)
    k = min(config.top_k, num_images)
    num_lists = int(min(65_536, max(1, 4 * np.sqrt(num_images)), max(1, num_images // 39)))
    quantizer = faiss.IndexFlatIP(width)
    searcher = faiss.IndexIVFScalarQuantizer(
        quantizer, width, num_lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    searcher.nprobe = min(config.num_probes, num_lists)
    sample = max(1, FAISS_SAMPLE // BLOCK_IMAGES)
    held, ids = [], []
    with progress("index", num_images, quiet=config.quiet) as report:
        for names, stored in blocks(index):
            ids.append(names)
            held.append(stored)
            # Lists are learned from the first blocks: an index stores its images in no order of meaning.
            if not searcher.is_trained and (len(held) >= sample or sum(map(len, held)) >= num_images):
                searcher.train(np.concatenate(held))
            if searcher.is_trained:
                for part in held:
                    searcher.add(part)
                held = []
            report.update(len(names))
    scores, found = searcher.search(embeddings, k)
    rows, columns = np.nonzero(found >= 0)
    names = pa.concat_arrays(ids).take(pa.array(found[rows, columns]))
    return sorted_table(rows, names, scores[rows, columns], query_ids)


def sorted_table(rows: np.ndarray, names: pa.Array, scores: np.ndarray, query_ids: pa.Array) -> pa.Table:
    """Candidates by query, falling score, image_id, with their ranks."""
    from edje_pipeline.pipeline.score_rank import sort_by_score

    order = sort_by_score(rows, scores, names)
    rows, scores = rows[order], scores[order]
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    ranks = np.arange(1, len(rows) + 1) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
    columns = [query_ids.take(pa.array(rows)), names.take(pa.array(order)), scores, ranks.astype(np.int32)]
    return pa.table(columns, RESULT_SCHEMA)
