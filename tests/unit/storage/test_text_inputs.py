"""Query, candidate, caption and id files in every format, and everything that can be wrong with them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from edje_pipeline.errors import InputFileError
from edje_pipeline.storage import compressed
from edje_pipeline.storage.text_inputs import iter_candidates, read_captions, read_ids, read_queries


def read_candidates(uri: str) -> pa.Table:
    return pa.concat_tables(iter_candidates(uri))


QUERIES = {"query_id": ["q1", "q2"], "text": ["a red apple", 'two "dogs", one\tcat']}
CSV_QUERIES = 'query_id,text\nq1,a red apple\nq2,"two ""dogs"", one\tcat"\n'
JSON_QUERIES = "".join(
    json.dumps({"query_id": i, "text": t, "extra": [1]}) + "\n" for i, t in zip(*QUERIES.values(), strict=True)
)


def write(path: Path, content: bytes) -> str:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".csv", CSV_QUERIES),
        (".csv", "\ufeff" + CSV_QUERIES.replace("\n", "\r\n")),
        (".tsv", 'query_id\ttext\nq1\ta red apple\nq2\t"two ""dogs"", one\tcat"\n'),
        (".jsonl", JSON_QUERIES),
        (".jsonl", "\n" + JSON_QUERIES.replace("\n", "\n\n")),
        (".dat", JSON_QUERIES),
        ("", CSV_QUERIES),
    ],
)
def test_queries_are_read_from_every_text_format(tmp_path: Path, suffix: str, content: str, packed: str) -> None:
    uri = write(tmp_path / f"queries{suffix}{packed}", content.encode())
    assert read_queries(uri).to_pydict() == QUERIES


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_queries_are_read_from_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"other": [1, 2], "text": QUERIES["text"], "query_id": pa.array(QUERIES["query_id"]).cast(kind)})
    pq.write_table(table, tmp_path / "q.parquet")
    assert read_queries(str(tmp_path / "q.parquet")).to_pydict() == QUERIES


def test_numeric_ids_become_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query_id": [7, 8], "text": ["a", "b"]}), tmp_path / "q.parquet")
    (tmp_path / "q.jsonl").write_text('{"query_id": 7, "text": "a"}\n{"query_id": "8", "text": "b"}\n')
    for name in ("q.parquet", "q.jsonl"):
        assert read_queries(str(tmp_path / name)).column("query_id").to_pylist() == ["7", "8"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("q.csv", "q1,a red apple\nq2,a dog\n", "is its header missing"),
        ("q.csv", "query_id,caption\nq1,x\n", "no column text"),
        ("q.csv", "", "is empty"),
        ("q.jsonl", "\ufeff\n", "is empty"),
        ("q.csv", "query_id,text\n", "no record"),
        ("q.csv", "query_id,text\nq1,a\nq1,b\n", "query_id 'q1' repeated at row 1, row 2"),
        ("q.csv", "query_id,text\nq1,a,b\nq2,b\n", "wrong number of fields at line 2"),
        ("q.csv", "query_id,text\nq1,  \n,b\n", "empty query_id at row 2; empty text at row 1"),
        ("q.jsonl", '{"query_id": "q1", "text": "a"}\n{oops\n', "not JSON"),
        ("q.jsonl", '{"query_id": "q1", "text": "a"}\n{oops\n', "line 2"),
        ("q.jsonl", '{"query_id": "q1", "text": ["a"]}\n', "text is a list, expected text at line 1"),
        ("q.jsonl", "[1]\n", "not a JSON object"),
        ("q.jsonl", '{"query_id": "q1"}\n', "no column text"),
        ("q.parquet", "not parquet", "cannot be read as Parquet"),
        ("q.csv.gz", None, "cannot be decompressed"),
        ("q.csv.zst", None, "cannot be decompressed"),
    ],
)
def test_what_is_wrong_with_a_query_file_is_said(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8bnot" if content is None else content.encode())
    with pytest.raises(InputFileError) as caught:
        read_queries(str(tmp_path / name))
    assert said in str(caught.value)
    assert name in str(caught.value)


def test_an_absent_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="does not exist"):
        read_queries(str(tmp_path / "none.csv"))
    with pytest.raises(InputFileError, match="directory"):
        read_queries(str(tmp_path))


def test_all_problems_are_reported_at_once_with_a_count(tmp_path: Path) -> None:
    lines = ["query_id,text"] + [f"q{i}," for i in range(10)] + ["q0,fine"]
    (tmp_path / "q.csv").write_text("\n".join(lines))
    with pytest.raises(InputFileError) as caught:
        read_queries(str(tmp_path / "q.csv"))
    assert "empty text at row 1, row 2, row 3 and 7 more" in str(caught.value)
    assert "'q0' repeated" in str(caught.value)


CANDIDATES = {"query_id": ["q1", "q1", "q2"], "image_id": ["a", "b c", "a"], "first_stage_score": [0.5, -2.0, None]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.csv", "image_id,query_id,first_stage_score\na,q1,0.5\nb c,q1,-2e0\na,q2,\n"),
        ("c.tsv", "query_id\timage_id\tfirst_stage_score\nq1\ta\t.5\nq1\tb c\t-2\nq2\ta\t\n"),
        (
            "c.jsonl",
            (
                '{"query_id":"q1","image_id":"a","first_stage_score":0.5}\n'
                '{"query_id":"q1","image_id":"b c","first_stage_score":-2}\n{"query_id":"q2","image_id":"a"}\n'
            ),
        ),
    ],
)
def test_candidates_are_read_from_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    table = read_candidates(str(tmp_path / name))
    assert table.to_pydict() == CANDIDATES
    assert table.schema.field("first_stage_score").type == pa.float32()


def test_candidates_without_scores_and_from_parquet(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("query_id,image_id\nq1,a\n")
    assert read_candidates(str(tmp_path / "c.csv")).column("first_stage_score").to_pylist() == [None]
    pq.write_table(pa.table(CANDIDATES), tmp_path / "c.parquet")
    assert read_candidates(str(tmp_path / "c.parquet")).to_pydict() == CANDIDATES


@pytest.mark.parametrize("name", ["run.trec", "run.txt", "run"])
def test_a_trec_run_is_read_whatever_its_blanks(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("q1 Q0 a.jpg 1 0.5 tag\nq1\tQ0\tb.jpg  2 -1.5e-1 tag \r\n\n q2 Q0 a.jpg 1 3 tag")
    table = read_candidates(str(tmp_path / name))
    assert table.column("query_id").to_pylist() == ["q1", "q1", "q2"]
    assert table.column("image_id").to_pylist() == ["a.jpg", "b.jpg", "a.jpg"]
    assert table.column("first_stage_score").to_pylist() == pytest.approx([0.5, -0.15, 3.0])


def test_bad_lines_of_a_trec_run_are_named(tmp_path: Path) -> None:
    (tmp_path / "r.trec").write_text("q1 Q0 a 1 0.5 t\nq1 Q0 a 1 0.5\nq1 Q0 b 2 high t\n")
    with pytest.raises(InputFileError, match=r"six fields .* at line 2 \(5 fields\)"):
        read_candidates(str(tmp_path / "r.trec"))
    (tmp_path / "r.trec").write_text("q1 Q0 a 1 0.5 t\nq1 Q0 b 2 high t\n")
    with pytest.raises(InputFileError, match="not a finite number at line 2"):
        read_candidates(str(tmp_path / "r.trec"))


def big_candidates(suffix: str, num: int, bad: int | None = None) -> str:
    """Candidates of many pieces; record `bad` has no image_id."""
    rows = [(f"q{n % 7}", "" if n == bad else f"img-{n}.jpg", n / 8) for n in range(num)]
    if suffix == ".csv":
        return "query_id,image_id,first_stage_score\n" + "".join(f"{q},{i},{s}\n" for q, i, s in rows)
    if suffix == ".trec":
        return "".join(f"{q} Q0 {i} 1 {s} tag\n" for q, i, s in rows)
    return "".join(json.dumps({"query_id": q, "image_id": i, "first_stage_score": s}) + "\n" for q, i, s in rows)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".trec", ".parquet"])
def test_candidates_come_in_pieces(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edje_pipeline.storage.tabular.CHUNK_BYTES", 4096)
    monkeypatch.setattr("edje_pipeline.storage.tabular.BATCH_ROWS", 100)
    path = tmp_path / f"c{suffix}"
    if suffix == ".parquet":
        (tmp_path / "c.csv").write_text(big_candidates(".csv", 1000))
        pq.write_table(pa.concat_tables(iter_candidates(str(tmp_path / "c.csv"))), path)
    else:
        path.write_text(big_candidates(suffix, 1000))
    pieces = list(iter_candidates(str(path)))
    assert len(pieces) > 3
    table = pa.concat_tables(pieces)
    assert table.column("image_id").to_pylist() == [f"img-{n}.jpg" for n in range(1000)]
    assert table.column("first_stage_score").to_pylist() == [n / 8 for n in range(1000)]


@pytest.mark.parametrize(("suffix", "place"), [(".csv", "row 701"), (".jsonl", "line 701")])
def test_a_bad_record_of_a_later_piece_is_named_and_nothing_comes_after_it(
    tmp_path: Path, suffix: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edje_pipeline.storage.tabular.CHUNK_BYTES", 4096)
    (tmp_path / f"c{suffix}").write_text(big_candidates(suffix, 1000, bad=700))
    pieces: list[pa.Table] = []
    with pytest.raises(InputFileError, match=f"empty image_id at {place}"):
        pieces.extend(iter_candidates(str(tmp_path / f"c{suffix}")))
    assert 0 < sum(piece.num_rows for piece in pieces) <= 700
    assert all(all(piece.column("image_id").to_pylist()) for piece in pieces)


def test_a_column_that_only_some_pieces_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edje_pipeline.storage.tabular.CHUNK_BYTES", 64)
    lines = [{"query_id": "q", "image_id": f"{n}", **({"first_stage_score": 1} if n > 40 else {})} for n in range(50)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = read_candidates(str(tmp_path / "c.jsonl"))
    assert table.column("first_stage_score").to_pylist() == [None] * 41 + [1.0] * 9
    del lines[3]["image_id"]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputFileError, match="empty image_id at line 4"):
        read_candidates(str(tmp_path / "c.jsonl"))


def test_ids_from_a_column_or_a_plain_list(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("a.jpg\n\nb c.jpg\na.jpg\n")
    (tmp_path / "ids.csv").write_text("image_id\na.jpg\nb c.jpg\n")
    for name in ("ids.txt", "ids.csv"):
        assert read_ids(str(tmp_path / name)).to_pydict() == {"image_id": ["a.jpg", "b c.jpg"]}


def test_captions_flat_or_in_lists(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"image_id":"a","captions":["x","y"]}\n{"image_id":"b","caption":"z"}\n')
    (tmp_path / "c.csv").write_text("image_id,caption\na,x\na,y\nb,z\n")
    for name in ("c.jsonl", "c.csv"):
        found = read_captions(str(tmp_path / name)).to_pydict()
        assert found == {"image_id": ["a", "a", "b"], "caption": ["x", "y", "z"]}
    (tmp_path / "c.jsonl").write_text('{"image_id":"a","captions":[]}\n{"captions":["x"]}\n')
    with pytest.raises(InputFileError, match="no caption, or an empty one at line 1; no image_id at line 2"):
        read_captions(str(tmp_path / "c.jsonl"))


class TestHostileFiles:
    def test_a_gzip_bomb_is_stopped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compressed, "BOMB_BYTES", 1 << 20)
        uri = write(tmp_path / "bomb.csv.gz", b"query_id,text\n" + b"\n" * (64 << 20))
        with pytest.raises(InputFileError, match="decompression bomb"):
            read_queries(uri)

    def test_a_line_without_end_is_stopped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compressed, "MAX_LINE_BYTES", 1 << 20)
        uri = write(tmp_path / "q.jsonl", b'{"query_id": "' + b"x" * (20 << 20))
        with pytest.raises(InputFileError, match="longer than"):
            read_queries(uri)

    def test_json_nested_without_end_is_a_problem_of_its_line(self, tmp_path: Path) -> None:
        uri = write(tmp_path / "q.jsonl", b'{"query_id": "a", "text": "b", "c": ' + b"[" * 200_000 + b"\n")
        with pytest.raises(InputFileError, match="line 1"):
            read_queries(uri)

    def test_parquet_whose_dictionary_unfolds_without_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("edje_pipeline.storage.tabular.MAX_TABLE_BYTES", 1 << 20)
        ids = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 100_000]))
        pq.write_table(pa.table({"query_id": ids, "image_id": ids}), tmp_path / "c.parquet")
        assert (tmp_path / "c.parquet").stat().st_size < 1 << 20
        with pytest.raises(InputFileError, match="split it"):
            read_candidates(str(tmp_path / "c.parquet"))
