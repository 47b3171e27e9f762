"""JPEG decoders on the same files: CPU seconds of decoding and of resizing, and whether pixels are equal.

    python -m benchmarks.decoders --images photos/

Pillow is what the pipeline uses. simplejpeg and torchvision are measured where they are installed.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, features

from benchmarks.corpus import make_corpus
from benchmarks.report import PACKAGES, table, write_report
from edje_pipeline.models.spec import PreprocessSpec
from edje_pipeline.stages.decode import decode_image

Decode = Callable[[bytes], np.ndarray]


def with_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def decoders() -> dict[str, Decode]:
    found: dict[str, Decode] = {"Pillow": with_pillow}
    try:
        import simplejpeg

        found["simplejpeg"] = lambda data: simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)
    except ImportError:
        pass
    try:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        torch.set_num_threads(1)

        def with_torchvision(data: bytes) -> np.ndarray:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(buffer, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()

        with_torchvision(sample_jpeg())
        found["torchvision"] = with_torchvision
    except (ImportError, RuntimeError):
        pass
    return found


def sample_jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG")
    return out.getvalue()


def cpu_ms(work: Callable[[bytes], object], blobs: list[bytes]) -> float:
    started = time.process_time()
    for blob in blobs:
        work(blob)
    return (time.process_time() - started) / len(blobs) * 1e3


def whole(decode: Decode) -> Callable[[bytes], object]:
    """Decode, then the resize that every side shares."""

    def run(blob: bytes) -> object:
        return Image.fromarray(decode(blob)).resize((224, 224), Image.Resampling.BICUBIC)

    return run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-images", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    spec = PreprocessSpec((224, 224))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in (None, (640, 480), (1600, 1200)):
            where, described = make_corpus(
                Path(folder, str(size)), options.num_images, size=size, images=options.images
            )
            blobs = [path.read_bytes() for path in sorted(where.iterdir())]
            out = np.zeros((224, 224, 3), np.uint8)
            sides: dict[str, Callable[[bytes], object]] = {}
            for name, decode in decoders().items():
                sides[f"{name}, decode"] = decode
                sides[f"{name}, decode and resize"] = whole(decode)
            sides["decode_image"] = lambda blob, out=out: decode_image(blob, spec, out)
            sides["decode_image, reduced"] = lambda blob, out=out: decode_image(blob, spec, out, reduced_jpeg=True)
            taken: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(options.rounds):
                for name, side in sides.items():
                    taken[name].append(cpu_ms(side, blobs))
            for name, decode in decoders().items():
                equal = sum(np.array_equal(decode(blob), with_pillow(blob)) for blob in blobs) / len(blobs)
                one, both = (statistics.median(taken[f"{name}, {what}"]) for what in ("decode", "decode and resize"))
                rows.append([described, name, f"{one:.2f}", f"{both:.2f}", f"{equal:.0%}"])
            own = ("decode_image", "decode_image, reduced")
            rows += [[described, name, "", f"{statistics.median(taken[name]):.2f}", ""] for name in own]
    turbo = f"Pillow's libjpeg-turbo {features.version('libjpeg_turbo')}"
    lines = [
        f"One process, one thread, CPU milliseconds an image, medians of {options.rounds} alternating rounds; {turbo}."
    ]
    lines += ["", *table(["files", "decoder", "decode", "decode + resize to 224", "pixels equal"], rows)]
    write_report("decoders", "JPEG decoders", lines, out=options.out, packages=(*PACKAGES, "simplejpeg", "torchvision"))


if __name__ == "__main__":
    main()
