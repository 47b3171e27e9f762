"""`edje-pipeline train-codec`."""

from __future__ import annotations

from typing import Annotated

import typer

from edje_pipeline.cli.app import app
from edje_pipeline.cli.common import DebugOption, FormatOption, OutputFormat, QuietOption, emit, handled
from edje_pipeline.errors import ConfigError


@app.command("train-codec")
@handled
def train_codec(
    index: Annotated[
        str | None, typer.Argument(metavar="[INDEX]", help="Directory or URI of the index to draw tokens from.")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="Images to make tokens of instead, as `extract` takes them.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="With --corpus: what makes the tokens.")] = None,
    source: Annotated[str, typer.Option("--source", help="With --corpus: auto, folder, webdataset, ...")] = "auto",
    codec: Annotated[
        str, typer.Option("--codec", help="opqN or pqN: N bytes a token, a divisor of the token width.")
    ] = "opq16",
    out: Annotated[
        str | None, typer.Option("--out", help="The codebook's file.", show_default="CODEC-FINGERPRINT.safetensors")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option("--num-images", min=1, help="Images in the sample.", show_default="by token count")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sample and of k-means.")] = 0,
    quiet: QuietOption = False,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Train the codebook of a product quantizer.

    Draws a sample of images from an index (or takes the first of a corpus),
    trains on nine tenths of it and reports the reconstruction error on the
    rest. The codebook file describes itself and carries its fingerprint; use
    it with `extract --codebook FILE`.

    Examples:

        edje-pipeline train-codec INDEX --codec opq16 --out opq16.safetensors

        edje-pipeline train-codec --corpus photos/ --model MODEL --num-images 2000
    """
    from edje_pipeline.pipeline.train_codec import train_from_corpus, train_from_index

    if (index is None) == (corpus is None):
        raise ConfigError("train-codec draws its sample from one place: give either INDEX or --corpus")
    if index is not None:
        if model is not None:
            raise ConfigError("--model goes with --corpus; an index brings its own tokens")
        emit(train_from_index(index, codec, out, num_images=num_images, seed=seed), format)
    if corpus is not None:
        if model is None:
            raise ConfigError("--corpus needs --model: a directory, hf:org/name or a bundled name")
        result = train_from_corpus(
            corpus, model, codec, out, num_images=num_images, seed=seed, source=source, quiet=quiet
        )
        emit(result, format)
