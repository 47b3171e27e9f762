"""What the tests of scoring share: a tiny model, input files, and the plain path that everything must equal."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from edje_pipeline.models.checkpoint import ModelDirectory
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.storage.index import Index

WORDS = ("a", "red", "apple", "on", "the", "table", "dog", "cat", "small", "big", "old", "house", "two", "people")


@cache
def tiny_model() -> ModelDirectory:
    """One random model for a whole test session."""
    folder = Path(tempfile.mkdtemp(prefix="edje-test-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_random_model(folder / "model", size="tiny")


def sentence(rng: np.random.Generator, num_words: int) -> str:
    return " ".join(rng.choice(WORDS, num_words))


def write_inputs(
    folder: Path, queries: Sequence[tuple[str, str]], pairs: Sequence[tuple[str, str]], name: str = ""
) -> tuple[Path, Path]:
    """Query and candidate files as Parquet."""
    query_path, pair_path = folder / f"queries{name}.parquet", folder / f"candidates{name}.parquet"
    pq.write_table(pa.table({"query_id": [q for q, _ in queries], "text": [t for _, t in queries]}), query_path)
    scores = pa.array(np.linspace(1, 0, len(pairs)), pa.float32())
    table = {"query_id": [q for q, _ in pairs], "image_id": [i for _, i in pairs], "first_stage_score": scores}
    pq.write_table(pa.table(table), pair_path)
    return query_path, pair_path


@torch.inference_mode()
def plain_scores(index: Index, model: ModelDirectory, texts: Sequence[str], image_ids: Sequence[str]) -> np.ndarray:
    """One padded batch through the same weights: what a scorer without any shortcut gives."""
    ids = model.load_tokenizer().encode(list(texts))
    width = max(map(len, ids))
    input_ids = torch.zeros(len(ids), width, dtype=torch.int64)
    mask = torch.zeros(len(ids), width, dtype=torch.int64)
    for row, tokens in enumerate(ids):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    tokens = torch.from_numpy(index.tokens(list(image_ids)))
    return model.load_joint_encoder().forward_padded(input_ids, mask, tokens).numpy()


def plain_ranking(
    index: Index, model: ModelDirectory, queries: Sequence[tuple[str, str]], pairs: Sequence[tuple[str, str]]
) -> list[tuple[str, str, float, int]]:
    """(query_id, image_id, score, rank) of distinct pairs that the index holds, in the order of the queries."""
    text_of = dict(queries)
    known = set(index.ids())
    rows = []
    for query_id, _ in queries:
        ids = list(dict.fromkeys(image for query, image in pairs if query == query_id and image in known))
        if ids:
            scores = plain_scores(index, model, [text_of[query_id]] * len(ids), ids)
            order = sorted(range(len(ids)), key=lambda n: (-scores[n], ids[n]))
            rows += [(query_id, ids[n], float(scores[n]), rank) for rank, n in enumerate(order, start=1)]
    return rows


def read_results(out: Path) -> list[tuple[str, str, float, int]]:
    """(query_id, image_id, score, rank) as stored."""
    files = sorted((out / "results").glob("*.parquet"))
    tables = [pq.ParquetFile(file).read() for file in files]
    table = pa.concat_tables(tables)
    columns = [table.column(name).to_pylist() for name in ("query_id", "image_id", "score", "rank")]
    return list(zip(*columns, strict=True))


def assert_same_ranking(found: list[tuple[str, str, float, int]], expected: list[tuple[str, str, float, int]]) -> None:
    """Equal pairs with scores within 1e-5; equal order but where scores are closer than that."""
    assert sorted(row[:2] for row in found) == sorted(row[:2] for row in expected)
    expected_scores = {row[:2]: row[2] for row in expected}
    for row in found:
        assert abs(row[2] - expected_scores[row[:2]]) < 1e-5
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[0] == theirs[0]
        assert ours[3] == theirs[3]
        if ours[1] != theirs[1]:  # two images within rounding may change places
            assert abs(expected_scores[ours[:2]] - theirs[2]) < 2e-5
