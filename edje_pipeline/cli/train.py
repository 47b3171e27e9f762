"""The commands `train` and `evaluate`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from edje_pipeline.cli.app import app
from edje_pipeline.cli.common import DebugOption, FormatOption, OutputFormat, QuietOption, emit, handled
from edje_pipeline.errors import ConfigError

CaptionsOption = Annotated[
    list[str],
    typer.Option("--captions", help="image_id and captions: JSONL, Parquet, CSV, WebDataset tar, Karpathy JSON."),
]
TemplateOption = Annotated[
    list[str] | None, typer.Option("--caption-template", help="Caption made of columns, such as '{name}'; repeatable.")
]
UnknownOption = Annotated[str, typer.Option(help="Captions of images that are not there: error or skip.")]


@app.command()
@handled
def train(
    out: Annotated[str, typer.Option(help="Directory of checkpoints, metrics and model; an unfinished run goes on.")],
    model: Annotated[str, typer.Option(help="Model to start from (see make-model): directory, hf:org/name or name.")],
    recipe: Annotated[Path, typer.Option(help="Phases, losses, rates: a TOML file, see recipes/.")],
    captions: CaptionsOption,
    images: Annotated[str, typer.Option(help="The images: folder, tar, Parquet or list, as for extract.")] = "",
    raw_index: Annotated[str, typer.Option(help="Or an index made with --variant raw: no vision forward.")] = "",
    val_captions: Annotated[list[str] | None, typer.Option(help="Captions to validate with while training.")] = None,
    val_images: Annotated[str, typer.Option(help="Their images; default: those of training.")] = "",
    val_raw_index: Annotated[str, typer.Option(help="Or their index of raw tokens.")] = "",
    caption_template: TemplateOption = None,
    teacher: Annotated[str, typer.Option(help="A trained model with the local adapter, for distillation.")] = "",
    first_stage: Annotated[str, typer.Option(help="ridge: fit the embedding map; keep: as it is; auto.")] = "auto",
    cache_tokens: Annotated[bool, typer.Option(help="Keep vision tokens of --images below --out.")] = True,
    cache_dir: Annotated[str, typer.Option(help="Or keep them here, where several runs can share them.")] = "",
    on_unknown: UnknownOption = "error",
    on_empty: Annotated[str, typer.Option(help="Empty captions: error or skip.")] = "error",
    name: Annotated[str, typer.Option(help="Name of the new model.")] = "",
    seed: Annotated[int | None, typer.Option(help="Replaces the recipe's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    num_workers: Annotated[int, typer.Option(help="Ray Train workers; 0 trains in this process.")] = 0,
    use_gpu: Annotated[bool, typer.Option("--use-gpu", help="One GPU a Ray worker.")] = False,
    ray_address: Annotated[str | None, typer.Option(help="A running Ray cluster.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished run in --out.")] = False,
    quiet: QuietOption = False,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Train an adapter and a joint encoder for a frozen backbone on captioned images.

    Writes OUT/model when done. A killed run goes on with the same command, with the same loss curve.

    Examples:

        edje-pipeline train --model start/ --recipe recipes/emoji.toml --images train.tar
            --captions train.tar --caption-template "{name}" --out run/

        edje-pipeline train --model start/ --recipe my.toml --raw-index raw.edje --captions c.jsonl --out run/
    """
    del debug
    from edje_pipeline.training.recipe import read_recipe
    from edje_pipeline.training.run import TrainJob
    from edje_pipeline.training.run import train as train_here

    plan = read_recipe(recipe)
    if seed is not None:
        plan = replace(plan, seed=seed)
    for option, value in (("--on-unknown", on_unknown), ("--on-empty", on_empty)):
        if value not in ("error", "skip"):
            raise ConfigError(f"{option} is {value!r}, expected error or skip")
    job = TrainJob(
        model=model, out=out, captions=tuple(captions), recipe=plan, images=images, index=raw_index,
        val_captions=tuple(val_captions or ()), val_images=val_images, val_index=val_raw_index,
        templates=tuple(caption_template or ()), teacher=teacher, first_stage=first_stage, cache=cache_tokens,
        cache_dir=cache_dir, on_unknown=on_unknown, on_empty=on_empty, name=name, device=device, restart=restart,
    )  # fmt: skip
    if num_workers:
        from edje_pipeline.training.ray_train import train_with_ray

        emit(train_with_ray(job, num_workers=num_workers, use_gpu=use_gpu, address=ray_address), format)
    emit(train_here(job, report=None if quiet else _show), format)


