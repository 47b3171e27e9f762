"""The head of a snapshot: small JSON that names everything else, and the one file that is ever replaced."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from edje_pipeline.errors import CorruptionError, FormatVersionError, IndexNotFoundError
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.parquet_io import reading
from edje_pipeline.storage.schema import FORMAT_VERSION

MANIFEST_NAME: Final = "manifest.json"
FORMAT_NAME: Final = "edje-index"
MAX_JSON_BYTES: Final = 16 << 20
FINGERPRINT_PARTS: Final = ("corpus", "backbone", "preprocess", "adapter", "codec")
FILE_KEYS: Final = ("shards", "rejects", "ids", "tombstones")
MAX_ROWS: Final = 10**12


@dataclass(frozen=True)
class FileRef:
    """A file of the index with what a reader can check before it parses it."""

    path: str
    num_rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class TokenSpec:
    """What one image's payload is."""

    num_tokens: int
    """M"""
    dim: int
    """E"""
    dtype: str
    """Of the decoded values: `float32` for every codec of version 1."""
    payload_bytes: int
    """P, bytes of one value of the `tokens` column."""
    codec: str
    """The codec's name: `float16`, `pq16`, ..."""


@dataclass(frozen=True)
class HeadFields:
    """What a run knows of itself and the index cannot know."""

    fingerprints: dict[str, str]
    """sha256 by part: corpus, backbone, preprocess, adapter, codec."""
    tokens: TokenSpec
    embedding_dim: int
    codec: dict[str, Any]
    """`Codec.to_dict()`."""
    model: dict[str, Any] = field(default_factory=dict)
    """The ModelSpec as JSON: names and revisions of backbone, preprocess, adapter."""
    source: dict[str, Any] = field(default_factory=dict)
    """What was listed, and how."""
    config: dict[str, Any] = field(default_factory=dict)
    """The run's options."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds by stage."""
    code_version: str = ""


