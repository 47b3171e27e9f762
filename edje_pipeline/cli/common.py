"""What every command shares: options, error lines, exit codes, text or JSON output.

Exit codes: 0 done; 1 failed; 2 usage; 3 done, but with rejects or missing candidates above the
warning level; 130 interrupted (the same command resumes).
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec, Protocol, TypeVar

import typer

from edje_pipeline.config import read_config_table
from edje_pipeline.errors import ConfigError, EdjeError

P = ParamSpec("P")
R = TypeVar("R")

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_WARNED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


class OutputFormat(StrEnum):
    """How a command prints its result."""

    text = "text"
    json = "json"


class Result(Protocol):
    """What a command's function returns: it knows how to show itself and how the run ended."""

    @property
    def exit_code(self) -> int: ...

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""

    def to_text(self) -> str:
        """For a terminal of 80 columns."""


FormatOption = Annotated[
    OutputFormat, typer.Option("--format", help="How to print the result.", rich_help_panel="Output")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress, only the result.", rich_help_panel="Output")
]


def _apply_config(context: typer.Context, path: Path | None) -> Path | None:
    """Fills the command's defaults from its table of the TOML file, before other options are parsed."""
    if path is None or context.resilient_parsing:
        return path
    parent = context.parent
    group = parent.command if parent is not None else context.command
    commands = list(getattr(group, "commands", {}))
    names = {
        (param.opts[0].lstrip("-") if param.param_type_name == "option" else str(param.name)).replace("_", "-"): str(
            param.name
        )
        for param in context.command.params
        if param.name != "config"
    }
    try:
        values = read_config_table(path, context.info_name or "", options=names, commands=commands)
    except ConfigError as error:
        _fail(str(error), error, as_json=False, debug=False)
        raise typer.Exit(EXIT_USAGE) from None
    context.default_map = {**(context.default_map or {}), **{names[key]: value for key, value in values.items()}}
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Read options from the command's table of a TOML file; the command line wins.",
        rich_help_panel="Output",
        callback=_apply_config,
        is_eager=True,
    ),
]
IndexArgument = Annotated[str, typer.Argument(metavar="INDEX", help="Directory or URI of the index.")]
IndexOption = Annotated[str, typer.Option("--index", help="Directory or URI of the index.")]


def emit(result: Result, output_format: OutputFormat) -> NoReturn:
    """Prints the result and ends the command with its exit code."""
    if output_format is OutputFormat.json:
        text = json.dumps(result.to_dict(), indent=2, sort_keys=True, default=str)
    else:
        text = result.to_text()
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    raise typer.Exit(result.exit_code)


def handled(function: Callable[P, R]) -> Callable[P, R]:
    """Turns errors into one line on stderr and the documented exit code.

    This is the outermost border of the program, the one place that may catch everything: an
    unexpected exception becomes a line that asks for a report instead of a page of traceback.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        debug = bool(kwargs.get("debug")) or os.environ.get("EDJE_DEBUG") == "1"
        as_json = kwargs.get("format") is OutputFormat.json
        try:
            return function(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            _fail("interrupted; run the same command again to go on where it stopped", None, as_json, debug)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except ConfigError as error:
            _fail(str(error), error, as_json, debug)
            raise typer.Exit(EXIT_USAGE) from None
        except EdjeError as error:
            _fail(str(error), error, as_json, debug)
            raise typer.Exit(EXIT_FAILED) from None
        except Exception as error:
            message = (
                f"unexpected {type(error).__name__}: {error} (this is a bug; run again with --debug and report it)"
            )
            _fail(message, error, as_json, debug)
            raise typer.Exit(EXIT_FAILED) from None

    return wrapper


def _fail(message: str, error: BaseException | None, as_json: bool, debug: bool) -> None:
    if debug and error is not None:
        traceback.print_exception(error)
    line = " ".join(message.split())
    sys.stderr.write(f"error: {line}\n")
    if as_json:
        kind = type(error).__name__ if error is not None else "Interrupted"
        sys.stdout.write(json.dumps({"error": {"kind": kind, "message": line}}) + "\n")
