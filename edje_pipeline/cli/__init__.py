"""The command line: `edje-pipeline COMMAND`. Thin: parse, call one function, print, exit code.

Importing a group registers its commands; the order here is the order of `--help`.
"""

from edje_pipeline.cli import demo, extract, score, rebuild, index, codec, train, explain, model  # noqa: F401, I001
from edje_pipeline.cli.app import main

__all__ = ["main"]
