from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from edje_pipeline.errors import ConfigError, IndexStateError, InputFileError, ModelError
from edje_pipeline.models.checkpoint import save_model
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.pipeline import retrieve as module
from edje_pipeline.pipeline.retrieve import RetrieveConfig, run_retrieve
from edje_pipeline.pipeline.top_k import TopK
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.text_inputs import iter_candidates
from tests.index_util import write_index
from tests.score_util import tiny_model


def brute_force(scores: np.ndarray, ids: list[str], k: int) -> list[tuple[int, str, int]]:
    rows = []
    for query, row in enumerate(scores):
        order = sorted(range(len(ids)), key=lambda n: (-row[n], ids[n]))[:k]
        rows += [(query, ids[n], rank) for rank, n in enumerate(order, start=1)]
    return rows


@pytest.mark.parametrize("levels", [2, 5, 1000], ids=["many ties", "some ties", "hardly a tie"])
@pytest.mark.parametrize("k", [1, 7, 100])
def test_top_k_over_blocks_equals_brute_force(levels: int, k: int) -> None:
    rng = np.random.default_rng(levels + k)
    ids = [f"{n:03d}" for n in rng.permutation(90)]
    scores = rng.integers(-levels, levels, (5, 90)).astype(np.float32)
    best = TopK(5, k)
    for start, stop in ((0, 3), (3, 40), (40, 41), (41, 90)):
        best.add(scores[:, start:stop], pa.array(ids[start:stop]))
    rows, images, values, ranks = best.result()
    assert list(zip(rows.tolist(), images.to_pylist(), ranks.tolist(), strict=True)) == brute_force(scores, ids, k)
    place = {name: n for n, name in enumerate(ids)}
    assert values.tolist() == [scores[q, place[i]] for q, i in zip(rows.tolist(), images.to_pylist(), strict=True)]


@pytest.fixture(scope="module")
def embedded_index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_index(tmp_path_factory.mktemp("index") / "index", tiny_model(), num_images=300)


def query_file(folder: Path, index: Index, num_queries: int = 9) -> tuple[Path, np.ndarray]:
    width = index.manifest.embedding_dim
    embeddings = np.random.default_rng(5).standard_normal((num_queries, width)).astype(np.float32)
    table = {"query_id": [f"q{n}" for n in range(num_queries)], "text": [f"text {n}" for n in range(num_queries)]}
    pq.write_table(pa.table({**table, "embedding": list(embeddings)}), folder / "queries.parquet")
    return folder / "queries.parquet", embeddings


