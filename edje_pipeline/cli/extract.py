"""`edje-pipeline extract`, `retry-rejects`: from images to an index."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from edje_pipeline.cli.app import app
from edje_pipeline.cli.common import (
    ConfigOption,
    DebugOption,
    FormatOption,
    IndexArgument,
    IndexOption,
    OutputFormat,
    QuietOption,
    emit,
    handled,
)

_CORPUS, _MODEL, _COMPUTE, _RUN = "Corpus", "Model", "Compute", "Run"

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Directory, hf:org/name[@rev] or bundled name. Default: the index's own.",
        rich_help_panel=_MODEL,
    ),
]
VariantOption = Annotated[
    str | None,
    typer.Option(
        "--variant",
        help="49kb, 1kb, int8, int4, local, raw, or a codec (pq48). Default: the index's own, else 49kb.",
        rich_help_panel=_MODEL,
    ),
]
CodebookOption = Annotated[
    str | None,
    typer.Option(
        "--codebook", help="Codebook of train-codec. Default: train one on the first images.", rich_help_panel=_MODEL
    ),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option("--batch-size", help="Images a forward pass. Default: CPU 16, GPU 64.", rich_help_panel=_COMPUTE),
]
ShardRowsOption = Annotated[
    int | None,
    typer.Option(
        "--shard-rows", help="Images a shard. Default: 256 MB of tokens or a 64th of the run.", rich_help_panel=_COMPUTE
    ),
]
NumGpusOption = Annotated[
    int | None, typer.Option("--num-gpus", min=0, help="Default: all there are.", rich_help_panel=_COMPUTE)
]
NumCpusOption = Annotated[
    int | None, typer.Option("--num-cpus", min=1, help="Default: all there are.", rich_help_panel=_COMPUTE)
]
RayAddressOption = Annotated[
    str | None,
    typer.Option("--ray-address", help="Join a running Ray cluster instead of starting one.", rich_help_panel=_COMPUTE),
]
ExecutorOption = Annotated[
    Literal["ray", "local"],
    typer.Option("--executor", help="local: this process only, no Ray; for small corpora.", rich_help_panel=_COMPUTE),
]
PrecisionOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--precision", help="auto: bfloat16 on a GPU, float32 on a CPU.", rich_help_panel=_COMPUTE),
]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Run the model through torch.compile.", rich_help_panel=_COMPUTE)
]
MaxPixelsOption = Annotated[
    int, typer.Option("--max-pixels", help="Reject larger images by their header.", rich_help_panel=_RUN)
]
MaxBytesOption = Annotated[int, typer.Option("--max-bytes", help="Reject larger files.", rich_help_panel=_RUN)]
MaxRejectOption = Annotated[
    float | None,
    typer.Option("--max-reject-fraction", help="Publish nothing above this share of rejects.", rich_help_panel=_RUN),
]
WarnRejectOption = Annotated[
    float,
    typer.Option("--warn-reject-fraction", help="Exit code 3 above this share of rejects.", rich_help_panel=_RUN),
]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Discard an unfinished run instead of resuming it.", rich_help_panel=_RUN)
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="List, say what would be done, write nothing.", rich_help_panel=_RUN)
]


ReducedJpegOption = Annotated[
    bool,
    typer.Option(
        "--reduced-jpeg",
        help="Decode large JPEGs at 1/2, 1/4 or 1/8: faster, slightly other pixels.",
        rich_help_panel=_COMPUTE,
    ),
]


@app.command()
@handled
def extract(
    corpus: Annotated[
        str, typer.Argument(metavar="CORPUS", help="Folder, tars, Parquet files or list; path, URI or pattern.")
    ],
    index: IndexOption,
    model: ModelOption = None,
    variant: VariantOption = None,
    codebook: CodebookOption = None,
    source: Annotated[
        Literal["auto", "folder", "webdataset", "parquet", "list"],
        typer.Option("--source", help="What the corpus is.", rich_help_panel=_CORPUS),
    ] = "auto",
    id_column: Annotated[
        str | None, typer.Option("--id-column", help="Column with the image_id.", rich_help_panel=_CORPUS)
    ] = None,
    image_column: Annotated[
        str | None,
        typer.Option("--image-column", help="Column with image bytes, paths or URIs.", rich_help_panel=_CORPUS),
    ] = None,
    suffixes: Annotated[
        str | None,
        typer.Option("--suffixes", help="Files to take: jpg,png or all. Default: images.", rich_help_panel=_CORPUS),
    ] = None,
    qualify_ids: Annotated[
        bool, typer.Option("--qualify-ids", help="Put the tar's name before its keys.", rich_help_panel=_CORPUS)
    ] = False,
    on_duplicate: Annotated[
        Literal["error", "first"],
        typer.Option("--on-duplicate", help="When one image_id stands twice.", rich_help_panel=_CORPUS),
    ] = "error",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Take only the first images.", rich_help_panel=_CORPUS)
    ] = None,
    prune_missing: Annotated[
        bool,
        typer.Option("--prune-missing", help="Drop images that the corpus no longer has.", rich_help_panel=_CORPUS),
    ] = False,
    batch_size: BatchSizeOption = None,
    shard_rows: ShardRowsOption = None,
    num_gpus: NumGpusOption = None,
    num_cpus: NumCpusOption = None,
    ray_address: RayAddressOption = None,
    executor: ExecutorOption = "ray",
    precision: PrecisionOption = "auto",
    compile_model: CompileOption = False,
    reduced_jpeg: ReducedJpegOption = False,
    max_pixels: MaxPixelsOption = 89_478_485,
    max_bytes: MaxBytesOption = 256 << 20,
    max_reject_fraction: MaxRejectOption = None,
    warn_reject_fraction: WarnRejectOption = 0.0,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    config: ConfigOption = None,
    quiet: QuietOption = False,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Encode a corpus of images into an index, or add to one.

    Interrupted? The same command again goes on where it stopped. Onto an index
    that exists, only images that are new or changed are encoded.

    Exit codes: 0 done, 1 failed, 2 usage, 3 done with rejects, 130 interrupted.

    Examples:

        edje-pipeline extract photos/ --index photos.edje --model MODEL_DIR

        edje-pipeline extract 's3://b/{0000..0099}.tar' --index s3://b/i --variant 1kb

        edje-pipeline extract photos/ --index photos.edje --prune-missing
    """
    from edje_pipeline.pipeline.extract import ExtractConfig, run_extract
    from edje_pipeline.pipeline.image_run import ComputeOptions
    from edje_pipeline.pipeline.runner import ExecutorOptions
    from edje_pipeline.storage.sources import SourceOptions

    options = SourceOptions(
        id_column=id_column,
        image_column=image_column,
        suffixes=tuple(part.strip() for part in suffixes.split(",")) if suffixes else None,
        qualify_ids=qualify_ids,
    )
    result = run_extract(
        ExtractConfig(
            corpus=corpus,
            index=index,
            model=model,
            variant=variant,
            codebook=codebook,
            source=source,
            source_options=options,
            on_duplicate=on_duplicate,
            limit=limit,
            prune_missing=prune_missing,
            compute=ComputeOptions(
                batch_size, shard_rows, precision, compile_model, max_pixels, max_bytes, reduced_jpeg
            ),
            executor=ExecutorOptions(executor, num_cpus, num_gpus, ray_address),
            max_reject_fraction=max_reject_fraction,
            warn_reject_fraction=warn_reject_fraction,
            restart=restart,
            dry_run=dry_run,
            quiet=quiet,
        )
    )
    emit(result, format)


