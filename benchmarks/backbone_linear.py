"""Linear maps of frozen backbones by oneDNN against PyTorch's own, side by side.

    python -m benchmarks.backbone_linear [--threads 1] [--rounds 9]

The forward pass alone, on pixels in memory, float32; rounds alternate between both.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import timm
import torch

from benchmarks.report import table, write_report
from edje_pipeline.models.cpu_linear import with_frozen_linears

BACKBONES = (
    ("vit_small_patch16_224", 112, 16),
    ("vit_small_patch14_dinov2", 112, 16),
    ("vit_base_patch16_siglip_224", 224, 4),
    ("efficientnet_lite0", 224, 16),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name, size, batch in BACKBONES:
        sizes = {"img_size": size} if name.startswith("vit") else {}
        plain = timm.create_model(name, num_classes=0, **sizes).eval()
        frozen = with_frozen_linears(copy.deepcopy(plain))
        pixels = torch.randn(batch, 3, size, size)
        with torch.inference_mode():
            wanted = plain.forward_features(pixels)
            error = ((frozen.forward_features(pixels) - wanted).norm() / wanted.norm()).item()
            spent: list[tuple[float, float]] = []
            for _ in range(options.rounds):
                pair = []
                for network in (plain, frozen):
                    started = time.process_time()
                    network.forward_features(pixels)
                    pair.append(time.process_time() - started)
                spent.append((pair[0], pair[1]))
        ratios = sorted(a / b for a, b in spent)
        rows.append([
            f"`{name}`, {size} px, batch {batch}", f"{1e3 * statistics.median(b for _, b in spent) / batch:.1f}",
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", f"{error:.1e}",
        ])  # fmt: skip
    header = ["backbone", "CPU ms an image", "times as fast as PyTorch's linear maps", "relative difference"]
    lines = [f"{options.rounds} alternating rounds, {options.threads} thread(s), float32, random weights.", ""]
    write_report(
        "backbone_linear", "Linear maps of backbones by oneDNN", [*lines, *table(header, rows)], out=options.out
    )


if __name__ == "__main__":
    main()
