"""The sides that `extract_speed` compares: ours, the bare backbone, a plain loop, decoding alone.

Each returns wall and CPU seconds an image in its steady state, and what it spent before and after.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.clock import spent, tree_cpu_s
from edje_pipeline.models.checkpoint import ModelDirectory
from edje_pipeline.models.cpu_linear import with_frozen_linears
from edje_pipeline.models.spec import PreprocessSpec
from edje_pipeline.pipeline.extract import ExtractConfig, ExtractResult, run_extract
from edje_pipeline.pipeline.image_run import ComputeOptions
from edje_pipeline.pipeline.runner import ExecutorOptions
from edje_pipeline.storage.index import Index

WARM_UP_S = 10.0
SAMPLE_S = 1.5
"""Looking at every process of the machine costs about 10 ms, which are charged to our own side."""


class CpuTimeline:
    """Samples the CPU seconds of the process tree, so that a part of a run can be looked at afterwards."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []

    def at(self, moment: float) -> float:
        """CPU seconds at a time (epoch seconds), interpolated."""
        times, values = zip(*self.points, strict=True)
        return float(np.interp(moment, times, values))


@contextmanager
def cpu_timeline() -> Iterator[CpuTimeline]:
    line, stop = CpuTimeline(), threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_S):
            line.points.append((time.time(), tree_cpu_s()))

    line.points.append((time.time(), tree_cpu_s()))
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield line
    finally:
        stop.set()
        thread.join()
        line.points.append((time.time(), tree_cpu_s()))


def shard_times(index: Path) -> list[tuple[float, int]]:
    """(time of the last write, rows) of every shard of the current snapshot, in order of time."""
    opened = Index.open(index)
    return sorted(((index / entry.path).stat().st_mtime, entry.num_rows) for entry in opened.shards)


