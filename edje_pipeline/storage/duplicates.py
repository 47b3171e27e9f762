"""Finds repeated image_ids among any number of them in flat memory.

Every id's 64-bit hash goes to one of 256 bucket files by its first byte. A bucket holds all hashes
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
SPILL_ROWS = 1 << 18
"""Hashes kept in memory (2 MB) before they are spilled."""


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
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, ids: Sequence[str]) -> None:
        """Adds ids; small corpora stay in memory, larger ones go to the bucket files."""
        self._waiting.append(hash_ids(ids))
        self._num_waiting += len(ids)
        if self._num_waiting >= SPILL_ROWS:
            self._spill()

    def repeated_hashes(self) -> np.ndarray:
        """Sorted uint64 hashes that at least two ids share; usually none."""
        if not self._buckets:
            return _repeated(np.concatenate([np.empty(0, np.uint64), *self._waiting]))
        self._spill()
        found = []
        for stream in self._buckets:
            stream.flush()
            stream.seek(0)
            found.append(_repeated(np.frombuffer(stream.read(), "<u8")))
        return np.concatenate(found)  # buckets are in the order of their hashes

    def _spill(self) -> None:
        if not self._buckets:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="edje-ids-", dir=self._directory))
            names = [Path(folder, f"{number:03d}") for number in range(NUM_BUCKETS)]
            self._buckets = [self._stack.enter_context(open(name, "w+b")) for name in names]  # noqa: SIM115
        hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *self._waiting]))
        edges = np.searchsorted(hashes, np.arange(NUM_BUCKETS, dtype=np.uint64) << np.uint64(56))
        for stream, start, end in zip(self._buckets, edges, [*edges[1:], len(hashes)], strict=True):
            stream.write(hashes[start:end].astype("<u8").tobytes())
        self._waiting, self._num_waiting = [], 0


def _repeated(hashes: np.ndarray) -> np.ndarray:
    values = np.sort(hashes)
    return np.unique(values[1:][values[1:] == values[:-1]])
