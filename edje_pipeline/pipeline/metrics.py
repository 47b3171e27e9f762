"""What a run measures of itself: it travels in extra columns beside the rows and ends in the receipts.

Each row carries its share of the seconds and bytes that its batch cost, so that sums stay right
however blocks are cut and joined on the way; memory peaks are carried as they are and maximised.
"""

from __future__ import annotations

import resource
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from edje_pipeline.progress import format_bytes, format_duration

SUMMED = ("read_s", "decode_s", "encode_s", "encode_wait_s", "write_s", "bytes_read", "handed_on_bytes")
PEAKS = ("decode_rss_bytes", "encode_rss_bytes", "write_rss_bytes")
FIRSTS = ("encode_began_at",)
"""Epoch seconds; the earliest counts."""
PREFIX = "metric_"


def peak_rss_bytes() -> int:
    """Largest resident memory that this program ever had.

    `getrusage` is the fallback only: on Linux its figure survives exec, so that a worker would report
    the peak of the process it was forked from.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc: not Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def with_metrics(table: pa.Table, **values: float) -> pa.Table:
    """Adds metric columns: summed ones are split over the rows, peaks and times repeated."""
    num_rows = table.num_rows
    for name, value in values.items():
        share = value if name in (*PEAKS, *FIRSTS) else value / max(num_rows, 1)
        table = table.append_column(PREFIX + name, pa.array(np.full(num_rows, share, np.float64)))
    return table


def collect_metrics(table: pa.Table) -> dict[str, float]:
    """Sums, peaks and first times of the metric columns of a table."""
    found: dict[str, float] = {}
    for names, combine in ((SUMMED, pc.sum), (PEAKS, pc.max), (FIRSTS, pc.min)):
        for name in names:
            if PREFIX + name in table.column_names and table.num_rows:
                found[name] = float(combine(table.column(PREFIX + name)).as_py())
    return found


@dataclass
class RunMetrics:
    """The receipts' metrics added up, and the run's own clock."""

    num_workers: dict[str, int] = field(default_factory=dict)
    """Processes or threads that each stage may use at once."""
    values: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0
    """From the first unit handed out to the last receipt, start-up of workers included."""
    began_at: float = 0.0
    """Epoch seconds of the first unit handed out."""

    def add(self, stats: Mapping[str, float]) -> None:
        """Adds one receipt's metrics."""
        for name, value in stats.items():
            if name in PEAKS:
                self.values[name] = max(self.values.get(name, 0.0), value)
            elif name in FIRSTS:
                self.values[name] = min(self.values.get(name, value), value)
            else:
                self.values[name] = self.values.get(name, 0.0) + value

    def add_all(self, stats: Iterable[Mapping[str, float]]) -> None:
        """Adds several receipts' metrics."""
        for one in stats:
            self.add(one)

    @property
    def startup_s(self) -> float:
        """Until the first encoder had its model and its first images; 0 where nothing was encoded."""
        began = self.values.get("encode_began_at", self.began_at)
        return min(max(began - self.began_at, 0.0), self.wall_s)

    def utilisation(self) -> dict[str, float]:
        """Share of the run that each stage was busy, 0 to 1 and a little above when processes overlap."""
        busy = {
            "decode": self.values.get("read_s", 0.0) + self.values.get("decode_s", 0.0),
            "encode": self.values.get("encode_s", 0.0),
            "write": self.values.get("write_s", 0.0),
        }
        wall = max(self.wall_s, 1e-9)
        return {name: busy[name] / wall / max(self.num_workers.get(name, 1), 1) for name in busy}

    def slowest_stage(self) -> str:
        """The stage that was busy longest, or `waiting` when none was busy half of the time."""
        shares = self.utilisation()
        name = max(shares, key=lambda key: shares[key])
        return name if shares[name] >= 0.5 else "waiting"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; seconds, bytes."""
        return {
            **{name: round(value, 4) for name, value in sorted(self.values.items()) if name not in FIRSTS},
            "wall_s": round(self.wall_s, 3),
            "startup_s": round(self.startup_s, 3),
            "utilisation": {name: round(share, 4) for name, share in self.utilisation().items()},
            "slowest_stage": self.slowest_stage(),
            "num_workers": dict(self.num_workers),
            "driver_rss_bytes": peak_rss_bytes(),
        }

    def to_lines(self) -> list[str]:
        """For the final summary, at most 80 columns."""
        shares = self.utilisation()
        parts = ", ".join(f"{name} {shares[name]:.0%}" for name in ("decode", "encode", "write"))
        seconds = ", ".join(
            f"{label} {format_duration(self.values.get(key, 0.0))}"
            for label, key in (
                ("read", "read_s"),
                ("decode", "decode_s"),
                ("encode", "encode_s"),
                ("write", "write_s"),
                ("encoder waiting", "encode_wait_s"),
            )
        )
        memory = ", ".join(
            f"{name.removesuffix('_rss_bytes')} {format_bytes(self.values[name])}"
            for name in PEAKS
            if name in self.values
        )
        table = {
            "slowest stage": f"{self.slowest_stage()} (busy: {parts})",
            "stage seconds": seconds,
            "bytes": f"read {format_bytes(self.values.get('bytes_read', 0.0))}, "
            f"between the stages {format_bytes(self.values.get('handed_on_bytes', 0.0))}",
            "peak memory": f"driver {format_bytes(peak_rss_bytes())}" + (f", {memory}" if memory else ""),
        }
        lines = []
        for label, value in table.items():
            first, *rest = textwrap.wrap(value, 62)
            lines += [f"{label:<15} {first}", *(" " * 16 + line for line in rest)]
        return lines
