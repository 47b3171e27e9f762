from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from edje_pipeline.errors import (
    ConfigError,
    CorruptionError,
    IndexLockedError,
    IndexStateError,
    InputFileError,
    ModelError,
    ResumeMismatchError,
    ShapeMismatchError,
)
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.pipeline import score as score_module
from edje_pipeline.pipeline.score import ScoreConfig, run_score
from edje_pipeline.pipeline.score_pass import Workers
from edje_pipeline.pipeline.score_worker import UnitScorer
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.lock import IndexLock
from tests.index_util import random_tokens, write_index
from tests.score_util import assert_same_ranking, plain_ranking, read_results, sentence, tiny_model, write_inputs

QUERIES = [(f"q{number}", sentence(np.random.default_rng(number), 1 + number % 7)) for number in range(12)]


@pytest.fixture(scope="module")
def score_index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_index(tmp_path_factory.mktemp("index") / "index", tiny_model(), num_images=120)


@pytest.fixture(scope="module")
def score_pairs(score_index: Index) -> list[tuple[str, str]]:
    rng = np.random.default_rng(7)
    ids = score_index.ids()
    return [(query, ids[n]) for query, _ in QUERIES for n in rng.choice(len(ids), 25, replace=False)]


def score_config(index: Index, folder: Path, pairs: list[tuple[str, str]], **options: object) -> ScoreConfig:
    queries, candidates = write_inputs(folder, QUERIES, pairs)
    values = {
        "index": str(index.location),
        "queries": str(queries),
        "candidates": str(candidates),
        "out": str(folder / "out"),
        "quiet": True,
        "num_workers": 0,
        "num_threads": 1,
        **options,
    }
    return ScoreConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{}, {"unit_pairs": 10}, {"unit_pairs": 3, "memory_pairs": 40}, {"memory_pairs": 7}],
    ids=["one unit", "many units", "cut row groups and spill", "spill"],
)
def test_results_equal_a_plain_padded_batch(
    tmp_path: Path, score_index: Index, score_pairs: list[tuple[str, str]], options: dict[str, int]
) -> None:
    result = run_score(score_config(score_index, tmp_path, score_pairs, **options))
    assert_same_ranking(read_results(tmp_path / "out"), plain_ranking(score_index, tiny_model(), QUERIES, score_pairs))
    assert result.exit_code == 0
    assert result.num_pairs == len(score_pairs)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")) == [
        "manifest.json",
        "results",
    ]


@pytest.mark.parametrize("options", [{}, {"unit_pairs": 3, "memory_pairs": 7}], ids=["in memory", "spill"])
def test_refining_everything_gives_the_ranking_of_float32(
    tmp_path: Path, score_index: Index, score_pairs: list[tuple[str, str]], options: dict[str, int]
) -> None:
    config = score_config(score_index, tmp_path, score_pairs, precision="bfloat16", refine_top=1000, **options)
    result = run_score(config)
    assert_same_ranking(read_results(tmp_path / "out"), plain_ranking(score_index, tiny_model(), QUERIES, score_pairs))
    assert result.manifest["refined"]["num_pairs"] == len(score_pairs)
    assert "refined   the best 1,000 of each query in float32" in result.to_text()


def test_refining_scores_the_best_of_each_query_in_float32_and_no_other(
    tmp_path: Path, score_index: Index, score_pairs: list[tuple[str, str]]
) -> None:
    found = {}
    for name, options in {"cheap": {}, "refined": {"refine_top": 2}, "exact": {"precision": "float32"}}.items():
        config = score_config(score_index, tmp_path, score_pairs, **{"precision": "bfloat16", **options})
        result = run_score(replace(config, out=str(tmp_path / name)))
        found[name] = {row[:2]: row[2] for row in read_results(tmp_path / name)}
        best = {row[:2] for row in read_results(tmp_path / name) if row[3] <= 2}
        if name == "cheap":
            chosen = best
        if name == "refined":
            assert result.manifest["refined"]["num_pairs"] == len(chosen)
            by_query: dict[str, list[float]] = {}
            for row in read_results(tmp_path / name):
                by_query.setdefault(row[0], []).append(row[2])
            assert all(scores == sorted(scores, reverse=True) for scores in by_query.values())
    assert len(chosen) == 2 * len(QUERIES)
    assert found["cheap"] != found["exact"]
    assert found["refined"].keys() == found["cheap"].keys()
    for pair, score in found["refined"].items():
        expected = found["exact" if pair in chosen else "cheap"][pair]
        assert abs(score - expected) < 1e-5


