"""Checkpoints of a training run: one file each, visible all at once or not at all.

A step's batch, negatives, masks and dropout follow from (seed, step), so the step number is all the
random state there is; weights and the optimizer's moments are the rest.
"""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edje_pipeline.errors import CorruptionError, ResumeMismatchError
from edje_pipeline.storage.location import Location

_NAME = re.compile(r"step-(\d{8})\.pt")
DIGEST_BYTES = 32


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run below its output directory."""

    directory: Path
    keep: int = 2

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.pt"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        names = (_NAME.fullmatch(path.name) for path in self.directory.glob("step-*.pt"))
        return sorted(int(match.group(1)) for match in names if match)

    def save(self, step: int, state: dict[str, Any], fingerprints: dict[str, str]) -> Path:
        """Writes the state after `step` finished steps, then removes all but the newest `keep`."""
        buffer = io.BytesIO()
        torch.save({"step": step, "fingerprints": fingerprints, "state": state}, buffer)
        content = buffer.getvalue()
        path = self.path(step)
        # The digest in front finds a file that a full disk or a bad one has cut.
        Location.parse(path).write_bytes(hashlib.sha256(content).digest() + content)
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink(missing_ok=True)
        return path

    def load_latest(self, fingerprints: dict[str, str]) -> tuple[int, dict[str, Any]] | None:
        """The newest readable checkpoint as (step, state), or None. A damaged newest one is passed over.

        Raises:
            ResumeMismatchError: it belongs to another recipe, corpus or model; names what differs.
            CorruptionError: there are checkpoints and none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            content = self.path(step).read_bytes()
            digest, content = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
            if hashlib.sha256(content).digest() != digest:
                continue
            value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            found = value["fingerprints"]
            differing = sorted(
                key for key in fingerprints.keys() | found.keys() if fingerprints.get(key) != found.get(key)
            )
            if differing:
                raise ResumeMismatchError(
                    f"the unfinished training in {self.directory.parent} was started with another "
                    f"{', '.join(differing)}; use the same again, another --out, or --restart to discard it"
                )
            return step, value["state"]
        if steps:
            raise CorruptionError(
                f"all {len(steps)} checkpoints in {self.directory} are damaged; start again with --restart"
            )
        return None
