"""What --precision, --compile and --reduced-jpeg change in stored tokens, against float32; see docs/performance.md."""

from __future__ import annotations

import functools
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter

from edje_pipeline.models.checkpoint import ModelDirectory
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.pipeline.extract import ExtractConfig, run_extract
from edje_pipeline.pipeline.image_run import ComputeOptions
from edje_pipeline.pipeline.runner import ExecutorOptions
from edje_pipeline.stages.encode import Encoder
from edje_pipeline.storage.codecs import Float16Codec
from edje_pipeline.storage.index import Index

NUM_TOKENS, DIM = 8, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    return write_random_model(tmp_path_factory.mktemp("m") / "model", size="tiny", num_compressed_tokens=NUM_TOKENS)


def tokens_of(model: ModelDirectory, **options: object) -> tuple[np.ndarray, np.ndarray]:
    codec = Float16Codec(NUM_TOKENS, DIM)
    encoder = Encoder(
        backbone=model.load_backbone(),
        adapter=model.load_adapter(),
        codec=codec,
        embedding_dim=model.spec.backbone.embedding_dim,
        micro_batch_size=8,
        **options,
    )
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 32, 3), dtype=np.uint8)
    encoded = encoder.encode(pixels)
    assert encoded.is_finite.all()
    assert encoded.embedding is not None
    return codec.decode(encoded.payload), encoded.embedding.astype(np.float32)


def relative_error(values: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))


@pytest.mark.slow
def test_the_encoder_is_compiled_once(model: ModelDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    # A backend that only counts traces as any other: it needs no compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    tokens_of(model, precision="float32", compile_model=True)  # three micro-batches
    assert counter.frame_count == 1


def test_auto_is_float32_on_a_cpu(model: ModelDirectory) -> None:
    auto, plain = tokens_of(model, precision="auto"), tokens_of(model, precision="float32")
    for one, other in zip(auto, plain, strict=True):
        np.testing.assert_array_equal(one, other)


def test_bfloat16_is_near_float32_and_not_equal(model: ModelDirectory) -> None:
    half, plain = tokens_of(model, precision="bfloat16"), tokens_of(model, precision="float32")
    for one, other in zip(half, plain, strict=True):
        assert 1e-5 < relative_error(one, other) < 0.02
    assert (np.sum(half[1] * plain[1], axis=1) > 0.999).all()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_plain_to_rounding(model: ModelDirectory) -> None:
    compiled, plain = tokens_of(model, compile_model=True), tokens_of(model)
    for one, other in zip(compiled, plain, strict=True):
        # Both are rounded to float16 (2**-11), where a last float32 bit may tip the scale.
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)
        assert relative_error(one, other) < 5e-4


def test_reduced_jpeg_reaches_the_decoder_and_stays_close(model: ModelDirectory, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(out, "JPEG", quality=92)
        (corpus / f"{number}.jpg").write_bytes(out.getvalue())
    found = {}
    for reduced in (False, True):
        index = tmp_path / f"index-{reduced}"
        run_extract(
            ExtractConfig(
                corpus=str(corpus),
                index=str(index),
                model=str(model.path),
                compute=ComputeOptions(reduced_jpeg=reduced),
                executor=ExecutorOptions("local", num_cpus=1, num_gpus=0),
                quiet=True,
            )
        )
        opened = Index.open(index)
        found[reduced] = opened.tokens(sorted(opened.ids()))
    assert 0 < relative_error(found[True], found[False]) < 0.05


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own imports
@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"precision": "float32"}, 0.002),
        ({}, 0.02),
        ({"compile_model": True}, 0.02),
    ],
    ids=["float32", "auto", "compiled"],
)
def test_a_gpu_is_near_the_cpu(model: ModelDirectory, options: dict[str, object], bound: float) -> None:
    for one, other in zip(tokens_of(model, device="cuda", **options), tokens_of(model), strict=True):
        assert relative_error(one, other) < bound
