"""The output folder of a scoring run: its lock, its unfinished run, its journal, its manifest.

    OUT/manifest.json            written last: what makes the results visible
        results/*.parquet        query_id, image_id, score, rank, first_stage_score
        missing.parquet          candidates that the index does not hold (named by the manifest)
        staging/<run_id>/        run.json and the units of an unfinished run (`score_journal`)
            refine/              the units of its second pass, when it has one

The same command on an unfinished folder goes on where it stopped; other inputs are refused.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import uuid
from collections.abc import Iterator
from typing import Any

from edje_pipeline.errors import ConfigError, CorruptionError, IndexStateError, ResumeMismatchError
from edje_pipeline.pipeline.score_journal import UnitJournal, as_json
from edje_pipeline.storage.faults import crash_point
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.lock import IndexLock
from edje_pipeline.storage.manifest import read_json

FORMAT_NAME = "edje-scores"
FORMAT_VERSION = 1
CRASH_POINTS = (
    "score.created",
    "score.planned",
    "score.computed",
    "score.journal",
    "score.journalled",
    "score.results",
    "score.publish",
    "score.published",
    "score.tidying",
)
"""Points at which a test may kill a scoring run (see `storage.faults`), in the order of a run."""


class ScoreStore:
    """The output folder, held by this process; made by `begin`."""

    def __init__(self, out: Location, run: dict[str, Any], *, is_resumed: bool) -> None:
        self.out, self.is_resumed = out, is_resumed
        self.run_id: str = run["run_id"]
        self.fingerprints: dict[str, str] = run["fingerprints"]
        self.run_dir = out.child("staging", self.run_id)
        self.published: dict[str, Any] | None = None
        """The manifest, when this run was killed between publishing and tidying up."""
        self.units = UnitJournal(self.run_dir)
        """Every pair, once."""
        self.refined = UnitJournal(self.run_dir.child("refine"))
        """Each query's best pairs, scored again."""
        if is_resumed:
            self.units.load()
            self.refined.load()

    @classmethod
    @contextlib.contextmanager
    def begin(
        cls, out: Location, *, fingerprints: dict[str, str], config: dict[str, Any], overwrite: bool
    ) -> Iterator[ScoreStore]:
        """Holds the folder for a with block: resumes the unfinished run there, or starts one.

        Args:
            out: made when absent.
            fingerprints: sha256 by part; resuming needs all of them equal.
            config: the run's options, for people to read.
            overwrite: replace finished results, and discard an unfinished run of other inputs.

        Raises:
            IndexLockedError: another run holds it.
            IndexStateError: it holds finished results and `overwrite` is not set.
            ResumeMismatchError: an unfinished run was started with other inputs.
            ConfigError: it holds files that no scoring run wrote.
        """
        check_is_ours(out)
        with IndexLock(out, purpose="score"):
            yield cls._begin(out, fingerprints, config, overwrite=overwrite)

    @classmethod
    def _begin(
        cls, out: Location, fingerprints: dict[str, str], config: dict[str, Any], *, overwrite: bool
    ) -> ScoreStore:
        manifest = read_scores_manifest(out)
        runs = list(_open_runs(out))
        if manifest is not None:
            for run in runs:
                if run["run_id"] == manifest["run_id"] and run["fingerprints"] == fingerprints:
                    store = cls(out, run, is_resumed=False)
                    store.published = manifest
                    return store
            if not overwrite:
                raise IndexStateError(
                    f"{out} holds finished scores of {manifest['created_at']}; "
                    "choose another --out, or pass --overwrite to replace them"
                )
        same = [run for run in runs if run["fingerprints"] == fingerprints]
        for run in runs:
            if run in same[-1:]:
                continue
            if not overwrite:
                _refuse(out, run, fingerprints)
            out.child("staging", run["run_id"]).delete_dir()
        if same:
            return cls(out, same[-1], is_resumed=True)
        now = dt.datetime.now(dt.UTC)
        run = {
            "run_id": f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}",
            "started_at": now.isoformat(timespec="seconds"),
            "fingerprints": fingerprints,
            "config": config,
        }
        store = cls(out, run, is_resumed=False)
        store.run_dir.child("run.json").write_bytes(as_json(run))
        crash_point("score.created")
        return store

    # -- the end -----------------------------------------------------------------------------------

    def publish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Swaps the manifest in, then removes what it does not name."""
        manifest = {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "run_id": self.run_id,
            "created_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "fingerprints": self.fingerprints,
            **manifest,
        }
        crash_point("score.publish")
        self.out.child("manifest.json").write_bytes(as_json(manifest))
        crash_point("score.published")
        self.tidy(manifest)
        return manifest

    def tidy(self, manifest: dict[str, Any]) -> None:
        """Removes results of other runs, then this run's staging folder, which shows that it is done."""
        needed = {entry["path"] for entry in manifest["files"]}
        for entry in self.out.child("results").list_files(recursive=False):
            if f"results/{entry.path}" not in needed:
                self.out.child("results", entry.path).delete_file()
        if manifest["missing"] is None:
            self.out.child("missing.parquet").delete_file()
        crash_point("score.tidying")
        self.out.child("staging").delete_dir()


def read_scores_manifest(out: Location) -> dict[str, Any] | None:
    """The manifest of finished scores; None when there is none.

    Raises:
        CorruptionError: manifest.json is there and is not ours or of another version.
    """
    try:
        manifest = read_json(out.child("manifest.json"))
    except FileNotFoundError:
        return None
    if manifest.get("format") != FORMAT_NAME or manifest.get("format_version") != FORMAT_VERSION:
        raise CorruptionError(
            f"{out.child('manifest.json')} has format {str(manifest.get('format'))[:40]!r} version "
            f"{str(manifest.get('format_version'))[:20]!r}; expected {FORMAT_NAME!r} version {FORMAT_VERSION}"
        )
    return manifest


def check_is_ours(out: Location) -> None:
    """Refuses a file, an index, or a folder of somebody else's files.

    Raises:
        ConfigError: says what is there.
    """
    if out.is_local and out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; expected a folder")
    if out.child("manifest.json").exists():
        kind = read_json(out.child("manifest.json")).get("format")
        if kind != FORMAT_NAME:
            raise ConfigError(f"--out {out} holds a manifest of format {str(kind)[:40]!r}; choose a folder of its own")
        return
    names = {entry.path for entry in out.list_files(recursive=False)} | set(out.list_dirs())
    foreign = sorted(name for name in names - {"staging", "results", "missing.parquet"} if not name.startswith("."))
    if foreign:
        raise ConfigError(
            f"--out {out} holds files that no scoring run wrote ({', '.join(foreign[:3])}); choose an empty folder"
        )


def _open_runs(out: Location) -> Iterator[dict[str, Any]]:
    for name in out.child("staging").list_dirs():
        try:
            run = read_json(out.child("staging", name, "run.json"))
        except (FileNotFoundError, CorruptionError):
            continue
        if run.get("run_id") == name and isinstance(run.get("fingerprints"), dict):
            yield run


def _refuse(out: Location, run: dict[str, Any], fingerprints: dict[str, str]) -> None:
    stored = run["fingerprints"]
    differing = [part for part in sorted({*stored, *fingerprints}) if stored.get(part) != fingerprints.get(part)]
    raise ResumeMismatchError(
        f"{out} holds an unfinished scoring run ({run['run_id']}) of other inputs; what differs: "
        f"{', '.join(differing)}. Give the inputs it was started with to finish it, "
        "or pass --overwrite to discard it and start anew"
    )
