"""Puts the commands together. Each module of this folder holds one group of them."""

from __future__ import annotations

import typer

from edje_pipeline import __version__

app = typer.Typer(
    name="edje-pipeline",
    help="Offline batch pipeline for vision-language reranking with EDJE.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"edje-pipeline {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Offline batch pipeline for vision-language reranking with EDJE."""


def main() -> None:
    """Entry point of the console script."""
    app()