def _show(record: dict[str, Any]) -> None:
    """One line a record on stderr."""
    numbers = "  ".join(f"{key} {value:.4g}" for key, value in record.items() if isinstance(value, float))
    sys.stderr.write(f"step {record['step']:>6,} {record['phase']:<12} {numbers}\n")
    sys.stderr.flush()


@app.command()
@handled
def evaluate(
    index: Annotated[list[str], typer.Option("--index", help="Index to evaluate; repeat it to compare several.")],
    captions: Annotated[
        list[str] | None, typer.Option(help="Caption files, as for train; or --queries and --qrels.")
    ] = None,
    queries: Annotated[str, typer.Option(help="query_id, text.")] = "",
    qrels: Annotated[str, typer.Option(help="TREC judgements: query_id 0 image_id relevance.")] = "",
    model: Annotated[str | None, typer.Option(help="Default: the index's own.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="t2i, i2t; default: both (t2i with --qrels).")] = None,
    pool: Annotated[
        list[int] | None, typer.Option(help="Answers of the first stage to rerank; repeatable [10].")
    ] = None,
    fusion_weight: Annotated[
        list[float] | None, typer.Option(help="Score = logit + weight x similarity; repeatable [0: reranker alone].")
    ] = None,
    gallery: Annotated[str, typer.Option(help="captions: the captioned images; index: all of them.")] = "captions",
    include: Annotated[str, typer.Option(help="Only image_ids of this pattern, such as 'openmoji-*'.")] = "",
    split: Annotated[str | None, typer.Option(help="Split of a Karpathy JSON file.")] = None,
    caption_template: TemplateOption = None,
    first_caption: Annotated[
        bool, typer.Option("--first-caption", help="Ask with each image's first caption.")
    ] = False,
    on_unknown: UnknownOption = "error",
    max_queries: Annotated[int | None, typer.Option(help="A random sample of the queries.")] = None,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap; 0: no intervals.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of sample and bootstrap.")] = 0,
    markdown: Annotated[Path | None, typer.Option(help="Write the full table to this file as Markdown.")] = None,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Recall@1/5/10 and MRR before and after reranking, with confidence intervals.

    Examples:

        edje-pipeline evaluate --index photos.edje --captions val.jsonl --pool 10 --pool 50

        edje-pipeline evaluate --index coco.edje --captions dataset_coco.json --split test --markdown table.md
    """
    del debug
    from edje_pipeline.pipeline.evaluate import DIRECTIONS, EvaluateConfig, run_evaluate
    from edje_pipeline.pipeline.evaluate_result import EvaluateResults
    from edje_pipeline.storage.location import Location

    directions = tuple(direction or (("t2i",) if qrels else DIRECTIONS))
    results = EvaluateResults(
        tuple(
            run_evaluate(
                EvaluateConfig(
                    index=uri, captions=tuple(captions or ()), queries=queries, qrels=qrels, model=model,
                    directions=directions, pool_sizes=tuple(pool or (10,)),
                    fusion_weights=tuple(fusion_weight or (0.0,)),
                    gallery=gallery, include=include, split=split, templates=tuple(caption_template or ()),
                    first_caption=first_caption, on_unknown=on_unknown, max_queries=max_queries,
                    num_resamples=resamples, seed=seed,
                )
            )
            for uri in index
        )
    )  # fmt: skip
    if markdown is not None:
        Location.parse(markdown).write_bytes(results.to_markdown().encode())
    emit(results, format)
