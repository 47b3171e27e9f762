"""Bytes on disk an image over the payload, everything but the embedding counted.

    python -m benchmarks.storage_overhead [--rows-1kb 100000] [--rows-49kb 20000] [--out RESULTS.md]

Synthetic payloads and random content hashes (neither compresses) go through the real shard writer,
staging and publish; then every file of the index is counted: shards, lookup, lists, head, manifest,
codebook. Of the embedding column (384 float16) the compressed size of its Parquet column chunks is taken
off. `counter` ids look like img2dataset's (`00012/000120345`), `hash` ids are 32 random hexadecimal digits.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.storage.arrow import fixed_binary_from_numpy
from edje_pipeline.storage.codecs import Codebook, Codec, resolve, save_codec
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.manifest import HeadFields, TokenSpec
from edje_pipeline.storage.publish import publish
from edje_pipeline.storage.schema import shard_schema
from edje_pipeline.storage.shards import row_group_rows_for, write_shard
from edje_pipeline.storage.staging import Receipt, Staging

NUM_TOKENS, DIM, EMBEDDING_DIM = 64, 384, 384
TARGETS = {"float16": 1.02, "opq16": 1.10}
SHARD_BYTES = 200_000_000


def make_codec(spec: str) -> Codec:
    """With a codebook of the real size; its values do not matter here."""
    if spec == "float16":
        return resolve(spec, num_tokens=NUM_TOKENS, dim=DIM)
    rng = np.random.default_rng(0)
    shapes = {"centroids": (16, 256, DIM // 16), "mean": (NUM_TOKENS, DIM), "rotation": (DIM, DIM)}
    arrays = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    return resolve(spec, num_tokens=NUM_TOKENS, dim=DIM, codebook=Codebook(spec, NUM_TOKENS, DIM, arrays))


def make_ids(kind: str, start: int, end: int) -> list[str]:
    if kind == "counter":
        return [f"{row // 10_000:05d}/{row:09d}" for row in range(start, end)]
    return [hashlib.sha256(str(row).encode()).hexdigest()[:32] for row in range(start, end)]


def make_rows(codec: Codec, ids: list[str], rng: np.random.Generator) -> pa.Table:
    count = len(ids)
    if codec.name == "float16":
        payload = rng.normal(size=(count, NUM_TOKENS * DIM)).astype("<f2").view(np.uint8)
    else:
        payload = rng.integers(0, 256, (count, codec.payload_bytes), np.uint8)
    embedding = rng.normal(size=(count, EMBEDDING_DIM)).astype("<f2")
    columns = [
        pa.array(ids),
        fixed_binary_from_numpy(payload),
        fixed_binary_from_numpy(embedding),
        pa.array(rng.choice([640, 480, 500, 333, 1024], count).astype(np.int32)),
        pa.array(rng.choice([640, 480, 500, 375, 768], count).astype(np.int32)),
        fixed_binary_from_numpy(rng.integers(0, 256, (count, 32), np.uint8)),
    ]
    return pa.table(columns, schema=shard_schema(codec.payload_bytes, EMBEDDING_DIM))


def build(root: Path, codec: Codec, num_rows: int, id_kind: str) -> None:
    index = Location.parse(root)
    fingerprints = {key: hashlib.sha256(key.encode()).hexdigest() for key in ("corpus", "backbone", "preprocess")}
    fingerprints |= {"adapter": hashlib.sha256(b"adapter").hexdigest(), "codec": codec.fingerprint}
    entry = save_codec(codec, index)
    group_rows = row_group_rows_for(codec.payload_bytes)
    shard_rows = max(1, SHARD_BYTES // codec.payload_bytes // group_rows) * group_rows
    rng = np.random.default_rng(1)
    with Staging.begin(index, fingerprints=fingerprints, config={}) as staging:
        staging.set_plan_info({"num_rows": num_rows})
        for number, start in enumerate(range(0, num_rows, shard_rows)):
            end = min(start + shard_rows, num_rows)
            table = make_rows(codec, make_ids(id_kind, start, end), rng)
            name = f"shards/{staging.run_id}-{number:032x}.parquet"
            shard = write_shard(index, name, table, row_group_rows=group_rows)
            staging.journal([Receipt(((start, end),), shard)])
        tokens = TokenSpec(NUM_TOKENS, DIM, "float32", codec.payload_bytes, codec.name)
        head = HeadFields(fingerprints=fingerprints, tokens=tokens, embedding_dim=EMBEDDING_DIM, codec=entry)
        publish(staging, head=head, mode="new")


def measure(root: Path, num_rows: int) -> tuple[dict[str, float], float]:
    """Bytes an image by top-level part, the embedding column apart."""
    parts: dict[str, float] = defaultdict(float)
    embedding = 0
    for path in root.rglob("*"):
        if path.is_file():
            parts[path.relative_to(root).parts[0]] += path.stat().st_size
    for path in (root / "shards").iterdir():
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            for column in range(row_group.num_columns):
                if row_group.column(column).path_in_schema == "embedding":
                    embedding += row_group.column(column).total_compressed_size
    parts["shards"] -= embedding
    return {key: value / num_rows for key, value in parts.items()}, embedding / num_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows-1kb", type=int, default=100_000)
    parser.add_argument("--rows-49kb", type=int, default=20_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    versions = f"pyarrow {pa.__version__}, numpy {np.__version__}, Python {platform.python_version()}"
    header = ["codec", "ids", "images", "payload B", "shards B", "snapshots B", "codebook B", "other B", "total B"]
    header += ["total / payload", "target", "met", "embedding B, not counted", "wall s"]
    lines = [versions, "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for spec, num_rows in (("opq16", args.rows_1kb), ("float16", args.rows_49kb)):
        for id_kind in ("counter", "hash") if spec == "opq16" else ("counter",):
            codec = make_codec(spec)
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder) / "index"
                start = time.monotonic()
                build(root, codec, num_rows, id_kind)
                wall_s = time.monotonic() - start
                parts, embedding = measure(root, num_rows)
            total = sum(parts.values())
            ratio = total / codec.payload_bytes
            named = [parts.pop(key, 0.0) for key in ("shards", "snapshots", "codecs")]
            cells = [spec, id_kind, f"{num_rows:,}", f"{codec.payload_bytes:,}", *(f"{x:,.1f}" for x in named)]
            cells += [f"{sum(parts.values()):,.2f}", f"{total:,.1f}", f"{ratio:.4f}", f"{TARGETS[spec]:.2f}"]
            cells += ["yes" if ratio <= TARGETS[spec] else "NO", f"{embedding:,.1f}", f"{wall_s:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    text = "\n".join(lines)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
