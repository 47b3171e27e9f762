"""Extraction speed, from JPEG files on disk to committed shards, against the limits of the same machine.

    python -m benchmarks.extract_speed                 both cases
    python -m benchmarks.extract_speed --case decode   only the one that is bound by decoding

backbone   ViT-S/16: ours (ray, local) against the bare forward on tensors in memory (same dtype, threads,
           batch), with timm's linear maps and with the ones our encoder uses on a CPU, and against a
           DataLoader + timm loop that saves npy files
decode     a backbone so small that decoding is the bottleneck: ours against processes that only decode, and
           against the same loop

Sides alternate. Steady state: from a quarter of the rows in shards (decode: from half) to the last shard, so
that the start of processes is not in it. CPU seconds are those of all processes in that window.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.clock import Rounds, alternate
from benchmarks.corpus import make_corpus
from benchmarks.extract_sides import bare, decode_only, ours, plain_loop
from benchmarks.report import num_cores, spread, table, write_report
from edje_pipeline.models.checkpoint import ModelDirectory
from edje_pipeline.models.random_model import write_random_model

TARGETS = {"backbone": 0.90, "decode": 0.85}
OWN_LINEARS = "bare forward, our linear maps"
SMALL_VIT = {"patch_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 3}


@dataclass
class Case:
    """One bottleneck, measured."""

    name: str
    corpus: str
    rounds: Rounds
    limit: str
    """The side that ours cannot beat."""
    after: float
    """Share of the rows after which the steady state begins."""
    summaries: dict[str, str] = field(default_factory=dict)
    """Of each of our executors: the run's own summary."""


def backbone_case(folder: Path, options: argparse.Namespace) -> Case:
    size = options.image_size
    corpus, described = make_corpus(folder / "vit-corpus", options.num_images, images=options.images)
    model = write_random_model(
        folder / "vit-model", size="demo", backbone="timm:vit_small_patch16_224", backbone_options={"img_size": size},
        num_compressed_tokens=options.num_tokens, text_tower=False,
    )  # fmt: skip
    what = (model, options.num_images, options.batch_size, torch.float32)
    limit = {"bare forward": bare(*what), OWN_LINEARS: bare(*what, frozen_linears=True)}
    return run_case("backbone", folder, corpus, described, model, options, limit)


def decode_case(folder: Path, options: argparse.Namespace) -> Case:
    corpus, described = make_corpus(
        folder / "small-corpus", options.num_decoded, size=(640, 480), images=options.images
    )
    model = write_random_model(
        folder / "small-model", size="tiny", image_size=224, backbone="timm:vit_tiny_patch16_224",
        backbone_options=SMALL_VIT, text_tower=False,
    )  # fmt: skip
    limit = {"decode only": decode_only(corpus, model.spec.preprocess, options.num_cpus)}
    return run_case("decode", folder, corpus, described, model, options, limit)


def run_case(
    name: str, folder: Path, corpus: Path, described: str, model: ModelDirectory, options: argparse.Namespace,
    limit: dict[str, Callable[[], dict[str, float]]],
) -> Case:  # fmt: skip
    summaries: dict[str, str] = {}
    after = 0.5 if name == "decode" else 0.25

    def mine(executor: str) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            values, result = ours(
                corpus, folder / "index", model.path, executor, after=after,
                batch_size=options.batch_size, num_cpus=options.num_cpus,
            )  # fmt: skip
            summaries[executor] = result.to_text()
            return values

        return run

    sides = {
        **limit,
        **{f"ours, {executor}": mine(executor) for executor in options.executors},
        "DataLoader loop": plain_loop(corpus, model, folder / "npy", options.batch_size, options.num_cpus),
    }
    return Case(name, described, alternate(sides, options.rounds), next(iter(limit)), after, summaries)


