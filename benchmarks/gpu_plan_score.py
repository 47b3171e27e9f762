"""The GPU plan's scoring part: pairs/s end to end and of the bare encoder, MiniLM-L12 sizes, 49 kB and 1 kB.

    python -m benchmarks.gpu_plan_score --device cuda        under five minutes on one 80 GB GPU
    python -m benchmarks.gpu_plan_score --device cpu --tiny  toy sizes, to see that the program works

Synthetic weights and tokens. Target: 100,000 pairs/s from the disk cache in bfloat16. The bare
encoder is timed at one text length in batches of several sizes: plain, with own kernels, compiled, and each as a CUDA
graph, which says what to change when the target is missed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.report import spread, table, write_report
from benchmarks.score_model import Material, make_material
from edje_pipeline.models.gpu_encoder import gpu_encoder
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.pipeline.score import ScoreConfig, run_score
from edje_pipeline.stages.score_pairs import BATCH_TOKENS, PairScorer, TextTokens
from edje_pipeline.storage.codecs import resolve, train_pq
from edje_pipeline.storage.index import Index
from tests.index_util import write_index

TARGET = 100_000
TEXT_LENGTH = 14
SECTIONS = {
    "score": ("", ["index", "texts", "precision", "form", "tokens a batch", "score pairs/s", "all pairs/s",
                   "read s", "wait s", "score s", "write s"]),
    "agreement": ("Difference of logits from float32 on the same GPU:",
                  ["form", "largest, in standard deviations", "Spearman, all pairs", "same first image"]),
    "bare": (f"The bare encoder, texts of {TEXT_LENGTH} tokens:", ["form", "tokens a batch", "pairs/s"]),
}  # fmt: skip
Row = tuple[str, list[str]]
"""A section and a row of it."""
WORDS = {"captions": (5, 11), "sentences": (5, 30)}
"""Words of a query: as few as captions have, and up to thirty."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=2, help="timed runs of each form")
    parser.add_argument("--num-queries", type=int, help="of 500 candidates each")
    parser.add_argument("--batch-tokens", type=int, nargs="+", help="of the end-to-end runs, instead of the default")
    parser.add_argument("--no-compile", action="store_true", help="leave out what costs a minute of compiling")
    parser.add_argument("--no-small", action="store_true", help="leave out the 1 kB index")
    parser.add_argument("--no-bare", action="store_true", help="leave out the bare encoder")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="no further row is begun after so long")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible; --device cpu --tiny shows that the program works")
        return 1
    began = time.perf_counter()
    num_images, num_queries, per_query, layers = (24, 4, 6, 2) if options.tiny else (8192, 1000, 500, 12)
    num_queries = options.num_queries or num_queries
    with tempfile.TemporaryDirectory(prefix="edje-gpu-") as name:
        folder = Path(name)
        material = make_material(folder, num_images=num_images, num_queries=0, num_layers=layers)
        lengths = {
            kind: write_pairs(folder / kind, words, num_images, num_queries, per_query, material)
            for kind, words in WORDS.items()
        }
        found = Found(options, describe(material, lengths, num_queries, per_query, options.rounds))
        steps = itertools.chain(
            end_to_end(folder, material, options),
            () if options.device == "cpu" else agreement(material, compiled=not options.no_compile),
            () if options.no_bare else bare_encoder(material.model.load_joint_encoder(), options),
        )
        for section, row in steps:
            print(row, flush=True)
            found.rows[section].append(row)
            found.save(complete=False)
            if time.perf_counter() - began > options.limit_s:
                print(f"the limit of {options.limit_s:.0f} s is reached: the rest is left out")
                return 0
        found.save(complete=True)
    return 0


def describe(material: Material, lengths: dict[str, float], num_queries: int, per_query: int, num_rounds: int) -> str:
    """The sentence above the table."""
    texts = " and ".join(f"{kind} have {length:.1f} tokens on average" for kind, length in lengths.items())
    return (
        f"{num_queries:,} queries x {per_query} candidates of {len(material.tokens):,} images, {material.described}; "
        f"{texts}, images {material.tokens.shape[1]}. "
        "Pairs/s of `score` are of reading, scoring and writing; of `all` also of joining and regrouping. "
        f"Median (lowest to highest) of {num_rounds} runs after one small one."
    )


