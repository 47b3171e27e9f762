"""One writer at a time: an operating system lock on a disk, a lease with a heartbeat on an object store.

The operating system lets go of a flock when its process dies, however it dies. An object store has
no such thing: there a small object names the holder and the time until which it speaks; a holder
renews it, and one that stopped renewing is overtaken. Two writers that start within the same second
on an object store are told apart by reading the lease back; a store without conditional writes
cannot promise more, so `docs/operations.md` asks for one scheduler.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edje_pipeline.errors import CorruptionError, IndexLockedError, StorageError
from edje_pipeline.storage.location import Location, storage_errors
from edje_pipeline.storage.manifest import read_json

LOCK_NAME = ".lock"
LEASE_NAME = ".lease.json"
LEASE_SECONDS = float(os.environ.get("EDJE_LEASE_SECONDS", "60"))
"""How long a lease speaks without a renewal; renewed every third of it."""


class IndexLock:
    """Held from construction to `release`; also a context manager.

    Raises:
        IndexLockedError: another run holds it; the message names process, host and run.
        StorageError: the index cannot be written.
    """

    def __init__(self, index: Location, *, purpose: str) -> None:
        self._index = index
        self._holder: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "purpose": purpose,
            "since": time.time(),
        }
        self._handle: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost = ""
        if index.is_local:
            self._take_flock()
        else:
            self._take_lease()

    def assert_held(self) -> None:
        """Raises IndexLockedError when another writer overtook this one's lease."""
        if self._lost:
            raise IndexLockedError(
                f"this run lost its lease on {self._index}: {self._lost}; nothing was published, run it again"
            )

    def release(self) -> None:
        """Lets go; a second call does nothing."""
        if self._handle is not None:
            os.close(self._handle)  # closing releases the flock; the file stays, so no one locks a removed file
            self._handle = None
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            if not self._lost:
                self._index.child(LEASE_NAME).delete_file()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.release()
        except StorageError:
            if error is None:  # the error that ends the run says more than a lease that could not be removed
                raise

    # -- local -----------------------------------------------------------------------------------

    def _take_flock(self) -> None:
        self._index.make_dirs()
        path = Path(self._index.path) / LOCK_NAME
        with storage_errors(self._index):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 4096)
            os.close(handle)
            raise IndexLockedError(_busy(self._index, _parse(holder))) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(self._holder).encode(), 0)
        self._handle = handle

    # -- object store ----------------------------------------------------------------------------

    def _take_lease(self) -> None:
        found = self._read_lease()
        if found and not _is_over(found):
            raise IndexLockedError(_busy(self._index, found))
        self._write_lease()
        time.sleep(min(1.0, LEASE_SECONDS / 20))
        found = self._read_lease()
        if found.get("token") != self._holder["token"]:
            raise IndexLockedError(_busy(self._index, found))
        self._thread = threading.Thread(target=self._renew, name="edje-lease", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        last_good = time.time()
        while not self._stop.wait(LEASE_SECONDS / 3):
            try:
                found = self._read_lease()
                if found and found.get("token") != self._holder["token"]:
                    self._lost = f"it is now held by process {found.get('pid')} on {found.get('host')}"
                    return
                self._write_lease()
                last_good = time.time()
            except StorageError as error:
                if time.time() - last_good > LEASE_SECONDS:
                    self._lost = f"it could not be renewed for {LEASE_SECONDS:.0f} s ({error})"
                    return

    def _write_lease(self) -> None:
        lease = {**self._holder, "until": time.time() + LEASE_SECONDS}
        self._index.child(LEASE_NAME).write_bytes(json.dumps(lease).encode())

    def _read_lease(self) -> dict[str, Any]:
        try:
            return read_json(self._index.child(LEASE_NAME), max_bytes=4096)
        except (FileNotFoundError, CorruptionError):
            return {}


def _parse(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_over(lease: dict[str, Any]) -> bool:
    until = lease.get("until")
    if not isinstance(until, int | float) or time.time() > until:
        return True
    if lease.get("host") != socket.gethostname() or not isinstance(lease.get("pid"), int):
        return False
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return True  # its process died on this very machine: no need to wait
    except PermissionError:
        return False
    return False


def _busy(index: Location, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')} ({holder.get('purpose', 'a run')})"
    hint = "wait for it or stop it, then run this again"
    if isinstance(holder.get("until"), int | float):
        left = max(0.0, holder["until"] - time.time())
        hint += f"; if it is dead its lease ends in {left:.0f} s"
    return f"{index} is in use by {who}; {hint}"
