"""Writes a model directory: all at once under its final name, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from edje_pipeline.errors import ConfigError, ModelError
from edje_pipeline.models.model_directory import (
    CARD_FILE,
    CONFIG_FILE,
    FORMAT_NAME,
    FORMAT_VERSION,
    TOKENIZER_FILE,
    WEIGHT_FILES,
    ModelDirectory,
    open_directory,
)
from edje_pipeline.models.model_files import check_name, sha256_of
from edje_pipeline.models.spec import ModelSpec
from edje_pipeline.models.spec_json import spec_to_dict
from edje_pipeline.storage.location import Location, fsync_dir, storage_errors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edje_pipeline.models.tokenizer import Tokenizer

READABLE = 0o644
Weights: TypeAlias = "nn.Module | Mapping[str, Tensor] | Path"
"""A module, its state dict, or a safetensors file to copy as it is."""


def save_model(
    directory: str | Path,
    spec: ModelSpec,
    *,
    backbone: Weights,
    adapter: Weights,
    joint_encoder: Weights,
    tokenizer: Tokenizer | str | Path,
    text_tower: Weights | None = None,
    card: str = "",
    extra: Mapping[str, bytes | Path | Mapping[str, Tensor]] | None = None,
    compact: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> ModelDirectory:
    """Writes a complete model directory and opens it.

    Everything goes to a temporary sibling that is checked like any model and then renamed.

    Args:
        directory: must not exist, unless `overwrite`.
        spec: its sha256 fields are filled in here.
        backbone: and the other parts, see `Weights`.
        tokenizer: or the text of a tokenizer.json, or its path.
        card: the text of MODEL_CARD.md; a short one is written when empty.
        extra: further files by name: bytes, a file to copy, or tensors.
        compact: part -> `float32`, `float16` or `int8`, how its weights are stored (`compact_weights`); a part not
            named is written as it is given.
        overwrite: an existing model is replaced.

    Raises:
        ModelError: the target exists, or what was given does not fit together or into the storage asked for.
        ConfigError: `compact` names a part or a storage that there is not.
        StorageError: the target cannot be written.
    """
    target = Path(os.path.abspath(directory))
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists already; choose another directory or allow overwriting")
    parts = {"backbone": backbone, "adapter": adapter, "joint_encoder": joint_encoder, "text_tower": text_tower}
    content: dict[str, Any] = {WEIGHT_FILES[part]: weights for part, weights in parts.items() if weights is not None}
    for part, storage in (compact or {}).items():
        if parts.get(part) is None:
            raise ConfigError(f"there is no {part} to store as {storage}; give one of {', '.join(parts)}")
        content[WEIGHT_FILES[part]] = _compacted(content[WEIGHT_FILES[part]], storage)
    content[TOKENIZER_FILE] = tokenizer if isinstance(tokenizer, Path) else _tokenizer_bytes(tokenizer)
    content[CARD_FILE] = (card or _default_card(spec)).encode()
    content |= extra or {}
    temporary = target.parent / f".tmp-{uuid.uuid4().hex}-{target.name[-80:]}"
    try:
        with storage_errors(Location.parse(target)):
            temporary.mkdir(parents=True)
            for name, value in content.items():
                check_name(name, where="save_model")
                _write(temporary / name, value)
            _write_config(temporary, spec, sorted(content))
            fsync_dir(temporary)
        open_directory(temporary)
        with storage_errors(Location.parse(target)):
            _swap_in(temporary, target, overwrite=overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_directory(target)


def _write_config(directory: Path, spec: ModelSpec, names: list[str]) -> None:
    sums = {name: sha256_of(directory / name) for name in names}
    filled: dict[str, Any] = {"tokenizer_sha256": sums[TOKENIZER_FILE]}
    for part, name in WEIGHT_FILES.items():
        part_spec = getattr(spec, part)
        if name in sums and part_spec is not None:
            filled[part] = replace(part_spec, weights_sha256=sums[name])
    config = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "spec": spec_to_dict(replace(spec, **filled)),
        "files": {name: {"sha256": sums[name], "size_bytes": (directory / name).stat().st_size} for name in names},
    }
    _write(directory / CONFIG_FILE, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _write(path: Path, value: Any) -> None:
    from edje_pipeline.models.tensor_files import write_tensors

    if isinstance(value, bytes):
        path.write_bytes(value)
    elif isinstance(value, Path):
        shutil.copyfile(value, path)
    else:
        write_tensors(path, value.state_dict() if hasattr(value, "state_dict") else value)
    # safetensors writes for its owner alone; a model directory is as public as any other file.
    path.chmod(READABLE)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _compacted(weights: Any, storage: str) -> dict[str, Tensor]:
    from edje_pipeline.models.compact_weights import compact
    from edje_pipeline.models.tensor_files import read_tensors

    if isinstance(weights, Path):
        return compact(read_tensors(weights), storage)
    return compact(weights.state_dict() if hasattr(weights, "state_dict") else weights, storage)


def _swap_in(temporary: Path, target: Path, *, overwrite: bool) -> None:
    """Renames into place; an existing model moves aside first and is removed last.

    Without `overwrite` the rename itself fails when somebody else has written there meanwhile.
    """
    old = None
    if overwrite and target.exists():
        old = target.parent / f".old-{uuid.uuid4().hex}-{target.name[-80:]}"
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    fsync_dir(target.parent)
    if old is not None:
        shutil.rmtree(old)


def _tokenizer_bytes(tokenizer: Tokenizer | str) -> bytes:
    return (tokenizer if isinstance(tokenizer, str) else tokenizer.to_json()).encode()


def _default_card(spec: ModelSpec) -> str:
    return (
        f"# {spec.name}\n\n"
        f"- backbone: {spec.backbone.source}, {spec.backbone.num_vision_tokens} tokens of {spec.backbone.width}\n"
        f"- adapter: {spec.adapter.kind}, {spec.adapter.num_compressed_tokens} tokens of {spec.adapter.output_dim}\n"
        f"- joint encoder: BERT, {spec.joint_encoder.num_layers} layers of {spec.joint_encoder.width}\n\n"
        "Nothing else is known about these weights: no training data, licence or evaluation was recorded.\n"
    )
