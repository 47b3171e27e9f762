"""The files of a model directory without torch: safe names, sizes, sha256, safetensors headers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edje_pipeline.errors import ModelError, ModelNotFoundError

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
READABLE_SUFFIXES = (".safetensors", ".json", ".md", ".txt", ".model")
CODE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".py", ".so")
MAX_JSON_BYTES = 16 << 20
MAX_HEADER_BYTES = 64 << 20

_verified: dict[tuple[str, int, int], str] = {}
"""sha256 by (path, size, mtime_ns): a process that opens one model often reads its bytes once."""


@dataclass(frozen=True)
class FileRecord:
    """What config.json says about one file."""

    sha256: str
    size_bytes: int


def check_name(name: str, *, where: str) -> None:
    """Raises ModelError unless `name` is a plain name of a kind of file that cannot run code."""
    if Path(name).suffix.lower() in CODE_SUFFIXES:
        raise ModelError(
            f"{where} names {name!r}: files of that kind can run code when they are read, so only "
            "safetensors and JSON are accepted; convert the weights with import-checkpoint"
        )
    if not SAFE_NAME.fullmatch(name) or not name.endswith(READABLE_SUFFIXES):
        raise ModelError(
            f"{where} names {name!r}; expected a plain file name inside the directory ending in "
            f"{', '.join(READABLE_SUFFIXES)}"
        )


def member(directory: Path, name: str) -> Path:
    """The real path of a file of the directory.

    A link may lead to another file of the directory, or into the `blobs` folder of a Hugging Face
    cache when the directory is one of its snapshots; nowhere else.

    Raises:
        ModelNotFoundError: no such file. ModelError: it leads out of the directory.
    """
    path = directory / name
    real = Path(os.path.realpath(path))
    roots = [Path(os.path.realpath(directory))]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise ModelError(f"{path} is a link to {real}, outside the model directory; refused")
    if not real.is_file():
        raise ModelNotFoundError(f"model directory {directory} has no file {name}; it is incomplete, fetch it again")
    return real


def read_json(path: Path) -> Any:
    """A JSON file of reasonable size."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ModelError(f"{path} has {size:,} bytes, more than the {MAX_JSON_BYTES:,} a JSON file here may have")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_sha256(path: Path, expected: FileRecord, *, name: str) -> None:
    """Raises ModelError when the bytes are not those that config.json promises; see `_verified`."""
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    found = _verified.get(key)
    if found is None:
        found = _verified[key] = sha256_of(path)
    if found != expected.sha256:
        raise ModelError(
            f"{name} is damaged: its sha256 is {found[:12]}..., config.json says {expected.sha256[:12]}...; "
            "fetch it again"
        )


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes of a safetensors file, from its header alone.

    Raises:
        ModelError: truncated, damaged, or not safetensors.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelError(
                    f"{path.name} is truncated or no safetensors file: its header would have {length:,} bytes"
                )
            header = json.loads(stream.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        shapes = {name: (str(e["dtype"]), tuple(int(n) for n in e["shape"])) for name, e in tensors.items()}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"{path.name} is not a safetensors file ({type(error).__name__}: {error}); fetch it again"
        ) from error
    if 8 + length + end != size:
        raise ModelError(f"{path.name} has {size:,} bytes, its header promises {8 + length + end:,}; fetch it again")
    return shapes


def shape_problems(
    name: str, found: dict[str, tuple[str, tuple[int, ...]]], expected: dict[str, tuple[int, ...]]
) -> list[str]:
    """Every difference between a file's header and the spec, as lines that name the file."""
    problems = []
    for kind, names in (
        ("lacks", sorted(expected.keys() - found.keys())),
        ("holds the unexpected", sorted(found.keys() - expected.keys())),
    ):
        if names:
            problems.append(f"{name} {kind} {', '.join(names)}")
    problems += [
        f"{name}: {key} is {found[key][1]}, the spec says {expected[key]}"
        for key in sorted(expected.keys() & found.keys())
        if found[key][1] != expected[key]
    ]
    problems += [
        f"{name}: {key} is {found[key][0]}, expected F32, F16 or BF16"
        for key in sorted(expected.keys() & found.keys())
        if found[key][0] not in ("F32", "F16", "BF16")
    ]
    return problems
