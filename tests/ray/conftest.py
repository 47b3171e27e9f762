"""One Ray cluster for the session: commands under test join it with --ray-address, so that none waits for its start."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Address of a head node with two CPUs and no dashboard, stopped by the ids of its own processes."""
    port = _free_port()
    # Unix socket paths must stay short.
    folder = tempfile.mkdtemp(prefix="edjeray", dir="/tmp")
    started = subprocess.Popen(
        [
            Path(sys.executable).parent / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
            "--num-gpus=0", "--include-dashboard=false", "--object-store-memory=200000000", f"--temp-dir={folder}",
            "--disable-usage-stats", "--node-ip-address=127.0.0.1",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_enable_metrics_collection": "0"},
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert started.poll() is None, "ray start ended"
            assert time.monotonic() < end, "ray start takes too long"
            time.sleep(0.2)
        time.sleep(3)  # the raylet registers after the port is open
        yield f"127.0.0.1:{port}"
    finally:
        children = psutil.Process(started.pid).children(recursive=True) if started.poll() is None else []
        started.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(20)
        for child in [*children, *([psutil.Process(started.pid)] if started.poll() is None else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        shutil.rmtree(folder, ignore_errors=True)
