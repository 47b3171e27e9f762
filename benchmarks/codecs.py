"""Codecs side by side: bytes, reconstruction error, speed; residual quantizers and lossless packing as rivals.

    OMP_NUM_THREADS=1 python -m benchmarks.codecs --tokens photos.npy drawings.npy [--out RESULTS.md]

Tokens: float16 (n, N, D) of a real backbone (benchmarks/vision_tokens.py) with N a square; 64 tokens an
image are made of them by averaging squares of patches. Without --tokens: synthetic low-rank ones.
A tenth of the images is held out; every error is measured there. Rates are images a CPU second of the
process: with one thread, what one free core does.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zstandard

from edje_pipeline.models.dequantize import dequantizer
from edje_pipeline.models.quantize import quantizer
from edje_pipeline.pipeline.train_codec import train_from_tokens
from edje_pipeline.storage.codecs import Codec

SPECS = ("float16", "int8", "int4", "pq16", "opq16", "pq48", "opq48")


def load_tokens(paths: list[Path], seed: int) -> np.ndarray:
    """(n, 64, D) float32, the images of all files mixed."""
    rng = np.random.default_rng(seed)
    if not paths:
        latent = rng.normal(size=(800 * 64, 48)) * np.linspace(3, 0.2, 48)
        return (latent @ rng.normal(size=(48, 384)) / 7).astype(np.float32).reshape(800, 64, 384)
    pooled = []
    for path in paths:
        tokens = np.load(path).astype(np.float32)
        side = round(tokens.shape[1] ** 0.5)
        step = side // 8
        squares = tokens.reshape(len(tokens), 8, step, 8, step, tokens.shape[2])
        pooled.append(squares.mean(axis=(2, 4)).reshape(len(tokens), 64, -1))
    tokens = np.concatenate(pooled)
    return tokens[rng.permutation(len(tokens))].astype(np.float16).astype(np.float32)


def errors(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    relative = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
    return float(relative), float(((found * wanted).sum(-1) / np.maximum(norms, 1e-12)).mean())


def rate(call: Callable[[], object], num_images: int, repeats: int = 3) -> float:
    """Images a CPU second, the best of some repeats: wall time says little on a shared machine."""
    best = np.inf
    for _ in range(repeats):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return num_images / best


def codec_row(codec: Codec, held: np.ndarray, train_s: float) -> list[str]:
    payload = codec.encode(held)
    relative, cosine = errors(codec.decode(payload), held)
    encode_module, decode_module = quantizer(codec), dequantizer(codec)
    tokens_t, payload_t = torch.from_numpy(held), torch.from_numpy(payload)
    agree = float((encode_module(tokens_t)[0].numpy() == payload).mean())
    with torch.inference_mode():
        rates = [
            rate(lambda: codec.encode(held), len(held)),
            rate(lambda: encode_module(tokens_t), len(held)),
            rate(lambda: codec.decode(payload), len(held)),
            rate(lambda: decode_module(payload_t), len(held)),
        ]
    return [
        codec.name,
        f"{codec.payload_bytes:,}",
        f"{relative:.4f}",
        f"{cosine:.4f}",
        *(f"{value:,.0f}" for value in rates),
        f"{agree:.4%}",
        f"{train_s:.0f}",
    ]


def residual_row(train: np.ndarray, held: np.ndarray, num_bytes: int, beam: int) -> list[str]:
    """faiss.ResidualQuantizer on the same centred tokens: what the pq codecs compete with."""
    import faiss

    mean = train.mean(axis=0)
    points = (train - mean).reshape(-1, train.shape[2])
    wanted = np.ascontiguousarray((held - mean).reshape(-1, train.shape[2]))
    residual = faiss.ResidualQuantizer(train.shape[2], num_bytes, 8)
    residual.max_beam_size = beam
    start = time.process_time()
    residual.train(np.ascontiguousarray(points))
    train_s = time.process_time() - start
    codes = residual.compute_codes(wanted)
    relative, cosine = errors(residual.decode(codes).reshape(held.shape) + mean, held)
    encode = rate(lambda: residual.compute_codes(wanted), len(held), repeats=1)
    decode = rate(lambda: residual.decode(codes), len(held))
    name = f"rq{num_bytes}, beam {beam}"
    sizes = [name, f"{num_bytes * 64:,}", f"{relative:.4f}", f"{cosine:.4f}"]
    return [*sizes, f"{encode:,.0f}", "", f"{decode:,.0f}", "", "", f"{train_s:.0f}"]


def lossless_rows(held: np.ndarray) -> list[list[str]]:
    """float16 an image: as it is and as two byte planes, through zstandard."""
    halves = held.astype("<f2").reshape(len(held), -1).view(np.uint8)
    rows = []
    for layout, data in (
        ("as it is", halves),
        ("byte planes", np.concatenate([halves[:, 0::2], halves[:, 1::2]], axis=1)),
    ):
        for level in (1, 3, 9):
            packer = zstandard.ZstdCompressor(level=level)
            rows.append([f"{layout}, zstd {level}", *_packing(packer, [row.tobytes() for row in data])])
    return rows


def _packing(packer: zstandard.ZstdCompressor, blobs: list[bytes]) -> list[str]:
    packed = [packer.compress(blob) for blob in blobs]
    unpacker = zstandard.ZstdDecompressor()
    size = np.mean([len(blob) for blob in packed])
    return [
        f"{size:,.0f}",
        f"{1 - size / len(blobs[0]):.1%}",
        f"{rate(lambda: [packer.compress(blob) for blob in blobs], len(blobs), 3):,.0f}",
        f"{rate(lambda: [unpacker.decompress(blob) for blob in packed], len(blobs), 3):,.0f}",
    ]


def backbone_rate() -> float:
    """Images a second of the forward pass of a DINOv2-S shape at 224 px, batch 16, fp32, on this machine."""
    import timm

    model = timm.create_model("vit_small_patch14_dinov2", img_size=224, pretrained=False).eval()
    images = torch.zeros(16, 3, 224, 224)
    with torch.inference_mode():
        return rate(lambda: model.forward_features(images), 16, repeats=4)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beams", type=int, nargs="*", default=[1, 5])
    parser.add_argument("--residual-bytes", type=int, nargs="*", default=[16])
    args = parser.parse_args()
    tokens = load_tokens(args.tokens, args.seed)
    held, train = tokens[: len(tokens) // 10], tokens[len(tokens) // 10 :]
    forward = backbone_rate()
    versions = f"numpy {np.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    parts = [
        f"{len(tokens)} images of 64 x {tokens.shape[2]} tokens, {len(held)} held out; {cores}, {versions}",
        f"backbone forward in the same run (ViT-S/14, 224 px, fp32, batch 16): {forward:.1f} images a CPU second",
    ]
    rows = []
    for spec in SPECS:
        start = time.process_time()
        codec = train_from_tokens(train, spec, args.seed)
        rows.append(codec_row(codec, held, time.process_time() - start))
        ratio = float(rows[-1][4].replace(",", "")) / forward
        rows[-1].append(f"{ratio:,.0f} x")
        print(rows[-1], flush=True)
    for num_bytes in args.residual_bytes:
        for beam in args.beams:
            rows.append(residual_row(train, held, num_bytes, beam))
            rows[-1].append(f"{float(rows[-1][4].replace(',', '')) / forward:,.1f} x")
            print(rows[-1], flush=True)
    header = ["codec", "bytes", "relative error", "cosine", "encode numpy", "encode torch", "decode numpy"]
    header += ["decode torch", "torch codes equal", "training s", "encode / backbone"]
    parts.append(table(header, rows))
    parts.append(table(["lossless float16", "bytes", "saved", "pack images/s", "unpack images/s"], lossless_rows(held)))
    text = "\n\n".join(parts)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
