"""A table of text columns from Parquet, JSONL, CSV, TSV or a TREC run, read by Arrow in bulk.

Every column comes back as text (or null), plus the hidden column of places: `numbers` says in which
line or row a record stands, so that a problem found later can be located.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from edje_pipeline.errors import InputFileError
from edje_pipeline.storage import compressed, files
from edje_pipeline.storage.input_problems import Problems

CHUNK_BYTES = 16 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_TABLE_BYTES = 16 << 30
"""Of text in memory at once. More is refused with the advice to split."""
BATCH_ROWS = 8192
"""Of a piece of a Parquet file."""

TREC_COLUMNS = ("query_id", "q0", "image_id", "rank", "first_stage_score", "run_tag")
_SUFFIX_FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".trec": "trec",
    ".run": "trec",
}


@dataclass(frozen=True)
class TextTable:
    """Records of a file, or of a piece of it: text columns, and where each record stands."""

    name: str
    table: pa.Table
    """The columns asked for; one that is not there is absent from a whole table and all null in a piece."""
    numbers: np.ndarray
    """int64 (n,): line or row number of each record, from 1."""
    unit: str
    """`line` or `row`."""
    found_columns: tuple[str, ...]
    has_header: bool = False
    """`found_columns` of one piece are those of the whole file."""

    def place(self, position: int) -> str:
        """`line 7`."""
        return f"{self.unit} {int(self.numbers[position]):,}"


def read_text_table(uri: str, columns: Sequence[str], *, lines_as: str | None = None) -> TextTable:
    """Reads the named columns of a file, whichever of them it has.

    Args and errors: see `iter_text_tables`; a file of more text than memory can be expected to hold is refused too.
    """
    pieces: list[TextTable] = []
    size = 0
    for piece in iter_text_tables(uri, columns, lines_as=lines_as):
        size += piece.table.nbytes
        _check_size(size, piece.name)
        pieces.append(piece)
    present = [column for column in columns if any(column in piece.found_columns for piece in pieces)]
    table = pa.concat_tables([piece.table for piece in pieces]).select(present)
    numbers = np.concatenate([piece.numbers for piece in pieces])
    return TextTable(pieces[0].name, table, numbers, pieces[0].unit, tuple(present), pieces[0].has_header)


def iter_text_tables(uri: str, columns: Sequence[str], *, lines_as: str | None = None) -> Iterator[TextTable]:
    """The named columns of a file in pieces of some megabytes; at least one piece.

    Nothing is yielded after the first record that cannot be parsed: the rest is read for the sake of one error
    that names every such record, raised at the end.

    Args:
        uri: path or URI; `.gz` and `.zst` are unpacked.
        columns: the columns wanted, in the order of the result.
        lines_as: a plain text file (.txt) is one value of this column a line.

    Raises:
        InputFileError: the file is absent, not of a known format, or holds records that cannot be parsed.
    """
    uri = files.absolute_uri(uri)
    name = files.shown(uri)
    with compressed.open_text_bytes(uri) as stream:
        head, whole = _peek(stream)
        if not head.removeprefix(BYTE_ORDER_MARK).strip():
            raise InputFileError(f"{name} is empty; expected columns {', '.join(columns)}")
        kind = detect_format(uri, head, lines_as)
        if kind == "parquet":
            with files.open_binary(uri) as seekable:
                yield from _parquet(seekable, name, columns)
        elif kind in ("csv", "tsv"):
            yield from _csv(whole, name, columns, "\t" if kind == "tsv" else ",")
        else:
            problems = Problems(name)
            parsers = {"jsonl": _json_chunk, "trec": _trec_chunk, "lines": _lines_chunk}
            for first, chunk in compressed.iter_chunks(whole, name, CHUNK_BYTES):
                table, places = parsers[kind](chunk, first, columns, problems)
                if not problems:
                    found = (column for column in columns if table.column(column).null_count < table.num_rows)
                    yield TextTable(name, table, places, "line", tuple(found))
            problems.raise_if_any(f"one record a line ({kind})")


def detect_format(uri: str, head: bytes, lines_as: str | None) -> str:
    """`parquet`, `jsonl`, `csv`, `tsv`, `trec` or `lines`, by the name, else by the first line."""
    name = compressed.plain_name(uri)
    for suffix, kind in _SUFFIX_FORMATS.items():
        if name.endswith(suffix):
            return kind
    first = head.lstrip().split(b"\n", 1)[0].strip()
    if head.startswith(b"PAR1"):
        return "parquet"
    if first.startswith(b"{"):
        return "jsonl"
    fields = first.split()
    if len(fields) == 6 and fields[1].upper() == b"Q0":
        return "trec"
    if lines_as is not None:
        return "lines"
    return "tsv" if b"\t" in first else "csv"


class _Joined:
    """A stream with bytes put back before it."""

    def __init__(self, head: bytes, rest: IO[bytes] | Any) -> None:
        self._head = head
        self._rest = rest
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        if self._head:
            head, self._head = (self._head, b"") if size < 0 else (self._head[:size], self._head[size:])
            return head
        return bytes(self._rest.read(size))

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


def _peek(stream: IO[bytes] | Any) -> tuple[bytes, Any]:
    head = bytes(stream.read(1 << 16))
    return head, _Joined(head, stream)


def _check_size(num_bytes: int, name: str) -> None:
    if num_bytes > MAX_TABLE_BYTES:
        raise InputFileError(f"{name} holds more than {MAX_TABLE_BYTES:,} bytes of text; split it into several files")


def _text(column: pa.ChunkedArray | pa.Array) -> Any:
    """The column as text; numbers are written out, other types are refused by Arrow."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    if pa.types.is_nested(column.type):
        raise pa.ArrowInvalid(f"a column of type {column.type} is not text")
    return column.cast(pa.string())


