"""The command line: `edje-pipeline COMMAND`. Thin: parse, call one function, print, exit code."""

from edje_pipeline.cli.app import main

__all__ = ["main"]
