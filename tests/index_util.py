"""Makes real indexes without the extraction pipeline: tokens, ids and embeddings as a test wants them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from edje_pipeline.models.checkpoint import ModelDirectory
from edje_pipeline.storage.arrow import fixed_binary_from_numpy
from edje_pipeline.storage.codecs import Codec, resolve, save_codec
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.manifest import HeadFields, TokenSpec
from edje_pipeline.storage.publish import publish
from edje_pipeline.storage.schema import shard_schema
from edje_pipeline.storage.shards import write_shard
from edje_pipeline.storage.staging import Receipt, Staging


def random_tokens(num_images: int, num_tokens: int, dim: int, seed: int = 0) -> np.ndarray:
    """float16 (n, M, E), each image different."""
    return np.random.default_rng(seed).standard_normal((num_images, num_tokens, dim), np.float32).astype(np.float16)


def write_index(
    path: Path,
    model: ModelDirectory,
    *,
    num_images: int = 0,
    ids: Sequence[str] | None = None,
    tokens: np.ndarray | None = None,
    embeddings: np.ndarray | None = None,
    codec: str | Codec = "float16",
    shard_rows: int = 50,
    row_group_rows: int = 8,
    seed: int = 0,
    mode: str = "new",
) -> Index:
    """An index of `model` whose images are scattered over shards in random order.

    Args:
        path: of the index.
        model: its fingerprints and token sizes are the index's.
        num_images: used when `ids` is None: img-00000.jpg and so on.
        ids: image ids.
        tokens: (n, M, E), random when None.
        embeddings: (n, De) float32; random unit vectors when None and the model has embeddings.
        codec: a codec, or a spec without a codebook.
        shard_rows: of each shard.
        row_group_rows: of each row group.
        seed: of tokens, embeddings and the order.
        mode: `new` or `add`.
    """
    ids = list(ids) if ids is not None else [f"img-{number:05d}.jpg" for number in range(num_images)]
    num_tokens, dim = model.spec.adapter.num_compressed_tokens, model.spec.adapter.output_dim
    tokens = tokens if tokens is not None else random_tokens(len(ids), num_tokens, dim, seed)
    width = model.spec.backbone.embedding_dim
    rng = np.random.default_rng(seed + 1)
    if embeddings is None and width:
        embeddings = rng.standard_normal((len(ids), width)).astype(np.float32)
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    chosen = resolve(codec, num_tokens=num_tokens, dim=dim) if isinstance(codec, str) else codec
    location = Location.parse(path)
    order = rng.permutation(len(ids))
    fingerprints = {
        "corpus": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        "backbone": model.spec.backbone.fingerprint,
        "preprocess": model.spec.preprocess.fingerprint,
        "adapter": model.spec.adapter.fingerprint,
        "codec": chosen.fingerprint,
    }
    with Staging.begin(location, fingerprints=fingerprints, config={}) as staging:
        for number, start in enumerate(range(0, len(ids), shard_rows)):
            rows = order[start : start + shard_rows]
            columns = {
                "image_id": pa.array([ids[row] for row in rows]),
                "tokens": fixed_binary_from_numpy(chosen.encode(tokens[rows])),
            }
            if width:
                assert embeddings is not None
                columns["embedding"] = fixed_binary_from_numpy(embeddings[rows].astype(np.float16))
            size = pa.array(np.full(len(rows), 32, np.int32))
            digests = pa.array([hashlib.sha256(ids[row].encode()).digest() for row in rows], pa.binary(32))
            columns |= {"width": size, "height": size, "content_sha256": digests}
            table = pa.table(columns).cast(shard_schema(chosen.payload_bytes, width))
            name = f"shards/{staging.run_id}-{number:05d}.parquet"
            entry = write_shard(location, name, table, row_group_rows=row_group_rows)
            staging.journal([Receipt(((start, start + len(rows)),), entry)])
        staging.set_plan_info({"num_rows": len(ids)})
        save_codec(chosen, location)
        head = HeadFields(
            fingerprints=fingerprints,
            tokens=TokenSpec(num_tokens, dim, "float32", chosen.payload_bytes, chosen.name),
            embedding_dim=width,
            codec=chosen.to_dict(),
            model={"name": model.spec.name},
            config={"model": str(model.path)},
            code_version="test",
        )
        publish(staging, head=head, mode=mode)  # type: ignore[arg-type]
    return Index.open(path)
