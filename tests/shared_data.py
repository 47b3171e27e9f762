"""Real images for tests that want them; a test that does is skipped where they are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_path(*parts: str) -> Path:
    """Path below the folder of real data, or a skip that says what was missing."""
    root = Path(os.environ.get("EDJE_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data not here: {'/'.join(parts)} (set EDJE_TEST_DATA to its folder)")
    return path
