"""Parquet files that hold the images: a binary column, or a struct {bytes, path} as Hugging Face writes it.

A Parquet file whose image column is text (paths or URIs) is a list and is read as one. img2dataset's
Parquet output works as it is: `key` is the id, `jpg` the bytes, and rows it could not download
(`status` other than `success`) are passed over and counted, as they are absent from its tars.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.errors import SourceError, SourceNotFoundError
from edje_pipeline.storage import files
from edje_pipeline.storage.sources.base import WHOLE_FILE, Source, SourceOptions, count_phrase
from edje_pipeline.storage.sources.uri_list import UriListSource, choose_column, parquet_uri_records
from edje_pipeline.storage.sources.walk import walk_files

ID_COLUMNS = ("image_id", "id", "key", "__key__", "uid", "sha256", "filename", "file_name", "path", "url")
BYTES_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "content", "data")
MAX_FOOTER_BYTES = 256 << 20


def open_parquet(stream: Any, name: str) -> pq.ParquetFile:
    """A Parquet file whose footer is bounded in size.

    Raises:
        SourceError: not Parquet, damaged, or a footer beyond any real one.
    """
    try:
        return pq.ParquetFile(
            stream, thrift_string_size_limit=MAX_FOOTER_BYTES, thrift_container_size_limit=10_000_000, pre_buffer=False
        )
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{name} is not a readable Parquet file: {error}; write it again or leave it out") from error


def is_image_type(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold image bytes."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def bytes_column(schema: pa.Schema, options: SourceOptions) -> str | None:
    """The column of image bytes, or None when there is none (the named one may hold paths)."""
    if options.image_column is not None:
        index = schema.get_field_index(options.image_column)
        return options.image_column if index >= 0 and is_image_type(schema.field(index).type) else None
    usual = [name for name in BYTES_COLUMNS if name in schema.names and is_image_type(schema.field(name).type)]
    structs = [field.name for field in schema if pa.types.is_struct(field.type) and is_image_type(field.type)]
    return next(iter(usual + structs), None)


class ParquetSource(Source):
    """One Parquet file, a folder of them, or a pattern; every file has the same columns."""

    kind: ClassVar[str] = "parquet"

    def __init__(self, uri: str, options: SourceOptions) -> None:
        super().__init__(uri, options)
        self.num_files = 0
        self.image_column: str | None = None
        self.id_column: str | None = None

    def describe(self) -> str:
        what = count_phrase(self.num_files, "Parquet file") if self.num_files else "Parquet files"
        count = f" with {count_phrase(self.num_listed, 'image')}" if self.num_listed else ""
        columns = f" (id column {self.id_column!r}, image column {self.image_column!r})" if self.image_column else ""
        return f"{what}{count} at {files.shown(self.uri)}{columns}"

    def looked_for(self) -> str:
        return "rows of .parquet files with a column of image bytes, paths or URIs"

    def file_uris(self) -> Iterator[str]:
        """The Parquet files in order."""
        if files.has_pattern(self.uri):
            yield from files.expand_pattern(self.uri)
        elif files.kind_of(self.uri) == "dir":
            for relative, uri in walk_files(self.uri):
                if relative.lower().endswith((b".parquet", b".pq")):
                    yield uri
        else:
            yield self.uri

    def _entries(self) -> Iterator[tuple[str, str, str, int, int]]:
        self.num_files = 0
        for uri in self.file_uris():
            self.num_files += 1
            try:
                with files.open_binary(uri) as stream:
                    yield from self._one_file(uri, open_parquet(stream, files.shown(uri)))
            except FileNotFoundError as error:
                raise SourceNotFoundError(f"the Parquet file {files.shown(uri)} does not exist") from error
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, SourceError):
                    raise
                raise SourceError(f"cannot list {files.shown(uri)}: {error}; write it again or leave it out") from error

    def _one_file(self, uri: str, file: pq.ParquetFile) -> Iterator[tuple[str, str, str, int, int]]:
        schema = file.schema_arrow
        image_column = bytes_column(schema, self.options)
        if image_column is None:
            choose = self.options.image_column
            if choose is None or choose not in schema.names:
                usual = (*BYTES_COLUMNS[:4], "uri", "path")
                self.image_column = choose_column(choose, (*usual, "url"), schema.names, "image", uri)
            resolver = UriListSource(uri, self.options)
            for number, image_id, text in parquet_uri_records(uri, self.options):
                if not text or not image_id:
                    raise SourceError(f"{files.shown(uri)} row {number:,} has an empty {'id' if text else 'URI'}")
                target = resolver.resolve(text)
                yield image_id, target, target, 0, WHOLE_FILE
            return
        self.image_column = image_column
        self.id_column = choose_column(self.options.id_column, ID_COLUMNS, schema.names, "id", uri)
        has_status = self.options.id_column in (None, "key") and {"status", "key"} <= set(schema.names)
        columns = list(dict.fromkeys([self.id_column, *(["status"] if has_status else [])]))
        prefix = (
            files.path_name(uri).rsplit("/", 1)[-1].removesuffix(".parquet") + "/" if self.options.qualify_ids else ""
        )
        row = 0
        for group in range(file.num_row_groups):
            inside = 0
            for batch in file.iter_batches(4096, row_groups=[group], columns=columns):
                ids = batch.column(self.id_column).cast(pa.string()).to_pylist()
                statuses = batch.column("status").to_pylist() if has_status else None
                for position, image_id in enumerate(ids):
                    if statuses is not None and statuses[position] != "success":
                        self.notes.add("rows that img2dataset could not download passed over", str(image_id))
                    elif not image_id:
                        raise SourceError(f"{files.shown(uri)} row {row:,} has no id in column {self.id_column!r}")
                    else:
                        yield prefix + image_id, f"{uri}#{row}", uri, group, inside
                    row += 1
                    inside += 1

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "image_column": self.image_column}
