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
from pathlib import Path

PARTS = ("extract", "score")
LIMIT_S = 300


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--out", type=Path, help="folder for the result files instead of benchmarks/results")
    options = parser.parse_args(arguments)
    failed = []
    for part in PARTS:
        module = f"benchmarks.gpu_plan_{part}"
        if options.only not in (None, part) or importlib.util.find_spec(module) is None:
            continue
        command = [sys.executable, "-m", module, "--device", options.device]
        command += ["--tiny"] if options.tiny else []
        command += ["--out", str(options.out / f"gpu_plan_{part}.md")] if options.out else []
        try:
            code = subprocess.run(command, check=False, timeout=LIMIT_S).returncode
        except subprocess.TimeoutExpired:
            print(f"{part}: ended after {LIMIT_S} s")
            code = 1
        failed += [part] if code else []
    print(f"GPU plan: {'FAILED: ' + ', '.join(failed) if failed else 'done'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
