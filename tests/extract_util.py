"""What the tests of extraction share: a small corpus, the command line as a process, and the comparison of indexes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.verify import verify

# The application as the console script starts it; groups register themselves when imported.
COMMAND = """
import edje_pipeline.cli.app as cli
for group in ("extract", "index", "rebuild"):
    try:
        __import__(f"edje_pipeline.cli.{group}")
    except ModuleNotFoundError as error:
        assert error.name == f"edje_pipeline.cli.{group}", error
cli.main()
"""


def write_image(path: Path, seed: int, size: tuple[int, int] = (48, 40)) -> None:
    """A real JPEG whose content depends on the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


def write_corpus(root: Path, num_images: int, num_bad: int = 0) -> Path:
    """`num_images` JPEGs in two folders, and `num_bad` text files that call themselves JPEG."""
    for number in range(num_images):
        write_image(root / ("even" if number % 2 == 0 else "odd") / f"{number:04d}.jpg", number)
    for number in range(num_bad):
        (root / f"bad{number}.jpg").write_text("this is no image")
    return root


@dataclass
class Ended:
    """A finished command."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON it printed, and nothing else."""
        assert self.stdout.startswith("{"), self.stdout[:2000]
        return json.loads(self.stdout)

    @property
    def error_line(self) -> str:
        """The one line that says what went wrong."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, self.stderr
        assert "Traceback" not in self.stderr, self.stderr
        return lines[0]


def start_cli(*args: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """The command in a process group of its own, so that a test can kill all of it."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", **(env or {})},
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> Ended:
    """Waits for the end; a command that hangs is killed and fails the test."""
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_group(process)
        stdout, stderr = process.communicate()
        raise AssertionError(f"the command did not end within {timeout_s} s:\n{stdout}\n{stderr}") from None
    return Ended(process.returncode, stdout, stderr)


def run_cli(*args: object, env: dict[str, str] | None = None, timeout_s: float = 120) -> Ended:
    """Runs the command to its end."""
    return finish(start_cli(*args, env=env), timeout_s)


def kill_group(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    """A signal to the command and everything it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 90) -> bool:
    """Polls; False when the process ended first."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return condition()
        time.sleep(0.02)
    kill_group(process)
    raise AssertionError(f"nothing happened within {timeout_s} s: {process.communicate()}")


def journalled_rows(index: Path) -> int:
    """Rows of the receipts in staging, read from the files themselves."""
    num = 0
    for path in index.glob("staging/*/receipts/*.json"):
        if path.stem.isdigit():
            for receipt in json.loads(path.read_text())["receipts"]:
                num += sum(end - start for start, end in receipt["row_ranges"])
    return num


def contents(index: Path) -> dict[str, str]:
    """image_id -> sha256 of the stored payload and embedding."""
    opened = Index.open(index)
    ids = opened.ids()
    assert len(ids) == len(set(ids)) == len(opened)
    found = {}
    for shard in opened.iter_shards():
        for _, table in shard.tables():
            for row in table.to_pylist():
                found[row["image_id"]] = hashlib.sha256(row["tokens"] + row["embedding"]).hexdigest()
    assert set(found) == set(ids)
    return found


def assert_sound(index: Path, expected: dict[str, str], num_rejected: int) -> None:
    """The index holds exactly what it should, and nothing lies about that the format does not name."""
    assert contents(index) == expected
    opened = Index.open(index)
    counts = opened.manifest.counts
    assert counts.listed == counts.accepted + counts.rejected == len(expected) + num_rejected
    snapshots = [Index.open(index, path.name) for path in (index / "snapshots").iterdir()]
    named = {Path(entry.path).name for snapshot in snapshots for entry in snapshot.shards}
    assert {path.name for path in (index / "shards").iterdir()} == named
    leftovers = [p for p in index.rglob("*") if p.is_file() and (p.name.startswith(".tmp") or "staging" in p.parts)]
    assert leftovers == []
    assert {path.name for path in index.iterdir()} <= {
        "manifest.json", "snapshots", "shards", "rejects", "codecs", "staging", ".lock",
    }  # fmt: skip
    report = verify(Location.parse(index))
    assert report.exit_code == 0, report.to_text()
