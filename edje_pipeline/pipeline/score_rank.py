"""From scored parts in the order of shards to ranked lists in the order of queries.

One bucket of queries is sorted at a time; when all pairs fit into memory there is one bucket, else
the parts are spread over buckets of queries on disk first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from edje_pipeline.errors import ConfigError
from edje_pipeline.storage.arrow import gathered
from edje_pipeline.storage.location import Location, storage_errors

MAX_BUCKETS = 256
"""Files open at a time; beyond this many, buckets grow."""
PART_SCHEMA = pa.schema(
    [
        pa.field("query", pa.int32(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("first_stage_score", pa.float32()),
    ]
)
RESULT_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("first_stage_score", pa.float32()),
    ]
)


def rank_parts(
    parts: Iterable[pa.Table],
    query_ids: pa.Array,
    *,
    num_pairs: int,
    memory_pairs: int,
    top_k: int | None,
    refined: Iterable[pa.Table] = (),
) -> Iterator[pa.Table]:
    """Yields tables of `RESULT_SCHEMA`: by query in the order of `query_ids`, then by rank.

    Args:
        parts: tables of `PART_SCHEMA`, each (query, image) pair once.
        query_ids: string (Q,).
        num_pairs: of all parts together.
        memory_pairs: sorted in memory at a time, about.
        top_k: ranks kept a query; None keeps all.
        refined: as `parts`, better scores of some of their pairs, which take the place of those.
    """
    num_buckets = min(MAX_BUCKETS, max(1, -(-num_pairs // memory_pairs)))
    sizes = (len(query_ids), num_buckets, max(1, memory_pairs // 4))
    for pairs, better in zip(by_query(parts, *sizes), by_query(refined, *sizes), strict=True):
        yield rank_pairs(replace_scores(pairs, better), query_ids, top_k)


def by_query(parts: Iterable[pa.Table], num_queries: int, num_buckets: int, piece_pairs: int) -> Iterator[pa.Table]:
    """One table for each range of queries, in order; more than one go through files on disk.

    Args:
        piece_pairs: collected before they are spread over the files, so that those get few large pieces.
    """
    if num_buckets == 1:
        yield pa.concat_tables([PART_SCHEMA.empty_table(), *parts])
        return
    with TemporaryDirectory(prefix="edje-rank-") as folder:
        writers = [pq.ParquetWriter(Path(folder) / f"{n}.parquet", PART_SCHEMA) for n in range(num_buckets)]
        try:
            with storage_errors(Location.parse(folder)):
                for part in gathered(parts, piece_pairs):
                    buckets = part.column("query").to_numpy().astype(np.int64) * num_buckets // num_queries
                    for bucket in np.unique(buckets).tolist():
                        writers[bucket].write_table(part.filter(pa.array(buckets == bucket)))
        finally:
            for writer in writers:
                writer.close()
        for number in range(num_buckets):
            path = Path(folder) / f"{number}.parquet"
            yield pq.ParquetFile(path).read()
            path.unlink()


def replace_scores(pairs: pa.Table, better: pa.Table) -> pa.Table:
    """`pairs` with the rows of `better` in place of those of the same query and image."""
    if not better.num_rows:
        return pairs
    both = pa.concat_tables([better, pairs])
    images = both.column("image_id").dictionary_encode().combine_chunks()
    keys = both.column("query").to_numpy().astype(np.int64) * len(images.dictionary) + images.indices.to_numpy()
    _, first = np.unique(keys, return_index=True)
    return both.take(pa.array(first))


def rank_pairs(pairs: pa.Table, query_ids: pa.Array, top_k: int | None) -> pa.Table:
    """Sorts pairs by query, falling score, image_id; numbers them from 1 within a query; keeps `top_k`."""
    queries = pairs.column("query").to_numpy()
    order = sort_by_score(queries, pairs.column("score").to_numpy(), pairs.column("image_id"))
    queries = queries[order]
    starts = np.flatnonzero(np.diff(queries, prepend=-1))
    sizes = np.diff(np.append(starts, len(queries)))
    ranks = np.arange(1, len(queries) + 1) - np.repeat(starts, sizes)
    if top_k is not None:
        kept = ranks <= top_k
        order, queries, ranks = order[kept], queries[kept], ranks[kept]
    taken = pairs.take(pa.array(order))
    columns = [
        query_ids.take(pa.array(queries)),
        taken.column("image_id"),
        taken.column("score"),
        pa.array(ranks.astype(np.int32)),
        taken.column("first_stage_score"),
    ]
    return pa.table(columns, RESULT_SCHEMA)


def sort_by_score(groups: np.ndarray, scores: np.ndarray, image_ids: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The order by group, falling score, image_id: int64 (n,).

    Ids are compared only where scores are equal: sorting strings costs more than all the rest.
    """
    scores = scores + np.float32(0)  # -0.0 ranks as 0.0
    order = np.lexsort((-scores, groups))
    sorted_groups, sorted_scores = groups[order], scores[order]
    same = (sorted_groups[1:] == sorted_groups[:-1]) & (sorted_scores[1:] == sorted_scores[:-1])
    if not same.any():
        return order
    tied = np.zeros(len(order), bool)
    tied[1:] |= same
    tied[:-1] |= same
    run = np.cumsum(np.append(True, ~same))[tied]
    ids = pc.take(image_ids, pa.array(order[tied]))
    within = pc.sort_indices(
        pa.table({"run": run, "image_id": ids}), sort_keys=[("run", "ascending"), ("image_id", "ascending")]
    ).to_numpy()
    order[tied] = order[tied][within]
    return order


def check_trec_ids(ids: pa.Array | pa.ChunkedArray, what: str) -> None:
    """Raises ConfigError when an id holds white space, which separates the fields of a TREC run."""
    bad = ids.filter(pc.match_substring_regex(ids, r"\s"))
    if len(bad):
        raise ConfigError(
            f"--trec cannot write the {what} {bad[0].as_py()!r}: a TREC run separates its fields by white space; "
            "leave --trec out and use the Parquet results"
        )


def trec_lines(results: pa.Table, tag: str = "edje") -> bytes:
    """Results as lines `query_id Q0 image_id rank score tag`."""
    if not results.num_rows:
        return b""
    check_trec_ids(results.column("image_id"), "image_id")
    fields = [results.column("query_id"), "Q0", results.column("image_id")]
    fields += [results.column(name).cast(pa.string()) for name in ("rank", "score")]
    lines = pc.binary_join_element_wise(*fields, f"{tag}\n", " ")
    return "".join(lines.to_pylist()).encode()
