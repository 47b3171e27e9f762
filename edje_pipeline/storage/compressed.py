"""Text files, plain or as .gz or .zst, read in bounded memory.

A compressed file of a few kilobytes can stand for terabytes of nothing. Lines are capped, and a
stream that grows beyond a size and a ratio which no real list reaches is refused.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import IO, Any

import zstandard

from edje_pipeline.errors import InputFileError
from edje_pipeline.storage import files

MAX_LINE_BYTES = 16 << 20
BOMB_BYTES = 256 << 20
BOMB_RATIO = 400
"""Refused above BOMB_BYTES of output from less than a BOMB_RATIO-th of input: lists of paths reach 50."""


class _GuardedReader(io.RawIOBase):
    """Counts what a decompressor gives out against what the file holds."""

    def __init__(self, stream: IO[bytes] | Any, compressed_bytes: int, name: str) -> None:
        super().__init__()
        self._stream = stream
        self._limit = max(BOMB_BYTES, compressed_bytes * BOMB_RATIO)
        self._given = 0
        self._name = name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise InputFileError(f"{self._name} cannot be decompressed: {error}; write it again") from error
        self._given += len(data)
        if self._given > self._limit:
            raise InputFileError(
                f"{self._name} unpacks to more than {self._limit:,} bytes, over {BOMB_RATIO} times its size; "
                "this looks like a decompression bomb. Unpack it yourself if it is meant"
            )
        buffer[: len(data)] = data
        return len(data)


def plain_name(name: str) -> str:
    """The name without a .gz or .zst at its end, lower case."""
    return files.path_name(name).lower().removesuffix(".gz").removesuffix(".zst")


@contextlib.contextmanager
def open_text_bytes(uri: str) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a local or remote file as a stream; the suffix names the compression.

    Raises:
        InputFileError: the file is absent, damaged, or unpacks without end.
    """
    lower = files.path_name(uri).lower()
    try:
        size = files.file_size(uri)
        with files.open_binary(uri) as raw:
            if lower.endswith(".gz"):
                inner: Any = gzip.GzipFile(fileobj=raw, mode="rb")
            elif lower.endswith(".zst"):
                inner = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False)
            else:
                inner = None
            if inner is None:
                yield io.BufferedReader(raw, 1 << 20) if isinstance(raw, io.RawIOBase) else raw
            else:
                with io.BufferedReader(_GuardedReader(inner, size, files.shown(uri)), 1 << 20) as stream:
                    yield stream
    except FileNotFoundError as error:
        raise InputFileError(f"{files.shown(uri)} does not exist") from error
    except IsADirectoryError as error:
        raise InputFileError(f"{files.shown(uri)} is a directory, expected a file") from error


def iter_chunks(stream: IO[bytes] | Any, name: str, chunk_bytes: int = 1 << 20) -> Iterator[tuple[int, bytes]]:
    """(number of its first line from 1, whole lines) in pieces of about `chunk_bytes`; drops a byte order mark.

    Raises:
        InputFileError: a line longer than MAX_LINE_BYTES.
    """
    number = 1
    rest = b""
    first = True
    while chunk := stream.read(chunk_bytes):
        data = rest + bytes(chunk)
        if first:
            data, first = data.removeprefix(b"\xef\xbb\xbf"), False
        end = data.rfind(b"\n") + 1
        rest = data[end:]
        if len(rest) > MAX_LINE_BYTES:
            raise InputFileError(_too_long(name, number + data.count(b"\n")))
        if end:
            yield number, data[:end]
            number += data.count(b"\n")
    if rest:
        yield number, rest


def iter_lines(stream: IO[bytes] | Any, name: str) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its end); otherwise as `iter_chunks`."""
    for first, chunk in iter_chunks(stream, name):
        for number, line in enumerate(chunk.removesuffix(b"\n").split(b"\n"), first):
            yield number, line.removesuffix(b"\r")


def _too_long(name: str, number: int) -> str:
    return f"{name} line {number:,} is longer than {MAX_LINE_BYTES:,} bytes; expected one record a line"
