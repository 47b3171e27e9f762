"""What `--reduced-jpeg` costs in recall and saves in time, on real photographs with captions.

    python -m benchmarks.reduced_jpeg --corpus photos/images --captions photos/val.jsonl --model MODEL

The same images are extracted twice with the same model. The larger the files against the backbone's input, the
smaller the scale that libjpeg decodes at, so results are given by how many of them were reduced and how far.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.report import table, write_report
from edje_pipeline.models.checkpoint import open_model
from edje_pipeline.models.spec import PreprocessSpec
from edje_pipeline.pipeline.evaluate import EvaluateConfig, run_evaluate
from edje_pipeline.pipeline.extract import ExtractConfig, run_extract
from edje_pipeline.pipeline.image_run import ComputeOptions
from edje_pipeline.pipeline.runner import ExecutorOptions
from edje_pipeline.stages.decode import decode_image
from edje_pipeline.storage.index import Index


@dataclass(frozen=True)
class Decoding:
    """Both ways of decoding, side by side."""

    scales: Counter[str]
    """Of the reduced way: `1/2` and so on -> files."""
    times_as_fast: float
    largest: int
    """Of 255."""
    rms: float


def compare_decoding(paths: list[Path], spec: PreprocessSpec, repeats: int = 3) -> Decoding:
    """CPU seconds of decoding and resizing, alternating file by file; differences of the pixels."""
    spent, scales, largest, squares = {False: 0.0, True: 0.0}, Counter[str](), 0, []
    for path in paths:
        data, pixels = path.read_bytes(), {}
        for _ in range(repeats):
            for reduced in (False, True):
                out = np.zeros((*spec.image_size, 3), np.uint8)
                started = time.process_time()
                decode_image(data, spec, out, reduced_jpeg=reduced)
                spent[reduced] += time.process_time() - started
                pixels[reduced] = out
        difference = pixels[True].astype(int) - pixels[False]
        largest = max(largest, int(np.abs(difference).max()))
        squares.append(float((difference**2).mean()))
        scales[scale_of(path, spec)] += 1
    return Decoding(scales, spent[False] / spent[True], largest, float(np.sqrt(np.mean(squares))))


def scale_of(path: Path, spec: PreprocessSpec) -> str:
    """At which scale the reduced way decodes a file."""
    from edje_pipeline.stages.decode import _reduce as reduce  # what the stage itself asks of libjpeg

    with Image.open(path) as image:
        width = image.width
        if image.format != "JPEG" or not reduce(image, spec):
            return "whole"
        return f"1/{round(width / image.width)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, type=Path, help="folder of JPEG files")
    parser.add_argument("--captions", required=True, type=Path, help="of some of them, as evaluate reads it")
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--variant", help="codec; default float16, or local with a local adapter")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = open_model(options.model)
    wanted = {json.loads(line)["image_id"] for line in options.captions.read_text().splitlines()}
    paths = [path for path in sorted(options.corpus.iterdir()) if {path.name, path.stem} & wanted]
    decoding = compare_decoding(paths, model.spec.preprocess)
    variant = options.variant or ("local" if model.spec.adapter.kind == "local" else "float16")
    rows: list[list[str]] = []
    embeddings, tokens = {}, {}
    with tempfile.TemporaryDirectory(prefix="edje-reduced-") as name:
        for reduced in (False, True):
            index = f"{name}/{'reduced' if reduced else 'whole'}"
            run_extract(ExtractConfig(
                corpus=str(options.corpus), index=index, model=str(options.model), variant=variant, quiet=True,
                compute=ComputeOptions(reduced_jpeg=reduced), executor=ExecutorOptions("local"),
            ))  # fmt: skip
            found = run_evaluate(EvaluateConfig(index, captions=(str(options.captions),), fusion_weights=(0.0, 40.0)))
            opened = Index.open(index)
            ids = sorted(set(opened.ids()) & {n for w in wanted for n in (w, Path(w).stem)})
            embeddings[reduced] = opened.embeddings(ids)
            tokens[reduced] = opened.codec.decode(opened.payloads(ids))
            for row in found.rows:
                stage = f"{row.stage}, fusion {row.fusion_weight:g}" if row.pool else row.stage
                rows.append(["reduced" if reduced else "whole", row.direction, stage, str(row.metrics["R@1"]),
                             f"{row.metrics['R@5'].mean:.1f}", f"{row.metrics['MRR'].mean:.1f}"])  # fmt: skip
    a, b = (value.astype(np.float32) for value in (embeddings[False], embeddings[True]))
    cosines = (a * b).sum(axis=1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
    x, y = (value.astype(np.float32) for value in (tokens[False], tokens[True]))
    rows.sort(key=lambda row: row[1:3] + row[:1])
    lines = [
        (
            f"{len(paths)} captioned photographs; model `{model.spec.name}` ({model.spec.backbone.source} at "
            f"{model.spec.preprocess.image_size[0]} px), codec {variant}."
        ),
        (
            f"Decoded at: {', '.join(f'{scale} {count}' for scale, count in sorted(decoding.scales.items()))} files. "
            f"Reduced decoding and resizing took {1 / decoding.times_as_fast:.2f} of the CPU time; pixels differ by "
            f"{decoding.rms:.2f} of 255 (rms), {decoding.largest} at most."
        ),
        (
            f"Embeddings: lowest cosine {cosines.min():.4f}, median {np.median(cosines):.4f}. Tokens: relative "
            f"difference {np.linalg.norm(x - y) / np.linalg.norm(x):.4f}."
        ),
        "",
        *table(["decoded", "direction", "stage", "R@1", "R@5", "MRR"], rows),
    ]
    write_report("reduced_jpeg", "Decoding JPEGs at a reduced scale", lines, out=options.out)


if __name__ == "__main__":
    main()
