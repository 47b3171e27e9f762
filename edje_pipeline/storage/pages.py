"""Walks the page headers of a Parquet column chunk, so that a page's claim is read before it is believed.

Arrow allocates what a page header says the page unpacks to, up to 2 GiB a page, and the header is
not covered by the page's checksum. The header is one small struct of Thrift's compact protocol
(parquet.thrift, PageHeader); reading three of its numbers needs no Thrift library.
"""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq

from edje_pipeline.errors import CorruptionError

MAX_PAGE_BYTES = 256 << 20
"""No writer of this package makes a page above 1 MiB, but for the token column: one row group, 8 MiB."""

_HEADER_WINDOW = 4096
_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)


class _Bad(Exception):  # noqa: N818 - never leaves this file
    """The bytes are not a Thrift struct."""


class _Compact:
    """Just enough of a Thrift compact reader: integers of the outer struct, everything else skipped."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def byte(self) -> int:
        if self.position >= len(self.data):
            raise _Bad
        value = self.data[self.position]
        self.position += 1
        return value

    def varint(self) -> int:
        result = shift = 0
        while True:
            byte = self.byte()
            result |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return result
            shift += 7
            if shift > 63:
                raise _Bad

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def skip(self, kind: int, depth: int = 0) -> None:
        if depth > 8:
            raise _Bad
        if kind in (_TRUE, _FALSE):
            return
        if kind == _BYTE:
            self.byte()
        elif kind in (_I16, _I32, _I64):
            self.varint()
        elif kind == _DOUBLE:
            self._advance(8)
        elif kind == _BINARY:
            self._advance(self.varint())
        elif kind == _STRUCT:
            self.struct(depth + 1)
        elif kind in (_LIST, _SET):
            head = self.byte()
            count = head >> 4
            if count == 15:
                count = self.varint()
            if count > _HEADER_WINDOW:
                raise _Bad
            for _ in range(count):
                self.skip(head & 0x0F, depth + 1)
        else:
            raise _Bad

    def struct(self, depth: int = 0) -> dict[int, int]:
        """The i32 fields of a struct by field id; other fields are skipped."""
        fields: dict[int, int] = {}
        field_id = 0
        while True:
            head = self.byte()
            kind = head & 0x0F
            if head == _STOP:
                return fields
            field_id = field_id + (head >> 4) if head >> 4 else self.zigzag()
            if kind == _I32:
                fields[field_id] = self.zigzag()
            else:
                self.skip(kind, depth)

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position > len(self.data):
            raise _Bad


def check_pages(
    file: pq.ParquetFile,
    stream: Any,
    where: str,
    *,
    row_groups: list[int] | None = None,
    columns: list[str] | None = None,
) -> int:
    """Reads every page header of the chosen column chunks and returns the largest unpacked page, bytes.

    Args:
        file: gives the chunk positions.
        stream: a seekable file with the same bytes.
        where: for messages.
        row_groups, columns: all unless given.

    Raises:
        CorruptionError: a header is not one, its pages overrun their chunk, or unpack to more than
            the footer says of the chunk or than `MAX_PAGE_BYTES`.
    """
    largest = 0
    metadata = file.metadata
    for group in range(metadata.num_row_groups) if row_groups is None else row_groups:
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            chunk = row_group.column(number)
            if columns is None or chunk.path_in_schema in columns:
                largest = max(largest, _check_chunk(chunk, stream, f"{where}, row group {group}", row_group.num_rows))
    return largest


def _check_chunk(chunk: Any, stream: Any, where: str, num_rows: int) -> int:
    name = chunk.path_in_schema
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    end = start + chunk.total_compressed_size
    if start < 4 or chunk.total_compressed_size < 0 or end > stream.size():
        raise CorruptionError(f"{where}: the footer puts column {name} outside of the file")
    unpacked = largest = num_values = 0
    while start < end:
        stream.seek(start)
        reader = _Compact(stream.read(min(_HEADER_WINDOW, end - start)))
        try:
            kind, size, packed, values = _page_header(reader)
        except _Bad:
            raise CorruptionError(f"{where}: column {name} has a damaged page header") from None
        header_bytes = reader.position
        unpacked += size + header_bytes
        largest = max(largest, size)
        num_values += values if kind in (0, 3) else 0
        start += header_bytes + packed
        limit = max(chunk.total_uncompressed_size, 0)
        if size > MAX_PAGE_BYTES or unpacked > limit or start > end or num_values > num_rows:
            raise CorruptionError(
                f"{where}: column {name} has a page that claims {size:,} bytes unpacked and {values:,} values; "
                f"the footer allows {limit:,} bytes and {num_rows:,} values"
            )
    return largest


def _page_header(reader: _Compact) -> tuple[int, int, int, int]:
    """(type, bytes unpacked, bytes packed, values) of a PageHeader."""
    fields: dict[int, int] = {}
    values = 0
    field_id = 0
    while True:
        head = reader.byte()
        if head == _STOP:
            break
        kind = head & 0x0F
        field_id = field_id + (head >> 4) if head >> 4 else reader.zigzag()
        if kind == _I32:
            fields[field_id] = reader.zigzag()
        elif kind == _STRUCT and field_id in (5, 7, 8):  # data page, dictionary page, data page v2: field 1 counts
            values = reader.struct().get(1, 0)
        else:
            reader.skip(kind)
    if not {1, 2, 3} <= fields.keys() or min(fields[2], fields[3], values) < 0:
        raise _Bad
    return fields[1], fields[2], fields[3], values
