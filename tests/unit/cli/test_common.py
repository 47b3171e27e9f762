"""The frame of every command: configuration files, error lines, exit codes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from edje_pipeline.cli.common import ConfigOption, DebugOption, FormatOption, OutputFormat, emit, handled
from edje_pipeline.errors import ConfigError, CorruptionError


@dataclass(frozen=True)
class _Result:
    size: int
    name: str
    exit_code: int = 3

    def to_dict(self) -> dict[str, Any]:
        return {"size": self.size, "name": self.name}

    def to_text(self) -> str:
        return f"{self.name} has {self.size}"


def _app() -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @handled
    def weigh(
        name: Annotated[str, typer.Argument()],
        batch_size: Annotated[int, typer.Option("--batch-size")] = 1,
        fail: Annotated[str, typer.Option("--fail")] = "",
        config: ConfigOption = None,
        format: FormatOption = OutputFormat.text,
        debug: DebugOption = False,
    ) -> None:
        if fail == "corrupt":
            raise CorruptionError("shards/a.parquet: sha256\ndiffers; run verify")
        if fail == "config":
            raise ConfigError("--a and --b exclude each other")
        if fail == "bug":
            raise RuntimeError("boom")
        if fail == "interrupt":
            raise KeyboardInterrupt
        emit(_Result(batch_size, name), format)

    @app.command()
    def other() -> None:
        pass

    return app


def _run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(_app(), list(args))
    return result.exit_code, result.stdout, result.stderr


def test_result_decides_text_json_and_exit_code() -> None:
    assert _run("weigh", "apple", "--batch-size", "7") == (3, "apple has 7\n", "")
    code, out, _ = _run("weigh", "apple", "--format", "json")
    assert (code, json.loads(out)) == (3, {"size": 1, "name": "apple"})


@pytest.mark.parametrize(
    ("fail", "code", "line"),
    [
        ("corrupt", 1, "error: shards/a.parquet: sha256 differs; run verify\n"),
        ("config", 2, "error: --a and --b exclude each other\n"),
        ("interrupt", 130, "error: interrupted; run the same command again to go on where it stopped\n"),
    ],
)
def test_errors_become_one_line(fail: str, code: int, line: str) -> None:
    assert _run("weigh", "x", "--fail", fail) == (code, "", line)


def test_unexpected_error_asks_for_a_report_and_debug_shows_the_traceback() -> None:
    code, _, err = _run("weigh", "x", "--fail", "bug")
    assert code == 1
    assert err.count("\n") == 1
    assert "RuntimeError: boom" in err
    assert "Traceback" in _run("weigh", "x", "--fail", "bug", "--debug")[2]


def test_json_errors_are_machine_readable() -> None:
    code, out, _ = _run("weigh", "x", "--fail", "corrupt", "--format", "json")
    assert code == 1
    assert json.loads(out)["error"]["kind"] == "CorruptionError"


def test_config_fills_defaults_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[weigh]\nname = "pear"\nbatch-size = 5\n[other]\n')
    assert _run("weigh", "--config", str(path))[1] == "pear has 5\n"
    assert _run("weigh", "fig", "--config", str(path), "--batch-size", "9")[1] == "fig has 9\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[weigh]\nbatch-sise = 1\nnome = 2\n", ["'batch-sise' (did you mean 'batch-size'?)", "'nome'"]),
        ("[waigh]\n", ["[waigh] is no command (did you mean 'weigh'?)"]),
        ("x = 1\n", ["'x' stands outside a table"]),
        ("[weigh\n", ["cannot read the configuration"]),
    ],
)
def test_config_mistakes_are_all_named(tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(content)
    code, _, err = _run("weigh", "a", "--config", str(path))
    assert code == 2
    for word in words:
        assert word in err


def test_missing_config_is_named(tmp_path: Path) -> None:
    code, _, err = _run("weigh", "a", "--config", str(tmp_path / "no.toml"))
    assert code == 2
    assert "does not exist" in err
