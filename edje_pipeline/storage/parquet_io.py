"""Writing Parquet with a checksum, and opening it without trusting what its footer says.

A Parquet footer is a claim: it may name 10^9 rows in a file of a kilobyte. Every file of an index is
named by a list that states rows, bytes and sha256, so a reader first compares, then reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.errors import CorruptionError, EdjeError, StorageError
from edje_pipeline.storage.faults import crash_point
from edje_pipeline.storage.location import Location

THRIFT_STRING_LIMIT = 16 << 20
THRIFT_CONTAINER_LIMIT = 1 << 20
"""Caps on one string and one list of a footer; ours stay far below, a hostile footer cannot go above."""

ZSTD_LEVEL = 3
READ_CHUNK = 4 << 20


@dataclass(frozen=True)
class WrittenFile:
    """What a writer knows of the file it wrote."""

    size_bytes: int
    sha256: str


class HashingStream(io.RawIOBase):
    """Passes bytes on to `target` and keeps their count and sha256."""

    def __init__(self, target: IO[bytes] | pa.NativeFile) -> None:
        super().__init__()
        self._target = target
        self._hash = hashlib.sha256()
        self._count = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._target.write(view)
        self._hash.update(view)
        self._count += len(view)
        return len(view)

    def tell(self) -> int:
        return self._count

    def result(self) -> WrittenFile:
        return WrittenFile(self._count, self._hash.hexdigest())


def write_parquet(
    location: Location,
    tables: Iterable[pa.Table],
    schema: pa.Schema,
    *,
    row_group_rows: int,
    raw_columns: tuple[str, ...] = (),
    dictionary_columns: tuple[str, ...] = (),
    raw_compression: str = "none",
) -> WrittenFile:
    """Writes one Parquet file that appears all at once.

    Args:
        location: the target; see `Location.open_atomic` for what is atomic where.
        tables: pieces of at most a few row groups each; all have `schema`.
        schema: of the file.
        row_group_rows: rows of a row group; only the last one of the file may be shorter when each
            piece but the last is a multiple of it.
        raw_columns: stored with `raw_compression` instead of zstd. No fixed-size column gets statistics:
            bounds of opaque bytes say nothing and cost footer.
        dictionary_columns: few distinct values: dictionary encoding.
        raw_compression: `none`, `zstd` or `lz4`.
    """
    crash_point("write.begin")
    names = schema.names
    compression = {name: (raw_compression if name in raw_columns else "zstd") for name in names}
    levels = {name: ZSTD_LEVEL for name in names if compression[name] == "zstd"}
    with location.open_atomic() as stream:
        hashing = HashingStream(stream)
        with pq.ParquetWriter(
            hashing,
            schema,
            compression=compression,
            compression_level=levels or None,
            use_dictionary=list(dictionary_columns),
            write_statistics=[name for name in names if not pa.types.is_fixed_size_binary(schema.field(name).type)],
            write_page_checksum=True,
            write_batch_size=1024,
        ) as writer:
            for table in tables:
                if table.num_rows:
                    writer.write_table(table, row_group_size=row_group_rows)
            crash_point("write.middle")
        result = hashing.result()
    crash_point("write.done")
    return result


@contextlib.contextmanager
def reading(location: Location, what: str = "file", *, absent_is_damage: bool = True) -> Iterator[None]:
    """Turns what Arrow says of a damaged, missing or unreachable file into one clear line.

    With `absent_is_damage=False` a FileNotFoundError passes as it is: absence is an answer there.
    """
    try:
        yield
    except EdjeError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        if not absent_is_damage:
            raise
        raise CorruptionError(
            f"the {what} {location} is missing; run `edje-pipeline verify` to see what else is"
        ) from error
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, UnicodeDecodeError) as error:
        raise CorruptionError(f"the {what} {location} is damaged: {first_line(error)}") from error
    except OSError as error:
        text = first_line(error)
        if not location.is_local and "AWS Error" in text:
            raise StorageError(
                f"lost the connection to {location}: {text}; run the same command again when it is reachable"
            ) from error
        if error.errno is not None:
            raise StorageError(f"cannot read {location}: {text}") from error
        raise CorruptionError(f"the {what} {location} is damaged: {text}") from error


def first_line(error: BaseException) -> str:
    """An exception's message cut to one short line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def open_parquet(
    location: Location, *, num_rows: int, size_bytes: int, schema: pa.Schema | None = None, what: str = "file"
) -> pq.ParquetFile:
    """Opens a file after comparing its size, its number of rows and its columns with what a list says.

    Raises:
        CorruptionError: one of them differs, or the footer cannot be read.
        StorageError: the store cannot be reached.
    """
    with reading(location, what):
        stream = location.open_input()
        found_size = stream.size()
        if found_size != size_bytes:
            raise CorruptionError(f"the {what} {location} has {found_size:,} bytes, its list says {size_bytes:,}")
        file = pq.ParquetFile(
            stream,
            page_checksum_verification=True,
            thrift_string_size_limit=THRIFT_STRING_LIMIT,
            thrift_container_size_limit=THRIFT_CONTAINER_LIMIT,
        )
        found_rows = file.metadata.num_rows
        if found_rows != num_rows:
            raise CorruptionError(f"the {what} {location} has {found_rows:,} rows, its list says {num_rows:,}")
        total = 0
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if rows < 0 or rows > num_rows:
                raise CorruptionError(f"row group {group} of the {what} {location} claims {rows:,} rows")
            total += rows
        if total != num_rows:
            raise CorruptionError(f"the row groups of the {what} {location} hold {total:,} rows, not {num_rows:,}")
        if schema is not None and not file.schema_arrow.remove_metadata().equals(schema):
            found = ", ".join(f"{field.name} {field.type}" for field in file.schema_arrow)
            expected = ", ".join(f"{field.name} {field.type}" for field in schema)
            raise CorruptionError(f"the {what} {location} has the columns ({found}), expected ({expected})")
    return file


def hash_file(location: Location) -> WrittenFile:
    """Size and sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    count = 0
    with reading(location), location.open_input() as stream:
        while piece := stream.read(READ_CHUNK):
            digest.update(piece)
            count += len(piece)
    return WrittenFile(count, digest.hexdigest())
