"""The paper's ablations in one command: number of tokens, parts of the objective, codecs, pool size.

    python -m benchmarks.ablations --model START --recipe recipes/emoji.toml --images train/ \
        --captions train.jsonl --test-images test/ --test-captions test.jsonl --out DIR \
        --tokens 16 32 64 local --objectives --codecs float16 int8 pq16 --pools 10 50

Trains one model for each number of tokens (and, with --objectives, one for each loss left out of the
recipe, at the first number of tokens), extracts the test images with each codec, evaluates text to
image, and writes OUT/ablations.md and .json. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.adapter import create_adapter
from edje_pipeline.models.checkpoint import ModelDirectory, open_model, save_model
from edje_pipeline.pipeline.evaluate import EvaluateConfig, run_evaluate
from edje_pipeline.pipeline.evaluate_result import METRICS
from edje_pipeline.pipeline.extract import ExtractConfig, run_extract
from edje_pipeline.pipeline.runner import ExecutorOptions
from edje_pipeline.training.recipe import LossWeights, Recipe, read_recipe
from edje_pipeline.training.run import TrainJob, train


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "recipe", "images", "captions", "test-images", "test-captions"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--tokens", nargs="+", default=["64"], help="numbers of compressed tokens, or `local`")
    parser.add_argument("--objectives", action="store_true", help="also leave out each loss of the recipe in turn")
    parser.add_argument("--codecs", nargs="+", default=["float16"])
    parser.add_argument("--pools", nargs="+", type=int, default=[10])
    parser.add_argument("--fusion-weights", nargs="+", type=float, default=[0.0])
    parser.add_argument("--template", action="append", default=[])
    parser.add_argument("--include", default="", help="test images of this pattern only")
    return parser.parse_args()


def with_adapter(start: ModelDirectory, tokens: str, target: Path, seed: int) -> Path:
    """The start model with a fresh adapter of another number of tokens."""
    if (target / "config.json").exists():
        return target
    kind = "local" if tokens == "local" else "compressed"
    count = start.spec.backbone.num_vision_tokens if tokens == "local" else int(tokens)
    spec = replace(start.spec.adapter, kind=kind, num_compressed_tokens=count)
    torch.manual_seed(seed)
    parts = {
        part: start.path / f"{part}.safetensors" for part in ("backbone", "joint_encoder", "text_tower")
        if (start.path / f"{part}.safetensors").exists()
    }  # fmt: skip
    # The joint encoder's file has the start's positions; loading lengthens the table where M needs more.
    save_model(target, replace(start.spec, adapter=spec, name=f"{start.spec.name}-{tokens}"),
               adapter=create_adapter(spec), tokenizer=start.path / "tokenizer.json", **parts)  # type: ignore[arg-type]  # fmt: skip
    return target


def without(recipe: Recipe, loss: str) -> Recipe | None:
    """The recipe with one loss off; None where nothing of a phase would be left."""
    phases = [replace(phase, weights=replace(phase.weights, **{loss: 0.0})) for phase in recipe.phases]
    kept = [phase for phase in phases if any(asdict(phase.weights).values())]
    return replace(recipe, phases=tuple(kept)) if kept else None


def for_tokens(recipe: Recipe, tokens: str) -> Recipe:
    """The local adapter wants all its tokens, so none are dropped for it."""
    if tokens != "local":
        return recipe
    return replace(recipe, phases=tuple(replace(phase, token_dropout=0.0) for phase in recipe.phases))


def main() -> None:
    options = parse()
    begun = time.monotonic()
    start, recipe = open_model(options.model), read_recipe(options.recipe)
    runs: list[tuple[str, str, Recipe]] = [
        (f"{tokens} tokens", tokens, for_tokens(recipe, tokens)) for tokens in options.tokens
    ]
    if options.objectives:
        used = [f.name for f in fields(LossWeights) if any(getattr(phase.weights, f.name) for phase in recipe.phases)]
        for loss in used:
            changed = without(recipe, loss)
            if changed is not None:
                runs.append((f"without {loss}", options.tokens[0], for_tokens(changed, options.tokens[0])))
    rows: list[dict[str, Any]] = []
    for label, tokens, changed in runs:
        rows += measure(options, start, label, tokens, changed)
    write(options, rows, time.monotonic() - begun)


def measure(
    options: argparse.Namespace, start: ModelDirectory, label: str, tokens: str, recipe: Recipe
) -> list[dict[str, Any]]:
    """Trains where needed, extracts with every codec, evaluates."""
    folder = options.out / label.replace(" ", "-")
    model = with_adapter(start, tokens, options.out / "starts" / tokens, recipe.seed)
    job = TrainJob(model=str(model), out=str(folder), captions=(options.captions,), recipe=recipe,
                   images=options.images, templates=tuple(options.template), name=label.replace(" ", "-"))  # fmt: skip
    if not (folder / "model" / "config.json").exists():
        sys.stderr.write(f"training: {label}\n")
        train(job)
    rows = []
    for codec in ["local"] if tokens == "local" else options.codecs:
        index = folder / f"index-{codec}"
        if not (index / "manifest.json").exists():
            run_extract(ExtractConfig(corpus=options.test_images, index=str(index), model=str(folder / "model"),
                                      variant=codec, executor=ExecutorOptions(executor="local")))  # fmt: skip
        result = run_evaluate(EvaluateConfig(
            index=str(index), captions=(options.test_captions,), directions=("t2i",), pool_sizes=tuple(options.pools),
            fusion_weights=tuple(options.fusion_weights), templates=tuple(options.template), include=options.include,
        ))  # fmt: skip
        rows += [{"model": label, "codec": codec, **asdict(row)} for row in result.rows]
    return rows


def write(options: argparse.Namespace, rows: list[dict[str, Any]], wall_s: float) -> None:
    """The tables."""
    if not rows:
        raise ConfigError("nothing was measured")
    lines = [f"Command: `python -m benchmarks.ablations {' '.join(sys.argv[1:])}`", "",
             f"torch {torch.__version__}, Python {platform.python_version()}, {wall_s:.0f} s. Text to image.",
             "", f"| model | codec | stage | k | fusion | {' | '.join(METRICS)} | gain in R@1 |",
             "|---|---|---|---|---|" + "---|" * (len(METRICS) + 1)]  # fmt: skip
    for row in rows:
        values = [interval(row["metrics"][name]) for name in METRICS]
        gain = interval(row["gain"]) if row["gain"] else ""
        cells = [
            row["model"],
            row["codec"],
            row["stage"],
            str(row["pool"] or ""),
            f"{row['fusion_weight']:g}",
            *values,
            gain,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    (options.out / "ablations.md").write_text("\n".join(lines) + "\n")
    (options.out / "ablations.json").write_text(json.dumps(rows, indent=1) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


def interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.1f} [{value['low']:.1f}, {value['high']:.1f}]"


if __name__ == "__main__":
    main()
