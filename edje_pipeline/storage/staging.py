"""An unfinished run: where its plan lies, what it has finished, and whether this command may continue it.

    INDEX/staging/<run_id>/run.json            fingerprints, options; written first
                           plan_info.json      what was listed; written when the listing is complete
                           plan/               the listing itself
                           receipts/<n>.json   the journal: a list of receipts a file, never changed once written

A receipt is written after its files are durable, so the union of the journalled receipts' row ranges
is exactly what need not be done again.
"""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

from edje_pipeline.errors import CorruptionError, IndexStateError, ResumeMismatchError
from edje_pipeline.storage.cleanup import remove_file, remove_files, remove_tree
from edje_pipeline.storage.faults import crash_point
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.lock import IndexLock
from edje_pipeline.storage.manifest import Manifest, find_manifest, is_safe_path, read_json
from edje_pipeline.storage.parquet_io import hash_file
from edje_pipeline.storage.recovery import finish_published, open_runs
from edje_pipeline.storage.rowset import Range, RowSet
from edje_pipeline.storage.schema import FORMAT_VERSION
from edje_pipeline.storage.shards import RejectEntry, ShardEntry

MAX_JOURNAL_BYTES = 64 << 20


@dataclass(frozen=True)
class Receipt:
    """What a writer hands to the driver: the files it wrote and the plan rows they settle."""

    row_ranges: tuple[Range, ...]
    """Half-open ranges of ALL plan rows covered, accepted and rejected."""
    shard: ShardEntry | None = None
    rejects: RejectEntry | None = None
    stats: dict[str, float] = field(default_factory=dict)
    """Free for the pipeline: seconds by stage, bytes read."""

    @property
    def num_rows(self) -> int:
        return sum(end - start for start, end in self.row_ranges)

    @property
    def num_accepted(self) -> int:
        return self.shard.num_rows if self.shard else 0

    @property
    def num_rejected(self) -> int:
        return self.rejects.num_rows if self.rejects else 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "row_ranges": [list(pair) for pair in self.row_ranges],
            "shard": self.shard.to_dict() if self.shard else None,
            "rejects": self.rejects.to_dict() if self.rejects else None,
            "stats": self.stats,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Receipt:
        """The inverse of `to_dict`.

        Raises:
            CorruptionError: a key is missing or has a value it cannot have.
        """
        try:
            shard = ShardEntry(**value["shard"]) if value["shard"] else None
            rejects = RejectEntry(**value["rejects"]) if value["rejects"] else None
            ranges = tuple((int(start), int(end)) for start, end in value["row_ranges"])
            stats = {str(key): float(number) for key, number in value["stats"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptionError(f"not a receipt: {type(error).__name__} {error}") from error
        receipt = cls(ranges, shard, rejects, stats)
        receipt.check()
        return receipt

    def check(self) -> None:
        """Raises CorruptionError when rows and files do not add up or a path leaves the index."""
        if any(start < 0 or end <= start for start, end in self.row_ranges):
            raise CorruptionError(f"a receipt names the row ranges {self.row_ranges[:3]}")
        if self.num_accepted + self.num_rejected != self.num_rows:
            raise CorruptionError(
                f"a receipt covers {self.num_rows} rows but its files hold "
                f"{self.num_accepted} accepted and {self.num_rejected} rejected"
            )
        for entry in (self.shard, self.rejects):
            if entry is not None and not is_safe_path(entry.path):
                raise CorruptionError(f"a receipt names the file {entry.path!r}, which would leave the index")


class Staging:
    """The run that this process holds; see the module docstring. Made by `begin`."""

    def __init__(self, index: Location, lock: IndexLock, run: dict[str, Any], *, is_resumed: bool) -> None:
        self.index = index
        self.lock = lock
        self.run_id: str = run["run_id"]
        self.fingerprints: dict[str, str] = run["fingerprints"]
        self.config: dict[str, Any] = run["config"]
        self.is_resumed = is_resumed
        self.already_published: Manifest | None = None
        """Set when the unfinished run turned out to be published: it was killed while it tidied up.
        Nothing is left to do; report that snapshot and end."""
        self._folder = index.child("staging", self.run_id)
        self._journal: dict[int, list[Receipt]] = {}
        self.covered = RowSet()
        if is_resumed:
            self._load_journal()

    @classmethod
    def begin(
        cls,
        index: Location,
        *,
        fingerprints: dict[str, str],
        config: dict[str, Any],
        restart: bool = False,
        purpose: str = "extract",
    ) -> Staging:
        """Takes the lock, then resumes the unfinished run there or starts a new one.

        Args:
            index: root of the index; made when absent.
            fingerprints: sha256 by part; resuming needs all of them equal.
            config: the run's options, kept for people to read.
            restart: discard an unfinished run instead of resuming it.
            purpose: named in the message that another run gets while this one holds the index.

        Raises:
            IndexLockedError: another run holds the index.
            ResumeMismatchError: an unfinished run was started with other inputs.
            StorageError: the index cannot be written.
        """
        lock = IndexLock(index, purpose=purpose)
        try:
            return cls._begin(index, lock, fingerprints, config, restart=restart)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _begin(
        cls, index: Location, lock: IndexLock, fingerprints: dict[str, str], config: dict[str, Any], *, restart: bool
    ) -> Staging:
        find_manifest(index)  # a newer format is refused before anything is written
        published = finish_published(index)
        if published is not None and published.fingerprints == fingerprints and not restart:
            run = {"run_id": published.manifest.run_id, "fingerprints": fingerprints, "config": config}
            staging = cls(index, lock, run, is_resumed=False)
            staging.already_published = published.manifest
            return staging
        runs = open_runs(index)
        if runs and not restart:
            found = runs[-1]
            _check_same(index, found, fingerprints)
            return cls(index, lock, found, is_resumed=True)
        for old in runs:
            cls(index, lock, old, is_resumed=False).discard()
        now = dt.datetime.now(dt.UTC)
        run_id = f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        new_run: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "run_id": run_id,
            "kind": "run",
            "started_at": now.isoformat(timespec="seconds"),
            "fingerprints": fingerprints,
            "config": config,
        }
        data = json.dumps(new_run, indent=1, sort_keys=True).encode()
        index.child("staging", run_id, "run.json").write_bytes(data)
        crash_point("staging.created")
        return cls(index, lock, new_run, is_resumed=False)

    # -- the plan ----------------------------------------------------------------------------------

    @property
    def plan_dir(self) -> Location:
        """Where the listing lies; incomplete while `plan_info` is None."""
        return self._folder.child("plan")

    @property
    def plan_info(self) -> dict[str, Any] | None:
        """What `set_plan_info` stored, None before."""
        try:
            return read_json(self._folder.child("plan_info.json"))
        except FileNotFoundError:
            return None

    def set_plan_info(self, info: dict[str, Any]) -> None:
        """Marks the listing as complete. `info["num_rows"]` is what publish compares the journal with."""
        self._assert_open()
        self._folder.child("plan_info.json").write_bytes(json.dumps(info, indent=1, sort_keys=True).encode())

    # -- the journal -------------------------------------------------------------------------------

    @property
    def receipts(self) -> list[Receipt]:
        """All journalled receipts, in the order of the journal."""
        return [receipt for number in sorted(self._journal) for receipt in self._journal[number]]

    def journal(self, receipts: Iterable[Receipt]) -> list[Receipt]:
        """Makes receipts durable in one small file, and returns those taken.

        A receipt that overlaps rows already covered is left out (a task that was tried twice): its
        files become orphans that publish removes.

        Raises:
            CorruptionError: rows and files of a receipt do not add up: a bug in the writer.
            StorageError: the journal cannot be written; none of the receipts counts then.
        """
        self._assert_open()
        taken: list[Receipt] = []
        covered = RowSet()
        for receipt in receipts:
            receipt.check()
            if self.covered.overlaps(receipt.row_ranges) or covered.overlaps(receipt.row_ranges):
                continue
            taken.append(receipt)
            covered.add(receipt.row_ranges)
        if taken:
            crash_point("journal.begin")
            number = max(self._journal, default=-1) + 1
            self._write_journal(number, taken)
            self._journal[number] = taken
            self.covered.add(covered.ranges)
            crash_point("journal.done")
        return taken

    def verify_staged(self, *, full: bool = True) -> list[Receipt]:
        """Re-reads the files of every receipt, drops the receipts of damaged ones, and returns those.

        Args:
            full: compare sha256 (reads everything once); else existence and size only.
        """
        dropped: list[Receipt] = []
        for number, receipts in list(self._journal.items()):
            bad = [receipt for receipt in receipts if not self._is_intact(receipt, full=full)]
            if not bad:
                continue
            kept = [receipt for receipt in receipts if receipt not in bad]
            self._write_journal(number, kept)
            self._journal[number] = kept
            dropped += bad
        if dropped:
            self.covered = RowSet.from_ranges(pair for receipt in self.receipts for pair in receipt.row_ranges)
        return dropped

    def _is_intact(self, receipt: Receipt, *, full: bool) -> bool:
        for entry in (receipt.shard, receipt.rejects):
            if entry is None:
                continue
            location = self.index.child(entry.path)
            try:
                if location.size_bytes() != entry.size_bytes:
                    return False
                if full and hash_file(location).sha256 != entry.sha256:
                    return False
            except (FileNotFoundError, CorruptionError):
                return False
        return True

    def _write_journal(self, number: int, receipts: list[Receipt]) -> None:
        data = json.dumps({"receipts": [receipt.to_dict() for receipt in receipts]}, sort_keys=True).encode()
        self._folder.child("receipts", f"{number:08d}.json").write_bytes(data)

    def _load_journal(self) -> None:
        folder = self._folder.child("receipts")
        for entry in folder.list_files(recursive=False):
            stem = entry.path.removesuffix(".json")
            if not stem.isdigit():
                continue  # a temporary file of a write that was cut off
            receipts = []
            try:
                value = read_json(folder.child(entry.path), max_bytes=MAX_JOURNAL_BYTES)
                listed = value.get("receipts")
                for item in listed if isinstance(listed, list) else []:
                    receipt = Receipt.from_dict(item)
                    if not self.covered.overlaps(receipt.row_ranges):
                        receipts.append(receipt)
                        self.covered.add(receipt.row_ranges)
            except CorruptionError:
                # A damaged journal file costs its rows, which are done again, never the run.
                pass
            self._journal[int(stem)] = receipts

    # -- the end -----------------------------------------------------------------------------------

    def discard(self) -> None:
        """Removes this run: its plan, its journal and every file it wrote."""
        prefix = f"{self.run_id}-"
        for folder in ("shards", "rejects"):
            remove_files(self.index, folder, is_needed=lambda path: prefix not in path.rpartition("/")[2])
        remove_tree(self.index, f"staging/{self.run_id}")

    def release(self) -> None:
        """Lets go of the lock; the run can be resumed later."""
        self.lock.release()

    def forget_receipts(self, receipts: Iterable[Receipt]) -> None:
        """Removes files of receipts that `journal` did not take."""
        for receipt in receipts:
            for entry in (receipt.shard, receipt.rejects):
                if entry is not None:
                    remove_file(self.index, entry.path)

    def run_dict(self) -> dict[str, Any]:
        """For messages and `inspect`."""
        return {
            "run_id": self.run_id,
            "is_resumed": self.is_resumed,
            "num_rows_done": self.covered.num_rows,
            "receipts": [asdict(receipt) for receipt in self.receipts],
        }

    def _assert_open(self) -> None:
        if self.already_published is not None:
            raise IndexStateError(f"run {self.run_id} is published as {self.already_published.snapshot}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lock.__exit__(kind, error, trace)


def _check_same(index: Location, run: dict[str, Any], fingerprints: dict[str, str]) -> None:
    stored: dict[str, str] = run["fingerprints"]
    differing = [
        part for part in sorted({*stored, *fingerprints}) if stored.get(part, "") != fingerprints.get(part, "")
    ]
    if differing:
        shown = "; ".join(
            f"{part}: {stored.get(part, 'none')[:12]} there, {fingerprints.get(part, 'none')[:12]} now"
            for part in differing
        )
        raise ResumeMismatchError(
            f"the unfinished run {run['run_id']} in {index} was started with another {', '.join(differing)} ({shown}). "
            "Run the command it was started with to finish it, or add --restart to discard what it did"
        )
