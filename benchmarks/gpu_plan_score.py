"""The GPU plan's scoring part: pairs/s end to end and of the bare encoder, MiniLM-L12 sizes, 49 kB and 1 kB.

    python -m benchmarks.gpu_plan_score --device cuda        under five minutes on one 80 GB GPU
    python -m benchmarks.gpu_plan_score --device cpu --tiny  toy sizes, to see that the program works

Synthetic weights and tokens. Target: 100,000 pairs/s from the disk cache in bfloat16. The bare
encoder is timed at one text length in batches of several sizes, as it is, compiled, and as a CUDA
graph, which says what to change when the target is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.report import table, write_report
from benchmarks.score_model import Material, make_material
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.pipeline.score import ScoreConfig, run_score
from edje_pipeline.storage.codecs import train_pq
from tests.index_util import write_index

TARGET = 100_000
TEXT_LENGTH = 14


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible; --device cpu --tiny shows that the program works")
        return 1
    num_images, num_queries, per_query, layers = (24, 4, 6, 2) if options.tiny else (8192, 4000, 500, 12)
    with tempfile.TemporaryDirectory(prefix="edje-gpu-") as name:
        folder = Path(name)
        material = make_material(folder, num_images=num_images, num_queries=0, num_layers=layers)
        write_pairs(folder, num_images, num_queries, per_query)
        rows = end_to_end(folder, material, options)
        bare = bare_encoder(material.model.load_joint_encoder(), options)
    best = max(float(row[3].replace(",", "")) for row in rows if row[0] == "49 kB")
    verdict = "reached" if best >= TARGET else "missed"
    about = (
        f"{num_queries:,} queries x {per_query} candidates of {num_images:,} images, {material.described}. "
        "Pairs/s of `score` are of reading, scoring and writing; of `all` also of joining and regrouping."
    )
    header = [
        "index",
        "precision",
        "compiled",
        "score pairs/s",
        "all pairs/s",
        "read s",
        "wait s",
        "score s",
        "write s",
    ]
    lines = [
        about,
        "",
        *table(header, rows),
        "",
        f"Target of 100,000 pairs/s at 49 kB: {'not judged at toy sizes' if options.tiny else verdict}.",
        "",
        f"The bare encoder, texts of {TEXT_LENGTH} tokens:",
        "",
        *table(["form", "tokens a batch", "pairs/s"], bare),
    ]  # fmt: skip
    write_report("gpu_plan_score", "GPU plan: scoring", lines, device=options.device, out=options.out,
                 module="gpu_plan_score", packages=("torch", "pyarrow", "numpy"))  # fmt: skip
    return 0


def write_pairs(folder: Path, num_images: int, num_queries: int, per_query: int) -> None:
    """Queries of 5 to 30 words, candidates of each in a random run of the images."""
    rng = np.random.default_rng(0)
    words = np.array(["red", "apple", "on", "the", "table", "dog", "cat", "small", "big", "old", "house", "people"])
    names = pa.array([f"q{number:06d}" for number in range(num_queries)])
    texts = [" ".join(rng.choice(words, rng.integers(5, 30))) for _ in range(num_queries)]
    pq.write_table(pa.table({"query_id": names, "text": texts}), folder / "q.parquet")
    start = rng.integers(0, num_images, num_queries)
    images = (start[:, None] + np.arange(per_query)) % num_images
    ids = pa.array([f"img-{number:05d}.jpg" for number in range(num_images)]).take(pa.array(images.ravel()))
    owners = names.take(pa.array(np.repeat(np.arange(num_queries), per_query)))
    pq.write_table(pa.table({"query_id": owners, "image_id": ids}), folder / "c.parquet")


def end_to_end(folder: Path, material: Material, options: argparse.Namespace) -> list[list[str]]:
    """One row an index, precision and form; each is run once before, so that kernels are compiled and files cached."""
    model, tokens = material.model, material.tokens
    codec = train_pq(tokens[:64], 16, "opq")
    forms: dict[str, dict[str, Any]] = {
        "49 kB": {"shard_rows": 4096, "row_group_rows": 128},
        "1 kB": {"shard_rows": 8192, "row_group_rows": 4096, "codec": codec},
    }
    indexes = {
        name: write_index(folder / name, model, num_images=len(tokens), tokens=tokens, **form)
        for name, form in forms.items()
    }
    precisions = ("bfloat16",) if options.device == "cuda" else ("float32", "int8")
    rows = []
    for size, index in indexes.items():
        for precision in precisions:
            for compiled in (False, True) if options.device == "cuda" else (False,):
                for _ in range(2):
                    result = run_score(
                        ScoreConfig(
                            index=str(index.location),
                            queries=str(folder / "q.parquet"),
                            candidates=str(folder / "c.parquet"),
                            out=str(folder / "out"),
                            precision=precision,
                            compile=compiled,
                            device=options.device,
                            num_workers=0,
                            overwrite=True,
                            quiet=True,
                        )
                    )
                    stats = result.manifest["stats"]
                    (folder / "out" / "manifest.json").unlink()
                    inside = stats["wait_s"] + stats["score_s"] + stats["write_s"]
                    rate, overall = result.num_pairs / inside, result.pairs_per_s
                    seconds = [f"{stats[f'{name}_s']:.2f}" for name in ("read", "wait", "score", "write")]
                    row = [size, precision, "yes" if compiled else "no", f"{rate:,.0f}", f"{overall:,.0f}", *seconds]
                    print(row, flush=True)
                rows.append(row)
    return rows


@torch.inference_mode()
def bare_encoder(encoder: JointEncoder, options: argparse.Namespace) -> list[list[str]]:
    """Forward passes on tensors that are on the device."""
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    encoder = encoder.to(device, torch.bfloat16 if on_gpu else torch.float32).eval()
    num_tokens, width = 64, encoder.spec.width
    forms: dict[str, Callable[..., Any]] = {"eager": encoder.forward_dense}
    if on_gpu:
        forms["compiled"] = torch.compile(encoder.forward_dense, dynamic=True)
        forms["CUDA graph of one length"] = torch.compile(encoder.forward_dense, mode="reduce-overhead")
    rows = []
    for batch_tokens in (32_768, 131_072, 524_288) if on_gpu else (512,):
        num_pairs = batch_tokens // (num_tokens + TEXT_LENGTH + 1)
        ids = torch.randint(1000, 20_000, (num_pairs, TEXT_LENGTH), device=device)
        images = torch.randn(num_pairs, num_tokens, width, device=device, dtype=encoder.dtype)
        for name, form in forms.items():
            rows.append([name, f"{batch_tokens:,}", f"{num_pairs / per_call(form, ids, images, on_gpu):,.0f}"])
            print(rows[-1], flush=True)
    return rows


def per_call(form: Callable[..., Any], ids: torch.Tensor, images: torch.Tensor, on_gpu: bool) -> float:
    """Seconds of one call, after three that warm up."""
    num_calls = 20 if on_gpu else 2
    for _ in range(3):
        form(ids, images)
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(num_calls):
        form(ids, images)
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / num_calls


if __name__ == "__main__":
    sys.exit(main())
