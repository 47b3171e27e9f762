"""Progress of a long run: a bar with rate and ETA on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


def format_duration(seconds: float) -> str:
    """`42 s`, `3 m 05 s`, `2 h 10 m`, `3 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, secs = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {secs:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} m"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def format_bytes(num_bytes: float) -> str:
    """`812 B`, `49.2 kB`, `1.2 GB`: powers of 1000, as disks and the paper count."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} PB"


@dataclass
class ProgressReport:
    """Counts one kind of thing up to `total` and shows it; `quiet` shows nothing."""

    label: str
    total: int
    unit: str = "images"
    quiet: bool = False
    plain_every_s: float = 10.0
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    done: int = 0
    _notes: dict[str, int] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)
    _skipped: int = 0
    _last_line: float = 0.0
    _shown: int = -1
    _bar: Progress | None = None
    _task: TaskID | None = None

    def start(self, *, skipped: int = 0) -> None:
        """Begins the clock. `skipped` things were done by an earlier run and do not count for the rate."""
        self._started = self._last_line = time.monotonic()
        self.done = self._skipped = skipped
        if self.quiet:
            return
        if self.stream.isatty():
            console = Console(file=self.stream)
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=18),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                console=console,
                transient=False,
            )
            self._task = self._bar.add_task(self.label, total=self.total or None, completed=skipped, detail="")
            self._bar.start()
        elif skipped:
            self._write(f"{self.label}: {skipped:,} of {self.total:,} {self.unit} were done before")

    def update(self, num_new: int, **notes: int) -> None:
        """Adds finished things; `notes` are running counts worth showing (`rejected=3`)."""
        self.done += num_new
        self._notes.update(notes)
        if self.quiet:
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, detail=self._detail())
        elif time.monotonic() - self._last_line >= self.plain_every_s:
            self._last_line = time.monotonic()
            self._write(f"{self.label}: {self._counts()} {self.unit}, {self._detail()}")

    def stop(self) -> None:
        """Ends the display; the counts stay."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif not self.quiet:
            self._write(f"{self.label}: {self._counts()} {self.unit}, {self._detail()}")

    @property
    def rate(self) -> float:
        """Things per second since `start`, those of earlier runs left out."""
        return (self.done - self._skipped) / max(time.monotonic() - self._started, 1e-9)

    def _counts(self) -> str:
        """`12/60`, or `12` while the total is not known (0)."""
        return f"{self.done:,}/{self.total:,}" if self.total else f"{self.done:,}"

    def _detail(self) -> str:
        left = max(self.total - self.done, 0)
        eta = f", ETA {format_duration(left / self.rate)}" if self.rate > 0 and left else ""
        notes = "".join(f", {count:,} {name.replace('_', ' ')}" for name, count in self._notes.items() if count)
        return f"{self.rate:,.1f}/s{eta}{notes}"

    def _write(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()


@contextmanager
def progress(
    label: str, total: int, *, unit: str = "images", quiet: bool = False, skipped: int = 0
) -> Iterator[ProgressReport]:
    """Shows a `ProgressReport` for the length of a with block."""
    report = ProgressReport(label, total, unit=unit, quiet=quiet)
    report.start(skipped=skipped)
    try:
        yield report
    finally:
        report.stop()
