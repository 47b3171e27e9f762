"""The commands `score` and `retrieve`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from edje_pipeline.cli.app import app
from edje_pipeline.cli.common import (
    ConfigOption,
    DebugOption,
    FormatOption,
    IndexOption,
    OutputFormat,
    QuietOption,
    emit,
    handled,
)


class OnMissing(StrEnum):
    """What to do with candidates that the index does not hold."""

    report = "report"
    error = "error"


class Precision(StrEnum):
    """What the joint encoder computes in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


class Kernels(StrEnum):
    """Whose layers compute on a GPU."""

    torch = "torch"
    own = "own"


class Method(StrEnum):
    """How `retrieve` searches."""

    auto = "auto"
    exact = "exact"
    faiss = "faiss"


ModelOption = Annotated[
    str | None, typer.Option(help="Directory, hf:org/name or bundled name; default: the index's own model.")
]
SnapshotOption = Annotated[str | None, typer.Option(help="Snapshot of the index; default: the current one.")]


@app.command()
@handled
def score(
    index: IndexOption,
    queries: Annotated[str, typer.Option(help="query_id, text: Parquet, JSONL, CSV, TSV; .gz and .zst too.")],
    candidates: Annotated[str, typer.Option(help="query_id, image_id [, first_stage_score]: as above, or a TREC run.")],
    out: Annotated[str, typer.Option(help="Folder of the results; an unfinished run there goes on.")],
    top_k: Annotated[int | None, typer.Option(help="Ranks kept a query; default: all.")] = None,
    trec: Annotated[str | None, typer.Option(help="Write a TREC run to this file as well.")] = None,
    on_missing: Annotated[
        OnMissing, typer.Option(help="Candidates not in the index: list them in missing.parquet, or stop.")
    ] = OnMissing.report,
    missing_warning: Annotated[
        float, typer.Option(help="Fraction of missing candidates above which the exit code is 3.")
    ] = 0.01,
    model: ModelOption = None,
    snapshot: SnapshotOption = None,
    precision: Annotated[
        Precision,
        typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU. int8: for CPUs without bfloat16."),
    ] = Precision.auto,
    compile_model: Annotated[
        bool, typer.Option("--compile", help="torch.compile the joint encoder: for long runs on a GPU.")
    ] = False,
    kernels: Annotated[
        Kernels,
        typer.Option(
            help="Layers on a GPU. own: an experiment for bfloat16; 71,000 and 82,000 pairs/s in two runs of 3 s on a "
            "shared H100. GELU in its tanh form; near-ties may rank differently."
        ),
    ] = Kernels.torch,
    refine_top: Annotated[
        int,
        typer.Option(help="Score each query's best K again in float32: exact first ranks with a cheap precision."),
    ] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    num_workers: Annotated[
        int | None, typer.Option(help="Ray actors; 0 scores in this process; default: by size and machine.")
    ] = None,
    ray_address: Annotated[str | None, typer.Option(help="A running Ray cluster.")] = None,
    num_threads: Annotated[int | None, typer.Option(help="Threads of one CPU worker.")] = None,
    unit_pairs: Annotated[int | None, typer.Option(help="Pairs committed at a time, about.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace finished results or an unfinished run of other inputs.")
    ] = False,
    config: ConfigOption = None,
    quiet: QuietOption = False,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Score query-candidate lists against stored images and rank them.

    Candidates are scored in the order of the index's shards: each stored image is read once, however
    many queries name it. The results are a folder of Parquet files (query_id, image_id, score, rank,
    first_stage_score) by query and rank; `score` is the joint encoder's logit. An interrupted run goes
    on with the same command.

    Examples:

        edje-pipeline score --index photos.edje --queries q.jsonl --candidates c.parquet --out scores

        edje-pipeline score --index photos.edje --queries q.tsv --candidates first.run --out scores \\
            --top-k 10 --trec reranked.run

        edje-pipeline score --index photos.edje --queries q.jsonl --candidates c.parquet --out scores \\
            --precision int8 --refine-top 5
    """
    del config, debug
    from edje_pipeline.pipeline.threads import let_threads_sleep

    let_threads_sleep()  # the next import loads torch
    from edje_pipeline.pipeline.score import ScoreConfig, run_score

    result = run_score(
        ScoreConfig(
            index=index,
            queries=queries,
            candidates=candidates,
            out=out,
            snapshot=snapshot,
            model=model,
            top_k=top_k,
            trec=trec,
            on_missing=on_missing.value,
            missing_warning=missing_warning,
            precision=precision.value,
            compile=compile_model,
            kernels=kernels.value,
            refine_top=refine_top,
            device=device,
            num_workers=num_workers,
            ray_address=ray_address,
            num_threads=num_threads,
            unit_pairs=unit_pairs,
            overwrite=overwrite,
            quiet=quiet,
        )
    )
    emit(result, format)


@app.command()
@handled
def retrieve(
    index: IndexOption,
    queries: Annotated[
        str, typer.Option(help="query_id, text [, embedding]: Parquet, JSONL, CSV, TSV; .gz and .zst too.")
    ],
    out: Annotated[str, typer.Option(help="Candidate file: Parquet, or a TREC run (.trec, .run, .txt).")],
    top_k: Annotated[int, typer.Option(help="Candidates a query.")] = 100,
    model: ModelOption = None,
    snapshot: SnapshotOption = None,
    embeddings: Annotated[
        str | None, typer.Option(help=".npy (queries, width): query embeddings of another text tower.")
    ] = None,
    method: Annotated[Method, typer.Option(help="exact, faiss (approximate), or auto by size.")] = Method.auto,
    num_probes: Annotated[int, typer.Option(help="Lists that faiss looks at for each query.")] = 32,
    config: ConfigOption = None,
    quiet: QuietOption = False,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Find candidates: the images whose stored embeddings lie nearest to each query.

    Texts pass through the model's text tower. Where it has none, give the query embeddings as a
    column `embedding` of a Parquet query file or with --embeddings.

    Examples:

        edje-pipeline retrieve --index photos.edje --queries q.jsonl --top-k 100 --out c.parquet

        edje-pipeline retrieve --index photos.edje --queries q.tsv --embeddings q.npy --out first.run
    """
    del config, debug
    from edje_pipeline.pipeline.retrieve import RetrieveConfig, run_retrieve

    result = run_retrieve(
        RetrieveConfig(
            index=index,
            queries=queries,
            out=out,
            top_k=top_k,
            snapshot=snapshot,
            model=model,
            embeddings=embeddings,
            method=method.value,
            num_probes=num_probes,
            quiet=quiet,
        )
    )
    emit(result, format)
