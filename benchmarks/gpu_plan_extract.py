"""Extraction at full size on one GPU, unattended, in about five minutes. Synthetic weights and pictures.

    python -m benchmarks.gpu_plan_extract --device cuda       SigLIP2 L/16-384 (timm's), bfloat16, torch.compile
    python -m benchmarks.gpu_plan_extract --device cpu --tiny the same program on toy sizes, to see that it works

bare      the compiled backbone's forward on float tensors that lie on the device
encode    the encode stage: uint8 pixels in host memory -> backbone, adapter, codec -> payloads in host memory
extract   JPEG files on disk -> committed shards, with ray; the second half of the rows

Target: extract at least 0.90 of bare. `encode` tells whether a miss is the stage's or the pipeline's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.clock import alternate
from benchmarks.corpus import make_corpus
from benchmarks.extract_sides import ours
from benchmarks.report import num_cores, spread, table, write_report
from edje_pipeline.models.checkpoint import ModelDirectory
from edje_pipeline.models.random_model import SIZES, RandomSize, write_random_model
from edje_pipeline.models.spec import JointEncoderSpec
from edje_pipeline.stages.encode import Encoder, require_device, resolve_precision
from edje_pipeline.storage.codecs import resolve

TARGET = 0.90
PAPER = RandomSize(
    backbone="timm:vit_large_patch16_siglip_384",
    image_size=384,
    num_compressed_tokens=64,
    adapter_mlp_dim=8192,
    joint_encoder=JointEncoderSpec(width=384, num_layers=12, num_heads=12, mlp_dim=1536),
)


def make_model(folder: Path, *, tiny: bool) -> ModelDirectory:
    """SigLIP2 L/16-384 has the architecture of timm's vit_large_patch16_siglip_384; the weights are random here."""
    if tiny:
        return write_random_model(folder / "model", size="tiny", text_tower=False)
    SIZES["paper"] = PAPER
    return write_random_model(folder / "model", size="paper", text_tower=False)


def time_on(device: torch.device, work: Callable[[], object], seconds: float, rows: int) -> dict[str, float]:
    """Seconds a row of `work`, repeated for about `seconds`."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        work()
        wait()
        count += 1
    return {"wall_s": (time.perf_counter() - started) / count / rows}


def bare_side(model: ModelDirectory, options: argparse.Namespace) -> Callable[[], dict[str, float]]:
    device = require_device(options.device)
    dtype = resolve_precision("auto", device)
    backbone = model.load_backbone().to(device, dtype)
    forward = torch.compile(backbone, dynamic=False) if options.compile else backbone
    height, width = backbone.preprocess.image_size
    batch = torch.randn(options.batch_size, 3, height, width, device=device).to(dtype)
    steps = options.rows // options.batch_size

    def work() -> None:
        with torch.inference_mode():
            for _ in range(steps):
                forward(batch)

    return lambda: time_on(device, work, options.seconds, steps * options.batch_size)


def encode_side(model: ModelDirectory, options: argparse.Namespace) -> Callable[[], dict[str, float]]:
    adapter = model.load_adapter()
    spec = model.spec.adapter
    assert spec is not None
    encoder = Encoder(
        backbone=model.load_backbone(),
        adapter=adapter,
        codec=resolve("float16", num_tokens=spec.num_compressed_tokens, dim=spec.output_dim),
        embedding_dim=model.spec.backbone.embedding_dim,
        device=options.device,
        micro_batch_size=options.batch_size,
        compile_model=options.compile,
    )
    size = model.spec.preprocess.image_size
    pixels = np.random.default_rng(0).integers(0, 255, (options.rows, *size, 3), dtype=np.uint8)
    return lambda: time_on(encoder.device, lambda: encoder.encode(pixels), options.seconds, options.rows)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    found.add_argument("--tiny", action="store_true", help="toy sizes")
    found.add_argument("--batch-size", type=int)
    found.add_argument("--rows", type=int, help="images of one call of the encode stage: a unit")
    found.add_argument("--num-images", type=int, help="JPEG files of the extract side")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--seconds", type=float, help="of each round")
    found.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    found.add_argument("--executor", choices=["ray", "local"], default="ray")
    found.add_argument("--out", type=Path)
    return found


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    full = {"batch_size": 64, "rows": 128, "num_images": 12_288, "seconds": 8.0}
    tiny = {"batch_size": 8, "rows": 32, "num_images": 256, "seconds": 0.5}
    for name, value in (tiny if options.tiny else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.compile is None:
        options.compile = options.device == "cuda"
    return options


def main(arguments: list[str] | None = None) -> None:
    options = with_defaults(parser().parse_args(arguments))
    require_device(options.device)  # a clear line before anything is made
    with tempfile.TemporaryDirectory(prefix="edje-gpu-") as name:
        folder = Path(name)
        model = make_model(folder, tiny=options.tiny)
        corpus, described = make_corpus(folder / "corpus", options.num_images, size=(500, 375))
        rounds = alternate({"bare": bare_side(model, options), "encode": encode_side(model, options)}, options.rounds)
        if options.device == "cuda":
            torch.cuda.empty_cache()
        extracted, result = ours(
            corpus, folder / "index", model.path, options.executor, after=0.5,
            batch_size=options.batch_size, compile_model=options.compile,
        )  # fmt: skip
    bare_s = statistics.median(rounds.column("bare", "wall_s"))
    rows = [[side, spread([1 / x for x in rounds.column(side, "wall_s")]),
             f"{statistics.median([1 / x for x in rounds.ratios(side, 'bare', 'wall_s')]):.3f}"]
            for side in rounds.values]  # fmt: skip
    ratio = bare_s / extracted["wall_s"]
    rows.append(["extract", f"{1 / extracted['wall_s']:,.1f}", f"{ratio:.3f}"])
    lines = [
        f"{model.spec.backbone.source} at {model.spec.preprocess.image_size[0]} px, random weights,",
        f"{resolve_precision('auto', torch.device(options.device))}, batch {options.batch_size},",
        f"compiled: {'yes' if options.compile else 'no'}; {num_cores()} CPU cores.",
        described + ".",
        "",
        *table(["side", "images/s", "against bare"], rows),
        "",
        f"Target {TARGET:.2f}: {'met' if ratio >= TARGET else 'MISSED'}."
        + (" Toy sizes: the ratio means nothing." if options.tiny else ""),
        f"Until the encoder began {extracted['startup_s']:.1f} s; the whole command {extracted['total_s']:.1f} s.",
        "",
        *(f"    {line}" for line in result.to_text().splitlines() if not line.startswith("index ")),
    ]
    write_report(
        "gpu_plan_extract", "Extraction on one device", lines, device=options.device, out=options.out,
        module="gpu_plan_extract",
    )  # fmt: skip


if __name__ == "__main__":
    main()