def test_a_refined_run_with_a_part_scored_again_loses_no_pair(
    tmp_path: Path, score_index: Index, score_pairs: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best were chosen by a part that is scored again otherwise: another computer, say."""
    config = score_config(score_index, tmp_path, score_pairs, precision="bfloat16", refine_top=2, unit_pairs=20)
    with monkeypatch.context() as patch:
        patch.setattr(score_module, "write_results", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_score(config)
    next((tmp_path / "out" / "staging").glob("*/parts/00000001-*.parquet")).unlink()
    plain = UnitScorer.compute
    monkeypatch.setattr(UnitScorer, "compute", lambda self, loaded: plain(self, loaded)[::-1].copy())
    run_score(config)
    found = [row[:2] for row in read_results(tmp_path / "out")]
    assert sorted(found) == sorted(set(score_pairs))


def test_each_row_group_is_read_once(
    tmp_path: Path, score_index: Index, score_pairs: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    plain = Index.read_row_group

    def counting(self: Index, shard: int, row_group: int, columns: object = None) -> object:
        read.append((shard, row_group))
        return plain(self, shard, row_group, columns)  # type: ignore[arg-type]

    monkeypatch.setattr(Index, "read_row_group", counting)
    result = run_score(score_config(score_index, tmp_path, score_pairs, unit_pairs=30))
    assert len(read) == len(set(read)) > 1
    assert result.manifest["plan"]["num_units"] > 1
    assert result.manifest["stats"]["num_images"] == len({image for _, image in score_pairs})


def test_first_stage_scores_travel_with_their_pairs(
    tmp_path: Path, score_index: Index, score_pairs: list[tuple[str, str]]
) -> None:
    config = score_config(score_index, tmp_path, score_pairs, unit_pairs=16)
    run_score(config)
    given = pq.read_table(config.candidates).to_pylist()
    stored = pq.read_table(next((tmp_path / "out" / "results").iterdir())).to_pylist()
    expected = {(row["query_id"], row["image_id"]): row["first_stage_score"] for row in given}
    assert {(row["query_id"], row["image_id"]): row["first_stage_score"] for row in stored} == expected


def test_top_k_and_trec(tmp_path: Path, score_index: Index, score_pairs: list[tuple[str, str]]) -> None:
    trec = tmp_path / "run.trec"
    run_score(score_config(score_index, tmp_path, score_pairs, top_k=3, trec=str(trec)))
    rows = read_results(tmp_path / "out")
    assert [row[3] for row in rows] == [1, 2, 3] * len(QUERIES)
    lines = [line.split(" ") for line in trec.read_text().splitlines()]
    assert [(q, image, float(np.float32(score)), int(rank)) for q, _, image, rank, score, _ in lines] == rows
    assert {(line[1], line[5]) for line in lines} == {("Q0", "edje")}


def test_trec_refuses_ids_with_white_space(tmp_path: Path) -> None:
    index = write_index(tmp_path / "index", tiny_model(), ids=["my photo.jpg"])
    config = score_config(index, tmp_path, [("q0", "my photo.jpg")], trec=str(tmp_path / "run.trec"))
    with pytest.raises(ConfigError, match=r"my photo\.jpg"):
        run_score(config)
    assert run_score(replace(config, trec=None)).num_pairs == 1


def test_missing_candidates_are_listed_counted_and_warned_of(tmp_path: Path, score_index: Index) -> None:
    pairs = [("q0", "img-00001.jpg"), ("q0", "gone.jpg"), ("q1", "gone.jpg"), ("q1", "img-00002.jpg"), ("q2", "no.jpg")]
    config = score_config(score_index, tmp_path, pairs)
    result = run_score(config)
    assert result.exit_code == 3
    missing = pq.read_table(tmp_path / "out" / "missing.parquet")
    assert missing.column("image_id").to_pylist() == ["gone.jpg", "gone.jpg", "no.jpg"]
    assert missing.column("first_stage_score").null_count == 0
    assert [row[:2] for row in read_results(tmp_path / "out")] == [("q0", "img-00001.jpg"), ("q1", "img-00002.jpg")]
    assert "missing   3 candidates (60.00%) of 2 images" in result.to_text()
    assert "no candidates for 9 queries" in result.to_text()
    assert run_score(replace(config, missing_warning=0.7, overwrite=True)).exit_code == 0
    with pytest.raises(InputFileError, match=r"3 candidates name 2 images.*'gone\.jpg'"):
        run_score(replace(config, out=str(tmp_path / "strict"), on_missing="error"))


def test_all_candidates_missing_gives_an_empty_result(tmp_path: Path, score_index: Index) -> None:
    result = run_score(score_config(score_index, tmp_path, [("q0", "gone.jpg")]))
    assert (result.num_pairs, result.exit_code) == (0, 3)
    assert read_results(tmp_path / "out") == []


def test_repeated_pairs_count_once_with_the_first_score(tmp_path: Path, score_index: Index) -> None:
    pairs = [("q0", "img-00001.jpg"), ("q0", "img-00002.jpg"), ("q0", "img-00001.jpg")]
    result = run_score(score_config(score_index, tmp_path, pairs))
    rows = pq.read_table(next((tmp_path / "out" / "results").iterdir())).to_pylist()
    assert {row["image_id"]: row["first_stage_score"] for row in rows} == {"img-00001.jpg": 1.0, "img-00002.jpg": 0.5}
    assert result.manifest["plan"]["num_duplicates"] == 1
    assert "repeat" in result.to_text()


def test_equal_scores_rank_by_image_id(tmp_path: Path) -> None:
    one = random_tokens(1, 4, 32)
    ids = ["b.jpg", "a.jpg", "d.jpg", "c.jpg"]
    index = write_index(tmp_path / "index", tiny_model(), ids=ids, tokens=np.repeat(one, 4, axis=0))
    run_score(score_config(index, tmp_path, [("q0", name) for name in ids], top_k=3))
    assert [row[1] for row in read_results(tmp_path / "out")] == ["a.jpg", "b.jpg", "c.jpg"]


def test_unknown_query_and_empty_inputs_are_errors(tmp_path: Path, score_index: Index) -> None:
    with pytest.raises(InputFileError, match=r"1 query_id values.*'nobody'"):
        run_score(score_config(score_index, tmp_path, [("nobody", "img-00001.jpg")]))
    with pytest.raises(InputFileError, match=r"no record|holds no pair|no row|empty"):
        run_score(score_config(score_index, tmp_path, [], out=str(tmp_path / "out2")))
    with pytest.raises(InputFileError, match="does not exist"):
        run_score(replace(score_config(score_index, tmp_path, []), candidates=str(tmp_path / "absent.parquet")))


def test_resume_scores_only_what_is_left(
    tmp_path: Path, score_index: Index, score_pairs: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = score_config(score_index, tmp_path, score_pairs, unit_pairs=20)
    scored: list[int] = []
    plain = UnitScorer.compute

    def failing(self: UnitScorer, loaded: object) -> object:
        if len(scored) == 4:
            raise KeyboardInterrupt
        scored.append(loaded.unit)  # type: ignore[attr-defined]
        return plain(self, loaded)  # type: ignore[arg-type]

    monkeypatch.setattr(UnitScorer, "compute", failing)
    with pytest.raises(KeyboardInterrupt):
        run_score(config)
    assert len(list((tmp_path / "out" / "staging").glob("*/receipts/*.json"))) == 4
    damaged = next((tmp_path / "out" / "staging").glob("*/parts/00000002-*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:-5])

    def counting(self: UnitScorer, loaded: object) -> object:
        scored.append(loaded.unit)  # type: ignore[attr-defined]
        return plain(self, loaded)  # type: ignore[arg-type]

    monkeypatch.setattr(UnitScorer, "compute", counting)
    result = run_score(config)
    assert sorted(scored) == sorted([*range(result.manifest["plan"]["num_units"]), 2])
    assert_same_ranking(read_results(tmp_path / "out"), plain_ranking(score_index, tiny_model(), QUERIES, score_pairs))


def test_other_inputs_are_refused_while_a_run_is_unfinished(
    tmp_path: Path, score_index: Index, score_pairs: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = score_config(score_index, tmp_path, score_pairs)
    with monkeypatch.context() as patch:
        patch.setattr(score_module, "write_results", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_score(config)
    _, candidates = write_inputs(tmp_path, QUERIES, score_pairs[:-1], name="-fewer")
    other = replace(config, candidates=str(candidates))
    with pytest.raises(ResumeMismatchError, match=r"what differs: candidates\."):
        run_score(other)
    with pytest.raises(ResumeMismatchError, match=r"what differs: candidates, precision\."):
        run_score(replace(other, precision="bfloat16"))
    assert run_score(replace(other, overwrite=True)).num_pairs == len(score_pairs) - 1


def test_finished_results_are_not_overwritten_by_accident(
    tmp_path: Path, score_index: Index, score_pairs: list[tuple[str, str]]
) -> None:
    config = score_config(score_index, tmp_path, score_pairs)
    run_score(config)
    with pytest.raises(IndexStateError, match="--overwrite"):
        run_score(config)
    run_score(replace(config, top_k=1, overwrite=True))
    assert len(read_results(tmp_path / "out")) == len(QUERIES)
    assert len(list((tmp_path / "out" / "results").iterdir())) == 1


def test_two_runs_on_one_folder(tmp_path: Path, score_index: Index, score_pairs: list[tuple[str, str]]) -> None:
    config = score_config(score_index, tmp_path, score_pairs)
    with IndexLock(Location.parse(config.out), purpose="score"), pytest.raises(IndexLockedError, match="in use"):
        run_score(config)


@pytest.mark.parametrize("kind", ["file", "index", "foreign"])
def test_out_must_be_a_folder_of_its_own(tmp_path: Path, score_index: Index, kind: str) -> None:
    config = score_config(score_index, tmp_path, [("q0", "img-00001.jpg")])
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("x")
    elif kind == "foreign":
        out.mkdir()
        (out / "thesis.tex").write_text("x")
    else:
        config = replace(config, out=str(score_index.location))
    with pytest.raises(ConfigError, match="--out"):
        run_score(config)


def test_another_model_is_refused(tmp_path: Path, score_index: Index) -> None:
    config = score_config(score_index, tmp_path, [("q0", "img-00001.jpg")])
    other = write_random_model(tmp_path / "other", size="tiny", seed=5)
    with pytest.raises(IndexStateError, match=r"backbone .* in the index.*adapter .*rebuild"):
        run_score(replace(config, model=str(other.path)))
    wide = write_random_model(tmp_path / "wide", size="demo", image_size=32, backbone_options={"depth": 1})
    with pytest.raises(ShapeMismatchError, match=r"width 32 .*reads width 384"):
        run_score(replace(config, model=str(wide.path)))


def test_tokens_that_are_not_finite_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(3, 4, 32)
    index = write_index(tmp_path / "index", tiny_model(), num_images=3, tokens=tokens)
    config = score_config(index, tmp_path, [("q0", "img-00001.jpg"), ("q1", "img-00002.jpg")])
    plain = UnitScorer.read

    def damaging(self: UnitScorer, unit: int) -> object:
        loaded = plain(self, unit)
        bad = loaded.image_ids.to_pylist().index("img-00002.jpg")
        loaded.payloads[bad].view(np.float16)[5] = np.nan
        return loaded

    with monkeypatch.context() as patch:
        patch.setattr(UnitScorer, "read", damaging)
        with pytest.raises(CorruptionError, match=r"'img-00002\.jpg'.*query 'q1'"):
            run_score(config)
    plain_compute = UnitScorer.compute

    def broken(self: UnitScorer, loaded: object) -> object:
        self._scorer.encoder.classifier.weight.data.fill_(np.inf)  # type: ignore[attr-defined]
        return plain_compute(self, loaded)  # type: ignore[arg-type]

    monkeypatch.setattr(UnitScorer, "compute", broken)
    with pytest.raises(ModelError, match=r"joint encoder gave .*query 'q"):
        run_score(config)


def test_result_as_dict_is_json(tmp_path: Path, score_index: Index, score_pairs: list[tuple[str, str]]) -> None:
    result = run_score(score_config(score_index, tmp_path, score_pairs))
    value = json.loads(json.dumps(result.to_dict()))
    assert value["num_results"] == len(score_pairs)
    assert value["pairs_per_s"] > 0
    assert value["driver_peak_bytes"] >= value["stats"]["peak_bytes"] > 1 << 20
    assert "memory    peak driver " in result.to_text()
    assert max(len(line) for line in result.to_text().splitlines() if str(tmp_path) not in line) <= 80


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"refine_top": -1},
        {"on_missing": "x"},
        {"missing_warning": 2.0},
        {"num_workers": -1},
        {"unit_pairs": 0},
    ],
    ids=lambda value: next(iter(value)),
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ScoreConfig(index="i", queries="q", candidates="c", out="o", **options)  # type: ignore[arg-type]


def test_one_gpu_by_its_number_is_scored_on_in_this_process() -> None:
    assert Workers().choose(10**9, "cuda:1") == 0
    assert Workers(num_workers=2).choose(10, "cuda:1") == 2
    assert Workers(ray_address="auto").choose(10, "cuda:1") >= 1  # a cluster that was asked for is used
    assert Workers().choose(10, "cpu") == 0


def test_own_kernels_are_refused_on_a_cpu(
    tmp_path: Path, score_index: Index, score_pairs: list[tuple[str, str]]
) -> None:
    with pytest.raises(ConfigError, match="own kernels are for bfloat16 on a GPU"):
        run_score(score_config(score_index, tmp_path, score_pairs, kernels="own", device="cpu", precision="bfloat16"))
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # inductor's advice to give up float32
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own imports
@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
def test_units_ahead_on_a_gpu_keep_their_pairs(
    tmp_path: Path, score_index: Index, score_pairs: list[tuple[str, str]], compiled: bool
) -> None:
    config = score_config(
        score_index, tmp_path, score_pairs, unit_pairs=20, device="cuda", precision="float32", compile=compiled
    )
    result = run_score(config)
    assert result.manifest["plan"]["num_units"] > 4
    assert_same_ranking(read_results(tmp_path / "out"), plain_ranking(score_index, tiny_model(), QUERIES, score_pairs))
