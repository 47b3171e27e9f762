"""One place on any file system that `pyarrow.fs` knows: a path, `file://`, `s3://`, `gs://`.

A `Location` is a value: it pickles by its URI, so that it can travel to a Ray worker, and joins
children without losing the URI's query (`s3://bucket/x?endpoint_override=...`). Writes are atomic:
on a local disk through a temporary name, fsync and rename; on an object store a single PUT is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO
from urllib.parse import quote, urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.fs as pafs

from edje_pipeline.errors import ConfigError, StorageError


@lru_cache(maxsize=64)
def _resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, ValueError) as error:
        raise ConfigError(
            f"cannot understand the location {uri!r}: {error}. "
            "Give a path or a URI such as s3://bucket/folder, gs://bucket/folder or file:///folder."
        ) from error
    return filesystem, path


@dataclass(frozen=True)
class FileEntry:
    """One file of a directory listing. `path` is relative to the listed directory, POSIX style."""

    path: str
    size_bytes: int


@dataclass(frozen=True)
class Location:
    """A file or directory named by a URI; see the module docstring."""

    uri: str

    @classmethod
    def parse(cls, text: str | os.PathLike[str] | Location) -> Location:
        """Reads a path or URI as a user types it; a bare path becomes an absolute `file://` URI."""
        if isinstance(text, Location):
            return text
        text = os.fspath(text)
        if "://" in text:
            return cls(text)
        return cls(Path(os.path.abspath(Path(text).expanduser())).as_uri())

    @cached_property
    def _resolved(self) -> tuple[pafs.FileSystem, str]:
        return _resolve(self.uri)

    @property
    def filesystem(self) -> pafs.FileSystem:
        return self._resolved[0]

    @property
    def path(self) -> str:
        """The path inside `filesystem`."""
        return self._resolved[1]

    @property
    def name(self) -> str:
        return posixpath.basename(self.path.rstrip("/"))

    @property
    def is_local(self) -> bool:
        return self.filesystem.type_name == "local"

    def __reduce__(self) -> tuple[type[Location], tuple[str]]:
        return (Location, (self.uri,))

    def __str__(self) -> str:
        """The form a person typed: a plain path when local."""
        return self.path if self.is_local else self.uri

    def child(self, *parts: str) -> Location:
        """The location of `parts` below this one.

        Raises:
            ConfigError: a part is absolute or climbs out with `..`; names read from an index or a
                manifest pass through here, and none may reach outside its directory.
        """
        for part in parts:
            if part.startswith("/") or "\\" in part or ".." in part.split("/") or "\0" in part:
                raise ConfigError(f"the name {part!r} would leave {self}; refused")
        split = urlsplit(self.uri)
        tail = "/".join(quote(part) if split.scheme == "file" else part for part in parts)
        return Location(urlunsplit(split._replace(path=split.path.rstrip("/") + "/" + tail)))

    # -- reading ---------------------------------------------------------------------------------

    def exists(self) -> bool:
        with reach_errors(self):
            return self.filesystem.get_file_info(self.path).type != pafs.FileType.NotFound

    def is_dir(self) -> bool:
        with reach_errors(self):
            return self.filesystem.get_file_info(self.path).type == pafs.FileType.Directory

    def size_bytes(self) -> int:
        with reach_errors(self):
            info = self.filesystem.get_file_info(self.path)
        if info.type == pafs.FileType.NotFound:
            raise FileNotFoundError(f"{self} does not exist")
        return int(info.size)

    def open_input(self) -> pa.NativeFile:
        """A seekable file; memory-mapped pages are not used so that truncation cannot raise SIGBUS."""
        return self.filesystem.open_input_file(self.path)

    def read_bytes(self, *, max_bytes: int | None = None) -> bytes:
        """The whole file.

        Raises:
            StorageError: the file is larger than `max_bytes` (a guard against hostile inputs).
        """
        with self.open_input() as stream:
            size = stream.size()
            if max_bytes is not None and size > max_bytes:
                raise StorageError(f"{self} has {size:,} bytes, more than the {max_bytes:,} allowed here")
            data: bytes = stream.read()
        return data

    def list_files(self, *, recursive: bool = True) -> list[FileEntry]:
        """Files below this directory sorted by path; an absent directory has none."""
        base = self.path.rstrip("/")
        selector = pafs.FileSelector(base, recursive=recursive, allow_not_found=True)
        with reach_errors(self):
            infos = self.filesystem.get_file_info(selector)
        return sorted(
            (
                FileEntry(info.path[len(base) + 1 :], int(info.size))
                for info in infos
                if info.type == pafs.FileType.File
            ),
            key=lambda entry: entry.path,
        )

    def list_dirs(self) -> list[str]:
        """Names of the directories directly below this one, sorted."""
        base = self.path.rstrip("/")
        selector = pafs.FileSelector(base, recursive=False, allow_not_found=True)
        with reach_errors(self):
            infos = self.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    # -- writing ---------------------------------------------------------------------------------

    def make_dirs(self) -> None:
        """Creates the directory and its parents; on an object store there is nothing to create."""
        if self.is_local:
            with storage_errors(self):
                _make_local_dirs(Path(self.path))

    @contextlib.contextmanager
    def open_atomic(self) -> Iterator[IO[bytes] | pa.NativeFile]:
        """A stream whose bytes appear under this name all at once, or not at all.

        Local: a hidden temporary name beside the target, fsync of file and directory, rename.
        Object store: the upload becomes visible when it is completed; an error aborts it as far as
        the store's client allows, and a unique target name makes a torn one harmless.
        """
        with storage_errors(self):
            if not self.is_local:
                with self.filesystem.open_output_stream(self.path) as remote:
                    yield remote
                return
            target = Path(self.path)
            _make_local_dirs(target.parent)
            temporary = target.parent / f".tmp-{uuid.uuid4().hex}-{target.name[-80:]}"
            try:
                with temporary.open("wb") as stream:
                    yield stream
                    stream.flush()
                    os.fsync(stream.fileno())
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            fsync_dir(target.parent)

    def write_bytes(self, data: bytes) -> None:
        """Writes the whole file atomically; see `open_atomic`."""
        with self.open_atomic() as stream:
            stream.write(data)

    def delete_file(self) -> None:
        """Removes the file; one that is gone already is fine."""
        with storage_errors(self), contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path)

    def delete_dir(self) -> None:
        """Removes the directory and all below it; one that is gone already is fine."""
        with storage_errors(self), contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(self.path)


def _make_local_dirs(path: Path) -> None:
    """As mkdir -p. File systems such as /proc answer "not found" when they mean "not here"."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise StorageError(f"cannot create the directory {path}: {error.strerror}; choose another target") from error


def fsync_dir(path: Path) -> None:
    """Makes a rename inside `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def reach_errors(location: Location) -> Iterator[None]:
    """Turns a lost connection to an object store into one line; a disk's errors pass as they are."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if location.is_local or isinstance(error, StorageError):
            raise
        reason = (str(error).splitlines() or ["no reason given"])[0][:300]
        raise StorageError(
            f"cannot reach {location}: {reason}; run the same command again when it is reachable"
        ) from error


@contextlib.contextmanager
def storage_errors(location: Location) -> Iterator[None]:
    """Turns an operating system's refusal into one line that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise StorageError(
            f"cannot write {location}: permission denied; choose another --index or fix its rights"
        ) from error
    except OSError as error:
        hints = {
            errno.ENOSPC: "the disk is full; free some space and run the same command again, finished work is kept",
            errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
            errno.EROFS: "the file system is read-only; choose another target",
        }
        hint = hints.get(error.errno or 0, f"{error}; run the same command again when it is reachable")
        raise StorageError(f"cannot write {location}: {hint}") from error
