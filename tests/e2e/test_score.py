"""The commands score and retrieve as a user runs them, and runs that are killed at every point."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from edje_pipeline.cli import score as score_commands
from edje_pipeline.cli.app import app
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.pipeline.score_store import CRASH_POINTS
from edje_pipeline.storage.index import Index
from tests.index_util import write_index
from tests.score_util import assert_same_ranking, plain_ranking, read_results, sentence, tiny_model, write_inputs

QUERIES = [(f"q{number}", sentence(np.random.default_rng(number), 1 + number % 5)) for number in range(8)]
assert score_commands


@pytest.fixture(scope="module")
def cli_index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_index(tmp_path_factory.mktemp("index") / "index", tiny_model(), num_images=64)


def pairs_of(index: Index) -> list[tuple[str, str]]:
    rng, ids = np.random.default_rng(1), index.ids()
    return [(query, ids[n]) for query, _ in QUERIES for n in rng.choice(len(ids), 15, replace=False)]


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_retrieve_then_score(tmp_path: Path, cli_index: Index) -> None:
    queries, _ = write_inputs(tmp_path, QUERIES, [("q0", "x")])
    found = tmp_path / "candidates.parquet"
    result = call("retrieve", "--index", cli_index.location, "--queries", queries, "--top-k", 10, "--out", found, "-q")
    assert result.exit_code == 0, result.output
    out, trec = tmp_path / "scores", tmp_path / "out.run"
    words = ["score", "--index", cli_index.location, "--queries", queries, "--candidates", found, "--out", out]
    words += ["--top-k", 5, "--trec", trec, "--num-workers", 0, "--quiet"]
    result = call(*words, "--format", "json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["num_results"], summary["plan"]["num_pairs"]) == (5 * len(QUERIES), 10 * len(QUERIES))
    table = pq.read_table(found)
    pairs = list(zip(table.column("query_id").to_pylist(), table.column("image_id").to_pylist(), strict=True))
    expected = [row for row in plain_ranking(cli_index, tiny_model(), QUERIES, pairs) if row[3] <= 5]
    assert_same_ranking(read_results(out), expected)
    assert len(trec.read_text().splitlines()) == 5 * len(QUERIES)
    again = call(*words)
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    assert call(*words, "--overwrite").exit_code == 0


def test_options_from_a_file(tmp_path: Path, cli_index: Index) -> None:
    queries, candidates = write_inputs(tmp_path, QUERIES, pairs_of(cli_index))
    (tmp_path / "run.toml").write_text(
        f'[score]\nindex = "{cli_index.location}"\nqueries = "{queries}"\ncandidates = "{candidates}"\n'
        f'out = "{tmp_path / "scores"}"\ntop-k = 2\nnum-workers = 0\nquiet = true\n'
    )
    result = call("score", "--config", tmp_path / "run.toml", "--top-k", 1)
    assert result.exit_code == 0, result.output
    assert len(read_results(tmp_path / "scores")) == len(QUERIES)


@pytest.mark.parametrize(
    ("change", "exit_code", "message"),
    [
        ({"--index": "absent"}, 1, "does not exist"),
        ({"--queries": "absent.tsv"}, 1, "does not exist"),
        ({"--candidates": "no-header.csv"}, 1, "no column"),
        ({"--candidates": "strangers.csv"}, 1, "query_id values that the query file does not hold"),
        ({"--candidates": "missing.csv"}, 3, ""),
        ({"--candidates": "missing.csv", "--on-missing": "error"}, 1, "such as 'gone.jpg'"),
        ({"--candidates": "missing.csv", "--missing-warning": "1"}, 0, ""),
        ({"--model": "other-model"}, 1, "was not made with model"),
        ({"--model": "absent-model"}, 1, "absent-model"),
        ({"--device": "cuda:9"}, 1, "CUDA devices are visible"),
        ({"--device": "toaster"}, 2, "device"),
        ({"--top-k": "0"}, 2, "top_k is 0"),
        ({"--precision": "int3"}, 2, ""),
        ({"--out": "file.txt"}, 2, "is a file"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_input_gets_one_line_and_its_exit_code(
    tmp_path: Path,
    cli_index: Index,
    change: dict[str, str],
    exit_code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    queries, candidates = write_inputs(tmp_path, QUERIES, pairs_of(cli_index))
    (tmp_path / "no-header.csv").write_text("q0,img-00000.jpg\nq1,img-00001.jpg\n")
    (tmp_path / "strangers.csv").write_text("query_id,image_id\nnobody,img-00000.jpg\n")
    (tmp_path / "missing.csv").write_text("query_id,image_id\nq0,img-00000.jpg\nq0,gone.jpg\n")
    (tmp_path / "file.txt").write_text("x")
    if change.get("--model") == "other-model":
        write_random_model(tmp_path / "other-model", seed=8)
    options = {
        "--index": str(cli_index.location),
        "--queries": str(queries),
        "--candidates": str(candidates),
        "--out": "scores",
        "--num-workers": "0",
        **change,
    }
    result = call("score", *(word for pair in options.items() for word in pair), "--quiet")
    assert result.exit_code == exit_code, result.output
    if exit_code in (1, 2):
        assert message in " ".join(result.stderr.split())
    if exit_code == 1:
        assert len(result.stderr.strip().splitlines()) == 1


POINTS = [*CRASH_POINTS, "score.journalled:4", "score.computed:3", "write.middle:5"]
REFINING = ["score.planned:2", "score.computed:8", "score.journalled:8", "score.results"]
"""With 120 pairs in units of 20 the eighth unit is the second of the second pass."""
FORK_SERVER = """
import json, os, sys
import torch, pyarrow.parquet
from edje_pipeline.storage import faults
import edje_pipeline.reranker, edje_pipeline.pipeline.score, edje_pipeline.cli.score
from edje_pipeline.cli.app import main

