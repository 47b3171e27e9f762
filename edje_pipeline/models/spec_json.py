"""`ModelSpec` to and from the JSON of a model directory's config.json; every problem is reported at once."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from edje_pipeline.errors import ModelError
from edje_pipeline.models.spec import (
    AdapterSpec,
    BackboneSpec,
    JointEncoderSpec,
    ModelSpec,
    PreprocessSpec,
    TextTowerSpec,
)

PARTS: dict[str, type] = {
    "backbone": BackboneSpec,
    "preprocess": PreprocessSpec,
    "adapter": AdapterSpec,
    "joint_encoder": JointEncoderSpec,
    "text_tower": TextTowerSpec,
}
NON_NEGATIVE = frozenset({"embedding_dim", "fill", "num_heads", "num_key_positions"})


def spec_to_dict(spec: ModelSpec) -> dict[str, Any]:
    """JSON-able; `spec_from_dict` is its inverse."""
    return asdict(spec)


def spec_from_dict(value: Any, *, where: str) -> ModelSpec:
    """Reads what `spec_to_dict` wrote.

    Raises:
        ModelError: unknown or missing keys, or values of another type; lists them all.
    """
    problems: list[str] = []
    if not isinstance(value, Mapping):
        raise ModelError(f"{where}: the model spec is a {type(value).__name__}, expected an object")
    parts: dict[str, Any] = {}
    for name, kind in PARTS.items():
        part = value.get(name)
        if part is None and name == "text_tower":
            parts[name] = None
        elif not isinstance(part, Mapping):
            problems.append(f"{name} is {'missing' if part is None else type(part).__name__}, expected an object")
        else:
            parts[name] = _read(kind, part, name, problems)
    plain = {key: value.get(key, "") for key in ("name", "tokenizer_sha256")}
    problems += [f"{key} is not a string" for key, text in plain.items() if not isinstance(text, str)]
    unknown = sorted(set(value) - set(PARTS) - set(plain))
    if unknown:
        problems.append(f"unknown keys {', '.join(unknown)}")
    if problems:
        raise ModelError(f"{where} does not describe a model: " + "; ".join(problems))
    return ModelSpec(**plain, **parts)


def _read(kind: type, value: Mapping[str, Any], part: str, problems: list[str]) -> Any:
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}
    problems += [f"{part}.{key} is unknown" for key in sorted(set(value) - set(known))]
    arguments: dict[str, Any] = {}
    before = len(problems)
    for name, field in known.items():
        if name in value:
            arguments[name] = _convert(value[name], hints[name], f"{part}.{name}", problems)
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"{part}.{name} is missing")
    return kind(**arguments) if len(problems) == before else None


def _convert(value: Any, hint: Any, name: str, problems: list[str]) -> Any:
    origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in choices:
            problems.append(f"{name} is {value!r}, expected one of {', '.join(map(str, choices))}")
        return value
    if origin in (Union, types.UnionType):
        inner = next(choice for choice in choices if choice is not type(None))
        return None if value is None else _convert(value, inner, name, problems)
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(choices):
            problems.append(f"{name} is {value!r}, expected {len(choices)} numbers")
            return value
        return tuple(_convert(v, choice, name, problems) for v, choice in zip(value, choices, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            problems.append(f"{name} is {value!r}, expected an object")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        problems.append(f"{name} is {value!r}, expected {hint.__name__}")
    elif hint is int:
        leaf = name.rpartition(".")[2]
        if value < 0 or (value == 0 and leaf not in NON_NEGATIVE):
            problems.append(f"{name} is {value}, expected a positive number")
    return value
