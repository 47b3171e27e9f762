"""Scoring equals a plain padded batch, whatever the candidate lists look like."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edje_pipeline.pipeline.score import ScoreConfig, run_score
from edje_pipeline.pipeline.score_rank import PART_SCHEMA, rank_pairs, rank_parts
from edje_pipeline.reranker import Reranker
from edje_pipeline.storage.index import Index
from tests.index_util import write_index
from tests.score_util import (
    WORDS,
    assert_same_ranking,
    plain_ranking,
    plain_scores,
    read_results,
    tiny_model,
    write_inputs,
)

NUM_IMAGES = 30


@cache
def property_index() -> tuple[Index, Reranker]:
    index = write_index(
        Path(tempfile.mkdtemp(prefix="edje-property-")) / "index",
        tiny_model(),
        num_images=NUM_IMAGES,
        shard_rows=11,
        row_group_rows=4,
    )
    return index, Reranker.open(index, device="cpu")


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)
candidates = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, NUM_IMAGES + 2)), min_size=1, max_size=60
)  # few queries, repeats likely, a few ids beyond the index


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(texts, min_size=5, max_size=5), candidates, st.integers(1, 40), st.sampled_from([3, 10**6]))
@example(["dog"] * 5, [(0, 0)], 1, 10**6)  # one pair
@example(["dog"] * 5, [(q, i) for q in range(5) for i in range(12)], 7, 10**6)  # texts of one length
@example(["a", "a a", "a a a", "a a a a", "a a a a a"], [(q, q) for q in range(5)], 2, 3)  # all lengths differ
@example(["dog", "cat", "a", "b", "c"], [(0, 3)] * 9, 1, 3)  # the same pair again and again
def test_run_score_equals_the_plain_path(
    query_texts: list[str], chosen: list[tuple[int, int]], unit_pairs: int, memory_pairs: int
) -> None:
    index, _ = property_index()
    queries = [(f"q{n}", text) for n, text in enumerate(query_texts)]
    pairs = [(f"q{q}", f"img-{i:05d}.jpg") for q, i in chosen]
    folder = Path(tempfile.mkdtemp(prefix="edje-property-run-"))
    try:
        query_path, pair_path = write_inputs(folder, queries, pairs)
        result = run_score(
            ScoreConfig(
                index=str(index.location),
                queries=str(query_path),
                candidates=str(pair_path),
                out=str(folder / "out"),
                unit_pairs=unit_pairs,
                memory_pairs=memory_pairs,
                num_workers=0,
                num_threads=1,
                device="cpu",
                quiet=True,
            )
        )
        assert_same_ranking(read_results(folder / "out"), plain_ranking(index, tiny_model(), queries, pairs))
        plan = result.manifest["plan"]
        assert plan["num_pairs"] + plan["num_missing"] + plan["num_duplicates"] == len(pairs)
    finally:
        shutil.rmtree(folder)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(texts, st.integers(0, NUM_IMAGES - 1)), min_size=1, max_size=50))
def test_predict_equals_the_plain_path(pairs: list[tuple[str, int]]) -> None:
    index, opened = property_index()
    named = [(text, f"img-{number:05d}.jpg") for text, number in pairs]
    expected = plain_scores(index, tiny_model(), [text for text, _ in named], [name for _, name in named])
    np.testing.assert_allclose(opened.predict(named), expected, atol=1e-5)


scored = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 50), st.sampled_from([-1.0, -0.0, 0.0, 0.5])),
    max_size=80,
    unique_by=lambda row: row[:2],
)


@settings(max_examples=200, deadline=None)
@given(scored, st.one_of(st.none(), st.integers(1, 5)), st.sampled_from([2, 10**6]), st.integers(1, 9))
def test_ranking_equals_sorting_tuples(
    rows: list[tuple[int, int, float]], top_k: int | None, memory_pairs: int, part_rows: int
) -> None:
    table = pa.table(
        [[q for q, _, _ in rows], [f"{i:02d}" for _, i, _ in rows], [s for _, _, s in rows], [None] * len(rows)],
        PART_SCHEMA.names,
    ).cast(PART_SCHEMA)
    names = pa.array([f"q{n}" for n in range(7)])
    parts = [table.slice(start, part_rows) for start in range(0, len(rows), part_rows)]
    ranked = rank_parts(parts, names, num_pairs=len(rows), memory_pairs=memory_pairs, top_k=top_k)
    found = [tuple(row.values())[:4] for piece in ranked for row in piece.to_pylist()]
    expected = []
    for query in range(7):
        ours = sorted((-s + 0.0, f"{i:02d}") for q, i, s in rows if q == query)
        expected += [(f"q{query}", name, -score, rank) for rank, (score, name) in enumerate(ours, 1)][:top_k]
    assert found == expected
    assert rank_pairs(table, names, None).num_rows == len(rows)
