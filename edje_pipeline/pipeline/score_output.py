"""Writes what a scoring run found: ranked results, missing candidates, a TREC file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.pipeline.score_journal import UnitJournal
from edje_pipeline.pipeline.score_plan import PlanInfo, read_plan_table
from edje_pipeline.pipeline.score_rank import PART_SCHEMA, RESULT_SCHEMA, rank_parts, trec_lines
from edje_pipeline.pipeline.score_store import ScoreStore
from edje_pipeline.storage.faults import crash_point
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.parquet_io import open_parquet, write_parquet

RESULT_FILE_ROWS = 8_000_000
RESULT_ROW_GROUP_ROWS = 131_072


def write_results(
    store: ScoreStore, info: PlanInfo, *, memory_pairs: int, top_k: int | None, trec: str | None
) -> dict[str, Any]:
    """Ranked results, the missing candidates and the TREC file; returns what the manifest says of them."""
    ranked = rank_parts(
        read_parts(store.units),
        read_query_ids(store.units),
        refined=read_parts(store.refined),
        num_pairs=info.num_pairs,
        memory_pairs=memory_pairs,
        top_k=top_k,
    )
    files: list[dict[str, Any]] = []
    rest: Iterator[pa.Table] = itertools.chain([RESULT_SCHEMA.empty_table()], ranked)
    with open_trec(trec) as write_trec:
        while (first := next(rest, None)) is not None:
            part = ResultFile(first, rest, write_trec)
            name = f"results/{store.run_id}-{len(files):05d}.parquet"
            written = write_parquet(
                store.out.child(name),
                part,
                RESULT_SCHEMA,
                row_group_rows=RESULT_ROW_GROUP_ROWS,
                dictionary_columns=("query_id", "image_id", "rank"),
            )
            files.append({"path": name, "num_rows": part.num_rows, **asdict(written)})
            crash_point("score.results")
    missing = None
    if info.num_missing:
        source, target = store.units.plan_dir.child("missing.parquet"), store.out.child("missing.parquet")
        with source.open_input() as stream:
            file = pq.ParquetFile(stream)
            pieces = (file.read_row_group(group) for group in range(file.num_row_groups))
            written = write_parquet(target, pieces, file.schema_arrow, row_group_rows=RESULT_ROW_GROUP_ROWS)
        missing = {"path": "missing.parquet", "num_rows": info.num_missing, **asdict(written)}
    return {"files": files, "missing": missing, "num_results": sum(entry["num_rows"] for entry in files)}


def read_query_ids(journal: UnitJournal) -> pa.Array:
    """string (Q,): what the numbers in the column `query` of parts stand for."""
    return read_plan_table(journal.plan_dir.child("queries.parquet")).column("query_id").combine_chunks()


def read_parts(journal: UnitJournal) -> Iterator[pa.Table]:
    """Scored parts in the order of their units, checked against their receipts."""
    for unit in sorted(journal.receipts):
        receipt = journal.receipts[unit]
        part = journal.run_dir.child(receipt.path)
        sizes = {"num_rows": receipt.num_pairs, "size_bytes": receipt.size_bytes}
        yield open_parquet(part, **sizes, schema=PART_SCHEMA, what="scored part").read()


class ResultFile:
    """Ranked tables until one file has `RESULT_FILE_ROWS` rows or a range more, counted and given to the TREC file."""

    def __init__(self, first: pa.Table, rest: Iterator[pa.Table], write_trec: Callable[[pa.Table], object]) -> None:
        self._tables = itertools.chain([first], rest)
        self._write_trec = write_trec
        self.num_rows = 0

    def __iter__(self) -> Iterator[pa.Table]:
        while self.num_rows < RESULT_FILE_ROWS and (table := next(self._tables, None)) is not None:
            self._write_trec(table)
            self.num_rows += table.num_rows
            yield table


@contextmanager
def open_trec(target: str | None) -> Iterator[Any]:
    """A function that appends a table to the TREC file; does nothing without one."""
    if target is None:
        yield lambda _: None
        return
    with Location.parse(target).open_atomic() as stream:
        yield lambda table: [
            stream.write(trec_lines(table.slice(start, RESULT_ROW_GROUP_ROWS)))
            for start in range(0, table.num_rows, RESULT_ROW_GROUP_ROWS)
        ]
