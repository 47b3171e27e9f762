"""From candidates to work: pairs joined with their (shard, row), sorted by place, cut into units.

A unit is a few consecutive row groups and all pairs whose image lies in them, so that over a whole
run each row group is read once and each image crosses to the device once. The plan is stored:

    plan/queries.parquet   query_id, text (number of its distinct text)
    plan/texts.parquet     tokens of each distinct text
    plan/pairs-<n>.parquet query (row of queries.parquet), shard, row, first_stage_score; a row group a unit
    plan/units.parquet     file, row group, pairs and images of each unit
    plan/missing.parquet   candidates that the index does not hold

Pairs are integers from the first step on, and what is in memory of them does not grow with their
number (`pair_sort`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from edje_pipeline.errors import InputFileError
from edje_pipeline.pipeline.pair_sort import PAIR_SCHEMA, Geometry, PairSorter
from edje_pipeline.stages.score_pairs import TextTokens
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.parquet_io import write_parquet

if TYPE_CHECKING:
    from edje_pipeline.storage.index import Index

UNIT_SCHEMA = pa.schema(
    [
        pa.field("file", pa.int32(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("num_pairs", pa.int64(), nullable=False),
        pa.field("num_images", pa.int64(), nullable=False),
    ]
)
QUERY_SCHEMA = pa.schema(
    [pa.field("query_id", pa.string(), nullable=False), pa.field("text", pa.int32(), nullable=False)]
)
TEXT_SCHEMA = pa.schema([pa.field("tokens", pa.list_(pa.int32()), nullable=False)])
CANDIDATE_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("first_stage_score", pa.float32()),
    ]
)
LARGEST_UNIT = 8
"""A row group with more pairs than this many units is cut, and read once a piece."""
FILE_ROWS = 16_384
"""Of a row group of the plan; texts are tokenized so many at a time."""


@dataclass(frozen=True)
class PlanLimits:
    """Sizes of the plan's parts."""

    unit_pairs: int = 8192
    """Pairs of a unit, about: it ends with a whole row group."""
    unit_bytes: int = 256 << 20
    """Payload bytes of a unit's images, about."""
    memory_pairs: int = 1_000_000
    """Pairs sorted in memory at a time; some 100 bytes each."""


@dataclass(frozen=True)
class PlanInfo:
    """What the join found."""

    num_queries: int
    num_texts: int
    num_pairs: int
    """Distinct (query, image) pairs that will be scored."""
    num_images: int
    """Distinct images among them."""
    num_units: int
    num_missing: int
    """Candidates whose image the index does not hold."""
    num_missing_images: int
    num_duplicates: int
    """Candidates that repeat a (query, image) pair; the first one counts."""
    num_empty_queries: int
    """Queries without any candidate."""
    empty_queries: list[str] = field(default_factory=list)
    """The first few of them."""
    missing_images: list[str] = field(default_factory=list)
    """The first few missing images."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Queries:
    """Queries as numbers: position in `query_ids`, and the distinct text of each."""

    query_ids: pa.Array
    texts: np.ndarray
    """int32 (Q,): number of the query's distinct text."""
    distinct_texts: list[str]

    @classmethod
    def from_table(cls, table: pa.Table) -> Queries:
        """From columns query_id and text.

        Raises:
            InputFileError: no query, or one query_id twice.
        """
        if table.num_rows == 0:
            raise InputFileError("the query file holds no query; expected columns query_id and text")
        ids = _array(table.column("query_id"), pa.string())
        counts = pc.value_counts(ids)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(twice):
            shown = ", ".join(repr(value) for value in twice.field("values").slice(0, 3).to_pylist())
            raise InputFileError(
                f"{len(twice):,} query_id values stand more than once in the query file, such as {shown}; "
                "give each query its own query_id"
            )
        texts = _array(table.column("text"), pa.string()).dictionary_encode()
        return cls(ids, texts.indices.to_numpy().astype(np.int32), texts.dictionary.to_pylist())