@dataclass(frozen=True)
class Counts:
    """Images and files of a snapshot. Always: listed = accepted + rejected."""

    listed: int
    accepted: int
    """Live rows."""
    rejected: int
    rejects_by_reason: dict[str, int]
    shards: int
    tombstones: int
    shard_bytes: int


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json` and of each snapshot's `head.json`."""

    snapshot: str
    parent: str | None
    run_id: str
    action: str
    """What made it: `extract`, `delete`, ..."""
    created_at: str
    """UTC, ISO 8601."""
    head: HeadFields
    counts: Counts
    run_counts: dict[str, int]
    """Of the run alone: listed, accepted, rejected."""
    files: dict[str, FileRef]
    """By `FILE_KEYS`."""

    @property
    def fingerprints(self) -> dict[str, str]:
        return self.head.fingerprints

    @property
    def tokens(self) -> TokenSpec:
        return self.head.tokens

    @property
    def codec(self) -> dict[str, Any]:
        return self.head.codec

    @property
    def embedding_dim(self) -> int:
        return self.head.embedding_dim

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `docs/format.md`."""
        head = asdict(self.head)
        return {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "snapshot": self.snapshot,
            "parent": self.parent,
            "run_id": self.run_id,
            "action": self.action,
            "created_at": self.created_at,
            "code_version": head.pop("code_version"),
            **head,
            "counts": asdict(self.counts),
            "run_counts": self.run_counts,
            "files": {key: asdict(ref) for key, ref in self.files.items()},
        }

    def to_bytes(self) -> bytes:
        return (json.dumps(self.to_dict(), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], where: str) -> Manifest:
        """Checks every key and reports all problems at once.

        Raises:
            FormatVersionError: written by another version of the format.
            CorruptionError: a key is missing or has a value it cannot have.
        """
        _check_version(value, where)
        problems = _problems(value)
        if problems:
            raise CorruptionError(f"{where} is damaged: " + "; ".join(problems))
        return cls(
            snapshot=value["snapshot"],
            parent=value["parent"],
            run_id=value["run_id"],
            action=value["action"],
            created_at=value["created_at"],
            head=HeadFields(
                fingerprints=value["fingerprints"],
                tokens=TokenSpec(**{key: value["tokens"][key] for key in TokenSpec.__dataclass_fields__}),
                embedding_dim=value["embedding_dim"],
                codec=value["codec"],
                model=value["model"],
                source=value["source"],
                config=value["config"],
                timings=value["timings"],
                code_version=value["code_version"],
            ),
            counts=Counts(**{key: value["counts"][key] for key in Counts.__dataclass_fields__}),
            run_counts=value["run_counts"],
            files={
                key: FileRef(**{name: value["files"][key][name] for name in FileRef.__dataclass_fields__})
                for key in FILE_KEYS
            },
        )


def _check_version(value: Mapping[str, Any], where: str) -> None:
    version = value.get("format_version")
    if value.get("format") != FORMAT_NAME or not isinstance(version, int):
        raise CorruptionError(
            f"{where} is not the manifest of an index: expected format {FORMAT_NAME!r} and a format_version, "
            f"found {str(value.get('format'))[:40]!r} and {str(version)[:40]!r}"
        )
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{where} has format version {version}, this program reads version {FORMAT_VERSION}; "
            "install a newer edje-pipeline to read it"
        )


def _is_count(value: object, most: int = MAX_ROWS) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def is_safe_path(path: object) -> bool:
    """True for a relative POSIX path that stays below where it starts."""
    return (
        isinstance(path, str)
        and 0 < len(path) <= 1024
        and not path.startswith("/")
        and "\\" not in path
        and "\0" not in path
        and ":" not in path
        and posixpath.normpath(path) == path
        and not path.startswith("..")
    )


_STRINGS = ("snapshot", "run_id", "action", "created_at", "code_version")
_OBJECTS = ("fingerprints", "tokens", "codec", "model", "source", "config", "timings", "counts", "run_counts", "files")


def _problems(value: Mapping[str, Any]) -> list[str]:
    found = [f"{key} is not a string" for key in _STRINGS if not isinstance(value.get(key), str)]
    found += [f"{key} is not an object" for key in _OBJECTS if not isinstance(value.get(key), dict)]
    if "parent" not in value or not isinstance(value["parent"], str | None):
        found.append("parent is neither a string nor null")
    if not _is_count(value.get("embedding_dim"), 1 << 20):
        found.append("embedding_dim is not a count")
    if found:
        return found
    for key in ("snapshot", "parent"):
        if value[key] is not None and (not is_safe_path(value[key]) or "/" in value[key]):
            found.append(f"{key} {value[key][:80]!r} is not a name")
    found += [
        f"fingerprints.{part} is not a string"
        for part in FINGERPRINT_PARTS
        if not isinstance(value["fingerprints"].get(part), str)
    ]
    tokens, counts = value["tokens"], value["counts"]
    found += [
        f"tokens.{key} is not a positive number"
        for key in ("num_tokens", "dim", "payload_bytes")
        if not _is_count(tokens.get(key), 1 << 30) or tokens[key] == 0
    ]
    found += [f"tokens.{key} is not a string" for key in ("dtype", "codec") if not isinstance(tokens.get(key), str)]
    found += [
        f"counts.{key} is not a count"
        for key in ("listed", "accepted", "rejected", "shards", "tombstones")
        if not _is_count(counts.get(key))
    ]
    if not _is_count(counts.get("shard_bytes"), 10**18):
        found.append("counts.shard_bytes is not a count")
    reasons = counts.get("rejects_by_reason")
    if not isinstance(reasons, dict) or not all(_is_count(count) for count in reasons.values()):
        found.append("counts.rejects_by_reason is not an object of counts")
    if not all(_is_count(count) for count in value["run_counts"].values()):
        found.append("run_counts is not an object of counts")
    for key in FILE_KEYS:
        found += _file_problems(key, value["files"].get(key))
    return found


def _file_problems(key: str, ref: object) -> list[str]:
    if not isinstance(ref, dict):
        return [f"files.{key} is missing"]
    found = []
    if not is_safe_path(ref.get("path")):
        found.append(f"files.{key}.path {str(ref.get('path'))[:80]!r} would leave the index")
    if not _is_count(ref.get("num_rows")) or not _is_count(ref.get("size_bytes"), 10**15):
        found.append(f"files.{key} has no num_rows or size_bytes")
    if not isinstance(ref.get("sha256"), str):
        found.append(f"files.{key} has no sha256")
    return found


def read_json(location: Location, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object of bounded size.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptionError: it is too large, not JSON, nested without end, or not an object.
    """
    with reading(location, absent_is_damage=False), location.open_input() as stream:
        size = stream.size()
        if size > max_bytes:
            raise CorruptionError(f"{location} has {size:,} bytes, more than the {max_bytes:,} a head may have")
        data = stream.read()
    return parse_json(data, str(location))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Bytes as a JSON object; see `read_json`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{where} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise CorruptionError(f"{where} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_manifest(index: Location) -> Manifest:
    """The current snapshot's head.

    Raises:
        IndexNotFoundError: nothing is published there; the message says what is.
        FormatVersionError, CorruptionError: see `Manifest.from_dict`.
    """
    manifest = find_manifest(index)
    if manifest is None:
        raise IndexNotFoundError(_what_is_there(index))
    return manifest


def find_manifest(index: Location) -> Manifest | None:
    """As `read_manifest`, None when nothing is published yet."""
    location = index.child(MANIFEST_NAME)
    try:
        value = read_json(location)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Manifest.from_dict(value, str(location))


def read_head(index: Location, snapshot: str) -> Manifest:
    """The head of a named snapshot.

    Raises:
        IndexNotFoundError: there is no such snapshot; the message lists those there are.
    """
    if not is_safe_path(snapshot) or "/" in snapshot:
        raise IndexNotFoundError(f"{snapshot!r} is not the name of a snapshot")
    location = index.child("snapshots", snapshot, "head.json")
    try:
        value = read_json(location)
    except FileNotFoundError as error:
        there = ", ".join(index.child("snapshots").list_dirs()) or "none"
        raise IndexNotFoundError(f"{index} has no snapshot {snapshot!r}; there are: {there}") from error
    return Manifest.from_dict(value, str(location))


def _what_is_there(index: Location) -> str:
    if not index.is_local or index.exists():
        runs = index.child("staging").list_dirs()
        if runs:
            return (
                f"{index} holds an unfinished run ({runs[-1]}) and no published index yet; "
                "run the same `edje-pipeline extract` command again to finish it"
            )
        if index.is_local and not index.is_dir():
            return f"{index} is a file, expected the directory of an index"
        names = [entry.path for entry in index.list_files(recursive=False)] + index.list_dirs()
        if names:
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            return f"{index} is not an index: no manifest.json there, but {shown}"
        return f"{index} is empty: no manifest.json there; `edje-pipeline extract` makes an index"
    return f"{index} does not exist; `edje-pipeline extract CORPUS --index {index}` makes an index there"