def report_lines(case: Case) -> list[str]:
    """The case as Markdown."""
    rounds, base = case.rounds, case.limit
    rows = []
    for side in rounds.values:
        speed = [1 / value for value in rounds.column(side, "wall_s")]
        cells = [side, spread(speed)]
        for key in ("wall_s", "cpu_s"):
            ratios = [1 / ratio for ratio in rounds.ratios(side, base, key)]
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        cores = statistics.median(rounds.column(side, "cpu_s")) / statistics.median(rounds.column(side, "wall_s"))
        rows.append([*cells, f"{cores:.2f}"])
    lines = [f"## Bound by the {case.name}", "", case.corpus + ".", ""]
    lines += table(["side", "images/s, steady", f"against {base}, wall", f"against {base}, CPU s", "cores busy"], rows)
    lines += ["", f"Target: {TARGETS[case.name]:.2f} of {base}; faster than the loop."]
    for side in rounds.values:
        if not side.startswith("ours"):
            continue
        loop = [1 / ratio for ratio in rounds.ratios(side, "DataLoader loop", "wall_s")]
        total = rounds.ratios("DataLoader loop", side, "total_s")
        before, publish = rounds.column(side, "startup_s"), rounds.column(side, "publish_s")
        lines.append(
            f"{side}: {statistics.median(loop):.2f} times the loop in steady state, "
            f"{statistics.median(total):.2f} times with start and end of both; "
            f"{statistics.median(before):.1f} s until the encoder began, {statistics.median(publish):.2f} s to publish."
        )
        ahead = statistics.median(before) / statistics.median(rounds.column(base, "wall_s"))
        if case.name == "decode" and ahead > case.after * rounds.column(side, "images")[0]:
            lines.append(
                f"  TOO SHORT: up to {ahead:,.0f} images may have been decoded before the encoder began, so the ratios "
                "of this side say nothing; take more with --num-decoded."
            )
        if case.name == "backbone":
            own = [1 / ratio for ratio in rounds.ratios(side, OWN_LINEARS, "wall_s")]
            lines.append(f"  Of the bare forward with our own linear maps: {statistics.median(own):.3f}.")
            # What ray decoded while the model was still loading is not in the window: put all of it back.
            decode = [a / options_cores() for a in rounds.column(side, "decode_s")]
            paid = [
                limit / (mine + extra)
                for limit, mine, extra in zip(
                    rounds.column(OWN_LINEARS, "wall_s"), rounds.column(side, "wall_s"), decode, strict=True
                )
            ]
            lines.append(
                f"  The same with all decoding charged to the window once more: {statistics.median(paid):.3f}."
            )
    for executor, text in case.summaries.items():
        lines += ["", f"The run's own summary ({executor}, last round):", ""]
        lines += [f"    {line}" for line in text.splitlines() if not line.startswith(("index ", "note:"))]
    return [*lines, ""]


def options_cores() -> int:
    return num_cores()


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--case", choices=["both", "backbone", "decode"], default="both")
    found.add_argument("--images", type=Path, help="folder of JPEG files; default: synthetic pictures")
    found.add_argument("--num-images", type=int, default=512, help="for the backbone case")
    found.add_argument("--num-decoded", type=int, default=4096, help="for the decode case")
    found.add_argument("--image-size", type=int, default=112)
    found.add_argument(
        "--num-tokens",
        type=int,
        default=8,
        help="of the adapter; 8 to 49 patches is about the 64 to 576 of the full-size model",
    )
    found.add_argument("--batch-size", type=int, default=16)
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--num-cpus", type=int, default=num_cores())
    found.add_argument("--executors", nargs="+", default=["ray", "local"])
    found.add_argument("--out", type=Path)
    return found


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.num_cpus)
    from edje_pipeline.pipeline import ray_bridge

    cases = []
    with tempfile.TemporaryDirectory(prefix="edje-extract-") as name:
        started = time.perf_counter()
        with ray_bridge.session(num_cpus=options.num_cpus):
            ray_s = time.perf_counter() - started
            if options.case in ("both", "backbone"):
                cases.append(backbone_case(Path(name), options))
            if options.case in ("both", "decode"):
                cases.append(decode_case(Path(name), options))
    lines = [
        f"{options.rounds} alternating rounds; ViT-S/16 at {options.image_size} px with {options.num_tokens} tokens,",
        f"batch {options.batch_size}, float32, {options.num_cpus} torch threads,",
        "which sleep while they wait (OMP_WAIT_POLICY=passive, every side); medians (smallest to largest). Files are",
        "in the page cache for every side. Other programs share the machine: read the ratios, not the rates.",
        f"ray.init took {ray_s:.1f} s, once, outside of every figure.",
        "",
    ]
    for case in cases:
        lines += report_lines(case)
    write_report("extract", "Extraction speed", lines, out=options.out, module="extract_speed")


if __name__ == "__main__":
    main()
