"""Scoring speed, end to end from a committed index, against the paths it replaces. Same weights, same pairs.

    python -m benchmarks.score_speed --bert MINILM --captions captions.jsonl --rounds 5
    python -m benchmarks.score_speed --queries 1000 --per-query 100 --images 10000     the full form

(ours)              run_score: index on disk -> ranked results on disk, by precision, with 49 kB and 1 kB an image
(authors)           one query at a time: mask, full last layer, MLM head over the sequence
(transformers)      BertModel on padded batches of 32 pairs
(transformers dense) BertModel on equal-length batches, no mask: the bare forward pass
(text only)         BertModel on as many word tokens, padded batches sorted by length
(CrossEncoder)      sentence-transformers' CrossEncoder.predict on text pairs of that length, tokenizing included

All rivals read their tokens from memory, ours reads them from disk and writes its results. Rounds
alternate. Ratios are of CPU seconds of the process with one thread, which the machine's other users
disturb least; wall seconds stand beside them.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.report import table, write_report
from benchmarks.score_model import Material, make_material
from benchmarks.score_rivals import CrossEncoderRival, Rivals
from edje_pipeline import reranker
from edje_pipeline.pipeline.score import ScoreConfig, run_score
from edje_pipeline.stages.score_pairs import BATCH_TOKENS
from edje_pipeline.storage.codecs import train_pq
from tests.index_util import write_index

PRECISIONS = ("float32", "bfloat16", "int8")


class Workload:
    """Indexes and input files on disk, and the sides that score them."""

    def __init__(self, folder: Path, material: Material, per_query: int, threads: int, *, small: bool = True) -> None:
        """Args: small: make the index of 1 kB an image as well."""
        self.folder, self.material, self.threads = folder, material, threads
        model, tokens = material.model, material.tokens
        self.indexes = {"49 kB": write_index(folder / "49kb", model, num_images=len(tokens), tokens=tokens,
                                             shard_rows=1024, row_group_rows=128)}  # fmt: skip
        if small:
            codec = train_pq(tokens[:64], 16, "opq")
            self.indexes["1 kB"] = write_index(
                folder / "1kb", model, num_images=len(tokens), tokens=tokens, codec=codec, shard_rows=8192
            )
        rng, ids = np.random.default_rng(1), [f"img-{number:05d}.jpg" for number in range(len(tokens))]
        self.images = np.concatenate(
            [rng.choice(len(ids), per_query, replace=False) for _ in range(len(material.queries))]
        )
        self.texts = np.repeat(np.arange(len(material.queries)), per_query)
        names = [f"q{number:05d}" for number in range(len(material.queries))]
        self.pairs = [(names[t], ids[i]) for t, i in zip(self.texts, self.images, strict=True)]
        pq.write_table(pa.table({"query_id": names, "text": material.queries}), folder / "q.parquet")
        columns = {"query_id": [q for q, _ in self.pairs], "image_id": [i for _, i in self.pairs]}
        pq.write_table(pa.table(columns), folder / "c.parquet")
        self.lists = model.load_tokenizer().encode(material.queries)
        self.rivals = Rivals(model.load_joint_encoder(), self.lists, tokens)
        self.cross_encoder, self.missing = self._cross_encoder()
        self.scores: dict[str, np.ndarray] = {}
        self.summaries: dict[str, str] = {}

    def _cross_encoder(self) -> tuple[CrossEncoderRival | None, str]:
        """The rival, or None and why there is none."""
        tokenizer = self.material.model.load_tokenizer().to_json()
        try:
            return CrossEncoderRival(self.rivals, tokenizer, self.material.queries, self.folder / "cross-encoder"), ""
        except ImportError as error:
            missing = f"CrossEncoder left out: {error}; pip install edje-pipeline[bench]"
            print(missing, flush=True)
            return None, missing

    def ours(self, size: str, precision: str) -> None:
        """Scores one index and keeps the scores and the summary."""
        out = self.folder / "out"
        result = run_score(
            ScoreConfig(
                index=str(self.indexes[size].location),
                queries=str(self.folder / "q.parquet"),
                candidates=str(self.folder / "c.parquet"),
                out=str(out),
                precision=precision,
                device="cpu",
                num_workers=0,
                num_threads=self.threads,
                overwrite=True,
                quiet=True,
            )
        )
        found = pq.read_table(out / "results")
        keys = zip(found["query_id"].to_pylist(), found["image_id"].to_pylist(), strict=True)
        scores = dict(zip(keys, found["score"].to_pylist(), strict=True))
        self.scores[f"ours {precision}, {size}"] = np.array([scores[pair] for pair in self.pairs], np.float32)
        self.summaries[f"ours {precision}, {size}"] = result.to_text()
        shutil.rmtree(out)

    def sides(self) -> dict[str, Callable[[], None]]:
        """Name -> what scores all pairs."""

        def rival(name: str, call: Callable[[], np.ndarray]) -> Callable[[], None]:
            def run() -> None:
                self.scores[name] = call()

            return run

        texts, images, rivals = self.texts, self.images, self.rivals
        sides = {
            "authors": rival("authors", lambda: rivals.authors(texts, images)),
            "transformers": rival("transformers", lambda: rivals.padded(texts, images)),
            "transformers dense": rival("transformers dense", lambda: rivals.dense(texts, images, BATCH_TOKENS["cpu"])),
            "text only": rival("text only", lambda: rivals.text_only(texts)),
        }
        if self.cross_encoder is not None:
            cross_encoder = self.cross_encoder
            sides["CrossEncoder"] = rival("CrossEncoder", lambda: cross_encoder.predict(texts))
        for size in self.indexes:
            for precision in PRECISIONS:
                sides[f"ours {precision}, {size}"] = lambda size=size, precision=precision: self.ours(size, precision)  # type: ignore[misc]
        return sides


@contextmanager
def loading() -> Iterator[list[tuple[float, float]]]:
    """(CPU, wall) seconds of every opening of a model in the block: as many for ten pairs as for ten million."""
    real, taken = reranker.open_scorer, []

    def timed(*args: Any, **kwargs: Any) -> reranker.OpenScorer:
        cpu, wall = time.process_time(), time.perf_counter()
        opened = real(*args, **kwargs)
        taken.append((time.process_time() - cpu, time.perf_counter() - wall))
        return opened

    reranker.open_scorer = timed
    try:
        yield taken
    finally:
        reranker.open_scorer = real


def alternate(sides: dict[str, Callable[[], None]], num_rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds, wall seconds) of every side and round, after a round that warms up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(num_rounds + 1):
        for name in list(sides) if number % 2 else list(reversed(sides)):
            cpu, wall = time.process_time(), time.perf_counter()
            with loading() as loads:
                sides[name]()
            if number:
                left_out = [sum(load[column] for load in loads) for column in (0, 1)]
                spent = (time.process_time() - cpu - left_out[0], time.perf_counter() - wall - left_out[1])
                taken[name].append(spent)
                print(f"round {number}: {name}: cpu {spent[0]:.2f} s, wall {spent[1]:.2f} s", flush=True)
    return taken


def ratio(taken: dict[str, list[tuple[float, float]]], base: str, side: str, column: int = 0) -> float:
    """Median over the rounds of base / side: how many times faster the side is."""
    return statistics.median(b[column] / s[column] for b, s in zip(taken[base], taken[side], strict=True))


def agreement(found: np.ndarray, expected: np.ndarray, texts: np.ndarray) -> tuple[float, float, float]:
    """(maximum absolute difference, least Spearman correlation of a query, fraction of queries of the same first)."""
    rows = [(found[texts == query], expected[texts == query]) for query in np.unique(texts)]
    ranks = [np.corrcoef(*(part.argsort().argsort() for part in pair))[0, 1] for pair in rows]
    first = [pair[0].argmax() == pair[1].argmax() for pair in rows]
    return float(np.abs(found - expected).max()), float(min(ranks)), float(np.mean(first))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--per-query", type=int, default=26)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bert", type=Path, help="Hugging Face BERT directory, such as all-MiniLM-L6-v2")
    parser.add_argument("--captions", type=Path, help="JSONL with `captions`, at least four each")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(prefix="edje-speed-"))
    try:
        material = make_material(
            folder,
            num_images=options.images,
            num_queries=options.queries,
            num_layers=options.layers,
            bert=options.bert,
            captions=options.captions,
        )
        work = Workload(folder, material, options.per_query, options.threads)
        taken = alternate(work.sides(), options.rounds)
    finally:
        shutil.rmtree(folder)
    report(work, taken, options)


def report(work: Workload, taken: dict[str, list[tuple[float, float]]], options: argparse.Namespace) -> None:
    rows = []
    for name, rounds in taken.items():
        cells = ["", "", ""]
        if name not in ("text only", "CrossEncoder"):
            difference, spearman, first = agreement(work.scores[name], work.scores["authors"], work.texts)
            cells = [f"{difference:.1e}", f"{spearman:.4f}", f"{first:.0%}"]
        rate = len(work.pairs) / statistics.median(cpu for cpu, _ in rounds)
        ratios = [
            ratio(taken, "authors", name),
            ratio(taken, "authors", name, 1),
            ratio(taken, "transformers dense", name),
        ]
        rows.append([name, f"{rate:.1f}", *(f"{value:.2f}" for value in ratios), *cells])
    header = [
        "path", "pairs a CPU second", "x authors (CPU)", "x authors (wall)", "x transformers dense (CPU)",
        "max abs difference", "least Spearman of a query", "same first",
    ]  # fmt: skip
    lengths = list(map(len, work.lists))
    about = (
        f"{options.queries} queries x {options.per_query} candidates of {options.images} images, texts of "
        f"{min(lengths)} to {max(lengths)} tokens, 64 image tokens; {work.material.described}. "
        f"{options.threads} thread(s). Medians over {options.rounds} alternating rounds; loading the model left out. "
        "The machine was shared: only ratios count. Differences are against `authors`, a query's candidates a list; "
        "at 1 kB they include what the codec loses."
    )
    said = []
    for name in ("ours float32, 49 kB", "ours int8, 49 kB"):
        said += [f"    {line}" for line in (f"[{name}]", *work.summaries[name].splitlines()[:5])]
    lines = [
        about,
        "",
        *table(header, rows),
        *(["", work.missing] if work.missing else []),
        "",
        "What the last runs said of themselves:",
        "",
        *said,
    ]  # fmt: skip
    write_report("score", "Scoring speed", lines, out=options.out, module="score_speed",
                 packages=("torch", "transformers", "sentence-transformers", "pyarrow", "numpy"))  # fmt: skip


if __name__ == "__main__":
    main()
