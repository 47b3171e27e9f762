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


def _own_ip() -> str:
    """The address that ray takes for this machine, on both sides."""
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


def _is_open(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Address of a head node with two CPUs and no dashboard, stopped by the ids of its own processes."""
    port, own_ip = _free_port(), _own_ip()
    # Unix socket paths must stay short.
    folder = tempfile.mkdtemp(prefix="edjeray", dir="/tmp")
    started = subprocess.Popen(
        [
            Path(sys.executable).parent / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
            "--num-gpus=0", "--include-dashboard=false", "--object-store-memory=200000000", f"--temp-dir={folder}",
            "--disable-usage-stats", f"--node-ip-address={own_ip}",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_enable_metrics_collection": "0", "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while True:
            if _is_open(own_ip, port):
                break
            assert started.poll() is None, "ray start ended"
            assert time.monotonic() < end, "ray start takes too long"
            time.sleep(0.2)
        time.sleep(3)  # the raylet registers after the port is open
        yield f"{own_ip}:{port}"
    finally:
        children = psutil.Process(started.pid).children(recursive=True) if started.poll() is None else []
        started.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(20)
        for child in [*children, *([psutil.Process(started.pid)] if started.poll() is None else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        started.wait(20)
        shutil.rmtree(folder, ignore_errors=True)
