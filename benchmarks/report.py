"""Result files of benchmarks: a dated Markdown file with the command, the versions and the machine.

lines = ["| a | b |", ...]
write_report("extract", "Extraction speed", lines, device="cpu")   -> benchmarks/results/extract_cpu2_2026-11-22.md
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "timm", "ray", "pyarrow", "pillow", "numpy")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(device: str = "cpu") -> str:
    """`cpu2`, or the GPU's name in file-name form."""
    if device == "cpu":
        return f"cpu{num_cores()}"
    import torch

    return torch.cuda.get_device_name().lower().replace("nvidia", "").strip().replace(" ", "-")


def versions(packages: Sequence[str] = PACKAGES) -> str:
    """`torch 2.9.0, ... Python 3.11.7, x86_64`, of what is installed."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} (not installed)")
    return ", ".join([*found, f"Python {platform.python_version()}, {platform.machine()}"])


def command(module: str | None = None) -> str:
    """The command line that runs this program again."""
    name = module or Path(sys.argv[0]).stem
    return " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]])


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    lines = [[str(cell) for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`median (min to max)`."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def write_report(
    theme: str,
    title: str,
    lines: Sequence[str],
    *,
    device: str = "cpu",
    out: Path | None = None,
    module: str | None = None,
    packages: Sequence[str] = PACKAGES,
    show: bool = True,
) -> Path:
    """Writes `results/<theme>_<hardware>_<date>.md` (or `out`), prints it unless told not to, returns its path."""
    today = datetime.now(tz=UTC).date().isoformat()
    path = out or RESULTS / f"{theme}_{hardware(device)}_{today}.md"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    head = [
        f"# {title}, {today}",
        "",
        f"    {command(module)}",
        "",
        f"{versions(packages)}; {num_cores()} cores, load averages when it ended {load}.",
        "",
    ]
    text = "\n".join([*head, *lines]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if show:
        print(text, flush=True)
    print(f"written to {path}", flush=True)
    return path
