"""Runs the benchmarks one after the other; each writes a dated file into benchmarks/results/.

python -m benchmarks.run                    everything, under 15 minutes on 2 cores
python -m benchmarks.run --quick            a few minutes, small sizes: do the programs work?
python -m benchmarks.run --only extract score
python -m benchmarks.run --device cuda      the GPU plan instead, under ten minutes on one 80 GB GPU
python -m benchmarks.run --list
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Program:
    """One benchmark and its arguments."""

    name: str
    module: str
    about: str
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    device: str = "cpu"
    limit_s: int = 600


PROGRAMS = (
    Program(
        "extract", "extract_speed", "images/s against the bare backbone, a plain loop, and decoding alone",
        full=("--rounds", "3", "--num-images", "256", "--num-decoded", "2048"),
        quick=("--rounds", "1", "--num-images", "96", "--num-decoded", "512"),
    ),
    Program(
        "score", "score_speed", "pairs/s against the authors' path and padded BERT",
        quick=("--rounds", "1", "--queries", "3"),
    ),
    Program(
        "growth", "growth", "seconds and driver memory against images and pairs, with a plot",
        full=("--listed", "1000", "10000", "100000", "1000000", "--extracted", "1000", "4000",
              "--pairs", "10000", "100000"),
        quick=("--listed", "1000", "10000", "--extracted", "200", "--pairs", "10000", "--stored", "10000"),
    ),
    Program("decoders", "decoders", "JPEG decoders: CPU time and equality of pixels", quick=("--rounds", "1")),
    Program(
        "storage", "storage_overhead", "bytes an image beyond the payload",
        full=("--rows-1kb", "100000", "--rows-49kb", "4000"), quick=("--rows-1kb", "10000", "--rows-49kb", "1000"),
    ),
    Program("gpu", "gpu_plan", "extraction and scoring at full size on one GPU", quick=("--tiny",), device="cuda"),
)  # fmt: skip


def chosen(options: argparse.Namespace) -> list[Program]:
    names = [program.name for program in PROGRAMS]
    unknown = set(options.only or ()) - set(names)
    if unknown:
        raise SystemExit(f"unknown benchmark {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    found = [p for p in PROGRAMS if (p.name in options.only if options.only else p.device == options.device)]
    return [p for p in found if importlib.util.find_spec(f"benchmarks.{p.module}") is not None]


def run(program: Program, options: argparse.Namespace) -> bool:
    """One program in a process of its own; False when it failed or took too long."""
    arguments = program.quick if options.quick else program.full
    if program.module == "gpu_plan":
        arguments += ("--device", options.device)
    if options.quick:  # figures of a quick run are no results
        options.scratch.mkdir(parents=True, exist_ok=True)
        arguments += ("--out", str(options.scratch / f"{program.name}.md"))
    print(f"== {program.name}: {program.about}", flush=True)
    started = time.monotonic()
    try:
        code = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{program.module}", *arguments], check=False, timeout=program.limit_s
        ).returncode
    except subprocess.TimeoutExpired:
        code = -1
    print(f"== {program.name} {'done' if code == 0 else 'FAILED'} in {time.monotonic() - started:.0f} s", flush=True)
    return code == 0


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
    started = time.monotonic()
    failed = [program.name for program in chosen(options) if not run(program, options)]
    print(f"all benchmarks: {time.monotonic() - started:.0f} s" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
