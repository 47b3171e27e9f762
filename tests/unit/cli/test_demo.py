"""The demo command hands its options over."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import edje_pipeline.cli.demo  # noqa: F401 (registers the command)
from edje_pipeline.cli.app import app
from edje_pipeline.pipeline import demo
from edje_pipeline.pipeline.demo_result import DemoResult, Measured


@pytest.fixture
def asked(monkeypatch):
    configs = []

    def record(config):
        configs.append(config)
        return DemoResult(config.directory, "m", False, 1, 0, 1.0, 10, 1, 1.0, 1.0, 0.0, Measured(1, 1.0, 1.0))

    monkeypatch.setattr(demo, "run_demo", record)
    return configs


def test_options_arrive(asked):
    runner = CliRunner()
    done = runner.invoke(
        app, ["demo", "--dir", "d", "--query", "fox", "--num-measured", "5", "--quiet", "--format", "json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["recall_at_1"]["num_names"] == 1
    assert asked == [demo.DemoConfig("d", None, ("fox",), 5, quiet=True)]
    assert runner.invoke(app, ["demo"]).exit_code == 0
    assert asked[1] == demo.DemoConfig()
