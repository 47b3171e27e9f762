"""A list of image URIs: text (one a line), CSV, TSV, JSONL or Parquet, plain or as .gz or .zst."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.errors import ConfigError, InputFileError, SourceError
from edje_pipeline.storage import compressed, files
from edje_pipeline.storage.sources.base import WHOLE_FILE, Source, SourceOptions, count_phrase

URI_COLUMNS = ("uri", "path", "file", "filepath", "file_path", "image_path", "filename", "file_name", "image", "url")
LIST_SUFFIXES = (".txt", ".lst", ".list", ".csv", ".tsv", ".jsonl", ".ndjson")


class UriListSource(Source):
    """image_id = the named id column, else the URI as written. Relative paths start at the list's folder."""

    kind: ClassVar[str] = "list"

    def __init__(self, uri: str, options: SourceOptions) -> None:
        super().__init__(uri, options)
        self._remote_options = "" if files.is_local_uri(uri) or "?" not in uri else uri[uri.index("?") :]
        self._schemes: set[str] = set()

    def describe(self) -> str:
        count = f" of {count_phrase(self.num_listed, 'image')}" if self.num_listed else ""
        return f"list{count} in {files.shown(self.uri)}"

    def looked_for(self) -> str:
        return "one image path or URI a line or row"

    def _entries(self) -> Iterator[tuple[str, str, str, int, int]]:
        try:
            for number, image_id, text in self._records():
                if not text or not image_id:
                    raise SourceError(
                        f"{files.shown(self.uri)} row {number:,} has an empty {'URI' if not text else 'id'}"
                    )
                uri = self.resolve(text)
                yield image_id, uri, uri, 0, WHOLE_FILE
        except InputFileError as error:
            raise SourceError(str(error)) from error

    def resolve(self, text: str) -> str:
        """The URI of one entry.

        Raises:
            SourceError: a scheme that no `pyarrow.fs` file system reads.
        """
        if "://" in text:
            scheme = text.split("://", 1)[0]
            if self._remote_options and "?" not in text and self.uri.startswith(scheme + "://"):
                text += self._remote_options  # region and endpoint of the list hold for what it lists
            if scheme not in self._schemes and scheme != "file":
                try:
                    files.remote(text)
                except ConfigError as error:
                    raise SourceError(f"{files.shown(self.uri)} lists {text!r}: {error}") from error
                self._schemes.add(scheme)
            return text
        if text.startswith("/"):
            return files.local_uri(os.fsencode(text))
        if files.is_local_uri(self.uri):
            folder = os.path.dirname(files.local_path(self.uri))  # noqa: PTH120  (a path of any bytes)
            return files.local_uri(os.path.normpath(os.path.join(folder, os.fsencode(text))))
        return files.sibling_uri(self.uri, files.remote(self.uri)[1].rsplit("/", 1)[0] + "/" + text)

    def _records(self) -> Iterator[tuple[int, str, str]]:
        name = compressed.plain_name(self.uri)
        if name.endswith(".parquet"):
            yield from parquet_uri_records(self.uri, self.options)
            return
        with compressed.open_text_bytes(self.uri) as stream:
            lines = compressed.iter_lines(stream, files.shown(self.uri))
            if name.endswith((".jsonl", ".ndjson")):
                yield from self._pick(_json_records(lines, files.shown(self.uri)))
            elif name.endswith((".csv", ".tsv")):
                yield from self._pick(_delimited_records(lines, "\t" if name.endswith(".tsv") else ",", self.uri))
            else:
                for number, line in lines:
                    text = _decoded(line, number, self.uri).strip()
                    if text:
                        yield number, text, text

    def _pick(self, records: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, str, str]]:
        uri_column = id_column = None
        for number, record in records:
            if uri_column is None:
                uri_column = choose_column(self.options.image_column, URI_COLUMNS, list(record), "image", self.uri)
                id_column = self.options.id_column or uri_column
            values = record.get(uri_column), record.get(id_column or uri_column)
            if not all(isinstance(value, str | int) for value in values):
                raise SourceError(
                    f"{files.shown(self.uri)} line {number:,}: expected text in the columns {uri_column!r} "
                    f"and {id_column!r}, found {values[0]!r} and {values[1]!r}"
                )
            yield number, str(values[1]), str(values[0])


def choose_column(named: str | None, usual: tuple[str, ...], present: list[str], what: str, uri: str) -> str:
    """The named column, or the first usual one.

    Raises:
        SourceError: it is not there; the message lists the columns that are.
    """
    found = named if named in present else None if named else next((name for name in usual if name in present), None)
    if found is None:
        wanted = f"named {named!r}" if named else f"among {', '.join(usual[:6])}"
        raise SourceError(
            f"{files.shown(uri)} has no {what} column {wanted}; it has {', '.join(present[:20]) or 'none'}. "
            f"Name the right one with --{what}-column"
        )
    return found


def parquet_uri_records(uri: str, options: SourceOptions) -> Iterator[tuple[int, str, str]]:
    """(row number, id, URI) of a Parquet file with a column of paths or URIs."""
    with files.open_binary(uri) as stream:
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names
        uri_column = choose_column(options.image_column, URI_COLUMNS, names, "image", uri)
        id_column = choose_column(options.id_column, (uri_column,), names, "id", uri)
        number = 0
        try:
            for batch in file.iter_batches(4096, columns=list(dict.fromkeys((uri_column, id_column)))):
                uris = batch.column(uri_column).cast(pa.string()).to_pylist()
                ids = batch.column(id_column).cast(pa.string()).to_pylist()
                for text, image_id in zip(uris, ids, strict=True):
                    number += 1
                    yield number, image_id or "", text or ""
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{files.shown(uri)} is damaged near row {number:,}: {error}") from error


def _decoded(line: bytes, number: int, uri: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{files.shown(uri)} line {number:,} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def _json_records(lines: Iterator[tuple[int, bytes]], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{name} line {number:,} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise SourceError(f"{name} line {number:,} is not a JSON object")
        yield number, record


def _delimited_records(
    lines: Iterator[tuple[int, bytes]], delimiter: str, uri: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    text = (_decoded(line, number, uri) + "\n" for number, line in lines)
    reader = csv.reader(text, delimiter=delimiter)
    header: list[str] | None = None
    try:
        for row in reader:
            if header is None:
                header = row
            elif row:
                if len(row) != len(header):
                    raise SourceError(
                        f"{files.shown(uri)} line {reader.line_num:,} has {len(row)} fields, the header {len(header)}"
                    )
                yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise SourceError(f"{files.shown(uri)} line {reader.line_num:,}: {error}") from error
