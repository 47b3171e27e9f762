"""`edje-pipeline rebuild` and `estimate`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from edje_pipeline.cli.app import app
from edje_pipeline.cli.common import ConfigOption, DebugOption, FormatOption, OutputFormat, QuietOption, emit, handled
from edje_pipeline.cli.extract import (
    BatchSizeOption,
    CodebookOption,
    CompileOption,
    DryRunOption,
    ExecutorOption,
    MaxRejectOption,
    ModelOption,
    NumCpusOption,
    NumGpusOption,
    PrecisionOption,
    RayAddressOption,
    RestartOption,
    ShardRowsOption,
    VariantOption,
)


@app.command()
@handled
def rebuild(
    index: Annotated[str, typer.Option("--index", help="Directory or URI of the index.")],
    model: ModelOption = None,
    variant: VariantOption = None,
    codebook: CodebookOption = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="Where the images are now. Default: as the manifest says.")
    ] = None,
    raw_index: Annotated[
        str | None, typer.Option("--raw-index", help="Index of the same images with --variant raw.")
    ] = None,
    from_images: Annotated[
        bool, typer.Option("--from-images", help="Read the images even where stored tokens would do.")
    ] = False,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Go on from stored tokens coarser than the new codec.")
    ] = False,
    batch_size: BatchSizeOption = None,
    shard_rows: ShardRowsOption = None,
    num_gpus: NumGpusOption = None,
    num_cpus: NumCpusOption = None,
    ray_address: RayAddressOption = None,
    executor: ExecutorOption = "ray",
    precision: PrecisionOption = "auto",
    compile_model: CompileOption = False,
    max_reject_fraction: MaxRejectOption = None,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    config: ConfigOption = None,
    quiet: QuietOption = False,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Make a new snapshot of an index for another model, adapter or codec.

    Does the least that the change asks for: another codec is written from the
    stored tokens, another adapter from stored vision tokens where there are
    any, and only a new backbone reads the images. The old snapshot stays.

    Examples:

        edje-pipeline rebuild --index photos.edje --variant 1kb

        edje-pipeline rebuild --index photos.edje --model NEW_MODEL --dry-run
    """
    from edje_pipeline.pipeline.image_run import ComputeOptions
    from edje_pipeline.pipeline.rebuild import RebuildConfig, run_rebuild
    from edje_pipeline.pipeline.runner import ExecutorOptions

    result = run_rebuild(
        RebuildConfig(
            index=index,
            model=model,
            variant=variant,
            codebook=codebook,
            corpus=corpus,
            raw_index=raw_index,
            from_images=from_images,
            allow_lossy=allow_lossy,
            compute=ComputeOptions(batch_size, shard_rows, precision, compile_model),
            executor=ExecutorOptions(executor, num_cpus, num_gpus, ray_address),
            max_reject_fraction=max_reject_fraction,
            restart=restart,
            dry_run=dry_run,
            quiet=quiet,
        )
    )
    emit(result, format)


@app.command()
@handled
def estimate(
    corpus: Annotated[
        str | None, typer.Argument(metavar="[CORPUS]", help="What would be extracted; counted and sampled.")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option("--num-images", min=1, help="Reckon with so many images instead of counting.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="As for extract.")] = None,
    variant: VariantOption = None,
    source: Annotated[
        Literal["auto", "folder", "webdataset", "parquet", "list"], typer.Option("--source", help="As for extract.")
    ] = "auto",
    num_probe: Annotated[int, typer.Option("--num-probe", min=1, help="Images to measure.")] = 48,
    batch_size: BatchSizeOption = None,
    num_gpus: NumGpusOption = None,
    num_cpus: NumCpusOption = None,
    precision: PrecisionOption = "auto",
    config: ConfigOption = None,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Say how long an extraction will take and how much it will store.

    Measures some dozens of the corpus's images on this machine, each stage
    alone. Without a corpus synthetic images are measured.

    Examples:

        edje-pipeline estimate photos/ --model MODEL_DIR

        edje-pipeline estimate --num-images 1000000000 --model MODEL_DIR --variant 1kb
    """
    from edje_pipeline.models.hub import default_model
    from edje_pipeline.pipeline.estimate import EstimateConfig, run_estimate
    from edje_pipeline.pipeline.image_run import ComputeOptions

    result = run_estimate(
        EstimateConfig(
            corpus=corpus,
            num_images=num_images,
            model=model or default_model(),
            variant=variant,
            source=source,
            num_probe=num_probe,
            num_gpus=num_gpus,
            num_cpus=num_cpus,
            compute=ComputeOptions(batch_size=batch_size, precision=precision),
        )
    )
    emit(result, format)
