"""JPEG files to measure with: photographs from a folder of yours, or synthetic pictures of a photograph's statistics.

The folder is the argument, else the environment variable EDJE_BENCH_IMAGES; without either, smooth random
pictures are drawn. A few hundred distinct pictures are encoded; more names are hard links to them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

NUM_DISTINCT = 200


def synthetic_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Random patterns of several scales added up: about as hard for a JPEG decoder as a photograph."""
    rng = np.random.default_rng(seed)
    width, height = size
    total = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((4, 90.0), (16, 45.0), (64, 22.0), (min(size), 6.0)):
        noise = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        total += weight / 128 * (np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float32) - 128)
    return Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8))


def make_corpus(
    folder: Path, num_images: int, *, size: tuple[int, int] | None = None, images: Path | None = None
) -> tuple[Path, str]:
    """A folder of `num_images` JPEG files and a sentence that says what they are.

    Args:
        folder: made.
        num_images: names in it.
        size: (width, height) to which pictures are resized before they are encoded (quality 90); None
            takes photographs as they are and draws synthetic ones at 500 x 375.
        images: folder of JPEG files.
    """
    images = images or (Path(os.environ["EDJE_BENCH_IMAGES"]) if "EDJE_BENCH_IMAGES" in os.environ else None)
    folder.mkdir(parents=True)
    distinct: list[Path] = []
    found = sorted(images.glob("*.jpg"))[: min(NUM_DISTINCT, num_images)] if images else []
    for number in range(len(found) or min(NUM_DISTINCT, num_images)):
        path = folder / f"{number:06d}.jpg"
        if found and size is None:
            path.write_bytes(found[number].read_bytes())
        else:
            picture = Image.open(found[number]).convert("RGB") if found else None
            wanted = size or (500, 375)
            picture = picture.resize(wanted, Image.Resampling.BICUBIC) if picture else synthetic_picture(number, wanted)
            picture.save(path, quality=90)
        distinct.append(path)
    for number in range(len(distinct), num_images):
        os.link(distinct[number % len(distinct)], folder / f"{number:06d}.jpg")
    kilobytes = sum(path.stat().st_size for path in distinct) / len(distinct) / 1e3
    with Image.open(distinct[0]) as first:
        shape = f"{first.width} x {first.height}" + ("" if size else " (the first)")
    kind = "photographs" if found else "synthetic pictures"
    return folder, f"{num_images:,} JPEG files ({len(distinct)} distinct {kind}, {shape}, {kilobytes:.0f} kB)"