def write_plan(
    plan_dir: Location,
    index: Index,
    queries: Queries,
    chunks: Iterable[pa.Table],
    *,
    tokenize: Callable[[list[str]], Sequence[Sequence[int]]],
    limits: PlanLimits,
) -> PlanInfo:
    """Joins candidates with the index and stores the plan.

    Args:
        plan_dir: where it goes; whatever a cut-off attempt left there is overwritten.
        index: open on the snapshot to score against.
        queries: every query the candidates may name.
        chunks: tables with the columns query_id, image_id, first_stage_score.
        tokenize: texts -> token ids with special tokens.
        limits: see `PlanLimits`.

    Raises:
        InputFileError: no candidate, or candidates of queries that are not in the query file.
    """
    _write(plan_dir, "queries", [pa.table([queries.query_ids, queries.texts], QUERY_SCHEMA)], QUERY_SCHEMA)
    texts = queries.distinct_texts
    pieces = (texts[start : start + FILE_ROWS] for start in range(0, len(texts), FILE_ROWS))
    _write(plan_dir, "texts", (_token_table(tokenize(piece)) for piece in pieces), TEXT_SCHEMA)
    geometry = Geometry.of(index)
    sorter = PairSorter(geometry, plan_dir.child("spill"), limits.memory_pairs)
    join = _Join(index, queries, sorter)
    _write(plan_dir, "missing", join.run(chunks), CANDIDATE_SCHEMA)
    if join.num_candidates == 0:
        raise InputFileError("the candidate file holds no pair; expected columns query_id and image_id")
    units: list[pa.Table] = []
    num_pairs = num_images = 0
    for number, (pairs, places) in enumerate(sorter.ranges()):
        num_pairs += len(pairs)
        edges = unit_edges(places, geometry, limits, index.manifest.tokens.payload_bytes)
        counts = np.diff(edges)
        new_image = np.diff(places, prepend=-1) != 0
        images = np.add.reduceat(new_image, edges[:-1], dtype=np.int64) if len(places) else np.empty(0, np.int64)
        # The image a cut row group ends with may go on in the next unit: it is read there as well.
        num_images += int(new_image.sum())
        pieces = (pairs.slice(start, stop - start) for start, stop in itertools.pairwise(edges))
        _write(plan_dir, f"pairs-{number:05d}", pieces, PAIR_SCHEMA, row_group_rows=int(counts.max(initial=1)))
        units.append(
            pa.table([np.full(len(counts), number), np.arange(len(counts)), counts, images], UNIT_SCHEMA.names).cast(
                UNIT_SCHEMA
            )
        )
    sorter.remove_runs()
    all_units = pa.concat_tables(units)
    _write(plan_dir, "units", [all_units], UNIT_SCHEMA)
    empty = queries.query_ids.filter(pa.array(join.candidates_of_query == 0))
    return PlanInfo(
        num_queries=len(queries.query_ids),
        num_texts=len(queries.distinct_texts),
        num_pairs=num_pairs,
        num_images=num_images,
        num_units=all_units.num_rows,
        num_missing=join.num_missing,
        num_missing_images=len(join.missing_ids),
        num_duplicates=join.num_candidates - join.num_missing - num_pairs,
        num_empty_queries=len(empty),
        empty_queries=empty.slice(0, 5).to_pylist(),
        missing_images=join.missing_ids.slice(0, 5).to_pylist(),
    )


