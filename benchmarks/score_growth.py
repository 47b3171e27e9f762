"""How scoring grows with the number of pairs: seconds of join, score and regroup, and peak memory.

    python -m benchmarks.score_growth --images 100000 --pairs 10000 100000 1000000

A synthetic index (random tokens, the tiny random model) is built once; each size runs in a process
of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = ("a", "red", "apple", "on", "the", "table", "dog", "cat", "small", "big", "old", "house", "two", "people")


def write_inputs(folder: Path, num_pairs: int, num_images: int, per_query: int) -> None:
    rng = np.random.default_rng(num_pairs)
    num_queries = num_pairs // per_query
    texts = [" ".join(rng.choice(WORDS, rng.integers(3, 20))) for _ in range(num_queries)]
    names = pa.array([f"q{n:07d}" for n in range(num_queries)])
    pq.write_table(pa.table({"query_id": names, "text": texts}), folder / f"queries-{num_pairs}.parquet")
    # Distinct images a query: a random start and a random odd stride modulo a power of two below num_images.
    modulus = 1 << (num_images.bit_length() - 1)
    start, stride = rng.integers(0, modulus, num_queries), rng.integers(0, modulus // 2, num_queries) * 2 + 1
    images = (start[:, None] + stride[:, None] * np.arange(per_query)) % modulus
    ids = pa.array([f"img-{n:05d}.jpg" for n in range(num_images)]).take(pa.array(images.ravel()))
    queries = names.take(pa.array(np.repeat(np.arange(num_queries), per_query)))
    scores = pa.array(rng.random(num_queries * per_query), pa.float32())
    table = pa.table({"query_id": queries, "image_id": ids, "first_stage_score": scores})
    pq.write_table(table, folder / f"candidates-{num_pairs}.parquet")


def peak_kib() -> int:
    """Peak resident memory of this program."""
    from edje_pipeline.pipeline.metrics import peak_rss_bytes

    return peak_rss_bytes() // 1024


def run_one(folder: Path, num_pairs: int) -> None:
    from edje_pipeline.pipeline.score import ScoreConfig, run_score

    base = peak_kib()
    started = time.perf_counter()
    result = run_score(
        ScoreConfig(
            index=str(folder / "index"),
            queries=str(folder / f"queries-{num_pairs}.parquet"),
            candidates=str(folder / f"candidates-{num_pairs}.parquet"),
            out=str(folder / f"out-{num_pairs}"),
            num_workers=0,
            num_threads=1,  # the tiny model's products are too small to share
            quiet=True,
            overwrite=True,
        )
    )
    wall_s = time.perf_counter() - started
    peak = peak_kib()
    print(json.dumps({"wall_s": wall_s, "base_kib": base, "peak_kib": peak, **result.to_dict()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--per-query", type=int, default=100)
    parser.add_argument("--out", type=Path, help="append the table to this file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(Path(options.one[0]), int(options.one[1]))
        return
    from edje_pipeline.models.random_model import write_random_model
    from tests.index_util import write_index

    names = ["pairs", "wall s", "hash s", "join s", "score s", "regroup s", "(join + regroup) / wall", "pairs/s"]
    names += ["peak RSS MB", "before MB", "peak against the smallest"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    smallest = 0
    with tempfile.TemporaryDirectory(prefix="edje-growth-") as name:
        folder = Path(name)
        model = write_random_model(folder / "model", size="tiny")
        write_index(folder / "index", model, num_images=options.images, shard_rows=8192, row_group_rows=1024)
        for num_pairs in options.pairs:
            write_inputs(folder, num_pairs, options.images, options.per_query)
            command = [sys.executable, "-m", "benchmarks.score_growth", "--one", str(folder), str(num_pairs)]
            value = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            seconds, wall_s = value["timings"], value["wall_s"]
            share = (seconds["join_s"] + seconds["regroup_s"]) / wall_s
            numbers = [seconds[f"{stage}_s"] for stage in ("hash", "join", "score", "regroup")]
            cells = [f"{num_pairs:,}", f"{wall_s:.1f}", *(f"{number:.2f}" for number in numbers), f"{share:.1%}"]
            smallest = smallest or value["peak_kib"]
            cells += [
                f"{num_pairs / wall_s:,.0f}",
                f"{value['peak_kib'] * 1024 / 1e6:,.0f}",
                f"{value['base_kib'] * 1024 / 1e6:,.0f}",
                f"{value['peak_kib'] / smallest:.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        import torch

        versions = f"torch {torch.__version__}, pyarrow {pa.__version__}, numpy {np.__version__}, {platform.machine()}"
        command = "python -m benchmarks.score_growth " + " ".join(sys.argv[1:])
        title = "# Scoring: growth with the number of pairs"
        head = f"{title}\n\n`{command}`; {versions}, Python {platform.python_version()}.\n"
        options.out.parent.mkdir(parents=True, exist_ok=True)
        note = f"{options.images:,} stored images of 4 x 32 float16 tokens, tiny random model, in process.\n"
        options.out.write_text(f"{head}{note}\n{text}")


if __name__ == "__main__":
    main()