# -- formats ----------------------------------------------------------------------------------------


def _parquet(stream: Any, name: str, columns: Sequence[str]) -> Iterator[TextTable]:
    try:
        names = pq.read_schema(stream).names
        present = tuple(column for column in columns if column in names)
        # Dictionaries are kept until the size of what they stand for is known.
        file = pq.ParquetFile(stream, read_dictionary=list(present), pre_buffer=False)
        num_rows = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=list(present), use_threads=False) if present else ():
            _check_size(sum(_expanded_bytes(column) for column in batch.columns), name)
            values = {column: _text(batch.column(column)) for column in present}
            yield _piece(name, values, columns, present, num_rows, batch.num_rows)
            num_rows += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, InputFileError):
            raise
        raise InputFileError(f"{name} cannot be read as Parquet: {_short(error)}") from error
    if num_rows == 0:
        yield _piece(name, {}, columns, present, 0, 0)


def _piece(
    name: str, values: dict[str, Any], columns: Sequence[str], present: Sequence[str], before: int, num_rows: int
) -> TextTable:
    """Rows of a file with a header: `before` of them came earlier."""
    table = pa.table({column: values.get(column, pa.nulls(num_rows, pa.string())) for column in columns})
    return TextTable(name, table, np.arange(before + 1, before + num_rows + 1), "row", tuple(present), has_header=True)


def _expanded_bytes(column: pa.Array) -> int:
    """Bytes of text of a column before its dictionary is unfolded."""
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = pc.binary_length(column.dictionary).cast(pa.int64())
    return int(pc.sum(lengths.take(column.indices)).as_py() or 0)


def _csv(stream: Any, name: str, columns: Sequence[str], delimiter: str) -> Iterator[TextTable]:
    problems = Problems(name)
    wrong: list[str] = []

    def note(row: Any) -> str:
        where = f"line {row.number:,}" if row.number is not None else repr(row.text[:40])
        wrong.append(f"{where} ({row.actual_columns} fields, the header has {row.expected_columns})")
        return "skip"

    try:
        reader = pacsv.open_csv(
            pa.PythonFile(stream, mode="r"),
            read_options=pacsv.ReadOptions(use_threads=False, block_size=CHUNK_BYTES),
            parse_options=pacsv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note, ignore_empty_lines=True
            ),
            convert_options=pacsv.ConvertOptions(
                column_types={column: pa.string() for column in columns},
                include_columns=list(columns),
                include_missing_columns=True,
                strings_can_be_null=False,
            ),
        )
        num_rows = 0
        for batch in reader:
            if batch.num_rows and not wrong:
                # An absent column is all null, since text here is never null.
                present = [column for column in columns if not batch.column(column).null_count]
                values = {column: batch.column(column) for column in present}
                yield _piece(name, values, columns, present, num_rows, batch.num_rows)
            num_rows += batch.num_rows
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputFileError(
            f"{name} cannot be read as {'TSV' if delimiter == chr(9) else 'CSV'}: {_short(error)}"
        ) from error
    if wrong:
        problems.add("wrong number of fields", wrong[:3], len(wrong))
        problems.raise_if_any(f"a header and {'tab' if delimiter == chr(9) else 'comma'}-separated fields")
    if num_rows == 0:
        present = [column for column in columns if pa.types.is_string(reader.schema.field(column).type)]
        yield _piece(name, {}, columns, present, 0, 0)


