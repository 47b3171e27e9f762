"""The recall tables out of what recall_plan.py measured.

    python -m benchmarks.recall_tables WORK/results --out benchmarks/results/recall_DEVICE_DATE.md

Percent, with 95 % bootstrap intervals over queries; a gain is paired by query. Per artist, `all` is the mean over
artists weighted by their queries, its interval from the artists' own (independent galleries and queries).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks.recall_runs import HELD_OUT_ARTIST

Row = dict[str, Any]
POOL = 10
FROM_LOCAL = "from-local-"
"""Runs of the plan `compress`."""
SIZES = ("local", *(f"{FROM_LOCAL}{num}" for num in (64, 32, 16)))
OBJECTIVES = {
    "base": "the recipe at 45 % of its steps, no distillation",
    "no-mlm": "without MLM",
    "no-recovery": "without text-embedding recovery",
    "no-contrastive-after-warm-up": "without the contrastive loss after the warm-up",
    "no-words": "without the words loss",
    "no-warm-up": "without the warm-up",
    "no-neighbours": "random batches instead of neighbours",
    "one-hard-negative": "one hardest negative each way instead of the matrix",
    f"{FROM_LOCAL}16": "from the local model: its adapter's start, its tokens, then ITM and its logits",
    f"{FROM_LOCAL}16-no-itm": "the same without ITM",
    f"{FROM_LOCAL}16-no-distillation": "the same without the teacher's logits",
    f"{FROM_LOCAL}16-tokens-only": "the same without any pair",
    f"{FROM_LOCAL}16-no-start": "the same from a random adapter",
}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {path.stem: json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))}
    if not found:
        print(f"no results in {options.results}")
        return 1
    lines = [*sizes(found), *codecs(found), *pools(found), *concepts(found), *photos(found), *objectives(found)]
    devices = sorted({f"{one['device']}, torch {one['torch']}" for one in found.values()})
    lines += ["", f"Trained and evaluated on: {'; '.join(devices)}.", ""]
    lines += [f"- {name}: {one['run']['tokens']} tokens, {one['run']['num_layers']} layers, "
              f"{one['last'].get('step', 0):,} steps, {one['train_s']:.0f} s"
              for name, one in found.items()]  # fmt: skip
    text = "\n".join(lines) + "\n"
    if options.out:
        options.out.write_text(text)
    sys.stdout.write(text)
    return 0


def pick(one: dict[str, Any], test: str, stage: str, codec: str, weight: float = 0.0, pool: int = POOL) -> Row | None:
    """The row of a result, None when it was not measured."""
    for row in one["rows"]:
        same = (row["test"], row["stage"], row["codec"]) == (test, stage, codec)
        if same and (stage == "first stage" or (row["pool"] == pool and row["fusion_weight"] == weight)):
            return dict(row)
    return None


def codec_of(one: dict[str, Any]) -> str:
    return "local" if one["run"]["tokens"] == "local" else "float16"


def interval(value: dict[str, float], *, sign: bool = False) -> str:
    return f"{value['mean']:{'+' if sign else ''}.1f} [{value['low']:.1f}, {value['high']:.1f}]"


def line(label: str, row: Row, first: Row) -> str:
    """One line: label, first stage, reranked, gain, R@5, MRR."""
    values = row["metrics"]
    cells = [label, interval(first["metrics"]["R@1"]), interval(values["R@1"]), interval(row["gain"], sign=True),
             f"{values['R@5']['mean']:.1f}", f"{values['MRR']['mean']:.1f}"]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


HEADER = ["| | first stage R@1 | reranked R@1 | gain | R@5 | MRR |", "|---|---|---|---|---|---|"]


def sizes(found: dict[str, Any]) -> list[str]:
    """The unseen artist, by number of tokens."""
    text = (
        f"Trained on the drawings of four artists, tested on the fifth ({HELD_OUT_ARTIST}): its names over all its "
        f"drawings, reranking the first stage's {POOL} best by the logit alone."
    )
    lines = ["## An artist never trained on", "", text, "", *HEADER]
    for name in SIZES:
        if name in found:
            one = found[name]
            row = pick(one, "artist", "reranked", codec_of(one))
            first = pick(one, "artist", "first stage", codec_of(one))
            if row and first:
                lines.append(line(f"{one['run']['tokens']} tokens", row, first))
    return [*lines, ""]


def codecs(found: dict[str, Any]) -> list[str]:
    """The unseen artist, by codec, before and after the quantization-aware finish."""
    lines = ["## Codecs, on the same artist", "", *HEADER]
    for name in (f"{FROM_LOCAL}64", f"{FROM_LOCAL}64-quantized"):
        for codec in found.get(name, {"run": {"codecs": []}})["run"]["codecs"]:
            row = pick(found[name], "artist", "reranked", codec)
            first = pick(found[name], "artist", "first stage", codec)
            if row and first:
                finish = "after the quantized phase" if name.endswith("-quantized") else "as trained"
                lines.append(line(f"{codec}, {finish}", row, first))
    return [*lines, ""]


def pools(found: dict[str, Any]) -> list[str]:
    """Pool sizes and fusion weights on the unseen artist."""
    lines = ["## Pool size and fusion, on the same artist", ""]
    lines += ["| tokens | k | logit alone | + 5 s | + 10 s | + 20 s | + 40 s |", "|---|---|---|---|---|---|---|"]
    for one in (found[name] for name in SIZES if name in found):
        for pool in one["run"]["pools"]:
            rows = [pick(one, "artist", "reranked", codec_of(one), weight, pool) for weight in (0, 5, 10, 20, 40)]
            means = [f"{row['metrics']['R@1']['mean']:.1f}" if row else "" for row in rows]
            lines.append(f"| {' | '.join([one['run']['tokens'], str(pool), *means])} |")
    return [*lines, "", "s is the first stage's similarity; R@1.", ""]


def best_weight(one: dict[str, Any], test: str) -> float:
    """The fusion weight with the highest R@1 on a set that the result is not reported for."""
    rows = [row for row in one["rows"] if row["test"] == test and row["stage"] == "reranked" and row["pool"] == POOL
            and row["codec"] == codec_of(one)]  # fmt: skip
    return float(max(rows, key=lambda row: row["metrics"]["R@1"]["mean"])["fusion_weight"]) if rows else 0.0


def concepts(found: dict[str, Any]) -> list[str]:
    """Concepts never trained on, each artist a gallery; the local model and the one of 64 tokens."""
    lines = ["## Concepts never trained on", ""]
    for one in (found[name] for name in SIZES[:2] if name in found):
        weight = best_weight(one, "artist")
        lines.append(
            f"The model of {one['run']['tokens']} tokens (four artists) on drawings of concepts it never saw, each "
            f"artist a gallery of its own. The fusion weight {weight:g} is the best on the table above, whose drawings "
            "show trained concepts."
        )
        fused = {f"logit + {weight:g} x similarity": weight} if weight else {}
        for label, used in {"logit alone": 0.0, **fused}.items():
            lines += ["", f"{label}:", "", *HEADER]
            parts: list[tuple[Row, Row]] = []
            for test in sorted({row["test"] for row in one["rows"] if row["test"].startswith("concepts-")}):
                row = pick(one, test, "reranked", codec_of(one), used)
                first = pick(one, test, "first stage", codec_of(one))
                if row and first:
                    parts.append((row, first))
                    lines.append(line(test.removeprefix("concepts-"), row, first))
            lines += [pooled(parts)] if parts else []
        lines.append("")
    return lines


def pooled(parts: list[tuple[Row, Row]]) -> str:
    """The mean over artists, weighted by queries."""
    total = sum(row["texts"] for row, _ in parts)

    def mean(values: list[dict[str, float]]) -> dict[str, float]:
        shares = [row["texts"] / total for row, _ in parts]
        centre = sum(share * value["mean"] for share, value in zip(shares, values, strict=True))
        spread = math.sqrt(sum((share * (value["high"] - value["low"]) / 2) ** 2
                               for share, value in zip(shares, values, strict=True)))  # fmt: skip
        return {"mean": centre, "low": centre - spread, "high": centre + spread}

    merged = {"metrics": {name: mean([row["metrics"][name] for row, _ in parts]) for name in ("R@1", "R@5", "MRR")},
              "gain": mean([row["gain"] for row, _ in parts])}  # fmt: skip
    return line(f"all {total} queries", merged, {"metrics": {"R@1": mean([f["metrics"]["R@1"] for _, f in parts])}})


def photos(found: dict[str, Any]) -> list[str]:
    """Photographs."""
    lines = ["## Photographs", "", "700 photographs to train on, 100 others to ask for (five captions each).", "",
             *HEADER]  # fmt: skip
    for name in ("photos", "photos-after-emoji", "photos-from-local"):
        if name in found:
            for weight in (0.0, 5.0, 10.0, 20.0, 40.0):
                row = pick(found[name], "photos", "reranked", codec_of(found[name]), weight)
                first = pick(found[name], "photos", "first stage", codec_of(found[name]))
                if row and first:
                    lines.append(line(f"{name}, logit + {weight:g} x similarity", row, first))
    return [*lines, ""]


def objectives(found: dict[str, Any]) -> list[str]:
    """The parts of the objective."""
    lines = ["## Parts of the objective, 16 tokens, the unseen artist", "", *HEADER]
    for name, label in OBJECTIVES.items():
        if name in found:
            row = pick(found[name], "artist", "reranked", "float16")
            first = pick(found[name], "artist", "first stage", "float16")
            if row and first:
                lines.append(line(label, row, first))
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
