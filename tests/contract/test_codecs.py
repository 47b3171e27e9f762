"""What holds for every codec: one class, run for each of them."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch

from edje_pipeline.errors import CodecError
from edje_pipeline.models.dequantize import dequantizer
from edje_pipeline.models.quantize import quantizer
from edje_pipeline.pipeline.train_codec import train_from_tokens
from edje_pipeline.storage.codecs import Codec, is_coarser, load_codec, needs_codebook, payload_bytes_for, save_codec
from edje_pipeline.storage.location import Location

NUM_TOKENS, DIM = 5, 24
# Largest relative error on the tokens below: what the codec promises, with little to spare.
BOUNDS = {"float16": 3e-4, "int8": 8e-3, "int4": 0.13, "pq3": 0.75, "pq12": 0.25, "opq3": 0.55, "opq12": 0.2}


def make_tokens(num_images: int, seed: int = 0) -> np.ndarray:
    """Correlated tokens with a mean of their own at each place, float32 (n, M, E)."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(8, DIM)) / 3
    places = np.random.default_rng(98).normal(size=(NUM_TOKENS, DIM))
    noise = rng.normal(size=(num_images, NUM_TOKENS, DIM)) * 0.1  # full rank: no part of a token is all ties
    return (rng.normal(size=(num_images, NUM_TOKENS, 8)) @ mixing + places + noise).astype(np.float32)


@pytest.fixture(scope="module", params=sorted(BOUNDS))
def codec(request: pytest.FixtureRequest) -> Codec:
    return train_from_tokens(make_tokens(300), request.param, seed=3)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return make_tokens(64, seed=1)