@dataclass
class Found:
    """The rows of each section so far."""

    options: argparse.Namespace
    about: str
    rows: dict[str, list[list[str]]] = field(default_factory=lambda: {name: [] for name in SECTIONS})

    def save(self, *, complete: bool) -> None:
        """Writes the result file, whole or not."""
        judged = [row for row in self.rows["score"] if (row[0], row[3]) == ("49 kB", "as it is")]
        verdict = "not measured"
        if judged:
            best = max(float(row[5].split()[0].replace(",", "")) for row in judged)
            verdict = "reached" if best >= TARGET else "missed"
        if self.options.tiny:
            verdict = "not judged at toy sizes"
        lines = [self.about, "", f"Target of {TARGET:,} pairs/s at 49 kB: {verdict}."]
        for name, (title, header) in SECTIONS.items():
            if self.rows[name]:
                lines += ["", *([title, ""] if title else []), *table(header, self.rows[name])]
        title = "GPU plan: scoring" + ("" if complete else ", cut off")
        write_report("gpu_plan_score", title, lines, device=self.options.device, out=self.options.out,
                     module="gpu_plan_score", packages=("torch", "pyarrow", "numpy"), show=complete)  # fmt: skip


def write_pairs(
    folder: Path, words_of_query: tuple[int, int], num_images: int, num_queries: int, per_query: int, material: Material
) -> float:
    """Queries of random words, candidates of each in a random run of the images; the mean length in tokens.

    `few.parquet` holds the candidates of the first tenth of the queries.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = np.array(["red", "apple", "on", "the", "table", "dog", "cat", "small", "big", "old", "house", "people"])
    names = pa.array([f"q{number:06d}" for number in range(num_queries)])
    texts = [" ".join(rng.choice(words, rng.integers(*words_of_query))) for _ in range(num_queries)]
    pq.write_table(pa.table({"query_id": names, "text": texts}), folder / "q.parquet")
    start = rng.integers(0, num_images, num_queries)
    images = (start[:, None] + np.arange(per_query)) % num_images
    ids = pa.array([f"img-{number:05d}.jpg" for number in range(num_images)]).take(pa.array(images.ravel()))
    owners = names.take(pa.array(np.repeat(np.arange(num_queries), per_query)))
    candidates = pa.table({"query_id": owners, "image_id": ids})
    pq.write_table(candidates, folder / "c.parquet")
    pq.write_table(candidates.slice(0, -(-num_queries // 10) * per_query), folder / "few.parquet")
    return float(np.mean([len(tokens) for tokens in material.model.load_tokenizer().encode(texts)]))


def end_to_end(folder: Path, material: Material, options: argparse.Namespace) -> Iterator[Row]:
    """One row an index, precision and form; each is run once before, so that kernels are compiled and files cached.

    What the target is about comes first, what takes a minute to compile last.
    """
    on_gpu = options.device == "cuda"
    forms = ["as it is", *(["own kernels"] if on_gpu else [])]
    forms += ["compiled"] if on_gpu and not options.no_compile else []
    sizes = ["49 kB"] if options.no_small else ["49 kB", "1 kB"]
    wanted = [row for row in itertools.product(forms, sizes, WORDS)
              if row[0] != "own kernels" or row[1:] == ("49 kB", "captions")]  # fmt: skip
    indexes: dict[str, Index] = {}
    for form, size, texts in wanted:
        if size not in indexes:
            indexes[size] = make_index(folder, material, size)
        for precision, batch_tokens in itertools.product(
            ("bfloat16",) if on_gpu else ("float32", "int8"), options.batch_tokens or [BATCH_TOKENS[options.device]]
        ):
            BATCH_TOKENS[options.device] = batch_tokens
            config = ScoreConfig(
                index=str(indexes[size].location),
                queries=str(folder / texts / "q.parquet"),
                candidates=str(folder / texts / "few.parquet"),
                out=str(folder / "out"),
                precision=precision,
                compile=form == "compiled",
                kernels="own" if form == "own kernels" else "torch",
                device=options.device,
                num_workers=0,
                overwrite=True,
                quiet=True,
            )
            one_run(config)
            config = replace(config, candidates=str(folder / texts / "c.parquet"))
            runs = [one_run(config) for _ in range(options.rounds)]
            shown = [spread([run[name] for run in runs], 0) for name in ("rate", "overall")]
            shown += [f"{statistics.median(run[f'{name}_s'] for run in runs):.2f}" for name in
                      ("read", "wait", "score", "write")]  # fmt: skip
            yield "score", [size, texts, precision, form, f"{batch_tokens:,}", *shown]


def make_index(folder: Path, material: Material, size: str) -> Index:
    """An index of `49 kB` or `1 kB` an image."""
    form: dict[str, Any] = {"shard_rows": 4096, "row_group_rows": 128}
    if size == "1 kB":
        form = {"shard_rows": 8192, "row_group_rows": 4096, "codec": train_pq(material.tokens[:64], 16, "opq")}
    tokens = material.tokens
    return write_index(folder / size, material.model, num_images=len(tokens), tokens=tokens, **form)


def one_run(config: ScoreConfig) -> dict[str, float]:
    """A whole `score`: its seconds by stage and pairs/s."""
    result = run_score(config)
    stats = result.manifest["stats"]
    Path(config.out, "manifest.json").unlink()
    inside = stats["wait_s"] + stats["score_s"] + stats["write_s"]
    found = {**stats, "rate": result.num_pairs / inside, "overall": result.pairs_per_s}
    print({name: round(value, 2) for name, value in found.items()}, result.manifest["timings"], flush=True)
    return found


def agreement(material: Material, *, compiled: bool, num_queries: int = 40, per_query: int = 400) -> Iterator[Row]:
    """How far the forms for a GPU are from float32: the same random pairs through each."""
    rng = np.random.default_rng(1)
    lists = [[2, *rng.integers(5, 1000, length).tolist(), 3] for length in rng.integers(6, 24, num_queries)]
    texts = TextTokens.from_lists(lists)
    tokens = material.tokens[:per_query]
    codec = resolve("float16", num_tokens=tokens.shape[1], dim=tokens.shape[2])
    payloads = codec.encode(tokens)
    images = np.tile(np.arange(per_query), num_queries)
    owners = np.repeat(np.arange(num_queries), per_query)
    forms: dict[str, dict[str, Any]] = {
        "float32": {"precision": "float32", "use_graphs": False},
        "float32, graphs": {"precision": "float32", "batch_tokens": 8192},
        "bfloat16": {"use_graphs": False},
        "bfloat16, graphs": {"batch_tokens": 8192},
        "bfloat16, own kernels": {"use_graphs": False, "kernels": "own"},
        "bfloat16, own kernels, graphs": {"batch_tokens": 8192, "kernels": "own"},
    }
    if compiled:
        forms["bfloat16, compiled, graphs"] = {"compiled": True, "batch_tokens": 8192}
    want = np.empty(0)
    for name, form in forms.items():
        scorer = PairScorer(material.model.load_joint_encoder(), codec, device="cuda", **form)
        scorer.score(payloads, images, texts, owners)
        found = scorer.score(payloads, images, texts, owners)
        want = found if name == "float32" else want
        first = (found.reshape(num_queries, -1).argmax(1) == want.reshape(num_queries, -1).argmax(1)).mean()
        ranks = [np.argsort(np.argsort(values)) for values in (found, want)]
        yield "agreement", [name, f"{np.abs(found - want).max() / want.std():.2g}",
                            f"{np.corrcoef(*ranks)[0, 1]:.5f}", f"{first:.0%}"]  # fmt: skip


def bare_encoder(encoder: JointEncoder, options: argparse.Namespace) -> Iterator[Row]:
    """Forward passes on tensors that are on the device."""
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    encoder = encoder.to(device, torch.bfloat16 if on_gpu else torch.float32).eval()
    num_tokens, width = 64, encoder.spec.width
    forms: dict[str, Callable[..., Any]] = {"eager": encoder.forward_dense}
    if on_gpu:
        forms["own kernels"] = gpu_encoder(encoder).forward_dense
        if not options.no_compile:
            forms["compiled"] = torch.compile(encoder.forward_dense, dynamic=True)
    for batch_tokens in (8192, 16_384, 32_768, 65_536, 131_072, 524_288) if on_gpu else (512,):
        num_pairs = batch_tokens // (num_tokens + TEXT_LENGTH + 1)
        for name, form in forms.items():
            with torch.inference_mode():
                ids = torch.randint(1000, 20_000, (num_pairs, TEXT_LENGTH), device=device)
                images = torch.randn(num_pairs, num_tokens, width, device=device, dtype=encoder.dtype)
                sides = {name: partial(form, ids, images)}
                if on_gpu:
                    sides[f"{name}, graph"] = recorded(sides[name])
                rates = {side: num_pairs / per_call(work, on_gpu) for side, work in sides.items()}
            for side, rate in rates.items():
                yield "bare", [side, f"{batch_tokens:,}", f"{rate:,.0f}"]


def recorded(work: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a CUDA graph of `work`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def per_call(work: Callable[[], Any], on_gpu: bool) -> float:
    """Seconds of one call, after three that warm up."""
    num_calls = 10 if on_gpu else 2
    for _ in range(3):
        work()
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(num_calls):
        work()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / num_calls


if __name__ == "__main__":
    sys.exit(main())