def retrieve_config(index: Index, folder: Path, **options: object) -> RetrieveConfig:
    queries, _ = query_file(folder, index)
    values = {"top_k": 10, "out": str(folder / "candidates.parquet"), "quiet": True, **options}
    return RetrieveConfig(index=str(index.location), queries=str(queries), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("block_images", [20, 16_384])
def test_exact_search_equals_brute_force(
    tmp_path: Path, embedded_index: Index, block_images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_IMAGES", block_images)
    config = retrieve_config(embedded_index, tmp_path)
    result = run_retrieve(config)
    _, embeddings = query_file(tmp_path, embedded_index)
    ids = embedded_index.ids()
    scores = embeddings @ embedded_index.embeddings(ids).T
    table = pq.read_table(config.out)
    columns = [table.column(name).to_pylist() for name in ("query_id", "image_id", "rank")]
    found = [(int(query[1:]), image, rank) for query, image, rank in zip(*columns, strict=True)]
    assert found == brute_force(scores, ids, 10)
    assert (result.num_candidates, result.method, result.exit_code) == (90, "exact", 0)
    assert "90 candidates for 9 queries" in result.to_text()


def test_faiss_with_all_lists_finds_the_same(tmp_path: Path, embedded_index: Index) -> None:
    exact, approximate = tmp_path / "exact.parquet", tmp_path / "faiss.parquet"
    run_retrieve(retrieve_config(embedded_index, tmp_path, out=str(exact)))
    run_retrieve(retrieve_config(embedded_index, tmp_path, out=str(approximate), method="faiss", num_probes=10**4))
    ours, theirs = (pq.read_table(path, columns=["query_id", "image_id", "rank"]) for path in (exact, approximate))
    assert ours == theirs


def test_candidates_are_what_score_reads(tmp_path: Path, embedded_index: Index) -> None:
    for name in ("candidates.parquet", "first.run"):
        run_retrieve(retrieve_config(embedded_index, tmp_path, out=str(tmp_path / name)))
    stored, trec = (
        pa.concat_tables(iter_candidates(str(tmp_path / name))) for name in ("candidates.parquet", "first.run")
    )
    assert stored.num_rows == 90
    assert stored.select(["query_id", "image_id"]) == trec.select(["query_id", "image_id"])
    np.testing.assert_allclose(stored.column("first_stage_score"), trec.column("first_stage_score"), rtol=1e-6)


def test_embeddings_from_a_file_win(tmp_path: Path, embedded_index: Index) -> None:
    config = retrieve_config(embedded_index, tmp_path)
    _, embeddings = query_file(tmp_path, embedded_index)
    np.save(tmp_path / "flipped.npy", -embeddings)
    run_retrieve(config)
    run_retrieve(replace(config, out=str(tmp_path / "flipped.parquet"), embeddings=str(tmp_path / "flipped.npy")))
    ours, flipped = (pq.read_table(tmp_path / name) for name in ("candidates.parquet", "flipped.parquet"))
    assert ours.column("image_id") != flipped.column("image_id")


def test_bad_embeddings_say_what_was_expected(tmp_path: Path, embedded_index: Index) -> None:
    config = retrieve_config(embedded_index, tmp_path, embeddings=str(tmp_path / "e.npy"))
    with pytest.raises(InputFileError, match="cannot read the query embeddings"):
        run_retrieve(config)
    np.save(tmp_path / "e.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(InputFileError, match=r"shape \(3, 2\), expected \(9, \d+\)"):
        run_retrieve(config)
    np.save(tmp_path / "e.npy", np.full((9, embedded_index.manifest.embedding_dim), np.nan, np.float32))
    with pytest.raises(InputFileError, match="not finite"):
        run_retrieve(config)


def test_a_model_without_text_tower_needs_embeddings(tmp_path: Path, embedded_index: Index) -> None:
    ours, config = tiny_model(), retrieve_config(embedded_index, tmp_path)
    blind = save_model(
        tmp_path / "blind",
        replace(ours.spec, text_tower=None),
        **{name: ours.file(f"{name}.safetensors") for name in ("backbone", "adapter", "joint_encoder")},  # type: ignore[arg-type]
        tokenizer=ours.file("tokenizer.json"),
    )
    (tmp_path / "q.jsonl").write_text('{"query_id": "a", "text": "dog"}\n')
    with pytest.raises(ModelError, match="no text tower"):
        run_retrieve(replace(config, queries=str(tmp_path / "q.jsonl"), model=str(blind.path)))


def test_texts_pass_through_the_text_tower(tmp_path: Path, embedded_index: Index) -> None:
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"query_id": n, "text": t}) + "\n" for n, t in (("a", "dog"), ("b", "a cat"), ("c", "dog")))
    )
    config = replace(retrieve_config(embedded_index, tmp_path, top_k=300), queries=str(tmp_path / "q.jsonl"))
    run_retrieve(config)
    table = pq.read_table(config.out)
    found = {q: table.filter(pc.equal(table["query_id"], q))["image_id"].to_pylist() for q in "abc"}
    ids = embedded_index.ids()
    scores = tiny_model().load_text_tower().encode(["dog", "a cat"]) @ embedded_index.embeddings(ids).T
    assert found["a"] == found["c"] == [name for _, name, _ in brute_force(scores[:1], ids, 300)]
    assert found["b"][:10] == [name for _, name, _ in brute_force(scores[1:], ids, 10)]


def test_another_backbone_is_refused(tmp_path: Path, embedded_index: Index) -> None:
    (tmp_path / "q.jsonl").write_text('{"query_id": "a", "text": "dog"}\n')
    other = write_random_model(tmp_path / "other", seed=4)
    config = replace(retrieve_config(embedded_index, tmp_path), queries=str(tmp_path / "q.jsonl"))
    with pytest.raises(IndexStateError, match="another backbone"):
        run_retrieve(replace(config, model=str(other.path)))


@pytest.mark.parametrize("options", [{"top_k": 0}, {"method": "magic"}, {"num_probes": 0}], ids=lambda v: next(iter(v)))
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        RetrieveConfig(index="i", queries="q", out="o", **options)  # type: ignore[arg-type]
