"""Named points at which a test may kill the process, to prove that recovery works there.

`EDJE_CRASH_AT="publish.swapped:2"` kills the process with SIGKILL the second time it passes
`crash_point("publish.swapped")`. Without the variable a point costs one comparison.
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn

ENV_NAME = "EDJE_CRASH_AT"

POINTS = (
    "staging.created",
    "listing.batch",
    "listing.done",
    "write.begin",
    "write.middle",
    "write.done",
    "journal.begin",
    "journal.done",
    "publish.begin",
    "publish.lookup",
    "publish.rejects",
    "publish.lists",
    "publish.head",
    "publish.swapped",
    "publish.cleaning",
    "publish.cleaned",
)
"""The points of `storage`, in the order of a run; the pipeline names its own (`stage.*`, `score.*`)."""


def _target() -> tuple[str, int] | None:
    text = os.environ.get(ENV_NAME, "")
    if not text:
        return None
    name, _, count = text.partition(":")
    return name, int(count or 1)


_armed = _target()
_passed: dict[str, int] = {}


def crash_point(name: str) -> None:
    """Ends the process without any cleanup when the environment asks for it here."""
    if _armed is None or _armed[0] != name:
        return
    _passed[name] = _passed.get(name, 0) + 1
    if _passed[name] == _armed[1]:
        _die()


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(137)  # unreachable where SIGKILL exists
