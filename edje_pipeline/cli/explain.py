"""`edje-pipeline explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from edje_pipeline.cli.app import app
from edje_pipeline.cli.common import ConfigOption, DebugOption, FormatOption, OutputFormat, emit, handled


@app.command()
@handled
def explain(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files; with --corpus, image ids.")],
    model: Annotated[str, typer.Option(help="Directory, hf:org/name[@rev] or bundled name.")],
    corpus: Annotated[str, typer.Option(help="Folder, tar, Parquet or list that has the image ids.")] = "",
    text: Annotated[str | None, typer.Option(help="Also what each token adds to this text's logit.")] = None,
    top_k: Annotated[int, typer.Option(help="Words a token.")] = 5,
    pieces: Annotated[bool, typer.Option("--pieces", help="Compare with pieces of words (##ing) too.")] = False,
    out: Annotated[str, typer.Option(help="Picture: a .png file, or a folder for NAME-tokens.png.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    config: ConfigOption = None,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Read the tokens of images: their nearest words, and where they look.

    For each compressed token: the words whose embeddings in the joint encoder are nearest to it, and the
    patch it attends to most. The picture shows the attention of every token. For a local adapter, which
    has a token for each patch, the words stand on the patches.

    A hint about a trained model, not a proof; see docs/explain.md.

    Examples:

        edje-pipeline explain cat.jpg --model run/model --out cat-tokens.png

        edje-pipeline explain cat.jpg dog.jpg --model run/model --text "a sleeping cat" --out pictures/

        edje-pipeline explain 000123 --corpus photos.tar --model run/model --top-k 10 --format json
    """
    del config, debug
    from edje_pipeline.pipeline.explain import ExplainConfig, run_explain

    result = run_explain(
        ExplainConfig(
            images=tuple(images), model=model, corpus=corpus, text=text, top_k=top_k, pieces=pieces, out=out,
            device=device,
        )
    )  # fmt: skip
    emit(result, format)
