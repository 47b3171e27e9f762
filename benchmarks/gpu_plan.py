"""The GPU plan: extraction and scoring at full size on one 80 GB GPU, unattended, within ten minutes.

    python -m benchmarks.gpu_plan                          both, on the GPU
    python -m benchmarks.gpu_plan --only extract
    python -m benchmarks.gpu_plan --device cpu --tiny      toy sizes, to see that the programs work

Targets: extraction at 0.90 of the bare compiled bfloat16 backbone, scoring at 100,000 pairs/s.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

PARTS = ("extract", "score")
TOTAL_S = 560
LIMIT_S = {"extract": 300, "score": TOTAL_S}
"""Scoring gets what extraction leaves. Each part writes what it has after every step, so that an end loses little."""
GRACE_S = 20
"""Between the last moment at which a part begins a step and its end."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--out", type=Path, help="folder for the result files instead of benchmarks/results")
    options = parser.parse_args(arguments)
    failed = []
    deadline = time.monotonic() + TOTAL_S
    for part in PARTS:
        module = f"benchmarks.gpu_plan_{part}"
        if options.only not in (None, part) or importlib.util.find_spec(module) is None:
            continue
        command = [sys.executable, "-m", module, "--device", options.device]
        command += ["--tiny"] if options.tiny else []
        command += ["--out", str(options.out / f"gpu_plan_{part}.md")] if options.out else []
        limit_s = min(LIMIT_S[part], deadline - time.monotonic())
        command += ["--limit-s", f"{limit_s - GRACE_S:.0f}"]
        try:
            code = subprocess.run(command, check=False, timeout=limit_s).returncode
        except subprocess.TimeoutExpired:
            print(f"{part}: ended after {limit_s:.0f} s; its file has what was measured until then")
            code = 1
        failed += [part] if code else []
    print(f"GPU plan: {'FAILED: ' + ', '.join(failed) if failed else 'done'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
