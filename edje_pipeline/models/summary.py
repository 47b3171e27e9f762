"""What the model commands print: the parts of a model directory, their sizes and fingerprints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edje_pipeline.models.model_directory import ModelDirectory
from edje_pipeline.models.spec_json import spec_to_dict


@dataclass(frozen=True)
class ModelSummary:
    """A model directory in a few lines."""

    model: ModelDirectory
    headline: str = ""
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.model.path),
            "fingerprints": dict(self.model.fingerprints),
            "files": {name: record.size_bytes for name, record in sorted(self.model.files.items())},
            "spec": spec_to_dict(self.model.spec),
        }

    def to_text(self) -> str:
        spec, tower = self.model.spec, self.model.spec.text_tower
        preprocess = spec.preprocess
        height, width = preprocess.image_size
        backbone, adapter, joint = spec.backbone, spec.adapter, spec.joint_encoder
        lines = [
            *([self.headline] if self.headline else []),
            f"model          {spec.name}",
            f"path           {self.model.path}",
            f"backbone       {backbone.source}",
            f"vision tokens  {backbone.num_vision_tokens} x {backbone.width}, {backbone.num_heads} heads",
            f"embedding      {backbone.embedding_dim or 'none'}",
            f"images         {height} x {width}, {preprocess.resize_mode}, {preprocess.interpolation}",
            f"adapter        {adapter.kind}, {adapter.num_compressed_tokens} x {adapter.output_dim}",
            f"joint encoder  {joint.num_layers} layers x {joint.width}, {joint.vocab_size:,} ids",
            f"text tower     {f'{tower.kind}, {tower.embedding_dim}' if tower else 'none'}",
            "files",
            *(f"  {record.size_bytes:>15,} B  {name}" for name, record in sorted(self.model.files.items())),
            "fingerprints",
            *(f"  {part:<13}  {value[:16]}" for part, value in self.model.fingerprints.items()),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class ExportSummary:
    """What `export-checkpoint` wrote."""

    path: Path
    num_tensors: int
    size_bytes: int
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "num_tensors": self.num_tensors, "size_bytes": self.size_bytes}

    def to_text(self) -> str:
        return f"wrote {self.num_tensors:,} tensors, {self.size_bytes:,} bytes\n  {self.path}"
