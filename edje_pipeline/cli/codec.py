"""`edje-pipeline train-codec`."""

from __future__ import annotations

from typing import Annotated

import typer

from edje_pipeline.cli.app import app
from edje_pipeline.cli.common import DebugOption, FormatOption, OutputFormat, emit, handled


@app.command("train-codec")
@handled
def train_codec(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="Directory or URI of the index to draw tokens from.")],
    codec: Annotated[
        str, typer.Option("--codec", help="opqN or pqN: N bytes a token, a divisor of the token width.")
    ] = "opq16",
    out: Annotated[
        str | None, typer.Option("--out", help="The codebook's file.", show_default="CODEC-FINGERPRINT.safetensors")
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option("--num-images", min=1, help="Images in the sample.", show_default="by token count"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sample and of k-means.")] = 0,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,  # noqa: ARG001 (read by `handled`)
) -> None:
    """Train the codebook of a product quantizer on the tokens of an index.

    Draws a sample, trains on nine tenths of it and reports the reconstruction
    error on the rest. The codebook file describes itself and carries its
    fingerprint.

    Examples:

        edje-pipeline train-codec INDEX --codec opq16 --out opq16.safetensors

        edje-pipeline train-codec s3://bucket/index --codec opq48 --num-images 4000
    """
    from edje_pipeline.pipeline.train_codec import train_from_index

    emit(train_from_index(index, codec, out, num_images=num_images, seed=seed), format)