@app.command("retry-rejects")
@handled
def retry_rejects(
    index: IndexArgument,
    reason: Annotated[
        list[str] | None, typer.Option("--reason", help="Only rejects of this reason; may be repeated.")
    ] = None,
    batch_size: BatchSizeOption = None,
    num_gpus: NumGpusOption = None,
    num_cpus: NumCpusOption = None,
    ray_address: RayAddressOption = None,
    executor: ExecutorOption = "ray",
    precision: PrecisionOption = "auto",
    max_pixels: MaxPixelsOption = 89_478_485,
    max_bytes: MaxBytesOption = 256 << 20,
    restart: RestartOption = False,
    config: ConfigOption = None,
    quiet: QuietOption = False,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Try the rejected images of an index again; those that work now join it.

    Examples:

        edje-pipeline retry-rejects photos.edje

        edje-pipeline retry-rejects photos.edje --reason too_many_pixels --max-pixels 400000000
    """
    from edje_pipeline.pipeline.image_run import ComputeOptions
    from edje_pipeline.pipeline.retry_rejects import RetryConfig, run_retry_rejects
    from edje_pipeline.pipeline.runner import ExecutorOptions

    result = run_retry_rejects(
        RetryConfig(
            index=index,
            reasons=tuple(reason or ()),
            compute=ComputeOptions(batch_size, None, precision, False, max_pixels, max_bytes),
            executor=ExecutorOptions(executor, num_cpus, num_gpus, ray_address),
            restart=restart,
            quiet=quiet,
        )
    )
    emit(result, format)
