"""Small real indexes for tests: seeded tokens through a real codec, journal and publish."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from edje_pipeline.storage.arrow import fixed_binary_from_numpy
from edje_pipeline.storage.codecs import Codec, resolve
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.manifest import HeadFields, Manifest, TokenSpec
from edje_pipeline.storage.publish import publish
from edje_pipeline.storage.schema import REJECT_SCHEMA
from edje_pipeline.storage.shards import write_rejects, write_shard
from edje_pipeline.storage.staging import Receipt, Staging

NUM_TOKENS, DIM, EMBEDDING_DIM = 4, 8, 6


def tokens_of(image_id: str, version: int = 0) -> np.ndarray:
    """The tokens (M, E) float16 that this image always has."""
    seed = int.from_bytes(hashlib.sha256(f"{image_id}/{version}".encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal((NUM_TOKENS, DIM)).astype(np.float16)


def shard_table(ids: Sequence[str], codec: Codec, *, version: int = 0, embedding_dim: int = EMBEDDING_DIM) -> pa.Table:
    tokens = np.stack([tokens_of(text, version) for text in ids])
    columns: dict[str, Any] = {
        "image_id": pa.array(ids, pa.string()),
        "tokens": fixed_binary_from_numpy(codec.encode(tokens)),
    }
    if embedding_dim:
        columns["embedding"] = fixed_binary_from_numpy(np.ascontiguousarray(tokens[:, 0, :embedding_dim]))
    sha = [hashlib.sha256(f"{text}/{version}".encode()).digest() for text in ids]
    columns["width"] = pa.array([100 + len(text) for text in ids], pa.int32())
    columns["height"] = pa.array([50] * len(ids), pa.int32())
    columns["content_sha256"] = pa.array(sha, pa.binary(32))
    return pa.table(columns)


def reject_table(ids: Sequence[str], reason: str = "corrupt") -> pa.Table:
    rows = [
        {
            "image_id": text,
            "uri": f"file:///x/{text}",
            "stage": "decode",
            "reason": reason,
            "message": "bad bytes",
            "container": "file:///x",
            "offset": 0,
            "length": -1,
        }
        for text in ids
    ]
    return pa.Table.from_pylist(rows, REJECT_SCHEMA)


def fingerprints_of(codec: Codec, **changes: str) -> dict[str, str]:
    return {
        "corpus": "c" * 64,
        "backbone": "b" * 64,
        "preprocess": "p" * 64,
        "adapter": "a" * 64,
        "codec": codec.fingerprint,
        **changes,
    }


def head_of(codec: Codec, embedding_dim: int = EMBEDDING_DIM, **changes: str) -> HeadFields:
    return HeadFields(
        fingerprints=fingerprints_of(codec, **changes),
        tokens=TokenSpec(codec.num_tokens, codec.dim, "float32", codec.payload_bytes, codec.name),
        embedding_dim=embedding_dim,
        codec=codec.to_dict(),
        model={"name": "test"},
        code_version="test",
    )


def default_codec(name: str = "float16") -> Codec:
    return resolve(name, num_tokens=NUM_TOKENS, dim=DIM)


def write_chunk(
    staging: Staging,
    ids: Sequence[str],
    start: int,
    codec: Codec,
    *,
    version: int = 0,
    rejected: frozenset[str] = frozenset(),
    row_group_rows: int = 8,
    embedding_dim: int = EMBEDDING_DIM,
) -> Receipt:
    """Writes the files of plan rows [start, start + len(ids)) and returns their receipt."""
    good = [text for text in ids if text not in rejected]
    bad = [text for text in ids if text in rejected]
    name = f"{staging.run_id}-{uuid.uuid4().hex}.parquet"
    shard = rejects = None
    if good:
        table = shard_table(good, codec, version=version, embedding_dim=embedding_dim)
        shard = write_shard(staging.index, f"shards/{name}", table, row_group_rows=row_group_rows)
    if bad:
        rejects = write_rejects(staging.index, f"rejects/{name}", reject_table(bad))
    return Receipt(((start, start + len(ids)),), shard, rejects)


def run_extract(
    index: Location | Path | str,
    ids: Sequence[str],
    *,
    mode: str = "new",
    rejected: Sequence[str] = (),
    chunk: int = 20,
    codec: Codec | None = None,
    version: int = 0,
    row_group_rows: int = 8,
    embedding_dim: int = EMBEDDING_DIM,
    removed: pa.Table | None = None,
    part_rows: int = 1_000_000,
    restart: bool = False,
) -> Manifest:
    """As a real run does: list, write what is not covered, journal, publish. Resumes what it finds."""
    codec = codec or default_codec()
    location = Location.parse(index)
    with Staging.begin(location, fingerprints=fingerprints_of(codec), config={}, restart=restart) as staging:
        if staging.already_published is not None:
            return staging.already_published
        if staging.plan_info is None:
            staging.set_plan_info({"num_rows": len(ids)})
        if staging.is_resumed:
            staging.verify_staged()
        for begin, end in staging.covered.missing(len(ids)):
            for start in range(begin, end, chunk):
                part = ids[start : min(start + chunk, end)]
                receipt = write_chunk(
                    staging,
                    part,
                    start,
                    codec,
                    version=version,
                    rejected=frozenset(rejected),
                    row_group_rows=row_group_rows,
                    embedding_dim=embedding_dim,
                )
                staging.journal([receipt])
        return publish(
            staging,
            head=head_of(codec, embedding_dim),
            mode="add" if mode == "add" else "new",
            removed=removed,
            part_rows=part_rows,
        )
