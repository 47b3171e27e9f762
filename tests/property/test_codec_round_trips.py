"""Whatever finite tokens come, codecs keep their promise, and torch says what numpy says."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edje_pipeline.models.dequantize import dequantizer
from edje_pipeline.models.quantize import quantizer
from edje_pipeline.storage.codecs import Codebook, Codec, ProductCodec, resolve, train_pq

SHAPES = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 9))
VALUES = st.floats(-60000, 60000, width=32) | st.floats(-(2.0**-13), 2.0**-13, width=32)
TOKENS = SHAPES.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=VALUES))


def both_paths(codec: Codec, tokens: np.ndarray) -> np.ndarray:
    """Encodes and decodes on both paths, asserts that they agree, returns the decoded tokens."""
    payload = codec.encode(tokens)
    on_device, storable = quantizer(codec)(torch.from_numpy(tokens))
    assert bool(storable.all())
    np.testing.assert_array_equal(on_device.numpy(), payload)
    decoded = codec.decode(payload)
    np.testing.assert_array_equal(dequantizer(codec)(torch.from_numpy(payload)).numpy(), decoded)
    return decoded


@settings(max_examples=60, deadline=None)
@given(TOKENS)
def test_float16_is_the_nearest_half(tokens: np.ndarray) -> None:
    decoded = both_paths(resolve("float16", num_tokens=tokens.shape[1], dim=tokens.shape[2]), tokens)
    np.testing.assert_array_equal(decoded, tokens.astype(np.float16).astype(np.float32))


@settings(max_examples=100, deadline=None)
@given(TOKENS, st.sampled_from([("int8", 127), ("int4", 7)]))
def test_scaled_codecs_err_by_half_a_step(tokens: np.ndarray, choice: tuple[str, int]) -> None:
    spec, levels = choice
    decoded = both_paths(resolve(spec, num_tokens=tokens.shape[1], dim=tokens.shape[2]), tokens)
    largest = np.abs(tokens).max(axis=-1, keepdims=True) if tokens.size else tokens[..., :1]
    # Half a step; a step is max / levels up to the rounding of a half, absolute below its normal range.
    step = largest / levels * (1 + 2**-10) + 2.0**-24
    assert (np.abs(decoded - tokens) <= 0.5 * step + largest * 2**-10).all()


@settings(max_examples=40, deadline=None)
@given(TOKENS, st.sampled_from(["int8", "int4"]), st.data())
def test_any_payload_decodes_alike_on_both_paths(tokens: np.ndarray, spec: str, data: st.DataObject) -> None:
    codec = resolve(spec, num_tokens=tokens.shape[1], dim=tokens.shape[2])
    payload = data.draw(hnp.arrays(np.uint8, (2, codec.payload_bytes)))
    np.testing.assert_array_equal(dequantizer(codec)(torch.from_numpy(payload)).numpy(), codec.decode(payload))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4, 8]), st.integers(1, 5))
def test_pq_picks_the_nearest_centroid(seed: int, num_bytes: int, num_tokens: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = {
        "centroids": rng.normal(size=(num_bytes, 256, 8 // num_bytes)).astype(np.float32),
        "mean": rng.normal(size=(num_tokens, 8)).astype(np.float32),
    }
    codec = ProductCodec(Codebook(f"pq{num_bytes}", num_tokens, 8, arrays))
    tokens = rng.normal(size=(6, num_tokens, 8)).astype(np.float32)
    payload = codec.encode(tokens)
    decoded = codec.decode(payload)
    np.testing.assert_array_equal(dequantizer(codec)(torch.from_numpy(payload)).numpy(), decoded)
    parts = (tokens - arrays["mean"]).reshape(-1, num_bytes, 1, 8 // num_bytes).astype(np.float64)
    distances = np.square(parts - arrays["centroids"]).sum(axis=-1)
    chosen = np.take_along_axis(distances, payload.reshape(-1, num_bytes, 1).astype(np.int64), axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, distances.min(axis=-1), rtol=0, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 12), st.sampled_from(["pq", "opq"]), st.integers(0, 1000))
def test_training_on_few_tokens_keeps_them(num_images: int, kind: str, seed: int) -> None:
    tokens = np.random.default_rng(seed).normal(size=(num_images, 4, 6)).astype(np.float32)
    codec = train_pq(tokens, 3, kind, seed=seed)
    np.testing.assert_allclose(codec.decode(codec.encode(tokens)), tokens, rtol=0, atol=0.35)