def ours(
    corpus: Path, index: Path, model: Path, executor: str, *, after: float, **compute: Any
) -> tuple[dict[str, float], ExtractResult]:
    """A whole `extract`. Its steady state is taken from the times at which shards were complete.

    Args:
        corpus: folder of images.
        index: made and removed again.
        model: model directory.
        executor: `ray` (in a session that is open) or `local`.
        after: the steady state begins when this share of the rows is in shards.
        **compute: fields of ComputeOptions; `num_cpus`, `num_gpus` and `object_store_bytes` of ExecutorOptions.
    """
    resources = {name: compute.pop(name, None) for name in ("num_cpus", "num_gpus", "object_store_bytes")}
    config = ExtractConfig(
        corpus=str(corpus),
        index=str(index),
        model=str(model),
        compute=ComputeOptions(**compute),
        executor=ExecutorOptions(executor, **resources),  # type: ignore[arg-type]
        quiet=True,
    )
    started = time.time()
    with cpu_timeline() as line:
        result = run_extract(config)
    ended = time.time()
    assert result.exit_code == 0, result.to_text()
    shards = shard_times(index)
    shutil.rmtree(index)
    values = result.metrics.values
    done = np.cumsum([rows for _, rows in shards])
    end = shards[-1][0]
    # Shards of one encoded batch are complete at nearly the same time: begin after the last of such a group.
    first = int(np.searchsorted(done, after * done[-1]))
    gaps = np.diff([moment for moment, _ in shards])[first : first + max(len(shards) // 8, 1)]
    first += int(gaps.argmax())
    begin, rows = shards[first][0], int(done[-1] - done[first])
    return {
        "wall_s": (end - begin) / rows,
        "cpu_s": (line.at(end) - line.at(begin)) / rows,
        "decode_s": (values.get("read_s", 0.0) + values.get("decode_s", 0.0)) / int(done[-1]),
        "total_s": ended - started,
        "startup_s": values["encode_began_at"] - started,
        "publish_s": result.timings.get("publish_s", 0.0),
        "images": float(done[-1]),
    }, result


def bare(
    model: ModelDirectory, num_images: int, batch_size: int, precision: torch.dtype, *, frozen_linears: bool = False
) -> Any:
    """The backbone's forward on float tensors that lie in memory; nothing else.

    frozen_linears: with the linear maps that our encoder uses on a CPU (models/cpu_linear.py).
    """
    backbone = model.load_backbone().to(precision)
    if frozen_linears:
        with_frozen_linears(backbone)
    height, width = backbone.preprocess.image_size
    batch = torch.randn(batch_size, 3, height, width).to(precision)

    def run() -> dict[str, float]:
        num_batches = -(-num_images // batch_size)
        with torch.inference_mode():
            backbone(batch)
            with spent() as cost:
                for _ in range(num_batches):
                    backbone(batch)
        rows = num_batches * batch_size
        return {"wall_s": cost.wall_s / rows, "cpu_s": cost.cpu_s / rows}

    return run


class Pictures(torch.utils.data.Dataset):
    """Files through timm's transform, as most people write it."""

    def __init__(self, paths: list[Path], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, str]:
        from PIL import Image

        with Image.open(self.paths[number]) as image:
            return self.transform(image.convert("RGB")), self.paths[number].stem


def plain_loop(corpus: Path, model: ModelDirectory, out: Path, batch_size: int, num_workers: int) -> Any:
    """PyTorch DataLoader, timm model, one npy file a batch. No adapter, no checksums, no resume."""
    import timm
    from timm.data import create_transform

    spec = model.spec.backbone
    options = {key: value for key, value in spec.options.items() if key not in ("tokens", "embedding", "pooled_dim")}
    network = timm.create_model(spec.source.partition(":")[2], pretrained=False, num_classes=0, **options).eval()
    size = model.spec.preprocess.image_size
    # timm's default is bilinear, which takes half the time of the bicubic that the models were made for.
    transform = create_transform(
        input_size=(3, *size), crop_pct=model.spec.preprocess.crop_pct,
        interpolation=model.spec.preprocess.interpolation, is_training=False,
    )  # fmt: skip
    paths = sorted(corpus.glob("*.jpg"))

    def run() -> dict[str, float]:
        out.mkdir(parents=True)
        loader = torch.utils.data.DataLoader(Pictures(paths, transform), batch_size=batch_size, num_workers=num_workers)
        rows, started, begun, cpu = 0, time.perf_counter(), 0.0, 0.0
        with torch.inference_mode():
            for number, (pixel_values, names) in enumerate(loader):
                if number == 1:  # workers run and the first batch is done
                    begun, cpu = time.perf_counter(), tree_cpu_s()
                features = network.forward_features(pixel_values)
                np.save(out / f"{number:06d}.npy", features.half().numpy())
                (out / f"{number:06d}.txt").write_text("\n".join(names))
                rows += len(names) if number else 0
                if number == len(loader) - 1:
                    end, cpu_end = time.perf_counter(), tree_cpu_s()
        shutil.rmtree(out)
        return {
            "wall_s": (end - begun) / rows,
            "cpu_s": (cpu_end - cpu) / rows,
            "total_s": time.perf_counter() - started,
        }

    return run


def _decode_some(paths: list[Path], spec: PreprocessSpec) -> int:
    from edje_pipeline.stages.decode import decode_image

    out = np.zeros((*spec.image_size, 3), np.uint8)
    for path in paths:
        decode_image(path.read_bytes(), spec, out)
    return len(paths)


def _warm_up(paths: list[Path], spec: PreprocessSpec, warm_up_s: float) -> None:
    """Imports are done and the process stays taken until every other one has had its own call."""
    _decode_some(paths, spec)
    time.sleep(warm_up_s)


def decode_only(corpus: Path, spec: PreprocessSpec, num_workers: int, warm_up_s: float = WARM_UP_S) -> Any:
    """Processes that read, decode and resize the same files and keep nothing."""
    paths = sorted(corpus.glob("*.jpg"))
    chunks = [paths[start : start + 64] for start in range(0, len(paths), 64)]

    def run() -> dict[str, float]:
        with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(_warm_up, [paths[:4]] * num_workers, [spec] * num_workers, [warm_up_s] * num_workers))
            with spent() as cost:
                rows = sum(pool.map(_decode_some, chunks, [spec] * len(chunks)))
        return {"wall_s": cost.wall_s / rows, "cpu_s": cost.cpu_s / rows}

    return run
