"""Commands on a published index: verify, inspect, rollback, prune, delete."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from edje_pipeline.cli.app import app
from edje_pipeline.cli.common import DebugOption, FormatOption, IndexArgument, OutputFormat, QuietOption, emit, handled

SnapshotOption = Annotated[str | None, typer.Option("--snapshot", help="Another snapshot than the current one.")]


@app.command()
@handled
def verify(
    index: IndexArgument,
    quick: Annotated[bool, typer.Option("--quick", help="Sizes, footers and lists only; no full read.")] = False,
    snapshot: SnapshotOption = None,
    quiet: QuietOption = False,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Prove that an index is whole, or list every problem.

    Reads every byte: checksums, counts, unique ids, finite tokens, decodable codes, the id lookup,
    the rejects, files that should not be there. Exit code 1 when anything is wrong.

    Examples:

        edje-pipeline verify photos.index

        edje-pipeline verify s3://bucket/photos.index --quick --format json
    """
    from edje_pipeline.progress import ProgressReport
    from edje_pipeline.storage.location import Location
    from edje_pipeline.storage.verify import verify as run

    display = partial(ProgressReport, "verify", unit="files", quiet=quiet or format is OutputFormat.json)
    emit(run(Location.parse(index), snapshot=snapshot, quick=quick, progress=display), format)


@app.command()
@handled
def inspect(
    index: IndexArgument,
    snapshot: SnapshotOption = None,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Show what an index holds, what made it, and how many bytes it takes.

    Examples:

        edje-pipeline inspect photos.index

        edje-pipeline inspect photos.index --format json
    """
    from edje_pipeline.storage.inspect import inspect as run
    from edje_pipeline.storage.location import Location

    emit(run(Location.parse(index), snapshot), format)


@app.command()
@handled
def rollback(
    index: IndexArgument,
    to: Annotated[str | None, typer.Option("--to", help="Snapshot to return to; the parent unless given.")] = None,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Return to an earlier snapshot. Nothing is removed, so it can be undone.

    Examples:

        edje-pipeline rollback photos.index

        edje-pipeline rollback photos.index --to 000002-20260102T030405-0a1b2c3d
    """
    from edje_pipeline.storage.location import Location
    from edje_pipeline.storage.snapshots import rollback as run

    emit(run(Location.parse(index), to), format)


@app.command()
@handled
def prune(
    index: IndexArgument,
    keep: Annotated[int, typer.Option("--keep", min=0, help="Earlier snapshots to keep.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Drop earlier snapshots and every file that no remaining one needs.

    Readers that have a dropped snapshot open lose it.

    Examples:

        edje-pipeline prune photos.index --dry-run

        edje-pipeline prune photos.index --keep 1
    """
    from edje_pipeline.storage.location import Location
    from edje_pipeline.storage.snapshots import prune as run

    emit(run(Location.parse(index), keep=keep, dry_run=dry_run), format)


@app.command()
@handled
def delete(
    index: IndexArgument,
    ids: Annotated[str, typer.Option("--ids", help="File of image_ids: text, CSV, JSONL or Parquet; .gz, .zst.")],
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Take images out of an index by their ids.

    Makes a new snapshot with tombstones; no shard is rewritten. Exit code 3 when some ids are
    not in the index.

    Examples:

        edje-pipeline delete photos.index --ids gone.txt
    """
    from edje_pipeline.storage.location import Location
    from edje_pipeline.storage.snapshots import delete as run
    from edje_pipeline.storage.text_inputs import read_ids

    emit(run(Location.parse(index), read_ids(ids).column("image_id")), format)
