"""Scoring speed, end to end from a committed index, against the paths it replaces. Same weights, same pairs.

    python -m benchmarks.score_speed --bert MINILM --captions captions.jsonl --rounds 5
    python -m benchmarks.score_speed --queries 1000 --per-query 100 --images 10000 --rival-queries 10 \\
        --rounds 1 --no-warm-up --skip-1kb                                             the full form: an hour
    python -m benchmarks.score_speed --index drawings.edje --captions captions.jsonl --queries 1000 \\
        --per-query 100 --rival-queries 20 --rounds 1 --no-warm-up --refined bfloat16 int8     a trained model

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
import torch

from benchmarks.report import table, write_report
from benchmarks.score_accuracy import compare
from benchmarks.score_workload import PRECISIONS, REFINE_TOP, Workload, index_workload, random_workload
from edje_pipeline import reranker


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


def alternate(
    sides: dict[str, Callable[[], None]], num_rounds: int, *, warm_up: bool = True
) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds, wall seconds) of every side and round, after a round that warms up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(0 if warm_up else 1, num_rounds + 1):
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


def ratio(work: Workload, taken: dict[str, list[tuple[float, float]]], base: str, side: str, column: int = 0) -> float:
    """Median over the rounds of a side's pairs a second over the base's."""
    scale = work.num_pairs[side] / work.num_pairs[base]
    return scale * statistics.median(b[column] / s[column] for b, s in zip(taken[base], taken[side], strict=True))


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
    parser.add_argument("--captions", type=Path, help="JSONL with `captions`: at least four each, or two with --index")
    parser.add_argument("--index", help="a real one, with a text tower: queries are captions, candidates retrieved")
    parser.add_argument("--rival-queries", type=int, help="the rivals score so many queries only; rates are compared")
    parser.add_argument("--refined", nargs="*", default=[], choices=PRECISIONS[1:], metavar="PRECISION",
                        help=f"precisions to run with --refine-top {REFINE_TOP} as well")  # fmt: skip
    parser.add_argument("--only", nargs="*", help="sides whose name contains one of these; authors always")
    parser.add_argument("--skip-1kb", action="store_true")
    parser.add_argument("--no-warm-up", action="store_true", help="for sides that take minutes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.index and options.captions is None:
        parser.error("--index needs --captions")
    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(prefix="edje-speed-"))
    try:
        work = index_workload(folder, options) if options.index else random_workload(folder, options)
        sides = work.sides(options.refined)
        if options.only:
            wanted = ("authors", *options.only)
            sides = {name: call for name, call in sides.items() if any(part in name for part in wanted)}
        taken = alternate(sides, options.rounds, warm_up=not options.no_warm_up)
    finally:
        shutil.rmtree(folder)
    report(work, taken, options)


def accuracy(work: Workload) -> list[str]:
    """What each precision does to the ranking, against float32 of the same index, over all queries."""
    rows = []
    for size in work.indexes:
        expected = work.scores.get(f"ours float32, {size}")
        for name, found in work.scores.items():
            if expected is None or not name.endswith(f", {size}") or "float32" in name:
                continue
            value = compare(found, expected, work.texts)
            rows.append([name, f"{value['rms']:.4f}", f"{value['spearman_mean']:.4f}", f"{value['spearman_min']:.4f}",
                         f"{value['spearman_99']:.1%}", f"{value['same_first']:.2%}"])  # fmt: skip
    if not rows:
        return []
    header = ["against float32, all queries", "rms difference / standard deviation", "Spearman of a query, mean",
              "least", "queries of 0.99 or more", "same first"]  # fmt: skip
    return ["", *table(header, rows)]


def report(work: Workload, taken: dict[str, list[tuple[float, float]]], options: argparse.Namespace) -> None:
    """The table of speed, the table of accuracy, and the summaries of the runs."""
    rows, sampled = [], work.sampled
    for name, rounds in taken.items():
        cells = ["", "", ""]
        if name not in ("text only", "CrossEncoder"):
            found = work.scores[name] if len(work.scores[name]) == len(sampled) else work.scores[name][sampled]
            difference, spearman, first = agreement(found, work.scores["authors"], work.texts[sampled])
            cells = [f"{difference:.1e}", f"{spearman:.4f}", f"{first:.0%}"]
        rate = work.num_pairs[name] / statistics.median(cpu for cpu, _ in rounds)
        dense = "transformers dense"
        ratios = [ratio(work, taken, "authors", name), ratio(work, taken, "authors", name, 1)]
        compared = [f"{value:.2f}" for value in ratios]
        compared.append(f"{ratio(work, taken, dense, name):.2f}" if dense in taken else "")
        rows.append([name, f"{rate:.1f}", *compared, *cells])
    header = [
        "path", "pairs a CPU second", "x authors (CPU)", "x authors (wall)", "x transformers dense (CPU)",
        "max abs difference", "least Spearman of a query", "same first",
    ]  # fmt: skip
    lengths = list(map(len, work.lists))
    about = (
        f"{len(work.lists)} queries x {options.per_query} candidates of {len(work.material.tokens)} images, texts of "
        f"{min(lengths)} to {max(lengths)} tokens, 64 image tokens; {work.material.described}. "
        f"{options.threads} thread(s). Medians over {options.rounds} alternating rounds; loading the model left out. "
        "The machine was shared: only ratios count. Differences are against `authors`, a query's candidates a list; "
        "at 1 kB they include what the codec loses."
    )
    if len(sampled) < len(work.pairs):
        about += f" The others scored {len(sampled):,} of the {len(work.pairs):,} pairs: rates are compared."
    said = []
    for name in [name for name in work.summaries if "1 kB" not in name and "bfloat16" not in name]:
        said += [f"    {line}" for line in (f"[{name}]", *work.summaries[name].splitlines()[:6])]
    lines = [
        about,
        "",
        *table(header, rows),
        *accuracy(work),
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