def _json_chunk(chunk: bytes, first: int, columns: Sequence[str], problems: Problems) -> tuple[pa.Table, np.ndarray]:
    schema = pa.schema([(column, pa.string()) for column in columns if column != "first_stage_score"])
    if "first_stage_score" in columns:
        schema = schema.append(pa.field("first_stage_score", pa.float64()))
    num_lines = chunk.count(b"\n") + (not chunk.endswith(b"\n"))
    try:
        table = pajson.read_json(
            pa.BufferReader(chunk),
            read_options=pajson.ReadOptions(use_threads=False, block_size=max(len(chunk) + 1, 1 << 16)),
            parse_options=pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowException:
        table = None
    if table is not None and table.num_rows == num_lines:
        result = pa.table([_text(table.column(column)) for column in columns], names=list(columns))
        return result, np.arange(first, first + num_lines)
    return _json_lines(chunk, first, columns, problems)


def _json_lines(chunk: bytes, first: int, columns: Sequence[str], problems: Problems) -> tuple[pa.Table, np.ndarray]:
    """The slow and exact way: a chunk with a bad line, blank lines, or ids that are numbers."""
    values: dict[str, list[str | None]] = {column: [] for column in columns}
    numbers = []
    for number, line in enumerate(chunk.removesuffix(b"\n").split(b"\n"), first):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.add(f"not JSON ({_short(error)})", [f"line {number:,}"])
            continue
        if not isinstance(record, dict):
            problems.add("not a JSON object", [f"line {number:,}"])
            continue
        for column in columns:
            value = record.get(column)
            if value is not None and not (isinstance(value, str | int | float) and not isinstance(value, bool)):
                problems.add(f"{column} is a {type(value).__name__}, expected text", [f"line {number:,}"])
                value = None
            values[column].append(None if value is None else str(value))
        numbers.append(number)
    table = pa.table({column: pa.array(values[column], pa.string()) for column in columns})
    return table, np.asarray(numbers, np.int64)


def _trec_chunk(chunk: bytes, first: int, columns: Sequence[str], problems: Problems) -> tuple[pa.Table, np.ndarray]:
    plain = re.sub(rb"[ \t\r]+", b" ", chunk)
    plain = re.sub(rb"(?m)^ | $", b"", plain)
    blank = plain.startswith(b"\n") or b"\n\n" in plain
    wrong: list[str] = []

    def note(row: Any) -> str:
        wrong.append(f"line {first + (row.number or 1) - 1:,} ({row.actual_columns} fields)")
        return "skip"

    try:
        table = pacsv.read_csv(
            pa.BufferReader(plain),
            read_options=pacsv.ReadOptions(
                column_names=list(TREC_COLUMNS), use_threads=False, block_size=max(len(plain) + 1, 1 << 16)
            ),
            parse_options=pacsv.ParseOptions(delimiter=" ", quote_char=False, invalid_row_handler=note),
            convert_options=pacsv.ConvertOptions(
                column_types={column: pa.string() for column in TREC_COLUMNS}, strings_can_be_null=False
            ),
        )
    except pa.ArrowException as error:
        raise InputFileError(f"{problems.name} cannot be read as a TREC run: {_short(error)}") from error
    if wrong:
        problems.add("not the six fields of a TREC run (query_id Q0 image_id rank score tag)", wrong[:3], len(wrong))
    if blank or wrong:
        lines = plain.removesuffix(b"\n").split(b"\n")
        numbers = np.asarray([first + i for i, line in enumerate(lines) if line.count(b" ") == 5], np.int64)
    else:
        numbers = np.arange(first, first + table.num_rows)
    absent = [column for column in columns if column not in TREC_COLUMNS]
    for column in absent:
        table = table.append_column(column, pa.nulls(table.num_rows, pa.string()))
    return table.select(list(columns)), numbers


def _lines_chunk(chunk: bytes, first: int, columns: Sequence[str], problems: Problems) -> tuple[pa.Table, np.ndarray]:
    values, numbers = [], []
    for number, line in enumerate(chunk.removesuffix(b"\n").split(b"\n"), first):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            problems.add("not UTF-8 text", [f"line {number:,}"])
            continue
        if text:
            values.append(text)
            numbers.append(number)
    absent = pa.nulls(len(values), pa.string())
    table = pa.table(
        {column: absent if place else pa.array(values, pa.string()) for place, column in enumerate(columns)}
    )
    return table, np.asarray(numbers, np.int64)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def positions(mask: pa.ChunkedArray | pa.Array) -> Iterator[int]:
    """Where a boolean column is true (null counts as false)."""
    yield from np.flatnonzero(np.asarray(pc.fill_null(mask, False))).tolist()