class _Join:
    """Turns chunks of candidates into integer pairs; yields what is missing."""

    def __init__(self, index: Index, queries: Queries, sorter: PairSorter) -> None:
        self._index, self._queries, self._sorter = index, queries, sorter
        self.num_candidates = self.num_missing = 0
        self.missing_ids = pa.array([], pa.string())
        """Distinct images that the index does not hold, in the order in which they came."""
        self.candidates_of_query = np.zeros(len(queries.query_ids), np.int64)

    def run(self, chunks: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for chunk in chunks:
            if not chunk.num_rows:
                continue
            self.num_candidates += chunk.num_rows
            pairs, missing = self._join(chunk)
            self._sorter.add(pairs)
            if missing.num_rows:
                yield missing

    def _join(self, chunk: pa.Table) -> tuple[pa.Table, pa.Table]:
        query_ids = _array(chunk.column("query_id"), pa.string()).dictionary_encode()
        known = pc.index_in(query_ids.dictionary, value_set=self._queries.query_ids)
        if known.null_count:
            unknown = query_ids.dictionary.filter(pc.is_null(known))
            shown = ", ".join(repr(value) for value in unknown.slice(0, 3).to_pylist())
            raise InputFileError(
                f"the candidate file names {len(unknown):,} query_id values that the query file does not hold, "
                f"such as {shown}; give the query file these candidates were retrieved for"
            )
        queries = known.to_numpy()[query_ids.indices.to_numpy()]
        self.candidates_of_query += np.bincount(queries, minlength=len(self.candidates_of_query))
        images = _array(chunk.column("image_id"), pa.string()).dictionary_encode()
        codes = images.indices.to_numpy()
        image_shards, image_rows = self._index.locate(images.dictionary)
        image_shards = np.asarray(image_shards)
        shards, rows = image_shards[codes], np.asarray(image_rows)[codes]
        found = shards >= 0
        scores = _array(chunk.column("first_stage_score"), pa.float32())
        pairs = pa.table(
            [queries.astype(np.int32), shards.astype(np.int32), rows.astype(np.int64), scores], PAIR_SCHEMA
        )
        if found.all():
            return pairs, CANDIDATE_SCHEMA.empty_table()
        absent = images.dictionary.filter(pa.array(image_shards < 0))
        self.missing_ids = pc.unique(pa.concat_arrays([self.missing_ids, absent]))
        missing = chunk.select(CANDIDATE_SCHEMA.names).filter(pa.array(~found)).cast(CANDIDATE_SCHEMA)
        self.num_missing += missing.num_rows
        return pairs.filter(pa.array(found)), missing


def unit_edges(places: np.ndarray, geometry: Geometry, limits: PlanLimits, payload_bytes: int) -> np.ndarray:
    """Where units begin and end: int64 (units + 1,) into pairs sorted by place.

    A unit ends with the row group in which it reaches one of its two limits; only a row group with
    more than `LARGEST_UNIT` units' worth of pairs is cut.
    """
    num_pairs = len(places)
    if num_pairs == 0:
        return np.zeros(1, np.int64)
    groups = geometry.groups_of_places(places)
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    pairs_of = np.diff(np.append(starts, num_pairs))
    images_of = np.add.reduceat(np.diff(places, prepend=-1) != 0, starts, dtype=np.int64)
    cost = np.maximum(pairs_of / limits.unit_pairs, images_of * payload_bytes / limits.unit_bytes)
    before = np.cumsum(cost) - cost
    first_of_unit = np.flatnonzero(np.diff(np.floor(before), prepend=-1))
    edges = starts[first_of_unit].tolist()
    cuts = []
    for group in np.flatnonzero(pairs_of > LARGEST_UNIT * limits.unit_pairs).tolist():
        start, stop = int(starts[group]), int(starts[group] + pairs_of[group])
        cuts += list(range(start + limits.unit_pairs, stop, limits.unit_pairs))
    return np.unique(np.array([*edges, *cuts, num_pairs], np.int64))


def read_plan_table(location: Location) -> pa.Table:
    """A whole Parquet file of the plan; it was written by this run and has no other reader."""
    with location.open_input() as stream:
        return pq.ParquetFile(stream).read()


def read_texts(plan_dir: Location) -> tuple[np.ndarray, TextTokens]:
    """The distinct text of each query, int32 (Q,), and the tokens of the texts."""
    texts = read_plan_table(plan_dir.child("queries.parquet")).column("text").to_numpy()
    tokens = _array(read_plan_table(plan_dir.child("texts.parquet")).column("tokens"), TEXT_SCHEMA.field(0).type)
    return texts, TextTokens(tokens.flatten().to_numpy(), tokens.offsets.to_numpy().astype(np.int64))


def _token_table(lists: Sequence[Sequence[int]]) -> pa.Table:
    return pa.table([pa.array([list(ids) for ids in lists], TEXT_SCHEMA.field(0).type)], TEXT_SCHEMA)


def _write(
    folder: Location, name: str, tables: Iterable[pa.Table], schema: pa.Schema, *, row_group_rows: int = FILE_ROWS
) -> None:
    write_parquet(folder.child(f"{name}.parquet"), tables, schema, row_group_rows=row_group_rows)


def _array(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    """A column as one array of `kind`."""
    combined = column.cast(kind).combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        return combined.chunk(0) if combined.num_chunks else pa.array([], kind)
    return combined
