"""An image that kills the decoder must cost one image, not the run.

A decode task leaves a marker while it works on a unit. A marker found at the start means that an
earlier attempt died on this unit (a crash in a decoder library, or the whole process was killed): the
unit is then decoded in child processes, halved until the image that kills is alone, and that image
becomes a reject row.
"""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

import pyarrow as pa

from edje_pipeline.errors import WorkerError
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.schema import RejectReason

if TYPE_CHECKING:
    from edje_pipeline.pipeline.job import Job

FOLDER = "attempts"
SECONDS_A_ROW = 60.0
"""Patience with a child before it is ended: a decoder that hangs is as bad as one that crashes."""


class Attempt:
    """A with block around the work on one unit. After an exception that Python could raise no marker stays."""

    def __init__(self, plan_dir: Location, name: str) -> None:
        self._marker = plan_dir.child(FOLDER, name)
        self.crashed_before = self._marker.exists()

    def __enter__(self) -> Self:
        if not self.crashed_before:
            self._marker.write_bytes(b"")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._marker.delete_file()

    def decode_apart(self, rows: pa.Table, job: Job) -> pa.Table:
        """As `ReadDecodeWorker.decode`, outside this process."""
        return decode_apart(rows, job)


def decode_apart(rows: pa.Table, job: Job) -> pa.Table:
    """Decodes plan rows in child processes; a row whose child dies alone is rejected as corrupt."""
    table, death = _run_child(rows, job)
    if table is not None:
        return table
    if rows.num_rows > 1:
        middle = rows.num_rows // 2
        halves = [decode_apart(rows.slice(0, middle), job), decode_apart(rows.slice(middle), job)]
        return pa.concat_tables(halves).combine_chunks()
    return _reject_alone(rows, job, death)


def _run_child(rows: pa.Table, job: Job) -> tuple[pa.Table | None, str]:
    """The decoded rows, or None and how the child died."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    # The job comes from this very process; nothing from outside is unpickled.
    message = pickle.dumps((job, sink.getvalue().to_pybytes()))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edje_pipeline.pipeline.decode_child"],
            input=message,
            capture_output=True,
            check=False,
            timeout=SECONDS_A_ROW * rows.num_rows,
        )
    except subprocess.TimeoutExpired:
        return None, f"took longer than {SECONDS_A_ROW:.0f} s"
    if done.returncode == 0:
        return pa.ipc.open_stream(done.stdout).read_all(), ""
    if done.returncode < 0:
        return None, f"crashed with {signal.Signals(-done.returncode).name}"
    raise WorkerError(
        "a decode process could not do its work: "
        + (done.stderr.decode(errors="replace").strip()[-400:] or "no message")
    )


def _reject_alone(rows: pa.Table, job: Job, death: str) -> pa.Table:
    from edje_pipeline.pipeline.metrics import with_metrics
    from edje_pipeline.stages.decode import decode_batch
    from edje_pipeline.storage.sources import ReadFailure

    assert job.preprocess is not None
    failure = ReadFailure(RejectReason.CORRUPT, f"the decoder {death}")
    table = decode_batch(rows, [failure], job.preprocess, max_pixels=job.max_pixels, max_bytes=job.max_bytes)
    # The same columns as its neighbours.
    return with_metrics(table, read_s=0.0, decode_s=0.0, bytes_read=0, decode_rss_bytes=0)
