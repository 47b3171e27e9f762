"""An existing model directory in fewer bytes: chosen parts rewritten as float16 or int8, everything else copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.compact_weights import STORAGES, relative_errors
from edje_pipeline.models.model_directory import CARD_FILE, TOKENIZER_FILE, WEIGHT_FILES, ModelDirectory
from edje_pipeline.models.model_writer import save_model
from edje_pipeline.progress import format_bytes


@dataclass(frozen=True)
class PartChange:
    """One part before and after."""

    part: str
    storage: str
    """`as it was` where nothing was asked for."""
    size_bytes_before: int
    size_bytes: int
    largest_error: float
    """Of a tensor: norm of the change over norm of the tensor."""
    largest_error_in: str


@dataclass(frozen=True)
class CompactSummary:
    """What `compact-model` wrote."""

    path: Path
    parts: tuple[PartChange, ...]
    size_bytes_before: int
    size_bytes: int
    """Of the whole directory."""
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}

    def to_text(self) -> str:
        lines = [f"{'part':13} {'stored as':10} {'before':>9} {'after':>9}  largest relative error"]
        for part in self.parts:
            error = f"{part.largest_error:.1e} in {part.largest_error_in}" if part.largest_error else "0"
            before, after = format_bytes(part.size_bytes_before), format_bytes(part.size_bytes)
            lines.append(f"{part.part:13} {part.storage:10} {before:>9} {after:>9}  {error}"[:80])
        before, after = format_bytes(self.size_bytes_before), format_bytes(self.size_bytes)
        return "\n".join([*lines, f"{'directory':24} {before:>9} {after:>9}", f"wrote {self.path}"])


def compact_model(
    model: ModelDirectory, out: str | Path, storages: Mapping[str, str], *, card: str | None = None,
    overwrite: bool = False,
) -> CompactSummary:  # fmt: skip
    """Writes a smaller copy of a model directory.

    Args:
        model: the model to copy.
        out: the new directory.
        storages: part -> `float32`, `float16` or `int8`; parts not named are copied as they are.
        card: another text for MODEL_CARD.md.
        overwrite: `out` may exist.

    Raises:
        ConfigError: a part that the model does not have, or no such storage. ModelError: see `save_model`, `compact`.
    """
    present = {part: name for part, name in WEIGHT_FILES.items() if name in model.files}
    if unknown := sorted(storages.keys() - present.keys()):
        raise ConfigError(f"the model {model.path} has no {', '.join(unknown)}; it has {', '.join(present)}")
    if wrong := sorted(set(storages.values()) - set(STORAGES)):
        raise ConfigError(f"there is no storage {', '.join(wrong)} for weights; choose among {', '.join(STORAGES)}")
    other = model.files.keys() - set(present.values()) - {CARD_FILE, TOKENIZER_FILE}
    written = save_model(
        out,
        model.spec,
        **{part: model.file(name) for part, name in present.items()},
        tokenizer=model.file(TOKENIZER_FILE),
        card=card or (model.file(CARD_FILE).read_text(encoding="utf-8") if CARD_FILE in model.files else ""),
        extra={name: model.file(name) for name in other},
        compact=storages,
        overwrite=overwrite,
    )
    changes = []
    for part, name in present.items():
        worst, error = "", 0.0
        if part in storages:
            errors = relative_errors(model.load_tensors(name), written.load_tensors(name))
            worst, error = max(errors.items(), key=lambda pair: pair[1], default=("", 0.0))
        before, after = model.files[name].size_bytes, written.files[name].size_bytes
        changes.append(PartChange(part, storages.get(part, "as it was"), before, after, error, worst))
    return CompactSummary(written.path, tuple(changes), model.size_bytes, written.size_bytes)
