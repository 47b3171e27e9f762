"""What is known of one pass over a plan's units: the plan, and a receipt for each unit that is done.

plan/              see `score_plan`
plan_info.json     written when the plan is whole
parts/*.parquet    scored units
receipts/*.json    one small file a unit, written after its part is durable
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from edje_pipeline.errors import CorruptionError
from edje_pipeline.storage.faults import crash_point
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.manifest import is_safe_path, read_json
from edje_pipeline.storage.parquet_io import hash_file

MAX_RECEIPT_BYTES = 1 << 20


@dataclass(frozen=True)
class ScoreReceipt:
    """One unit is scored and its part is on disk."""

    unit: int
    path: str
    """Of the part, relative to the run's folder."""
    num_pairs: int
    size_bytes: int
    sha256: str
    stats: dict[str, float] = field(default_factory=dict)
    """images, rows and bytes read, seconds by stage."""

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> ScoreReceipt:
        """The inverse of `asdict`.

        Raises:
            CorruptionError: not a receipt, or its part lies outside the run's folder.
        """
        try:
            receipt = cls(**value)
            int(receipt.unit), int(receipt.num_pairs), {key: float(number) for key, number in receipt.stats.items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise CorruptionError(f"not a receipt of a scored unit: {error}") from error
        if not is_safe_path(receipt.path):
            raise CorruptionError(f"a receipt names the part {str(receipt.path)[:80]!r}, which would leave its run")
        return receipt


class UnitJournal:
    """The plan and the receipts in one folder."""

    def __init__(self, run_dir: Location) -> None:
        self.run_dir = run_dir
        self.receipts: dict[int, ScoreReceipt] = {}

    @property
    def plan_dir(self) -> Location:
        return self.run_dir.child("plan")

    @property
    def plan_info(self) -> dict[str, Any] | None:
        """What `set_plan_info` stored; None while the plan is incomplete."""
        try:
            return read_json(self.run_dir.child("plan_info.json"))
        except FileNotFoundError:
            return None

    def set_plan_info(self, info: dict[str, Any]) -> None:
        self.run_dir.child("plan_info.json").write_bytes(as_json(info))
        crash_point("score.planned")

    def journal(self, receipt: ScoreReceipt) -> bool:
        """Makes a receipt durable; False when its unit was scored before (a task that was tried twice)."""
        if receipt.unit in self.receipts:
            self.run_dir.child(receipt.path).delete_file()
            return False
        crash_point("score.journal")
        self.run_dir.child("receipts", f"{receipt.unit:08d}.json").write_bytes(as_json(asdict(receipt)))
        self.receipts[receipt.unit] = receipt
        crash_point("score.journalled")
        return True

    def drop_damaged(self) -> list[int]:
        """Re-reads every part, forgets the receipts of damaged or missing ones, returns their units."""
        dropped = []
        for unit, receipt in list(self.receipts.items()):
            part = self.run_dir.child(receipt.path)
            try:
                found = hash_file(part)
                intact = (found.size_bytes, found.sha256) == (receipt.size_bytes, receipt.sha256)
            except (FileNotFoundError, CorruptionError):
                intact = False
            if not intact:
                del self.receipts[unit]
                dropped.append(unit)
        return dropped

    def load(self) -> None:
        """Reads the receipts of an earlier attempt."""
        folder = self.run_dir.child("receipts")
        for entry in folder.list_files(recursive=False):
            if not entry.path.removesuffix(".json").isdigit():
                continue  # the temporary file of a write that was cut off
            try:
                receipt = ScoreReceipt.from_dict(read_json(folder.child(entry.path), max_bytes=MAX_RECEIPT_BYTES))
            except CorruptionError:
                continue  # costs its unit, which is scored again, never the run
            self.receipts[receipt.unit] = receipt


def as_json(value: dict[str, Any]) -> bytes:
    """Indented, for people to read."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