for point, words in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        name, _, count = point.partition(":")
        faults._armed = (name, int(count or 1))
        sys.argv = ["edje-pipeline", *words]
        main()
    print(os.waitpid(child, 0)[1], flush=True)
"""


def crash_words(index: Index, folder: Path, out: Path, *, refining: bool = False) -> list[str]:
    words = ["score", "--index", str(index.location), "--queries", str(folder / "queries.parquet")]
    words += ["--candidates", str(folder / "candidates.parquet"), "--out", str(out), "--trec", f"{out}.run"]
    words += ["--precision", "bfloat16", "--refine-top", "5"] if refining else []
    return [*words, "--unit-pairs", "20", "--num-workers", "0", "--num-threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory: pytest.TempPathFactory, cli_index: Index) -> dict[str, tuple[int, Path]]:
    """One run a point, each killed there; one process loads the libraries for all of them and forks."""
    folder = tmp_path_factory.mktemp("killed")
    write_inputs(folder, QUERIES, [*pairs_of(cli_index), ("q0", "gone.jpg")])
    names = [*POINTS, *(f"refining/{point}" for point in REFINING)]
    outs = {name: folder / name.replace(":", "-").replace("/", "-") for name in names}
    jobs = [
        (name.removeprefix("refining/"), crash_words(cli_index, folder, out, refining="/" in name))
        for name, out in outs.items()
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FORK_SERVER]
    done = subprocess.run(command, input=json.dumps(jobs), env=environment, capture_output=True, text=True, check=True)
    statuses = [int(line) for line in done.stdout.split()]
    return {name: (status, outs[name]) for name, status in zip(names, statuses, strict=True)}


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_the_same_command_gives_the_same_result(
    killed_runs: dict[str, tuple[int, Path]], cli_index: Index, point: str
) -> None:
    status, out = killed_runs[point]
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    pairs = [*pairs_of(cli_index), ("q0", "gone.jpg")]
    result = call(*crash_words(cli_index, out.parent, out), "--format", "json")
    assert result.exit_code == 0, result.output
    assert_same_ranking(read_results(out), plain_ranking(cli_index, tiny_model(), QUERIES, pairs))
    assert pq.read_table(out / "missing.parquet").column("image_id").to_pylist() == ["gone.jpg"]
    assert len(Path(f"{out}.run").read_text().splitlines()) == len(pairs) - 1
    names = {path.relative_to(out).parts[0] for path in out.rglob("*") if not path.name.startswith(".")}
    assert names == {"manifest.json", "missing.parquet", "results"}
    assert len(list((out / "results").iterdir())) == 1


@pytest.mark.parametrize("point", REFINING)
def test_killed_while_refining_the_same_command_gives_the_same_result(
    killed_runs: dict[str, tuple[int, Path]], cli_index: Index, tmp_path: Path, point: str
) -> None:
    status, out = killed_runs[f"refining/{point}"]
    assert os.WIFSIGNALED(status)
    plan = json.loads(next(out.glob("staging/*/refine/plan_info.json")).read_text())
    assert plan["num_pairs"] == 5 * len(QUERIES)
    result = call(*crash_words(cli_index, out.parent, out, refining=True), "--format", "json")
    assert result.exit_code == 0, result.output
    assert call(*crash_words(cli_index, out.parent, tmp_path / "whole", refining=True)).exit_code == 0
    assert read_results(out) == read_results(tmp_path / "whole")


@pytest.mark.parametrize("command", ["score", "retrieve"])
def test_help_has_examples(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.output
