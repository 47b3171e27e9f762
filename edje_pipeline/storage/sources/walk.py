"""Every file below a directory in a fixed order, in memory that does not grow with the directory.

A directory's names are sorted before they are used, since no file system promises an order. A
directory of millions of names is sorted in runs that are spilled to a temporary file and merged.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import tempfile
from collections.abc import Iterator
from typing import IO

import pyarrow.fs as pafs

from edje_pipeline.errors import SourceError
from edje_pipeline.storage import files

SORT_RUN_NAMES = 50_000


def walk_files(root: str) -> Iterator[tuple[bytes, str]]:
    """Yields (relative POSIX path, file URI) of every file below the directory `root`.

    Hidden files and directories (a leading dot) are passed over. Links to files are followed; a link
    to a directory is followed unless it leads back to a directory above it, so no walk is endless.
    """
    if files.is_local_uri(root):
        yield from _walk_local(files.local_path(root), b"", ())
    else:
        yield from _walk_remote(root)


def _walk_local(root: bytes, prefix: bytes, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[bytes, str]]:
    directory = os.path.join(root, prefix) if prefix else root
    try:
        status = os.stat(directory)  # noqa: PTH116  (a path of any bytes)
        me = (status.st_dev, status.st_ino)
        if me in above:
            return
        for tagged in _sorted_names(directory):
            name, is_dir = tagged[:-1], tagged[-1:] == b"d"
            relative = prefix + name
            if is_dir:
                yield from _walk_local(root, relative + b"/", (*above, me))
            else:
                yield relative, files.local_uri(os.path.join(root, relative))
    except PermissionError as error:
        raise SourceError(
            f"cannot list {files.readable(directory)}: permission denied; fix its rights or leave it out"
        ) from error


def _sorted_names(directory: bytes) -> Iterator[bytes]:
    """Names with a trailing `d` or `f`, sorted; flat in memory."""
    run: list[bytes] = []
    with contextlib.ExitStack() as stack:
        spilled: list[IO[bytes]] = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                run.append(entry.name + (b"d" if entry.is_dir() else b"f"))
                if len(run) == SORT_RUN_NAMES:
                    spilled.append(stack.enter_context(_spill(run)))
                    run = []
        run.sort()
        if not spilled:
            yield from run
            return
        yield from heapq.merge(run, *(_stored(stream) for stream in spilled))


def _spill(run: list[bytes]) -> IO[bytes]:
    """A temporary file of the sorted run; a file name holds neither NUL nor slash, a slash divides them."""
    run.sort()
    stream: IO[bytes] = tempfile.TemporaryFile(prefix="edje-names-")  # noqa: SIM115  (the caller closes it)
    stream.write(b"/".join(run))
    stream.seek(0)
    return stream


def _stored(stream: IO[bytes]) -> Iterator[bytes]:
    rest = b""
    while chunk := stream.read(1 << 16):
        *names, rest = (rest + chunk).split(b"/")
        yield from names
    if rest:
        yield rest


def _walk_remote(root: str) -> Iterator[tuple[bytes, str]]:
    filesystem, path = files.remote(root)
    base = path.rstrip("/")
    yield from _remote_directory(filesystem, root, base, base)


def _remote_directory(filesystem: pafs.FileSystem, root: str, base: str, directory: str) -> Iterator[tuple[bytes, str]]:
    # One directory at a time: `get_file_info` of a recursive selector holds the whole bucket in memory.
    entries = filesystem.get_file_info(pafs.FileSelector(directory, allow_not_found=True))
    for info in sorted(entries, key=lambda info: info.path):
        if info.base_name.startswith("."):
            continue
        if info.type == pafs.FileType.Directory:
            yield from _remote_directory(filesystem, root, base, info.path)
        elif info.type == pafs.FileType.File:
            yield info.path[len(base) + 1 :].encode(), files.sibling_uri(root, info.path)
