"""Query, candidate, caption and id files: what a user hands to `score`, `retrieve`, `delete`, `evaluate`.

Parquet, JSONL, CSV and TSV with a header, TREC runs (candidates) and plain lists (ids), also as .gz
and .zst. Everything wrong with a file is reported at once, with its places.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from edje_pipeline.errors import InputFileError
from edje_pipeline.storage import compressed, files
from edje_pipeline.storage.input_problems import SHOWN, Problems
from edje_pipeline.storage.tabular import TextTable, iter_text_tables, positions, read_text_table

QUERY_SCHEMA = pa.schema(
    [pa.field("query_id", pa.string(), nullable=False), pa.field("text", pa.string(), nullable=False)]
)
CANDIDATE_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("first_stage_score", pa.float32()),
    ]
)
CAPTION_SCHEMA = pa.schema(
    [pa.field("image_id", pa.string(), nullable=False), pa.field("caption", pa.string(), nullable=False)]
)
ID_SCHEMA = pa.schema([pa.field("image_id", pa.string(), nullable=False)])

_NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"


def read_queries(uri: str) -> pa.Table:
    """QUERY_SCHEMA, in file order.

    Raises:
        InputFileError: no such file, no header, a missing column, an empty or repeated query_id, an empty text.
    """
    found = read_text_table(uri, QUERY_SCHEMA.names)
    problems = Problems(found.name)
    _check_whole(found, QUERY_SCHEMA.names, "a query file has the columns query_id and text")
    _check_filled(found, "query_id", problems)
    _check_filled(found, "text", problems)
    _check_unique(found, "query_id", problems)
    problems.raise_if_any("a unique query_id and a text in every record")
    return found.table.cast(QUERY_SCHEMA)


def iter_candidates(uri: str) -> Iterator[pa.Table]:
    """CANDIDATE_SCHEMA in pieces, in file order; `first_stage_score` is null where the file gives none.

    Nothing is yielded after the first bad record; what is wrong with the file is raised at its end, all at once.

    Raises:
        InputFileError: no such file, no header, a missing column, an empty id, a score that is no number.
    """
    expected = "a candidate file has the columns query_id, image_id and optionally first_stage_score, or is a TREC run"
    required = ["query_id", "image_id"]
    found: set[str] = set()
    problems, num_records = Problems(""), 0
    for piece in iter_text_tables(uri, CANDIDATE_SCHEMA.names):
        problems.name = piece.name
        found.update(piece.found_columns)
        num_records += piece.table.num_rows
        if piece.has_header:
            _check_columns(piece.name, found, num_records, required, expected)
        for column in required:
            _check_filled(piece, column, problems)
        scores = _scores(piece, problems)
        if not problems and piece.table.num_rows:
            columns = [piece.table.column("query_id"), piece.table.column("image_id"), scores]
            yield pa.table(columns, names=CANDIDATE_SCHEMA.names).cast(CANDIDATE_SCHEMA)
    _check_columns(problems.name, found, num_records, required, expected)
    problems.raise_if_any("a query_id, an image_id and, if any, a numeric first_stage_score in every record")


def read_captions(uri: str) -> pa.Table:
    """CAPTION_SCHEMA: one row for each caption of each image; JSONL may hold `captions`, a list.

    Raises:
        InputFileError: as for queries.
    """
    uri = files.absolute_uri(uri)
    if compressed.plain_name(uri).endswith((".jsonl", ".ndjson")):
        return _caption_lines(uri)
    found = read_text_table(uri, CAPTION_SCHEMA.names)
    problems = Problems(found.name)
    _check_whole(found, ["image_id", "caption"], "a caption file has the columns image_id and caption")
    _check_filled(found, "image_id", problems)
    _check_filled(found, "caption", problems)
    problems.raise_if_any("an image_id and a caption in every record")
    return found.table.select(CAPTION_SCHEMA.names).cast(CAPTION_SCHEMA)


def read_ids(uri: str) -> pa.Table:
    """ID_SCHEMA, each id once, in file order: a column `image_id`, or a text file with one id a line.

    Raises:
        InputFileError: as for queries.
    """
    found = read_text_table(uri, ID_SCHEMA.names, lines_as="image_id")
    problems = Problems(found.name)
    _check_whole(found, ID_SCHEMA.names, "an id file has a column image_id, or is a .txt with one id a line")
    _check_filled(found, "image_id", problems)
    problems.raise_if_any("an image_id in every record")
    return pa.table([pc.unique(found.table.column("image_id"))], schema=ID_SCHEMA)


def _check_columns(name: str, found: Collection[str], num_records: int, required: Sequence[str], expected: str) -> None:
    absent = [column for column in required if column not in found]
    if absent:
        raise InputFileError(
            f"{name} has no column {' and no column '.join(absent)} (is its header missing?): {expected}"
        )
    if num_records == 0:
        raise InputFileError(f"{name} has a header and no record; {expected}")


def _check_whole(found: TextTable, required: Sequence[str], expected: str) -> None:
    _check_columns(found.name, found.found_columns, found.table.num_rows, required, expected)


def _check_filled(found: TextTable, column: str, problems: Problems) -> None:
    values = found.table.column(column)
    empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True)
    count = pc.sum(empty).as_py() or 0
    if count:
        problems.add(f"empty {column}", map(found.place, itertools.islice(positions(empty), SHOWN)), count)


def _check_unique(found: TextTable, column: str, problems: Problems) -> None:
    values = found.table.column(column)
    counts = pc.value_counts(values.combine_chunks().drop_null())
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    for value in repeated.field("values")[:SHOWN].to_pylist():
        places = positions(pc.equal(values, value))
        problems.add(f"{column} {value!r} repeated", map(found.place, itertools.islice(places, SHOWN)))
    if len(repeated) > SHOWN:
        problems.add(f"{len(repeated) - SHOWN:,} more {column}s repeated", [])


def _scores(found: TextTable, problems: Problems) -> pa.ChunkedArray | pa.Array:
    if "first_stage_score" not in found.found_columns:
        return pa.nulls(found.table.num_rows, pa.float32())
    values = found.table.column("first_stage_score")
    absent = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True)
    wrong = pc.and_not(pc.invert(pc.fill_null(pc.match_substring_regex(values, _NUMBER), False)), absent)
    count = pc.sum(wrong).as_py() or 0
    if count:
        problems.add(
            "first_stage_score is not a finite number",
            map(found.place, itertools.islice(positions(wrong), SHOWN)),
            count,
        )
    usable = pc.if_else(pc.or_(absent, wrong), pa.scalar(None, pa.string()), pc.utf8_trim_whitespace(values))
    return usable.cast(pa.float64()).cast(pa.float32(), safe=False)


def _caption_lines(uri: str) -> pa.Table:
    """JSONL whose records hold `caption`, a text, or `captions`, a list of texts."""
    name = files.shown(uri)
    problems = Problems(name)
    ids: list[str] = []
    captions: list[str] = []
    with compressed.open_text_bytes(uri) as stream:
        for number, line in compressed.iter_lines(stream, name):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                problems.add(f"not JSON ({str(error)[:80]})", [f"line {number:,}"])
                continue
            image_id = record.get("image_id") if isinstance(record, dict) else None
            texts = record.get("captions", [record.get("caption")]) if isinstance(record, dict) else None
            if not isinstance(image_id, str) or not image_id:
                problems.add("no image_id", [f"line {number:,}"])
            elif not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
                problems.add("no caption, or an empty one", [f"line {number:,}"])
            else:
                ids += [image_id] * len(texts)
                captions += texts
    problems.raise_if_any("an image_id and a caption (or a list of captions) in every record")
    if not ids:
        raise InputFileError(f"{name} is empty; a caption file has records with image_id and caption")
    return pa.table([ids, captions], schema=CAPTION_SCHEMA)
