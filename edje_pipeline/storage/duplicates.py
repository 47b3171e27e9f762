"""Finds repeated image_ids among any number of them in flat memory.

Every id's 64-bit hash goes to one of 256 bucket files with its row number. A bucket holds all ids
that can be equal to one another, so each is sorted alone. Equal hashes are only suspects: the caller
compares the ids themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

NUM_BUCKETS = 256
_RECORD = np.dtype([("hash", "<u8"), ("row", "<i8")])


def hash_ids(ids: Sequence[str]) -> np.ndarray:
    """uint64 (n,): blake2b, the same in every process."""
    digests = b"".join(hashlib.blake2b(image_id.encode(), digest_size=8).digest() for image_id in ids)
    return np.frombuffer(digests, "<u8")


class DuplicateFinder:
    """Takes ids in row order, then tells which hashes occur more than once."""

    def __init__(self, directory: Path | None = None) -> None:
        self._stack = contextlib.ExitStack()
        self._directory = directory
        self._buckets: list[IO[bytes]] = []

    def __enter__(self) -> Self:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="edje-ids-", dir=self._directory))
        names = [Path(folder, f"{number:03d}") for number in range(NUM_BUCKETS)]
        self._buckets = [self._stack.enter_context(open(name, "w+b")) for name in names]  # noqa: SIM115
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, ids: Sequence[str], first_row: int) -> None:
        """Adds the ids of rows `first_row`, `first_row + 1`, ..."""
        records = np.empty(len(ids), _RECORD)
        records["hash"] = hash_ids(ids)
        records["row"] = np.arange(first_row, first_row + len(ids))
        numbers = (records["hash"] >> np.uint64(56)).astype(np.intp)
        order = np.argsort(numbers, kind="stable")
        records, numbers = records[order], numbers[order]
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(records)], strict=True):
            self._buckets[int(numbers[start])].write(records[start:end].tobytes())

    def repeated_hashes(self) -> np.ndarray:
        """Sorted uint64 hashes that at least two rows share; usually none."""
        found = []
        for stream in self._buckets:
            stream.flush()
            stream.seek(0)
            values = np.sort(np.frombuffer(stream.read(), _RECORD)["hash"])
            found.append(np.unique(values[1:][values[1:] == values[:-1]]))
        return np.sort(np.concatenate(found))