class TestCodecContract:
    def test_has_the_protocol(self, codec: Codec) -> None:
        assert isinstance(codec, Codec)
        assert (codec.num_tokens, codec.dim) == (NUM_TOKENS, DIM)

    def test_shapes_and_dtypes(self, codec: Codec, tokens: np.ndarray) -> None:
        payload = codec.encode(tokens)
        assert (payload.dtype, payload.shape) == (np.dtype(np.uint8), (64, codec.payload_bytes))
        decoded = codec.decode(payload)
        assert (decoded.dtype, decoded.shape) == (np.dtype(np.float32), tokens.shape)
        assert payload_bytes_for(codec.name, num_tokens=NUM_TOKENS, dim=DIM) == codec.payload_bytes

    def test_no_images(self, codec: Codec) -> None:
        payload = codec.encode(np.empty((0, NUM_TOKENS, DIM), np.float32))
        assert payload.shape == (0, codec.payload_bytes)
        assert codec.decode(payload).shape == (0, NUM_TOKENS, DIM)

    def test_error_is_bounded(self, codec: Codec, tokens: np.ndarray) -> None:
        error = np.linalg.norm(codec.decode(codec.encode(tokens)) - tokens) / np.linalg.norm(tokens)
        assert error <= BOUNDS[codec.name]

    def test_lossless_means_rounded_to_half(self, codec: Codec, tokens: np.ndarray) -> None:
        same = np.array_equal(codec.decode(codec.encode(tokens)), tokens.astype(np.float16).astype(np.float32))
        assert same is not codec.is_lossy

    def test_images_do_not_depend_on_each_other(self, codec: Codec, tokens: np.ndarray) -> None:
        alone = np.concatenate([codec.encode(tokens[i : i + 1]) for i in range(8)])
        np.testing.assert_array_equal(alone, codec.encode(tokens)[:8])

    def test_half_input_equals_float_input(self, codec: Codec, tokens: np.ndarray) -> None:
        halves = tokens.astype(np.float16)
        np.testing.assert_array_equal(codec.encode(halves), codec.encode(halves.astype(np.float32)))

    def test_takes_read_only_and_strided_arrays(self, codec: Codec, tokens: np.ndarray) -> None:
        expected = codec.encode(tokens)
        wide = np.repeat(tokens, 2, axis=2)[..., ::2]
        wide.flags.writeable = False
        np.testing.assert_array_equal(codec.encode(wide), expected)
        frozen = np.repeat(expected, 2, axis=1)[:, ::2]
        frozen.flags.writeable = False
        np.testing.assert_array_equal(codec.decode(frozen), codec.decode(expected))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e9, -1e9])
    def test_refuses_what_it_cannot_store(self, codec: Codec, tokens: np.ndarray, bad: float) -> None:
        broken = tokens.copy()
        broken[7, 2, 3] = bad
        with pytest.raises(CodecError, match="image 7 of this batch"):
            codec.encode(broken)

    @pytest.mark.parametrize("shape", [(2, NUM_TOKENS, DIM + 1), (2, NUM_TOKENS + 1, DIM), (NUM_TOKENS, DIM)])
    def test_refuses_other_shapes(self, codec: Codec, shape: tuple[int, ...]) -> None:
        with pytest.raises(CodecError, match="another adapter"):
            codec.encode(np.zeros(shape, np.float32))

    def test_refuses_whole_numbers(self, codec: Codec) -> None:
        with pytest.raises(CodecError, match="floating point"):
            codec.encode(np.zeros((1, NUM_TOKENS, DIM), np.int64))

    def test_refuses_other_payloads(self, codec: Codec) -> None:
        for payload in (np.zeros((2, codec.payload_bytes + 1), np.uint8), np.zeros((2, codec.payload_bytes), np.int8)):
            with pytest.raises(CodecError, match="another codec"):
                codec.decode(payload)

    def test_is_a_frozen_value(self, codec: Codec) -> None:
        again = train_from_tokens(make_tokens(300), codec.name, seed=3)
        assert again == codec
        assert hash(again) == hash(codec)
        assert again.fingerprint == codec.fingerprint
        with pytest.raises(dataclasses.FrozenInstanceError):
            codec.num_images = 1  # type: ignore[attr-defined]

    def test_pickles(self, codec: Codec, tokens: np.ndarray) -> None:
        copy = pickle.loads(pickle.dumps(codec))
        assert copy == codec
        np.testing.assert_array_equal(copy.encode(tokens), codec.encode(tokens))

    def test_dict_is_json_and_enough_to_load(self, codec: Codec, tmp_path, tokens: np.ndarray) -> None:
        index = Location.parse(tmp_path)
        entry = json.loads(json.dumps(save_codec(codec, index)))
        assert entry["fingerprint"] == codec.fingerprint
        assert entry["has_codebook"] is needs_codebook(codec.name)
        loaded = load_codec(entry, index)
        assert loaded == codec
        np.testing.assert_array_equal(loaded.encode(tokens), codec.encode(tokens))

    def test_torch_decode_equals_numpy(self, codec: Codec, tokens: np.ndarray) -> None:
        payload = codec.encode(tokens)
        found = dequantizer(codec)(torch.from_numpy(payload)).numpy()
        if codec.name.startswith("opq"):
            np.testing.assert_allclose(found, codec.decode(payload), rtol=0, atol=3e-6)
        else:
            np.testing.assert_array_equal(found, codec.decode(payload))

    def test_torch_encode_equals_numpy(self, codec: Codec, tokens: np.ndarray) -> None:
        payload, storable = quantizer(codec)(torch.from_numpy(tokens))
        assert storable.all()
        np.testing.assert_array_equal(payload.numpy(), codec.encode(tokens))

    def test_torch_encode_marks_what_numpy_refuses(self, codec: Codec, tokens: np.ndarray) -> None:
        broken = tokens.copy()
        broken[2, 0, 0], broken[5, 1, 1], broken[6, 2, 2] = np.nan, np.inf, -1e9
        payload, storable = quantizer(codec)(torch.from_numpy(broken))
        assert np.flatnonzero(~storable.numpy()).tolist() == [2, 5, 6]
        np.testing.assert_array_equal(payload.numpy()[storable.numpy()], codec.encode(broken[storable.numpy()]))

    def test_coarser_means_lossy_and_smaller(self, codec: Codec) -> None:
        assert is_coarser(codec, codec.payload_bytes + 1) is codec.is_lossy
        assert not is_coarser(codec, codec.payload_bytes)
