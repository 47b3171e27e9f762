"""One TOML file a run: a table for each command, keys as the command line spells them.

    [extract]
    corpus = "photos/"
    index = "s3://bucket/photos.edje"
    variant = "1kb"
    batch-size = 64

The command line wins over the file. Unknown tables and keys are errors, all reported at once: a
misspelt key that is silently ignored costs a GPU week.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from edje_pipeline.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20


def read_config_table(
    path: Path, command: str, *, options: Collection[str], commands: Collection[str]
) -> dict[str, Any]:
    """The table of `command` in a TOML file; empty when the file has none.

    Args:
        path: the TOML file.
        command: name of the command that runs.
        options: every key the command knows, spelt with dashes.
        commands: every command there is; other tables of the file must be among them.

    Returns:
        Key (with dashes) to value.

    Raises:
        ConfigError: no such file, not TOML, or unknown tables or keys (all named).
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_CONFIG_BYTES:,} bytes; this is no run configuration")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"the configuration {path} does not exist") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    problems = []
    for name, value in content.items():
        if not isinstance(value, dict):
            problems.append(f"key {name!r} stands outside a table such as [{command}]")
        elif name not in commands:
            problems.append(f"table [{name}] is no command{_suggest(name, commands)}")
    table = content.get(command, {})
    values = {key.replace("_", "-"): value for key, value in table.items()} if isinstance(table, dict) else {}
    problems += [f"[{command}] has no option {key!r}{_suggest(key, options)}" for key in values if key not in options]
    problems += [
        f"[{command}] {key} is a table; a value was expected"
        for key, value in values.items()
        if isinstance(value, dict)
    ]
    if problems:
        raise ConfigError(f"{path}: " + "; ".join(problems))
    return values


def _suggest(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(sorted(known))})"
