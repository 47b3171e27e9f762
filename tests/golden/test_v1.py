"""Format version 1, frozen: bare pyarrow, DuckDB, Polars and the reader see what expected.json says."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from edje_pipeline.errors import FormatVersionError
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.snapshots import rollback
from edje_pipeline.storage.verify import verify
from tests.index_factory import run_extract

GOLDEN = Path(__file__).parent / "v1"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
IMAGES: dict[str, dict[str, Any]] = EXPECTED["images"]
MANIFEST = json.loads((GOLDEN / "index" / "manifest.json").read_text())


def test_with_bare_pyarrow() -> None:
    root = GOLDEN / "index"
    assert MANIFEST["format_version"] == EXPECTED["format_version"]
    assert MANIFEST["embedding_dim"] == EXPECTED["embedding_dim"]
    for key, value in EXPECTED["counts"].items():
        assert MANIFEST["counts"][key] == value
    assert {key: MANIFEST["tokens"][key] for key in EXPECTED["tokens"]} == EXPECTED["tokens"]
    lists = {key: pq.read_table(root / ref["path"]).to_pylist() for key, ref in MANIFEST["files"].items()}
    for key, ref in MANIFEST["files"].items():
        assert hashlib.sha256((root / ref["path"]).read_bytes()).hexdigest() == ref["sha256"]
        assert len(lists[key]) == ref["num_rows"]
    dead = {(row["shard"], row["row"]) for row in lists["tombstones"]}
    found = {}
    for number, entry in enumerate(lists["shards"]):
        path = root / entry["path"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        for row, values in enumerate(pq.read_table(path, page_checksum_verification=True).to_pylist()):
            if (number, row) not in dead:
                found[values["image_id"]] = (values, number, row)
    assert sorted(found) == sorted(IMAGES)
    for text, (values, _, _) in found.items():
        assert base64.b64encode(values["tokens"]).decode() == IMAGES[text]["tokens_float16_base64"]
        assert base64.b64encode(values["embedding"]).decode() == IMAGES[text]["embedding_float16_base64"]
        assert (values["width"], values["height"]) == (IMAGES[text]["width"], IMAGES[text]["height"])
        assert len(values["content_sha256"]) == 32
    lookup = [row for part in lists["ids"] for row in pq.read_table(root / part["path"]).to_pylist()]
    assert [(row["image_id"], row["shard"], row["row"]) for row in lookup] == sorted(
        (text, number, row) for text, (_, number, row) in found.items()
    )
    rejects = [row for entry in lists["rejects"] for row in pq.read_table(root / entry["path"]).to_pylist()]
    assert {row["image_id"]: row["reason"] for row in rejects} == EXPECTED["rejects"]


def test_with_the_reader_and_verify() -> None:
    index = Index.open(GOLDEN / "index")
    assert index.ids() == sorted(IMAGES)
    tokens = index.tokens(list(IMAGES))
    for number, value in enumerate(IMAGES.values()):
        plain = np.frombuffer(base64.b64decode(value["tokens_float16_base64"]), np.float16).reshape(4, 8)
        np.testing.assert_array_equal(tokens[number], plain.astype(np.float32))
        embedding = np.frombuffer(base64.b64decode(value["embedding_float16_base64"]), np.float16)
        np.testing.assert_array_equal(index.embeddings(list(IMAGES))[number], embedding.astype(np.float32))
    report = verify(Location.parse(GOLDEN / "index"))
    assert report.problems == (), report.to_text()


def test_with_duckdb_and_polars() -> None:
    shards = str(GOLDEN / "index" / "shards" / "*.parquet")
    rows = duckdb.sql(
        f"select image_id, width, octet_length(tokens) from '{shards}' order by image_id, width"
    ).fetchall()
    frame = pl.read_parquet(shards)
    assert sorted(frame["image_id"].to_list()) == [row[0] for row in rows]
    assert {row[2] for row in rows} == {EXPECTED["tokens"]["payload_bytes"]}
    ids = str(GOLDEN / "index" / "snapshots" / MANIFEST["snapshot"] / "ids-*.parquet")
    assert pl.read_parquet(ids)["image_id"].to_list() == sorted(IMAGES)
    assert duckdb.sql(f"select count(*) from '{ids}'").fetchall() == [(len(IMAGES),)]


def test_this_program_can_still_write_to_it(tmp_path: Path) -> None:
    root = tmp_path / "index"
    shutil.copytree(GOLDEN / "index", root)
    run_extract(root, ["brand new"], mode="add")
    assert Index.open(root).ids() == sorted([*IMAGES, "brand new"])
    rollback(Location.parse(root))
    rollback(Location.parse(root))
    assert len(Index.open(root)) == 12
    assert verify(Location.parse(root)).is_good


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "index"
    shutil.copytree(GOLDEN / "index", root)
    (root / "manifest.json").write_text(json.dumps({**MANIFEST, "format_version": 2, "files": "something new"}))
    with pytest.raises(FormatVersionError, match="install a newer edje-pipeline"):
        Index.open(root)
