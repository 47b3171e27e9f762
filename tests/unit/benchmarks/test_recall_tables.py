"""Tables from a folder of results: every section, no line for what was not measured."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recall_tables
from benchmarks.recall_runs import Plans, Run
from edje_pipeline.pipeline.evaluate_result import METRICS, Interval, Row

RUNS = {run.name: run for run in Plans().plans["final"]}
ARTISTS = {"fluent": 300, "noto": 100}
BEST_WEIGHT = 10.0


def around(mean: float, half: float = 1.0) -> Interval:
    return Interval(mean, mean - half, mean + half)


def row(stage: str, recall: float, *, pool: int = 0, weight: float = 0.0, gain: float | None = None) -> dict[str, Any]:
    metrics = {name: around(recall + place) for place, name in enumerate(METRICS)}
    return asdict(Row("t2i", stage, pool, weight, metrics, None if gain is None else around(gain)))


def rows_of(test: str, codec: str, texts: int, recall: float, pools: tuple[int, ...]) -> list[dict[str, Any]]:
    """The first stage at 20; reranked at `recall` + k / 100, and a point more at the best weight."""
    found = [row("first stage", 20.0)]
    for pool in pools:
        for weight in (0.0, 5.0, BEST_WEIGHT, 20.0, 40.0):
            value = recall + pool / 100 + (weight == BEST_WEIGHT)
            found.append(row("reranked", value, pool=pool, weight=weight, gain=value - 20))
    return [{"test": test, "codec": codec, "texts": texts, "images": texts, **one} for one in found]


def result(run: Run, recall: float) -> dict[str, Any]:
    drawings = {"artist": 700, **{f"concepts-{artist}": num for artist, num in ARTISTS.items()}}
    tests = {"photos": 500} if run.data == "photos" else drawings
    codecs = ("local",) if run.tokens == "local" else run.codecs
    rows = []
    for test, texts in tests.items():
        for place, codec in enumerate(codecs):
            mean = recall - place + 4 * (test == "concepts-fluent")
            rows += rows_of(test, codec, texts, mean, run.pools)
    return {"run": asdict(run), "rows": rows, "train_s": 61.4, "test_s": 5.0, "device": "CPU", "torch": "2.x",
            "last": {"step": 1234}}  # fmt: skip


def tables(folder: Path, monkeypatch: pytest.MonkeyPatch, results: dict[str, dict[str, Any]]) -> list[str]:
    folder.mkdir(exist_ok=True)
    for name, one in results.items():
        (folder / f"{name}.json").write_text(json.dumps(one))
    out = folder.parent / "tables.md"
    monkeypatch.setattr(sys, "argv", ["recall_tables", str(folder), "--out", str(out)])
    assert recall_tables.main() == 0
    return out.read_text().splitlines()


def section(lines: list[str], title: str) -> list[str]:
    """The table lines below a heading, heads left out."""
    begin = next(place for place, line in enumerate(lines) if line.startswith(f"## {title}"))
    found = []
    for line in lines[begin + 1 :]:
        if line.startswith("## "):
            break
        if line.startswith("| ") and not line.startswith(("| |", "| tokens | k |")):
            found.append(line)
    return found


@pytest.fixture
def everything() -> dict[str, dict[str, Any]]:
    return {name: result(run, 40.0 + place) for place, (name, run) in enumerate(RUNS.items())}


def test_every_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    everything: dict[str, dict[str, Any]],
) -> None:  # fmt: skip
    everything["from-local-64"] = result(RUNS["from-local-64"], 50.0)
    lines = tables(tmp_path / "results", monkeypatch, everything)
    assert capsys.readouterr().out.splitlines() == lines
    sizes = section(lines, "An artist never trained on")
    assert [line.split("|")[1].strip() for line in sizes] == [f"{n} tokens" for n in ("local", "64", "32", "16")]
    assert sizes[1] == "| 64 tokens | 20.0 [19.0, 21.0] | 50.1 [49.1, 51.1] | +30.1 [29.1, 31.1] | 51.1 | 53.1 |"
    codecs = [line.split("|")[1].strip() for line in section(lines, "Codecs")]
    assert codecs == [
        *(f"{codec}, as trained" for codec in ("float16", "int8", "int4", "opq16")),
        *(f"{codec}, after the quantized phase" for codec in ("float16", "opq16")),
    ]
    pools = section(lines, "Pool size")
    assert pools[2] == "| 64 | 10 | 50.1 | 50.1 | 51.1 | 50.1 | 50.1 |"
    assert [line[:10] for line in pools[5:]] == ["| 32 | 10 ", "| 16 | 10 "]
    photos = [line.split(",")[0] for line in section(lines, "Photographs")]
    assert photos == ["| photos"] * 5 + ["| photos-after-emoji"] * 5 + ["| photos-from-local"] * 5
    objectives = section(lines, "Parts of the objective")
    assert [line.split("|")[1].strip() for line in objectives] == list(recall_tables.OBJECTIVES.values())
    assert "Trained and evaluated on: CPU, torch 2.x." in lines
    assert "- from-local-64: 64 tokens, 3 layers, 1,234 steps, 61 s" in lines
    assert all(line.count("|") == 7 for line in sizes + objectives)


def test_concepts_use_the_weight_chosen_on_the_other_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = section(
        tables(tmp_path / "results", monkeypatch, {"from-local-64": result(RUNS["from-local-64"], 50.0)}), "Concepts"
    )
    assert [line.split("|")[1].strip() for line in lines] == ["fluent", "noto", "all 400 queries"] * 2
    # 300 queries at 54.1 and 100 at 50.1; half-widths of 1 each: sqrt(0.75 ** 2 + 0.25 ** 2) = 0.79.
    assert lines[2].startswith("| all 400 queries | 20.0 [19.2, 20.8] | 53.1 [52.3, 53.9] | +33.1 [32.3, 33.9] |")
    assert lines[5].startswith("| all 400 queries | 20.0 [19.2, 20.8] | 54.1 [53.3, 54.9] |")
    best_alone = {**result(RUNS["from-local-64"], 50.0)}
    best_alone["rows"] = [one for one in best_alone["rows"] if one["fusion_weight"] == 0]
    again = section(tables(tmp_path / "again", monkeypatch, {"from-local-64": best_alone}), "Concepts")
    assert len(again) == 3
    both = {name: result(RUNS[name], 50.0) for name in ("local", "from-local-64")}
    assert len(section(tables(tmp_path / "both", monkeypatch, both), "Concepts")) == 12


@pytest.mark.parametrize("missing", sorted(RUNS))
def test_a_missing_run_leaves_its_lines_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything: dict[str, dict[str, Any]], missing: str
) -> None:
    whole = tables(tmp_path / "whole", monkeypatch, everything)
    del everything[missing]
    part = tables(tmp_path / "part", monkeypatch, everything)
    assert len(part) < len(whole)
    assert not any(line.startswith(f"- {missing}:") for line in part)
    assert [line for line in part if line not in whole] == []


def test_what_was_not_measured_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(RUNS["from-local-64"], codecs=("float16", "int8"))
    one = result(run, 50.0)
    one["rows"] = [entry for entry in one["rows"] if entry["test"] == "artist" and entry["codec"] == "float16"]
    lines = tables(tmp_path / "results", monkeypatch, {"from-local-64": one})
    assert section(lines, "Concepts") == []
    assert len(section(lines, "Codecs")) == 1


def test_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["recall_tables", str(tmp_path)])
    assert recall_tables.main() == 1
    assert "no results" in capsys.readouterr().out
