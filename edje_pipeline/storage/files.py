"""Names and handles of files, local or on any `pyarrow.fs` file system.

A corpus may hold millions of single files, so a file system is resolved once per bucket rather than
once per file, and local files are opened by the operating system directly. Local names need not be
UTF-8: they travel percent-encoded in `file://` URIs.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import IO, Any
from urllib.parse import quote_from_bytes, unquote_to_bytes, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from edje_pipeline.errors import ConfigError, SourceError

MAX_BRACE_NAMES = 1_000_000
_BRACE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


def is_local_uri(uri: str) -> bool:
    """True for a path or a `file://` URI."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> bytes:
    """The operating system's path of a `file://` URI or plain path."""
    if uri.startswith("file://"):
        return unquote_to_bytes(uri[len("file://") :])
    home = os.path.expanduser(uri)  # noqa: PTH111  (Path would fold //)
    return os.path.abspath(os.fsencode(home))


def local_uri(path: bytes) -> str:
    """The `file://` URI of an absolute path, whatever bytes it is made of."""
    return "file://" + quote_from_bytes(path)


def shown(uri: str) -> str:
    """The form a person would type, without the options of a remote URI."""
    return readable(local_path(uri)) if is_local_uri(uri) else re.sub(r"\?[^#]*", "", uri)


def path_name(uri: str) -> str:
    """What suffixes are looked for in: a remote URI's options (`?region=...`) are not part of the name."""
    return uri if is_local_uri(uri) else uri.split("?", 1)[0]


def readable(name: bytes) -> str:
    """Text of a file name; bytes that are not UTF-8 are written as `\\xe9`, so that ids stay unique."""
    return name.decode("utf-8", "backslashreplace")


@lru_cache(maxsize=32)
def _bucket(scheme: str, authority: str, query: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a bucket and what it puts before a URI's path."""
    probe = f"{scheme}://{authority}/edje-probe" + (f"?{query}" if query else "")
    try:
        filesystem, path = pafs.FileSystem.from_uri(probe)
    except (pa.ArrowInvalid, ValueError) as error:
        raise ConfigError(
            f"cannot read {scheme}://{authority}: {error}. Local paths, file://, s3:// and gs:// are read; "
            "for http(s) lists download the images first (what img2dataset writes is read as it is)"
        ) from error
    return filesystem, path[: -len("edje-probe")]


def remote(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a remote URI and the path inside it.

    Raises:
        ConfigError: no `pyarrow.fs` file system reads this scheme.
    """
    split = urlsplit(uri)
    filesystem, prefix = _bucket(split.scheme, split.netloc, split.query)
    return filesystem, prefix + unquote_to_bytes(split.path.lstrip("/")).decode("utf-8", "surrogateescape")


def sibling_uri(root: str, inner: str) -> str:
    """The URI of the path `inner` (as the file system gives it) on the remote file system of `root`."""
    split = urlsplit(root)
    _, prefix = _bucket(split.scheme, split.netloc, split.query)
    path = quote_from_bytes(inner[len(prefix) :].encode("utf-8", "surrogateescape"))
    return f"{split.scheme}://{split.netloc}/{path}" + (f"?{split.query}" if split.query else "")


def open_binary(uri: str) -> AbstractContextManager[IO[bytes] | Any]:
    """A seekable handle (`read`, `seek`) for one file."""
    if is_local_uri(uri):
        return open(local_path(uri), "rb")
    filesystem, path = remote(uri)
    return filesystem.open_input_file(path)


def file_size(uri: str) -> int:
    """Bytes of a file; FileNotFoundError when it is not there."""
    if is_local_uri(uri):
        return os.stat(local_path(uri)).st_size  # noqa: PTH116  (a path of any bytes)
    filesystem, path = remote(uri)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(uri)
    return int(info.size or 0)


def kind_of(uri: str) -> str:
    """`file`, `dir` or `missing`."""
    if is_local_uri(uri):
        local = local_path(uri)
        if not os.path.exists(local):  # noqa: PTH110  (a path of any bytes)
            return "missing"
        return "dir" if os.path.isdir(local) else "file"  # noqa: PTH112
    filesystem, path = remote(uri)
    found = filesystem.get_file_info(path.rstrip("/")).type
    return {pafs.FileType.Directory: "dir", pafs.FileType.File: "file"}.get(found, "missing")


def absolute_uri(text: str) -> str:
    """A path or URI as typed, as a URI; `Location`'s rule, for names with any bytes."""
    return local_uri(local_path(text)) if is_local_uri(text) else text.rstrip("/") or text


def has_pattern(text: str) -> bool:
    """Whether a corpus name is a brace or glob pattern rather than one file's name."""
    if kind_of(text) != "missing":
        return False
    return bool(_BRACE.search(text)) or (is_local_uri(text) and glob.has_magic(text))


def expand_braces(text: str) -> Iterator[str]:
    """`a{000..002}.tar` -> a000.tar, a001.tar, a002.tar; `{x,y}` likewise; nested sets multiply.

    Raises:
        SourceError: more than a million names, or a range that runs backwards.
    """
    pieces: list[list[str]] = []
    end = 0
    total = 1
    for match in _BRACE.finditer(text):
        pieces.append([text[end : match.start()]])
        if match[3] is not None:
            names = match[3].split(",")
        else:
            first, last = int(match[1]), int(match[2])
            if last < first or last - first >= MAX_BRACE_NAMES:
                raise SourceError(f"the range {match[0]} in {text!r} is empty or above {MAX_BRACE_NAMES:,} names")
            names = [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
        total *= len(names)
        if total > MAX_BRACE_NAMES:
            raise SourceError(f"{text!r} stands for more than {MAX_BRACE_NAMES:,} names")
        pieces.append(names)
        end = match.end()
    pieces.append([text[end:]])
    for combination in itertools.product(*pieces):
        yield "".join(combination)


def expand_pattern(text: str) -> list[str]:
    """The URIs a brace or glob pattern stands for, sorted within each glob."""
    uris: list[str] = []
    for name in expand_braces(text):
        if is_local_uri(name) and glob.has_magic(name):
            uris += [local_uri(path) for path in sorted(glob.glob(local_path(name), recursive=True))]
        else:
            uris.append(absolute_uri(name))
    return uris
