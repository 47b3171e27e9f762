"""Decodes rows from stdin to stdout in a process of its own; see attempts.py. Not a command for people."""

from __future__ import annotations

import os
import pickle
import sys

import pyarrow as pa

from edje_pipeline.pipeline.workers import ReadDecodeWorker


def main() -> None:
    """Pickled (job, Arrow stream of plan rows) on stdin, Arrow stream of the image batch on stdout."""
    # A library that prints must not end up inside the Arrow stream.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    job, data = pickle.load(sys.stdin.buffer)  # noqa: S301 (the parent is this program)
    table = ReadDecodeWorker(job).decode(pa.ipc.open_stream(data).read_all())
    with output, pa.ipc.new_stream(output, table.schema) as writer:
        writer.write_table(table)


if __name__ == "__main__":
    main()
