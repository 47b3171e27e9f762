"""What every codec refuses, in the same words: wrong shapes, values that are not finite or out of range."""

from __future__ import annotations

import numpy as np

from edje_pipeline.errors import CodecError


def checked_shape(num_tokens: int, dim: int) -> None:
    """Raises CodecError unless M and E are at least 1."""
    if num_tokens < 1 or dim < 1:
        raise CodecError(f"a codec needs at least 1 token of at least 1 value; got {num_tokens} x {dim}")


def checked_tokens(tokens: np.ndarray, *, name: str, num_tokens: int, dim: int, limit: float) -> np.ndarray:
    """The tokens as a C-contiguous float32 array (n, M, E), after every check.

    Args:
        tokens: (n, M, E), any float dtype.
        name: the codec's name, for the message.
        limit: largest magnitude the codec can store.

    Raises:
        CodecError: another shape or dtype; NaN, infinity or a magnitude above `limit`, naming the first such image.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 3 or tokens.shape[1:] != (num_tokens, dim):
        raise CodecError(
            f"codec {name} encodes tokens of shape (n, {num_tokens}, {dim}); got {tokens.shape}. "
            "Was the codec made for another adapter?"
        )
    if tokens.dtype.kind != "f":
        raise CodecError(f"codec {name} encodes floating point tokens; got {tokens.dtype}")
    # A float64 above the range of float32 becomes infinity here, which the next check names.
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(tokens, np.float32)
    if not len(values):
        return values
    # NaN spreads through max and min, so two reductions find every kind of bad value without a mask in memory.
    flat = values.reshape(len(values), -1)
    largest = np.maximum(flat.max(axis=1), -flat.min(axis=1))
    bad = ~(largest <= limit)
    if bad.any():
        image = int(np.flatnonzero(bad)[0])
        found = flat[image]
        if np.isnan(found).any():
            what = "NaN"
        elif np.isinf(found).any():
            what = "infinity"
        else:
            what = f"a magnitude of {float(np.abs(found).max()):.6g}"
        raise CodecError(
            f"codec {name} cannot store the tokens of image {image} of this batch ({int(bad.sum())} of {len(values)} "
            f"images are affected): found {what}, expected finite values of at most {limit:.6g}. "
            "Reject the image or choose another codec."
        )
    return values


def checked_payload(payload: np.ndarray, *, name: str, payload_bytes: int) -> np.ndarray:
    """The payload as a C-contiguous uint8 array (n, P).

    Raises:
        CodecError: another dtype or width.
    """
    payload = np.asarray(payload)
    if payload.dtype != np.uint8 or payload.ndim != 2 or payload.shape[1] != payload_bytes:
        raise CodecError(
            f"codec {name} decodes uint8 payloads of shape (n, {payload_bytes}); got {payload.dtype} {payload.shape}. "
            "Was the shard written with another codec?"
        )
    return np.ascontiguousarray(payload)


def non_finite_rows(tokens: np.ndarray) -> np.ndarray:
    """Indices of the images of (n, M, E) that hold NaN or infinity, for `verify` and the encode stage."""
    flat = np.asarray(tokens, np.float32).reshape(len(tokens), -1)
    return np.flatnonzero(~np.isfinite(flat).all(axis=1))
