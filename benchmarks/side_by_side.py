"""A CPU's threads: one batch by all of them, or a batch each. Scoring by precision, and encoding images.

    python -m benchmarks.side_by_side --rounds 5

12 layers of MiniLM's sizes on texts of 9 to 20 tokens with 64 image tokens; ViT-S/16 at 112 px. Random
weights. Threads sleep while they wait (OMP_WAIT_POLICY=passive), as in `extract` and `score`. Sides
alternate; nothing else is measured: no disk, no decoding.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded

import numpy as np
import torch

from benchmarks.report import table, write_report
from benchmarks.score_model import make_material
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.stages.encode import Encoder
from edje_pipeline.stages.score_pairs import PRECISIONS, PairScorer, TextTokens
from edje_pipeline.storage.codecs import resolve

Work = Callable[[], Any]


def scoring(folder: Path, num_pairs: int, threads: int) -> dict[str, dict[str, Work]]:
    """What to run, by precision and side."""
    material = make_material(folder, num_images=100, num_queries=20)
    texts = TextTokens.from_lists(material.model.load_tokenizer().encode(material.queries))
    codec = resolve("float16", num_tokens=material.tokens.shape[1], dim=material.tokens.shape[2])
    payloads, rng = codec.encode(material.tokens), np.random.default_rng(0)
    chosen, images = rng.integers(0, len(texts), num_pairs), rng.integers(0, len(payloads), num_pairs)
    found: dict[str, dict[str, Work]] = {}
    for precision in PRECISIONS:
        sides = {}
        for side, wide in (("one batch", 1), ("a batch each", threads)):
            torch.set_num_threads(wide)  # a scorer computes as many batches side by side as torch has threads when made
            scorer = PairScorer(material.model.load_joint_encoder(), codec, device="cpu", precision=precision)
            sides[side] = partial(scorer.score, payloads, images, texts, chosen)
        found[f"score, {precision}"] = sides
    return found


def encoding(folder: Path, num_images: int, threads: int) -> dict[str, dict[str, Work]]:
    """The same of the encode stage."""
    model = write_random_model(
        folder / "vit", size="demo", backbone="timm:vit_small_patch16_224", backbone_options={"img_size": 112},
        num_compressed_tokens=8, text_tower=False,
    )  # fmt: skip
    adapter = model.spec.adapter
    assert adapter is not None
    pixels = np.random.default_rng(0).integers(0, 255, (num_images, 112, 112, 3), dtype=np.uint8)
    sides = {}
    for side, wide in (("one batch", 1), ("a batch each", threads)):
        torch.set_num_threads(wide)
        encoder = Encoder(
            backbone=model.load_backbone(),
            adapter=model.load_adapter(),
            codec=resolve("float16", num_tokens=adapter.num_compressed_tokens, dim=adapter.output_dim),
            embedding_dim=model.spec.backbone.embedding_dim,
        )
        sides[side] = partial(encoder.encode, pixels)
    return {"encode, float32": sides}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="edje-side-") as name:
        folder = Path(name)
        works = scoring(folder, options.pairs, options.threads) | encoding(folder, options.images, options.threads)
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in range(options.rounds + 1):
        for what, sides in works.items():
            for side in list(sides) if number % 2 else reversed(list(sides)):
                torch.set_num_threads(options.threads)
                cpu, wall = time.process_time(), time.perf_counter()
                sides[side]()
                spent = (time.process_time() - cpu, time.perf_counter() - wall)
                if number:
                    taken.setdefault((what, side), []).append(spent)
                    print(f"round {number}: {what}, {side}: cpu {spent[0]:.2f} s, wall {spent[1]:.2f} s", flush=True)
    rows = []
    for what, sides in works.items():
        before, after = (taken[what, side] for side in sides)
        count = options.images if what.startswith("encode") else options.pairs
        faster = [b[1] / a[1] for b, a in zip(before, after, strict=True)]
        busy = [f"{statistics.median(cpu / wall for cpu, wall in values):.2f}" for values in (before, after)]
        rates = [f"{count / statistics.median(wall for _, wall in values):.1f}" for values in (before, after)]
        rows.append([what, *rates, f"{statistics.median(faster):.2f} ({min(faster):.2f} to {max(faster):.2f})", *busy])
    header = ["what", "one batch by all threads, per s", "a batch each, per s", "times as fast, wall",
              "cores busy, one batch", "cores busy, a batch each"]  # fmt: skip
    about = (
        f"{options.threads} threads; medians (smallest to largest) of {options.rounds} alternating rounds. Pairs or "
        "images a second. Other programs share the machine: the ratios count."
    )
    write_report("side_by_side", "One batch by all threads, or a batch each", [about, "", *table(header, rows)],
                 out=options.out, module="side_by_side", packages=("torch", "timm", "numpy"))  # fmt: skip


if __name__ == "__main__":
    main()
