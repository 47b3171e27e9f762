"""Runs the benchmarks one after the other; each writes a dated file into benchmarks/results/.

python -m benchmarks.run                    everything, under 15 minutes on 2 cores: each part has a limit
python -m benchmarks.run --quick            a few minutes, small sizes: do the programs work?
python -m benchmarks.run --only extract score
python -m benchmarks.run --device cuda      the GPU plan instead, under ten minutes on one 80 GB GPU
python -m benchmarks.run --list
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TOTAL_S = 900
"""What all limits of the CPU's parts together stay below."""
GRACE_S = 15
"""Between asking a part to end and ending it."""


@dataclass(frozen=True)
class Program:
    """One benchmark and its arguments."""

    name: str
    module: str
    about: str
    limit_s: int
    """It is stopped then, and the others go on."""
    expected_s: int
    """On two quiet cores, about."""
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    device: str = "cpu"


PROGRAMS = (
    Program(
        "decoders", "decoders", "JPEG decoders: CPU time and equality of pixels", 60, 20,
        full=("--rounds", "3"), quick=("--rounds", "1", "--num-images", "12"),
    ),
    Program(
        "storage", "storage_overhead", "bytes an image beyond the payload", 100, 50,
        full=("--rows-1kb", "100000", "--rows-49kb", "4000"), quick=("--rows-1kb", "10000", "--rows-49kb", "1000"),
    ),
    Program(
        "score", "score_speed", "pairs/s against the authors' path, padded BERT and CrossEncoder", 240, 150,
        full=("--queries", "4", "--per-query", "16", "--images", "64", "--rounds", "5"),
        quick=("--rounds", "1", "--queries", "2", "--per-query", "4", "--images", "24", "--layers", "2"),
    ),
    Program(
        "growth", "growth", "seconds and driver memory against images and pairs, with a plot", 160, 100,
        full=("--listed", "1000", "10000", "100000", "1000000", "--extracted", "1000", "4000",
              "--pairs", "10000", "100000"),
        quick=("--listed", "1000", "10000", "--extracted", "200", "--pairs", "10000", "--stored", "10000"),
    ),
    Program(
        "extract", "extract_speed", "images/s against the bare backbone, a plain loop, and decoding alone", 320, 260,
        full=("--rounds", "3", "--num-images", "256", "--num-decoded", "2048"),
        quick=("--rounds", "1", "--num-images", "96", "--num-decoded", "512"),
    ),
    Program("gpu", "gpu_plan", "extraction and scoring at full size on one GPU", 600, 600,
            quick=("--tiny",), device="cuda"),
)  # fmt: skip


def chosen(options: argparse.Namespace) -> list[Program]:
    names = [program.name for program in PROGRAMS]
    unknown = set(options.only or ()) - set(names)
    if unknown:
        raise SystemExit(f"unknown benchmark {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return [p for p in PROGRAMS if (p.name in options.only if options.only else p.device == options.device)]


def run(program: Program, options: argparse.Namespace) -> str:
    """One program in a process group of its own: `done`, or what went wrong."""
    arguments = program.quick if options.quick else program.full
    if program.module == "gpu_plan":
        arguments += ("--device", options.device)
    if options.quick:  # figures of a quick run are no results
        options.scratch.mkdir(parents=True, exist_ok=True)
        arguments += ("--out", str(options.scratch / f"{program.name}.md"))
    command = [sys.executable, "-m", f"benchmarks.{program.module}", *arguments]
    try:
        process = subprocess.Popen(command, start_new_session=True)
    except OSError as error:
        return f"FAILED to start: {error}"
    try:
        code = process.wait(program.limit_s)
    except subprocess.TimeoutExpired:
        end_group(process)
        return f"STOPPED at its limit of {program.limit_s} s; run it alone with --only {program.name}"
    except KeyboardInterrupt:
        end_group(process)
        raise
    return "done" if code == 0 else f"FAILED with exit code {code}"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Asks the program to end, so that it removes its files; ends it and its children when it does not."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def time_plan(programs: list[Program]) -> list[str]:
    """What will run, how long about, and when it is stopped at the latest."""
    lines = [f"{p.name:<9} about {p.expected_s:>3} s, at most {p.limit_s:>3} s   {p.about}" for p in programs]
    expected, limit = (sum(getattr(p, key) for p in programs) for key in ("expected_s", "limit_s"))
    return [*lines, f"{'together':<9} about {expected:>3} s, at most {limit:>3} s"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="small sizes, results into --scratch")
    parser.add_argument("--scratch", type=Path, default=Path("build/bench-quick"))
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    if options.list:
        for program in PROGRAMS:
            print(f"{program.name:<10} {program.device:<5} {program.about}")
        return 0
    programs, started, ended = chosen(options), time.monotonic(), []
    if not options.quick:  # of the full form; a quick run takes a fraction of it
        print("\n".join(time_plan(programs)), flush=True)
    for number, program in enumerate(programs, 1):
        began = time.monotonic()
        print(f"== {number} of {len(programs)}: {program.name}, {began - started:.0f} s after the start", flush=True)
        how = run(program, options)
        ended.append((program.name, how, time.monotonic() - began))
        print(f"== {program.name}: {how} after {ended[-1][2]:.0f} s", flush=True)
    print(f"all benchmarks: {time.monotonic() - started:.0f} s")
    print("\n".join(f"  {name:<9} {seconds:>4.0f} s  {how}" for name, how, seconds in ended))
    return 0 if all(how == "done" for _, how, _ in ended) else 1


if __name__ == "__main__":
    sys.exit(main())
