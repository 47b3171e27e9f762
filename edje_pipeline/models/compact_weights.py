"""Weights in fewer bytes: matrices as int8 rows with a float16 scale a row, or everything as float16.

In the safetensors file a matrix NAME (R, C) becomes NAME int8 (R, C) and `NAME@row_scale` float16 (R, 1); its value is
the product of the two. The scale is a row's largest absolute value over 127, rounded up to float16, so no value is off
by more than half a scale. A product of 7 and 11 bits is exact in float32, so every machine reads the same tensors.
"@" cannot be part of a module's name in Python source, so the suffix never meets a tensor of that name, and a
program that does not know it refuses the file as one with unknown tensors instead of reading it wrongly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from edje_pipeline.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

Storage: TypeAlias = Literal["float32", "float16", "int8"]
STORAGES: tuple[str, ...] = get_args(Storage)
SCALE_SUFFIX = "@row_scale"
INT8_MAX = 127
SMALLEST_SCALE = 2.0**-24
"""The smallest positive float16."""
KEPT_MODULES = frozenset({"position_embeddings", "positional_embedding", "type_embeddings", "classifier"})
"""Small tables that every token passes, and the last map: float16 where the other matrices are int8."""

Header: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]
"""Names, safetensors dtypes and shapes, as `model_files.read_header` gives them."""


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is stored as int8 rows: a floating-point matrix that is none of `KEPT_MODULES`' own."""
    return tensor.ndim == 2 and tensor.is_floating_point() and KEPT_MODULES.isdisjoint(name.split("."))


def compact(tensors: Mapping[str, Tensor], storage: str) -> dict[str, Tensor]:
    """The tensors as a file of this storage holds them; what is not floating-point stays as it is.

    Raises:
        ConfigError: no such storage.
        ModelError: a value that float16 cannot hold, or that is not finite.
    """
    import torch

    if storage not in STORAGES:
        raise ConfigError(f"there is no storage {storage!r} for weights; choose one of {', '.join(STORAGES)}")
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE_SUFFIX):
            raise ModelError(f"the tensor name {name!r} ends in {SCALE_SUFFIX}, which marks scales of compact weights")
        if not tensor.is_floating_point():
            stored[name] = tensor
        elif storage == "float32":
            stored[name] = tensor.float()
        elif storage == "int8" and is_matrix(name, tensor):
            stored[name], stored[name + SCALE_SUFFIX] = quantize_rows(name, tensor)
        else:
            half = tensor.to(torch.float16)
            if not bool(torch.isfinite(half).all()):
                raise ModelError(
                    f"{name} has values up to {float(tensor.abs().max()):g}, which float16 cannot hold; "
                    "store this part as float32"
                )
            stored[name] = half
    return stored


def quantize_rows(name: str, matrix_rc: Tensor) -> tuple[Tensor, Tensor]:
    """(R, C) -> int8 (R, C) and float16 scales (R, 1); matrix = int8 x scale to half a scale.

    Raises:
        ModelError: a value is not finite, or a row too large for a float16 scale.
    """
    import torch

    matrix_rc = matrix_rc.detach().float()
    largest_r1 = matrix_rc.abs().amax(dim=1, keepdim=True)
    # The smallest float16 stands in for scales below it: a row of tiny values keeps its bound.
    exact_r1 = torch.where(largest_r1 > 0, (largest_r1 / INT8_MAX).clamp(min=SMALLEST_SCALE), 0.0)
    scale_r1 = exact_r1.to(torch.float16)
    # Rounded up, so that the largest value of a row still fits into 127 steps.
    is_short = scale_r1.float() < exact_r1
    scale_r1 = torch.where(is_short, torch.nextafter(scale_r1, torch.full_like(scale_r1, torch.inf)), scale_r1)
    if not bool(torch.isfinite(scale_r1).all()):
        raise ModelError(f"{name} has rows that are not finite or too large for int8; store this part as float32")
    divisor_r1 = torch.where(scale_r1 == 0, torch.ones_like(scale_r1), scale_r1).float()
    return (matrix_rc / divisor_r1).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale_r1


def restore(tensors: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """The tensors under their own names, int8 rows as float32; a file without scales comes back as it is.

    Raises:
        ModelError: scales that do not fit their matrix, or are damaged; lists them all.
    """
    import torch

    scales = {name.removesuffix(SCALE_SUFFIX) for name in tensors if name.endswith(SCALE_SUFFIX)}
    if not scales:
        return dict(tensors)
    dtypes = {torch.int8: "I8", torch.float16: "F16"}
    header = {name: (dtypes.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in tensors.items()}
    problems = scale_problems(header)
    problems += [
        f"{name}{SCALE_SUFFIX} has values that are negative or not finite"
        for name in sorted(scales)
        if not bool(((scale := tensors[name + SCALE_SUFFIX]) >= 0).all() and torch.isfinite(scale).all())
    ]
    if problems:
        raise ModelError(f"{where} has damaged compact weights: {'; '.join(problems)}; fetch or make it again")
    return {
        name: tensor.float() * tensors[name + SCALE_SUFFIX].float() if name in scales else tensor
        for name, tensor in tensors.items()
        if not name.endswith(SCALE_SUFFIX)
    }


def scale_problems(header: Header) -> list[str]:
    """Scales without an int8 matrix of as many rows, as lines; from names, dtypes and shapes alone."""
    problems = []
    for scale in _scales(header):
        name = scale.removesuffix(SCALE_SUFFIX)
        matrix = header.get(name)
        if matrix is None:
            problems.append(f"{scale} has no matrix {name}")
        elif matrix[0] != "I8" or len(matrix[1]) != 2:
            problems.append(f"{name} is {matrix[0]} {matrix[1]}, expected an I8 matrix beside {scale}")
        elif header[scale] != ("F16", (matrix[1][0], 1)):
            problems.append(f"{scale} is {header[scale][0]} {header[scale][1]}, expected F16 {(matrix[1][0], 1)}")
    return problems


def plain_header(header: Header) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The header as a reader of the restored tensors sees it: scales gone, their matrices F32."""
    scaled = {scale.removesuffix(SCALE_SUFFIX) for scale in _scales(header)}
    return {
        name: ("F32", shape) if name in scaled else (dtype, shape)
        for name, (dtype, shape) in header.items()
        if not name.endswith(SCALE_SUFFIX)
    }


def relative_errors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Of each floating-point tensor: the norm of the change over the norm of the tensor."""
    errors = {}
    for name, tensor in before.items():
        if tensor.is_floating_point():
            norm = float(tensor.float().norm())
            errors[name] = float((after[name].float() - tensor.float()).norm()) / norm if norm else 0.0
    return errors


def _scales(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(SCALE_SUFFIX))
