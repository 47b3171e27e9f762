"""The benchmark programs run: the GPU plan in its CPU form, and what `make bench` would start."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import run as run_program
from benchmarks.report import table, write_report
from benchmarks.run import PROGRAMS, TOTAL_S, Program, main


def run_module(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_gpu_plan_of_extraction_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "result.md"
    arguments = ("--device", "cpu", "--tiny", "--executor", "local", "--rounds", "1", "--out", str(out))
    run_module("gpu_plan_extract", *arguments)
    text = out.read_text()
    for side in ("bare", "encode", "extract"):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {side} ")]
        assert float(row.split("|")[3]) > 0
    assert "python -m benchmarks.gpu_plan_extract" in text
    assert "torch " in text
    assert "256 listed = 256 accepted" in text


@pytest.mark.slow
def test_gpu_plan_of_scoring_keeps_what_it_has_when_its_time_is_over(tmp_path: Path) -> None:
    out = tmp_path / "result.md"
    arguments = ("--device", "cpu", "--tiny", "--rounds", "1", "--limit-s", "0", "--out", str(out))
    printed = run_module("gpu_plan_score", *arguments)
    assert "the limit of 0 s is reached" in printed
    text = out.read_text()
    assert text.startswith("# GPU plan: scoring, cut off, ")
    (row,) = [line for line in text.splitlines() if line.startswith("| 49 kB ")]
    assert "captions" in row
    assert "The bare encoder" not in text


def test_every_program_of_make_bench_exists_and_has_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    for program in PROGRAMS:
        assert importlib.util.find_spec(f"benchmarks.{program.module}") is not None, program.module
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(program.name in listed for program in PROGRAMS)
    with pytest.raises(SystemExit, match="unknown benchmark nothing; there are decoders"):
        main(["--only", "nothing"])


def test_make_bench_ends_within_fifteen_minutes() -> None:
    parts = [program for program in PROGRAMS if program.device == "cpu"]
    assert sum(part.limit_s for part in parts) <= TOTAL_S
    assert all(part.expected_s < part.limit_s for part in parts)


def test_a_part_that_fails_or_hangs_does_not_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "broken.py").write_text("raise SystemExit(3)")
    (package / "endless.py").write_text("import time\ntime.sleep(600)")
    (package / "fine.py").write_text("print('measured')")
    monkeypatch.chdir(tmp_path)  # `python -m` looks in the working directory first
    parts = tuple(Program(name, name, "a part", 5, 1) for name in ("broken", "endless", "fine"))
    monkeypatch.setattr(run_program, "PROGRAMS", parts)
    assert main([]) == 1
    printed = capfd.readouterr().out
    assert "together  about   3 s, at most  15 s" in printed
    assert "broken: FAILED with exit code 3" in printed
    assert "endless: STOPPED at its limit of 5 s" in printed
    assert "measured" in printed
    assert "fine: done" in printed


def test_a_report_names_command_versions_and_date(tmp_path: Path) -> None:
    path = write_report("x", "A title", table(["a", "b"], [[1, 2]]), out=tmp_path / "deep" / "x.md", module="x")
    text = path.read_text()
    assert text.startswith("# A title, 20")
    assert "python -m benchmarks.x" in text
    assert "numpy " in text
    assert "| a | b |\n| --- | --- |\n| 1 | 2 |\n" in text
