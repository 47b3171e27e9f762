"""A run in its own process, for tests that kill it: `python crash_run.py INDEX NUM_IDS MODE`."""

from __future__ import annotations

import sys

from edje_pipeline.storage.location import Location
from edje_pipeline.storage.snapshots import delete
from tests.index_factory import run_extract


def main() -> None:
    index, num_ids, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if mode == "delete":
        print(delete(Location.parse(index), ["x0003", "x0007", "x0059"]).snapshot)
        return
    prefix = "y" if mode == "add" else "x"
    ids = [f"{prefix}{number:04d}" for number in range(num_ids)]
    if mode == "add":
        ids += ["x0003", "x0004"]  # replaces two rows
    manifest = run_extract(index, ids, mode=mode, rejected=[f"{prefix}0007", f"{prefix}0030"], part_rows=25)
    print(manifest.snapshot)


if __name__ == "__main__":
    main()
