"""Recall and MRR before and after reranking, against rankings worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edje_pipeline.errors import ConfigError, InputFileError
from edje_pipeline.pipeline.evaluate import (
    EvaluateConfig,
    Similarity,
    bootstrap,
    measure,
    per_query,
    rank_first_stage,
    rerank,
)
from edje_pipeline.pipeline.evaluate_result import EvaluateResult, EvaluateResults
from edje_pipeline.pipeline.evaluation_sets import EvaluationSet, from_captions, from_qrels


def unit(rows: list[list[float]]) -> np.ndarray:
    values = np.array(rows, np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


QUESTIONS = EvaluationSet(("a", "b", "c"), ("ta", "tb", "tc", "tc2"), tuple(map(frozenset, ([0], [1], [2], [2]))))
# Text ta lies nearest to image b, then a: wrong at first place. The others are right.
SIMILARITY = Similarity(
    unit([[0.6, 0.8, 0], [0, 1, 0], [0, 0, 1], [0, 0.1, 1]]), unit([[1, 0, 0], [0.1, 1, 0], [0, 0, 1]])
)


def knows_all(pairs: list[tuple[str, str]]) -> np.ndarray:
    return np.array([1.0 if text[1] == image else -1.0 for text, image in pairs], np.float32)


def test_metrics_by_hand() -> None:
    order = np.array([[1, 0, 2], [1, 0, 2], [2, 1, 0], [0, 1, 2]])
    found = per_query(order, [frozenset([0]), frozenset([1]), frozenset([2]), frozenset([1, 2])])
    assert found["R@1"].tolist() == [0, 1, 1, 0]
    assert found["R@5"].tolist() == [1, 1, 1, 1]
    assert found["MRR"].tolist() == [0.5, 1, 1, 0.5]


def test_before_and_after() -> None:
    config = EvaluateConfig("i", captions=("c",), pool_sizes=(1, 2), num_resamples=50)
    rows = measure(config, QUESTIONS, SIMILARITY, knows_all)
    t2i = [row for row in rows if row.direction == "t2i"]
    assert [(row.stage, row.pool) for row in t2i] == [("first stage", 0), ("reranked", 1), ("reranked", 2)]
    assert [row.metrics["R@1"].mean for row in t2i] == [75.0, 75.0, 100.0]
    assert t2i[2].gain is not None
    assert t2i[2].gain.mean == 25.0
    i2t = [row for row in rows if row.direction == "i2t"]
    assert i2t[-1].metrics["R@1"].mean == 100.0


def test_fusion_weight() -> None:
    order, first = np.array([[0, 1, 2]]), np.array([[0.9, 0.8, 0.1]])
    logits = np.array([[0.0, 0.5]])
    assert rerank(order, first, logits, 2, 0.0).tolist() == [[1, 0, 2]]
    assert rerank(order, first, logits, 2, 10.0).tolist() == [[0, 1, 2]]
    assert rerank(order, first, np.zeros((1, 2)), 2, 0.0).tolist() == [[0, 1, 2]]


def test_first_stage_is_a_full_sort() -> None:
    rng = np.random.default_rng(0)
    asked, answers = rng.standard_normal((1100, 4)), rng.standard_normal((30, 4))
    order, scores = rank_first_stage(asked, answers, 10)
    full = asked @ answers.T
    assert np.array_equal(order, np.argsort(-full, axis=1, kind="stable")[:, :10])
    np.testing.assert_allclose(scores, -np.sort(-full, axis=1)[:, :10])


def test_bootstrap_covers_the_mean_and_narrows() -> None:
    rng = np.random.default_rng(0)
    few, many = (bootstrap((rng.random(n) < 0.4).astype(float), 500, 0) for n in (50, 5000))
    assert few.low < few.mean < few.high
    assert many.high - many.low < (few.high - few.low) / 5
    # Standard error of a share: 100 * sqrt(p (1 - p) / n); the interval is about 3.92 of them wide.
    p = many.mean / 100
    assert many.high - many.low == pytest.approx(392 * (p * (1 - p) / 5000) ** 0.5, rel=0.2)


def test_sets_from_captions(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    rows = [{"image_id": "x-1", "captions": ["same", "one"]}, {"image_id": "x-2", "captions": ["same"]},
            {"image_id": "y-3", "captions": ["three"]}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    indexed = ["x-1", "x-2", "x-9", "y-3"]
    found = from_captions([str(path)], indexed)
    assert found.texts == ("same", "one", "three")
    assert found.images_of_text == (frozenset([0, 1]), frozenset([0]), frozenset([2]))
    assert found.texts_of_image == (frozenset([0, 1]), frozenset([0]), frozenset([2]))
    whole = from_captions([str(path)], indexed, gallery="index", include="x-*", first_only=True)
    assert whole.image_ids == ("x-1", "x-2", "x-9")
    assert whole.texts == ("same",)
    with pytest.raises(InputFileError, match="1 captioned images are left"):
        from_captions([str(path)], indexed, include="y*")
    with pytest.raises(InputFileError, match="not in the index: 'y-3'"):
        from_captions([str(path)], indexed[:3])
    assert len(from_captions([str(path)], indexed[:3], on_unknown="skip").image_ids) == 2


def test_sets_from_qrels(tmp_path: Path) -> None:
    queries, qrels = tmp_path / "q.jsonl", tmp_path / "qrels.txt"
    queries.write_text('{"query_id": "1", "text": "dog"}\n{"query_id": "2", "text": "cat"}\n')
    qrels.write_text("1 0 a 1\n1 0 b 0\n\n2 0 b 2\n")
    found = from_qrels(str(queries), str(qrels), ["a", "b"])
    assert found.images_of_text == (frozenset([0]), frozenset([1]))
    qrels.write_text("1 0 a 1\n")
    with pytest.raises(InputFileError, match="1 of 2 queries have no right image in the index: '2'"):
        from_qrels(str(queries), str(qrels), ["a", "b"])
    qrels.write_text("1 a 1\n")
    with pytest.raises(InputFileError, match=r"qrels.txt:1 is '1 a 1'"):
        from_qrels(str(queries), str(qrels), ["a"])
    qrels.write_text("7 0 a 1\n")
    with pytest.raises(InputFileError, match="judges the query '7'"):
        from_qrels(str(queries), str(qrels), ["a"])


def test_options_that_do_not_work() -> None:
    with pytest.raises(ConfigError, match="either --captions, or --queries"):
        EvaluateConfig("i")
    with pytest.raises(ConfigError, match=r"pool sizes .*fusion weights"):
        EvaluateConfig("i", captions=("c",), pool_sizes=(0,), fusion_weights=(-1.0,))


def test_tables() -> None:
    config = EvaluateConfig("i", captions=("c",), num_resamples=20)
    rows = measure(config, QUESTIONS, SIMILARITY, knows_all)
    results = EvaluateResults((EvaluateResult("idx", "m", 3, 4, rows, 0.1),))
    text = results.to_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "+25.0" in text
    assert json.loads(json.dumps(results.to_dict()))["results"][0]["rows"][0]["metrics"]["R@1"]["mean"] == 75.0
    markdown = results.to_markdown().splitlines()
    table = [line for line in markdown if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + len(rows)
