"""A decoder that kills its process costs the images that kill it, nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from edje_pipeline.models.spec import PreprocessSpec
from edje_pipeline.pipeline import attempts
from edje_pipeline.pipeline.attempts import Attempt, decode_apart
from edje_pipeline.pipeline.job import Job
from edje_pipeline.pipeline.workers import ReadDecodeWorker
from edje_pipeline.storage.codecs import Float16Codec
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.plan import read_unit, write_plan
from edje_pipeline.storage.sources import open_source
from tests.extract_util import write_corpus


@pytest.fixture
def job(tmp_path: Path) -> Job:
    corpus = write_corpus(tmp_path / "corpus", 6)
    source = open_source(str(corpus))
    plan_dir = Location.parse(tmp_path / "plan")
    write_plan(source, plan_dir, unit_rows=8)
    return Job(
        index=Location.parse(tmp_path / "index"),
        run_id="test",
        plan_dir=plan_dir,
        codec=Float16Codec(4, 32),
        embedding_dim=0,
        unit_rows=8,
        shard_rows=8,
        source=source.to_dict(),
        preprocess=PreprocessSpec((32, 32)),
        max_pixels=10**8,
        max_bytes=1 << 20,
    )


def test_apart_gives_the_same_as_here(job: Job) -> None:
    rows = read_unit(job.plan_dir, 0)
    here, apart = ReadDecodeWorker(job).decode(rows), decode_apart(rows, job)
    names = [name for name in here.column_names if not name.startswith("metric_")]
    assert apart.select(names).equals(here.select(names))
    assert apart.column_names == here.column_names


def test_the_killer_is_isolated(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_unit(job.plan_dir, 0)
    killer = rows.column("image_id")[3].as_py()
    real = attempts._run_child

    def run(part: pa.Table, its_job: Job) -> tuple[pa.Table | None, str]:
        # A child whose rows hold the killer dies as one with a broken decoder would.
        if killer in part.column("image_id").to_pylist():
            return None, "crashed with SIGSEGV"
        return real(part, its_job)

    monkeypatch.setattr(attempts, "_run_child", run)
    table = decode_apart(rows, replace(job))
    assert table.column("row").to_pylist() == list(range(6))
    reasons = dict(zip(table.column("image_id").to_pylist(), table.column("reject_reason").to_pylist(), strict=True))
    assert {name for name, reason in reasons.items() if reason is not None} == {killer}
    assert reasons[killer] == "corrupt"
    assert table.column("reject_message")[3].as_py() == "the decoder crashed with SIGSEGV"


def test_a_marker_stays_only_when_the_process_died(tmp_path: Path) -> None:
    place = Location.parse(tmp_path)
    with Attempt(place, "0-0") as first:
        assert not first.crashed_before
        assert Attempt(place, "0-0").crashed_before
    assert not Attempt(place, "0-0").crashed_before
    with pytest.raises(ValueError, match="no"), Attempt(place, "0-0"):
        raise ValueError("no")
    assert not Attempt(place, "0-0").crashed_before
