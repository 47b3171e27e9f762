"""Which kind of source a corpus is, from its name and a look inside."""

from __future__ import annotations

import itertools
from collections import Counter

from edje_pipeline.errors import ConfigError, SourceError, SourceNotFoundError
from edje_pipeline.storage import compressed, files
from edje_pipeline.storage.sources.base import Source, SourceOptions
from edje_pipeline.storage.sources.folder import FolderSource
from edje_pipeline.storage.sources.parquet import ParquetSource, bytes_column, open_parquet
from edje_pipeline.storage.sources.uri_list import LIST_SUFFIXES, UriListSource
from edje_pipeline.storage.sources.walk import walk_files
from edje_pipeline.storage.sources.webdataset import COMPRESSED_TARS, WebDatasetSource, refuse_compressed

SOURCES: dict[str, type[Source]] = {
    "folder": FolderSource,
    "webdataset": WebDatasetSource,
    "parquet": ParquetSource,
    "list": UriListSource,
}
FILES_LOOKED_AT = 2000


def open_source(uri: str, kind: str = "auto", *, options: SourceOptions | None = None) -> Source:
    """The source of a corpus given as a user types it: path, URI, or pattern.

    Raises:
        ConfigError: an unknown kind.
        SourceNotFoundError: nothing is there.
        SourceError: what is there is not of the kind, or its kind is not clear.
    """
    options = options or SourceOptions()
    if kind not in ("auto", *SOURCES):
        raise ConfigError(f"--source {kind!r} is not known; expected auto, {', '.join(SOURCES)}")
    if files.has_pattern(uri):
        if kind == "auto":
            kind = "parquet" if files.path_name(uri).lower().endswith((".parquet", ".pq")) else "webdataset"
        if kind not in ("webdataset", "parquet"):
            raise SourceError(f"the pattern {uri!r} can name tars or Parquet files only, not a {kind}")
        if not files.expand_pattern(uri):
            raise SourceNotFoundError(f"no file matches the pattern {uri!r}")
        return SOURCES[kind](uri, options)
    absolute = files.absolute_uri(uri)
    found = files.kind_of(absolute)
    if found == "missing":
        raise SourceNotFoundError(f"the corpus {files.shown(absolute)} does not exist; check the path")
    if kind == "auto":
        kind = detect_directory(absolute, options) if found == "dir" else detect_file(absolute)
    if kind == "folder" and found != "dir":
        raise SourceError(f"{files.shown(absolute)} is a file; --source folder expects a directory")
    if kind == "list" and found == "dir":
        raise SourceError(f"{files.shown(absolute)} is a directory; --source list expects a file")
    return SOURCES[kind](absolute, options)


def detect_file(uri: str) -> str:
    """The kind of a single file, by its suffix; a single image is not a corpus."""
    name = compressed.plain_name(uri)
    refuse_compressed(uri)
    if name.endswith(".tar"):
        return "webdataset"
    if name.endswith((".parquet", ".pq")):
        return "parquet"
    if name.endswith(LIST_SUFFIXES):
        return "list"
    raise SourceError(
        f"cannot tell what {files.shown(uri)} is from its name; expected a folder, .tar, .parquet, "
        "or a list (.txt, .csv, .tsv, .jsonl, also .gz or .zst). Say which with --source"
    )


def detect_directory(uri: str, options: SourceOptions) -> str:
    """The kind of a directory, from the names of its first files.

    Captions and metadata beside the images (.txt, .json, img2dataset's .parquet without image
    bytes) do not count. Tars and loose images together are not guessed.
    """
    counts: Counter[str] = Counter()
    first_parquet = None
    names = ((files.readable(relative), file_uri) for relative, file_uri in walk_files(uri))
    for name, file_uri in itertools.islice(names, FILES_LOOKED_AT):
        if name.lower().endswith((".tar", *COMPRESSED_TARS)):
            counts["webdataset"] += 1
        elif name.lower().endswith((".parquet", ".pq")):
            counts["parquet"] += 1
            first_parquet = first_parquet or file_uri
        elif options.takes(name):
            counts["folder"] += 1
    if counts["webdataset"] and counts["folder"]:
        raise SourceError(
            f"{files.shown(uri)} holds both tars and loose images; say which to take with --source webdataset or folder"
        )
    if counts["webdataset"]:
        return "webdataset"
    if first_parquet is not None and not counts["folder"]:
        return "parquet"
    if first_parquet is not None and options.suffixes is None:
        with files.open_binary(first_parquet) as stream:
            if bytes_column(open_parquet(stream, files.shown(first_parquet)).schema_arrow, options) is not None:
                raise SourceError(
                    f"{files.shown(uri)} holds both loose images and Parquet files with images; "
                    "say which to take with --source folder or parquet"
                )
    return "folder"
