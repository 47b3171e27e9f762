"""How torch's threads wait for one another, and where threads stand when a run seems to hang. No torch here."""

from __future__ import annotations

import faulthandler
import os
from pathlib import Path

STACKS_EVERY_S = 60.0


def let_threads_sleep() -> None:
    """Threads of torch that wait for one another sleep instead of spinning; no effect once torch is loaded.

    Decoders and other programs need those cycles: with every core wanted twice, a forward pass took two to three times
    the CPU seconds (docs/performance.md). A value that the user set is kept.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def dump_stacks_if_asked() -> None:
    """With EDJE_STACKS_DIR=DIR: every minute, where each thread of this process stands, into DIR/stacks-PID.txt.

    A worker that compiles, waits for a device or starts again and again says nothing else of itself.
    """
    folder = os.environ.get("EDJE_STACKS_DIR")
    if not folder:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / f"stacks-{os.getpid()}.txt"
    # A descriptor that stays open until the process ends.
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    faulthandler.dump_traceback_later(STACKS_EVERY_S, repeat=True, file=target)
