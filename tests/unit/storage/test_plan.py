"""The plan: units, duplicates, limits, a killed listing, and the same hash however it was batched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje_pipeline.errors import CorruptionError, DuplicateIdError, SourceNotFoundError
from edje_pipeline.storage import duplicates, plan, plan_writer
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.plan import PlanInfo, open_plan, read_unit, write_plan
from edje_pipeline.storage.schema import PLAN_SCHEMA
from edje_pipeline.storage.sources import SourceOptions, open_source
from edje_pipeline.storage.sources.base import Source


class NamedSource(Source):
    """Lists made-up ids; a real source in all but its files."""

    kind = "list"

    def __init__(self, ids: list[str]) -> None:
        super().__init__("file:///made-up.txt", SourceOptions())
        self.ids = ids

    def describe(self) -> str:
        return f"list of {self.num_listed} made-up images"

    def _entries(self) -> Iterator[tuple[str, str, str, int, int]]:
        for number, name in enumerate(self.ids):
            yield name, f"file:///{number}", f"file:///{number}", 0, -1


def planned(tmp_path: Path, ids: list[str], **options: object) -> tuple[PlanInfo, list[dict[str, object]]]:
    place = Location.parse(tmp_path / "plan")
    info = write_plan(NamedSource(ids), place, **options)
    assert open_plan(place) == info
    units = [read_unit(place, unit) for unit in range(info.num_units)]
    assert all(unit.schema == PLAN_SCHEMA for unit in units)
    assert [unit.num_rows for unit in units[:-1]] == [info.unit_rows] * (len(units) - 1)
    rows = [row for unit in units for row in unit.to_pylist()]
    assert [row["row"] for row in rows] == list(range(info.num_rows))
    return info, rows


@settings(max_examples=15, deadline=None)
@given(num=st.integers(1, 60), unit_rows=st.integers(1, 20), limit=st.none() | st.integers(1, 70))
def test_units_hold_every_row_once(
    tmp_path_factory: pytest.TempPathFactory, num: int, unit_rows: int, limit: int | None
) -> None:
    tmp_path = tmp_path_factory.mktemp("plan")
    ids = [f"i{n}" for n in range(num)]
    info, rows = planned(tmp_path, ids, unit_rows=unit_rows, limit=limit)
    expected = ids[:limit]
    assert [row["image_id"] for row in rows] == expected
    assert info.num_units == -(-len(expected) // unit_rows)


def test_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_writer, "UNITS_PER_PART", 2)
    info, rows = planned(tmp_path, [f"i{n}" for n in range(10_001)], unit_rows=1000)
    assert info.num_units == 11
    assert len(list((tmp_path / "plan").glob("part-*"))) == 6
    assert rows[-1]["image_id"] == "i10000"


def test_row_ranges_pick_rows_of_a_unit(tmp_path: Path) -> None:
    planned(tmp_path, [f"i{n}" for n in range(30)], unit_rows=10)
    place = Location.parse(tmp_path / "plan")
    picked = read_unit(place, 1, [(0, 12), (15, 16), (19, 99)])
    assert picked.column("row").to_pylist() == [10, 11, 15, 19]


def test_spilled_hashes_find_the_same_as_hashes_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"i{n}" for n in range(3000)] + ["i17", "i2999", "i17"]
    found = []
    for spill_rows in (1 << 18, 100):
        monkeypatch.setattr(duplicates, "SPILL_ROWS", spill_rows)
        with duplicates.DuplicateFinder() as finder:
            for start in range(0, len(ids), 64):
                finder.add(ids[start : start + 64])
            found.append(finder.repeated_hashes().tolist())
    assert found[0] == found[1] == sorted(duplicates.hash_ids(["i17", "i2999"]).tolist())


def test_the_hash_is_of_the_listing_alone(tmp_path: Path) -> None:
    ids = [f"i{n}" for n in range(50)]
    first = planned(tmp_path / "1", ids, unit_rows=7)[0].listing_sha256
    assert planned(tmp_path / "2", ids, unit_rows=50)[0].listing_sha256 == first
    assert planned(tmp_path / "3", ids[::-1])[0].listing_sha256 != first
    assert planned(tmp_path / "4", [*ids[:-2], ids[-2] + "x", ids[-1][1:]])[0].listing_sha256 != first


def test_a_repeated_id_names_both_places(tmp_path: Path) -> None:
    with pytest.raises(DuplicateIdError, match=r"'b' stands at two places: /1 and /4 \(1 ids are repeated\)"):
        planned(tmp_path, ["a", "b", "c", "d", "b"], unit_rows=2)
    assert open_plan(Location.parse(tmp_path / "plan")) is None


def test_the_first_of_equal_ids_is_kept(tmp_path: Path) -> None:
    info, rows = planned(tmp_path, ["a", "b", "a", "c", "b", "a", "d"], unit_rows=2, on_duplicate="first")
    assert [row["image_id"] for row in rows] == ["a", "b", "c", "d"]
    assert [row["uri"] for row in rows] == ["file:///0", "file:///1", "file:///3", "file:///6"]
    assert info.num_duplicates_dropped == 3
    clean = planned(tmp_path / "x", ["a", "b", "c", "d"])[0]
    assert clean.num_duplicates_dropped == 0


def test_equal_hashes_of_different_ids_are_not_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (duplicates, plan):
        monkeypatch.setattr(module, "hash_ids", lambda ids: np.full(len(ids), 7, np.uint64))
    assert planned(tmp_path, ["a", "b", "c"])[0].num_rows == 3
    with pytest.raises(DuplicateIdError):
        planned(tmp_path, ["a", "b", "c", "a"])


def test_suspects_are_checked_in_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SUSPECTS_PER_PASS", 3)
    ids = [f"i{n % 40}" for n in range(100)]
    info, rows = planned(tmp_path, ids, unit_rows=9, on_duplicate="first")
    assert [row["image_id"] for row in rows] == ids[:40]
    assert info.num_duplicates_dropped == 60


def test_known_images_are_left_out_and_counted(tmp_path: Path) -> None:
    def known(batch: object) -> list[bool]:
        return [image_id in ("a", "c") for image_id in batch.column("image_id").to_pylist()]

    info, rows = planned(tmp_path, ["a", "b", "c", "d"], known=known)
    assert [row["image_id"] for row in rows] == ["b", "d"]
    assert info.num_known == 2
    info, rows = planned(tmp_path, ["a", "c"], known=known)
    assert (info.num_rows, info.num_units, rows) == (0, 0, [])


def test_an_empty_corpus_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "notes.txt").write_text("x")
    source = open_source(str(tmp_path / "corpus"))
    with pytest.raises(SourceNotFoundError, match=r"looked for files ending in .*\.jpg.*notes\.txt"):
        write_plan(source, Location.parse(tmp_path / "plan"))


def test_a_plan_that_is_damaged(tmp_path: Path) -> None:
    planned(tmp_path, ["a", "b"])
    place = Location.parse(tmp_path / "plan")
    with pytest.raises(CorruptionError, match="unit 300"):
        read_unit(place, 300)
    (tmp_path / "plan" / "plan.json").write_text("{}")
    with pytest.raises(CorruptionError, match="not a plan"):
        open_plan(place)


_KILLED = """
import sys
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.plan import write_plan
from edje_pipeline.storage.sources import open_source
write_plan(open_source(sys.argv[1]), Location.parse(sys.argv[2]), unit_rows=3)
"""


@pytest.mark.parametrize("point", ["listing.batch:1", "listing.batch:4", "listing.done:1"])
def test_a_killed_listing_starts_again(tmp_path: Path, point: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(20):
        (corpus / f"{number}.jpg").write_bytes(b"x")
    arguments = [sys.executable, "-c", _KILLED, str(corpus), str(tmp_path / "plan")]
    done = subprocess.run(arguments, env={**os.environ, "EDJE_CRASH_AT": point}, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    place = Location.parse(tmp_path / "plan")
    assert open_plan(place) is None
    info = write_plan(open_source(str(corpus)), place, unit_rows=3)
    assert info.num_rows == 20
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["part-0-000000.parquet", "plan.json"]
