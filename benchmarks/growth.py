"""Growth: seconds and the driver's peak memory against the number of images and of pairs, as a table and a plot.

    python -m benchmarks.growth --listed 1000 10000 100000 1000000 --extracted 1000 10000 --pairs 10000 100000 1000000

listing     a list of made-up URIs becomes a plan: what the driver does for every image before a run
extraction  real JPEG files through a trivial backbone (ray), to a published index
scoring     pairs against an index of --stored images, a trivial joint encoder

Every size runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import table, write_report

KINDS = ("listing", "extraction", "scoring")
EXPLAINED = {"listing": "images listed", "extraction": "images extracted", "scoring": "pairs scored"}


def one_listing(_folder: Path, num_images: int) -> dict[str, Any]:
    from benchmarks.listing_growth import measure
    from benchmarks.score_growth import peak_kib

    wall_s = measure(num_images)["wall_s"]
    return {"wall_s": wall_s, "peak_kib": peak_kib()}


def one_extraction(folder: Path, num_images: int) -> dict[str, Any]:
    from benchmarks.corpus import make_corpus
    from benchmarks.score_growth import peak_kib
    from edje_pipeline.pipeline.extract import ExtractConfig, run_extract

    corpus, _ = make_corpus(folder / f"corpus-{num_images}", num_images, size=(48, 48))
    result = run_extract(
        ExtractConfig(corpus=str(corpus), index=str(folder / f"e{num_images}"), model=str(folder / "model"), quiet=True)
    )
    assert result.num_accepted == num_images
    timings = result.timings
    wall_s = timings["list_s"] + result.metrics.wall_s - result.metrics.startup_s + timings["publish_s"]
    return {"wall_s": wall_s, "peak_kib": peak_kib()}


def one_scoring(folder: Path, num_pairs: int) -> dict[str, Any]:
    from benchmarks.score_growth import run_one

    run_one(folder, num_pairs)  # prints its figures itself
    return {}


def in_process(kind: str, folder: Path, size: int) -> dict[str, Any]:
    """Runs one size in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.growth", "--one", kind, str(folder), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    value = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    print(f"{kind} {size:,}: {value['wall_s']:.2f} s, {value['peak_kib'] / 1024:,.0f} MiB", flush=True)
    return {"size": size, **value}


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    from benchmarks.score_growth import write_inputs
    from edje_pipeline.models.random_model import write_random_model
    from tests.index_util import write_index

    with tempfile.TemporaryDirectory(prefix="edje-growth-") as name:
        folder = Path(name)
        model = write_random_model(folder / "model", size="tiny")
        found = {
            "listing": [in_process("listing", folder, size) for size in options.listed],
            "extraction": [in_process("extraction", folder, size) for size in options.extracted],
        }
        if options.pairs:
            write_index(folder / "index", model, num_images=options.stored, shard_rows=8192, row_group_rows=1024)
            for size in options.pairs:
                write_inputs(folder, size, options.stored, 100)
        found["scoring"] = [in_process("scoring", folder, size) for size in options.pairs]
    return {kind: values for kind, values in found.items() if values}


def per_thousand(values: list[dict[str, Any]]) -> str:
    """Milliseconds a thousand more images, between the two largest sizes: what one may extrapolate with."""
    if len(values) < 2:
        return ""
    small, large = values[-2:]
    seconds = (large["wall_s"] - small["wall_s"]) / (large["size"] - small["size"])
    if seconds <= 0:
        return "The larger size took less time than the smaller: nothing to extrapolate from (small sizes, noise)."
    return f"{seconds * 1e6:,.1f} ms for a thousand more, {seconds * 1e9 / 3600:,.2f} hours for 10^9 (extrapolated)."


def report_lines(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = []
    for kind, values in found.items():
        rows = [
            [f"{v['size']:,}", f"{v['wall_s']:.2f}", f"{v['wall_s'] / v['size'] * 1e6:,.1f}",
             f"{v['peak_kib'] / 1024:,.0f}", f"{v['peak_kib'] / values[0]['peak_kib']:.2f}"]
            for v in values
        ]  # fmt: skip
        lines += [f"## {EXPLAINED[kind].capitalize()}", ""]
        lines += table([EXPLAINED[kind], "wall s", "us each", "driver peak MiB", "against the smallest"], rows)
        lines += ["", per_thousand(values), ""]
    return lines


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Seconds (log-log, with the line of equal seconds each) and memory (log-linear), side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, values in found.items():
        sizes = [value["size"] for value in values]
        (line,) = left.plot(sizes, [value["wall_s"] for value in values], "o-", label=EXPLAINED[kind])
        each = values[-1]["wall_s"] / sizes[-1]
        left.plot(sizes, [each * size for size in sizes], ":", color=line.get_color(), alpha=0.6)
        right.plot(sizes, [value["peak_kib"] / 1024 for value in values], "o-", label=EXPLAINED[kind])
    left.set(xscale="log", yscale="log", xlabel="images or pairs", ylabel="seconds", title="Time (dotted: linear)")
    right.set(xscale="log", xlabel="images or pairs", ylabel="MiB", title="Peak memory of the driver")
    right.set_ylim(bottom=0)
    left.legend()
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listed", type=int, nargs="*", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--extracted", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--pairs", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--stored", type=int, default=100_000, help="images in the index that is scored")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        kind, folder, size = options.one
        value = {"listing": one_listing, "extraction": one_extraction, "scoring": one_scoring}[kind](
            Path(folder), int(size)
        )
        if value:
            print(json.dumps(value))
        return
    found = measure(options)
    head = [
        "Trivial models, so that what is left is the pipeline's own work. Other programs share the machine: the slope",
        "counts, not the seconds. Extraction is listing, the run after its start-up, and publishing.",
        "",
    ]
    path = write_report("growth", "Growth", [*head, *report_lines(found)], out=options.out, module="growth")
    plot(found, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
