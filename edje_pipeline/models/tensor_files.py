"""Reads tensors from weight files that cannot run code, and puts them into modules with one complete complaint.

safetensors files and `torch.save` files (read with `weights_only=True`); nothing else.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edje_pipeline.errors import ModelError, ModelNotFoundError, ShapeMismatchError
from edje_pipeline.models.compact_weights import restore

MAX_LISTED_KEYS = 20
"""Of each kind of problem in one message: a wrong file differs in hundreds of keys and ten tell the story."""

DAMAGED = (RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError, struct.error)
"""What the restricted unpickler raises for bytes that are no pickle, besides UnpicklingError."""

SAFETENSORS_SUFFIX = ".safetensors"


def sha256_of_file(path: Path) -> str:
    """sha256 (hex) of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over names, dtypes, shapes and bytes, independent of order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_object(path: Path) -> Any:
    """What the file holds: a flat dict of tensors (safetensors), or whatever a `torch.save` file holds.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelError: the file is damaged, of another format, or would need code to run.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"no weights file at {path}")
    if path.suffix == SAFETENSORS_SUFFIX:
        try:
            return load_file(path)
        except (safetensors.SafetensorError, ValueError) as error:
            raise ModelError(f"{path} is not a readable safetensors file ({error}); fetch it again") from error
    try:
        with warnings.catch_warnings():
            # A file that is no state dict may use a pickle protocol that torch warns about before it fails.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than tensors and plain values, which this program does not read because it could "
            f"run code; save its state dict alone, or convert it to safetensors ({str(error).splitlines()[0]})"
        ) from error
    except DAMAGED as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(
            f"{path} is not a torch.save file ({reason}); expected .safetensors, .pt, .pth or .bin"
        ) from error


def read_tensors(path: Path, *, entries: Iterable[str] = ("model", "state_dict")) -> dict[str, Tensor]:
    """The state dict in a weights file, also when it stands under one of `entries`.

    Compact weights come back as the float32 tensors they stand for (`compact_weights`).

    Raises:
        ModelError: as `read_object`, or the file holds no tensors, or compact weights that are damaged.
    """
    value = read_object(path)
    for entry in entries:
        if isinstance(value, dict) and isinstance(value.get(entry), dict):
            value = value[entry]
            break
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, expected a dict of tensors")
    tensors = {str(name): tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise ModelError(f"{path} holds no tensors; expected a state dict, alone or under {', '.join(entries)}")
    return restore(tensors, where=str(path))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes safetensors; views are made contiguous and independent, as the format asks."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def key_problems(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor] | Mapping[str, torch.Size], *, ignore: frozenset[str]
) -> list[str]:
    """Every difference of names and shapes as lines; empty when the tensors fit."""

    def listed(kind: str, names: list[str]) -> list[str]:
        if not names:
            return []
        more = f" and {len(names) - MAX_LISTED_KEYS} more" if len(names) > MAX_LISTED_KEYS else ""
        return [f"{len(names)} {kind}: {', '.join(names[:MAX_LISTED_KEYS])}{more}"]

    shapes = {name: tuple(value.shape if isinstance(value, Tensor) else value) for name, value in expected.items()}
    misshapen = [
        f"{name} is {tuple(found[name].shape)}, expected {shapes[name]}"
        for name in sorted(shapes.keys() & found.keys())
        if tuple(found[name].shape) != shapes[name]
    ]
    return [
        *listed("missing", sorted(shapes.keys() - found.keys())),
        *listed("unknown", sorted(found.keys() - shapes.keys() - ignore)),
        *listed("of another shape", misshapen),
    ]


def load_exactly(
    module: nn.Module, tensors: Mapping[str, Tensor], *, where: str, ignore: frozenset[str] = frozenset()
) -> None:
    """Loads a state dict whose names and shapes must be the module's own, converted to the module's dtype.

    Raises:
        ShapeMismatchError: some names or shapes differ; lists them all.
    """
    expected = module.state_dict()
    problems = key_problems(tensors, expected, ignore=ignore)
    if problems:
        raise ShapeMismatchError(f"{where} does not fit {type(module).__name__}: " + "; ".join(problems))
    module.load_state_dict({name: tensors[name] for name in expected}, strict=True)
