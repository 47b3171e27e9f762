"""The command `score`: what it does before the run begins."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from edje_pipeline import cli
assert "torch" not in sys.modules
try:
    sys.argv = ["edje-pipeline", "score", "--index", "nowhere", "--queries", "q", "--candidates", "c", "--out", "o"]
    cli.main()
except SystemExit:
    pass
import os
assert "torch" in sys.modules
print(os.environ["OMP_WAIT_POLICY"])
"""


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_threads_sleep_unless_the_user_says_otherwise(given: str | None, expected: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"OMP_WAIT_POLICY": given} if given else {}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == expected
