"""Scoring in Ray actors gives what scoring in process gives."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edje_pipeline.errors import CorruptionError
from edje_pipeline.pipeline import ray_bridge
from edje_pipeline.pipeline.score import ScoreConfig, run_score
from tests.index_util import random_tokens, write_index
from tests.score_util import assert_same_ranking, plain_ranking, read_results, sentence, tiny_model, write_inputs

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::Warning")]


def niceness() -> int:
    return os.nice(0)


def test_actors_equal_the_plain_path_and_pass_on_errors(tmp_path: Path) -> None:
    queries = [(f"q{number}", sentence(np.random.default_rng(number), 1 + number % 5)) for number in range(8)]
    index = write_index(tmp_path / "index", tiny_model(), num_images=80)
    ids, rng = index.ids(), np.random.default_rng(0)
    pairs = [(query, ids[n]) for query, _ in queries for n in rng.choice(80, 20, replace=False)]
    query_path, pair_path = write_inputs(tmp_path, queries, pairs)

    def options(out: str, where: Path) -> ScoreConfig:
        return ScoreConfig(
            index=str(where),
            queries=str(query_path),
            candidates=str(pair_path),
            out=str(tmp_path / out),
            num_workers=2,
            num_threads=1,
            unit_pairs=25,
            device="cpu",
            quiet=True,
        )

    result = run_score(options("out", tmp_path / "index"))
    assert_same_ranking(read_results(tmp_path / "out"), plain_ranking(index, tiny_model(), queries, pairs))
    assert result.manifest["num_workers"] == 2
    assert result.manifest["plan"]["num_units"] > 3
    assert "largest of 2 workers" in result.to_text()

    write_index(tmp_path / "damaged", tiny_model(), num_images=80, tokens=random_tokens(80, 4, 32, seed=3))
    shard = max((tmp_path / "damaged" / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[200:4000] = b"\xff" * 3800
    shard.write_bytes(bytes(data))
    with ray_bridge.session(num_cpus=2):
        with pytest.raises(CorruptionError):
            run_score(options("out2", tmp_path / "damaged"))
        refining = replace(options("out3", tmp_path / "index"), precision="bfloat16", refine_top=1000)
        run_score(refining)
        assert_same_ranking(read_results(tmp_path / "out3"), plain_ranking(index, tiny_model(), queries, pairs))
        import ray

        # By default ray's workers yield to everybody else.
        assert ray.get(ray.remote(niceness).remote()) == niceness()
