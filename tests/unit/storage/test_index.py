"""The reader: order, repeats, unknown ids, what is there when there is no index."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest

from edje_pipeline.errors import ConfigError, CorruptionError, IndexNotFoundError, UnknownIdError
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.staging import Staging
from tests.index_factory import EMBEDDING_DIM, default_codec, fingerprints_of, run_extract, tokens_of

IDS = [f"{number:03d}/ü.jpg" for number in range(130)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader")
    run_extract(path, IDS, chunk=33, part_rows=40)
    return path


def test_order_and_repeats(root: Path) -> None:
    index = Index.open(root)
    rng = np.random.default_rng(3)
    asked = [IDS[number] for number in rng.integers(0, len(IDS), 300)]
    tokens = index.tokens(asked)
    assert tokens.dtype == np.float32
    np.testing.assert_array_equal(tokens, np.stack([tokens_of(text) for text in asked]).astype(np.float32))
    embeddings = index.embeddings(asked)
    np.testing.assert_array_equal(embeddings, tokens[:, 0, :EMBEDDING_DIM])
    assert index.tokens([]).shape == (0, 4, 8)
    assert len(index) == 130
    assert index.ids() == sorted(IDS)
    assert IDS[3] in index
    assert "nope" not in index


def test_unknown_ids_are_named(root: Path) -> None:
    with pytest.raises(UnknownIdError, match=r"2 of 3 image_ids .* 'no', 'nein'"):
        Index.open(root).tokens(["no", IDS[0], "nein"])


def test_one_string_is_not_a_list_of_ids(root: Path) -> None:
    with pytest.raises(ConfigError, match="one string"):
        Index.open(root).tokens(IDS[0])


def test_only_the_needed_lookup_part_is_opened(root: Path) -> None:
    index = Index.open(root)
    index.locate([IDS[0]])
    assert len(index._lookup._files) == 1
    assert len(index._lookup._parts) >= 3


def test_rows_and_row_groups_agree(root: Path) -> None:
    index = Index.open(root)
    shards, rows = index.locate(IDS)
    for text, shard, row in list(zip(IDS, shards, rows, strict=True))[::17]:
        entry = index.shards[shard]
        table = index.read_row_group(int(shard), int(row // entry.row_group_rows), ["image_id"])
        assert table.column(0)[int(row % entry.row_group_rows)].as_py() == text


def test_no_embeddings(tmp_path: Path) -> None:
    run_extract(tmp_path, IDS[:5], embedding_dim=0)
    with pytest.raises(ConfigError, match="stores no embeddings"):
        Index.open(tmp_path).embeddings(IDS[:1])


def test_a_shard_of_another_size_is_refused(tmp_path: Path) -> None:
    run_extract(tmp_path, IDS[:20])
    path = next((tmp_path / "shards").iterdir())
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CorruptionError, match="its list says"):
        Index.open(tmp_path).tokens(IDS[:1])


def test_what_is_there_instead_of_an_index(tmp_path: Path) -> None:
    with pytest.raises(IndexNotFoundError, match="does not exist"):
        Index.open(tmp_path / "no")
    with pytest.raises(IndexNotFoundError, match="is empty"):
        Index.open(tmp_path)
    (tmp_path / "cat.jpg").write_bytes(b"x")
    with pytest.raises(IndexNotFoundError, match=r"is not an index: .*cat\.jpg"):
        Index.open(tmp_path)
    with pytest.raises(IndexNotFoundError, match="is a file"):
        Index.open(tmp_path / "cat.jpg")
    codec = default_codec()
    Staging.begin(Location.parse(tmp_path / "run"), fingerprints=fingerprints_of(codec), config={}).release()
    with pytest.raises(IndexNotFoundError, match=r"unfinished run .* run the same"):
        Index.open(tmp_path / "run")


def test_duckdb_and_polars_read_a_shard(root: Path) -> None:
    path = str(next((root / "shards").iterdir()))
    rows = duckdb.sql(f"select image_id, octet_length(tokens), width from '{path}' order by image_id").fetchall()
    frame = pl.read_parquet(path).sort("image_id")
    assert [row[0] for row in rows] == frame["image_id"].to_list()
    assert {row[1] for row in rows} == {64}
    first = np.frombuffer(frame["tokens"][0], np.float16).reshape(4, 8)
    np.testing.assert_array_equal(first, tokens_of(frame["image_id"][0]))
