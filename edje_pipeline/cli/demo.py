"""`demo`: the main job on embedded real images."""

from __future__ import annotations

from typing import Annotated

import typer

from edje_pipeline.cli.app import app
from edje_pipeline.cli.common import ConfigOption, DebugOption, FormatOption, OutputFormat, QuietOption, emit, handled


@app.command()
@handled
def demo(
    directory: Annotated[str, typer.Option("--dir", help="Where to write images, index and results.")] = "edje-demo",
    model: Annotated[str | None, typer.Option("--model", help="Model directory; default: the bundled one.")] = None,
    query: Annotated[
        list[str] | None, typer.Option("--query", help="A text to search for; may be repeated.", show_default=False)
    ] = None,
    num_measured: Annotated[
        int | None,
        typer.Option("--num-measured", min=1, help="Names whose drawing's place is counted.", show_default="all"),
    ] = None,
    fusion_weight: Annotated[
        float,
        typer.Option("--fusion-weight", min=0, help="Rerank by logit + this x first-stage similarity; 0: logit alone."),
    ] = 0.0,
    config: ConfigOption = None,
    format: FormatOption = OutputFormat.text,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Extract, retrieve and rerank 1,600 real drawings (OpenMoji).

    Each drawing's name is a query: the table shows some of them, the line
    below it how often the drawing that was asked for came first.

    Examples:

        edje-pipeline demo

        edje-pipeline demo --query "a slice of pizza" --query "sleeping face"
    """
    from edje_pipeline.pipeline.demo import DEFAULT_QUERIES, DemoConfig, run_demo

    shown = tuple(query or DEFAULT_QUERIES)
    emit(run_demo(DemoConfig(directory, model, shown, num_measured, fusion_weight, quiet=quiet)), format)
