"""How torch's threads wait for one another. No torch here: it must be said before torch is loaded."""

from __future__ import annotations

import os


def let_threads_sleep() -> None:
    """Threads of torch that wait for one another sleep instead of spinning; no effect once torch is loaded.

    Decoders and other programs need those cycles: with every core wanted twice, a forward pass took two to three times
    the CPU seconds (docs/performance.md). A value that the user set is kept.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
