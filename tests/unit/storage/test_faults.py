"""The named crash points: the list is the truth about `storage`, and a point kills at its count only."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from edje_pipeline.storage import faults

STORAGE = Path(faults.__file__).parent


def test_the_list_names_every_point_of_storage() -> None:
    found = set()
    for path in STORAGE.rglob("*.py"):
        if path.name != "faults.py":
            found.update(re.findall(r'crash_point\("([a-z_.]+)"\)', path.read_text()))
    assert found == set(faults.POINTS)


def test_kills_at_the_count_and_not_before() -> None:
    code = (
        "from edje_pipeline.storage.faults import crash_point\n"
        "for number in range(4):\n"
        "    crash_point('other'); crash_point('here'); print(number, flush=True)\n"
    )
    environment = {**os.environ, "EDJE_CRASH_AT": "here:3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -9
    assert done.stdout.split() == ["0", "1"]
