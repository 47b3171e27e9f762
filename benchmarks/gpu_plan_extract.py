"""Extraction at full size on one GPU, unattended, in about five minutes. Synthetic weights and pictures.

    python -m benchmarks.gpu_plan_extract --device cuda       SigLIP2 L/16-384 (timm's), bfloat16, torch.compile
    python -m benchmarks.gpu_plan_extract --device cpu --tiny the same program on toy sizes, to see that it works

bare      the compiled backbone's forward on float tensors that lie on the device
encode    the encode stage: uint8 pixels in host memory -> backbone, adapter, codec -> payloads in host memory
extract   JPEG files on disk -> committed shards, with ray; the second half of the rows
decode    processes that only read, decode and resize the same files: what the cores could feed

Decoding starts while the encoder still compiles; a small object store keeps it from getting far ahead,
so that in the second half images are decoded as fast as they are encoded, or slower.

Target: extract at least 0.90 of bare. `encode` tells whether a miss is the stage's or the pipeline's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.clock import alternate
from benchmarks.corpus import make_corpus
from benchmarks.extract_sides import decode_only, ours
from benchmarks.report import num_cores, spread, table, write_report
from edje_pipeline.models.checkpoint import ModelDirectory, open_model
from edje_pipeline.models.random_model import SIZES, RandomSize, write_random_model
from edje_pipeline.models.spec import JointEncoderSpec
from edje_pipeline.stages.decode import decode_image
from edje_pipeline.stages.encode import Encoder, require_device, resolve_precision
from edje_pipeline.storage.codecs import resolve

TARGET = 0.90
BEGAN = time.perf_counter()
UNITS = 4
"""Of one timed call of the encode side."""
PAPER = RandomSize(
    backbone="timm:vit_large_patch16_siglip_384",
    image_size=384,
    num_compressed_tokens=64,
    adapter_mlp_dim=8192,
    joint_encoder=JointEncoderSpec(width=384, num_layers=12, num_heads=12, mlp_dim=1536),
)


def make_model(folder: Path, *, tiny: bool) -> ModelDirectory:
    """SigLIP2 L/16-384 has the architecture of timm's vit_large_patch16_siglip_384; the weights are random here."""
    if (folder / "model").exists():
        return open_model(str(folder / "model"))
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
    while not count or time.perf_counter() - started < seconds:
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
    steps = max(1, UNITS * options.rows // options.batch_size)  # as seldom synchronised as the encode side

    def work() -> None:
        with torch.inference_mode():
            for _ in range(steps):
                forward(batch)

    return lambda: time_on(device, work, options.seconds, steps * options.batch_size)


def pictures(folder: Path, num_images: int) -> tuple[Path, str]:
    """As `make_corpus`, whose sentence is kept beside the folder for the next time."""
    note = folder.with_name("corpus.txt")
    if not note.exists():
        note.write_text(make_corpus(folder, num_images, size=(500, 375))[1])
    return folder, note.read_text()


def say(what: str) -> None:
    """A line with the seconds since the program began: a run that is cut off shows how far it came."""
    print(f"[{time.perf_counter() - BEGAN:.0f} s] {what}", flush=True)


def make_encoder(model: ModelDirectory, options: argparse.Namespace, **changes: Any) -> Encoder:
    spec = model.spec.adapter
    assert spec is not None
    return Encoder(
        backbone=model.load_backbone(),
        adapter=model.load_adapter(),
        codec=resolve("float16", num_tokens=spec.num_compressed_tokens, dim=spec.output_dim),
        embedding_dim=model.spec.backbone.embedding_dim,
        device=options.device,
        micro_batch_size=options.batch_size,
        **{"compile_model": options.compile, **changes},
    )


def encode_side(model: ModelDirectory, options: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """The stage as ray calls it: from two threads, a unit each."""
    encoder = make_encoder(model, options)
    size = model.spec.preprocess.image_size
    pixels = np.random.default_rng(0).integers(0, 255, (options.rows, *size, 3), dtype=np.uint8)
    pool = ThreadPoolExecutor(2)

    def work() -> None:
        list(pool.map(encoder.encode, [pixels] * UNITS))

    return lambda: time_on(encoder.device, work, options.seconds, UNITS * options.rows)


def agreement(model: ModelDirectory, corpus: Path, options: argparse.Namespace) -> list[list[str]]:
    """How far tokens and embedding of the first pictures are from float32."""
    spec = model.spec.preprocess
    paths = sorted(corpus.glob("*.jpg"))[: options.batch_size]
    pixels = np.zeros((len(paths), *spec.image_size, 3), np.uint8)
    for path, out in zip(paths, pixels, strict=True):
        decode_image(path.read_bytes(), spec, out)
    forms: dict[str, dict[str, Any]] = {"float32": {"precision": "float32"}, "bfloat16": {"precision": "bfloat16"}}
    forms = {name: {**form, "compile_model": False} for name, form in forms.items()}
    if options.compile:
        forms["bfloat16, compiled"] = {"precision": "bfloat16"}
    rows, reference = [], None
    for name, form in forms.items():
        encoder = make_encoder(model, options, **form)
        encoded = encoder.encode(pixels)
        assert encoded.embedding is not None
        tokens, embedding = encoder.codec.decode(encoded.payload), encoded.embedding.astype(np.float32)
        reference = reference or (tokens, embedding)
        error = np.linalg.norm(tokens - reference[0]) / np.linalg.norm(reference[0])
        norms = np.linalg.norm(embedding, axis=1) * np.linalg.norm(reference[1], axis=1)
        lowest = ((embedding * reference[1]).sum(axis=1) / norms).min()
        rows.append([name, f"{error:.2%}", f"{lowest:.5f}"])
        print(rows[-1], flush=True)
    return rows


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
    found.add_argument("--object-store-gb", type=float, default=4.0)
    found.add_argument("--work", type=Path, help="folder for model and pictures, used again when it holds them")
    found.add_argument("--only-prepare", action="store_true", help="make model and pictures in --work, no more")
    found.add_argument("--limit-s", type=float, default=float("inf"), help="no further side is begun after so long")
    found.add_argument("--out", type=Path)
    return found


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    full = {"batch_size": 64, "rows": 128, "num_images": 20_480, "seconds": 4.0}
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
        folder = options.work or Path(name)
        model = make_model(folder, tiny=options.tiny)
        corpus, described = pictures(folder / "corpus", options.num_images)
        if options.only_prepare:
            return
        say("model and pictures are there")
        found = Found(options, model, described)
        found.rounds = alternate({"bare": bare_side(model, options), "encode": encode_side(model, options)},
                                 options.rounds)  # fmt: skip
        found.save("bare and encode")
        # What it is about comes before what explains it: a run that is cut off has it.
        gpu: dict[str, Any] = {}
        if options.device == "cuda":
            torch.cuda.empty_cache()
            gpu = {"num_gpus": 1}
        if options.executor == "ray" and not options.tiny:
            gpu["object_store_bytes"] = int(options.object_store_gb * 1e9)
        found.extracted, found.result = ours(
            corpus, Path(name) / "index", model.path, options.executor, after=0.5,
            batch_size=options.batch_size, compile_model=options.compile, **gpu,
        )  # fmt: skip
        found.save("extract")
        if time.perf_counter() - BEGAN < options.limit_s:
            found.decode_s = decode_only(corpus, model.spec.preprocess, num_cores(), warm_up_s=4.0)()["wall_s"]
            found.save("decoding alone")
        if time.perf_counter() - BEGAN < options.limit_s:
            found.agreed = agreement(model, corpus, options)
        found.save("the precisions", last=True)


@dataclass
class Found:
    """What is measured so far."""

    options: argparse.Namespace
    model: ModelDirectory
    described: str
    rounds: Any = None
    extracted: dict[str, float] | None = None
    result: Any = None
    decode_s: float | None = None
    agreed: list[list[str]] = field(default_factory=list)

    def save(self, what: str, *, last: bool = False) -> None:
        """Writes the result file, whole or not."""
        say(f"measured: {what}")
        title = "Extraction on one device" + ("" if last else ", cut off")
        write_report("gpu_plan_extract", title, self.lines(), device=self.options.device, out=self.options.out,
                     module="gpu_plan_extract", show=last)  # fmt: skip

    def lines(self) -> list[str]:
        """The report."""
        options, spec = self.options, self.model.spec
        bare_s = statistics.median(self.rounds.column("bare", "wall_s"))
        rows = [[side, spread([1 / x for x in self.rounds.column(side, "wall_s")]),
                 f"{statistics.median([1 / x for x in self.rounds.ratios(side, 'bare', 'wall_s')]):.3f}"]
                for side in self.rounds.values]  # fmt: skip
        verdict = ["Target: not measured."]
        if self.extracted is not None:
            ratio = bare_s / self.extracted["wall_s"]
            rows.append(["extract", f"{1 / self.extracted['wall_s']:,.1f}", f"{ratio:.3f}"])
            verdict = [
                f"Target {TARGET:.2f}: {'met' if ratio >= TARGET else 'MISSED'}."
                + (" Toy sizes: the ratio means nothing." if options.tiny else ""),
                f"Until the encoder began, compiling included, {self.extracted['startup_s']:.1f} s.",
                f"The whole command {self.extracted['total_s']:.1f} s.",
            ]
        if self.decode_s is not None:
            rows.append(["decode", f"{1 / self.decode_s:,.1f}", f"{bare_s / self.decode_s:.3f}"])
        lines = [
            f"{spec.backbone.source} at {spec.preprocess.image_size[0]} px, random weights,",
            f"{resolve_precision('auto', torch.device(options.device))}, batch {options.batch_size},",
            f"compiled: {'yes' if options.compile else 'no'}; {num_cores()} CPU cores.",
            self.described + ".",
            "",
            *table(["side", "images/s", "against bare"], rows),
            "",
            *verdict,
        ]
        if self.agreed:
            header = ["form", "tokens, relative difference from float32", "embedding, lowest cosine"]
            lines += ["", *table(header, self.agreed)]
        if self.result is not None:
            kept = [line for line in self.result.to_text().splitlines() if not line.startswith("index ")]
            lines += ["", *(f"    {line}" for line in kept)]
        return lines


if __name__ == "__main__":
    main()
