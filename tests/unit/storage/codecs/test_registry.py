"""Specs, variants, and what they refuse."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from edje_pipeline.errors import CodecError
from edje_pipeline.storage.codecs import VARIANTS, Codebook, needs_codebook, payload_bytes_for, resolve


@pytest.mark.parametrize(
    ("spec", "payload_bytes"),
    [("float16", 49152), ("int8", 24704), ("int4", 12416), ("pq16", 1024), ("opq16", 1024), ("opq48", 3072)],
)
def test_payload_bytes_of_64_by_384(spec: str, payload_bytes: int) -> None:
    assert payload_bytes_for(spec, num_tokens=64, dim=384) == payload_bytes


@pytest.mark.parametrize(
    "spec", ["", "pq", "pq0", "opq016", "rq16", "float32", "PQ16", "pq16 ", "pq99999", "int8/../x"]
)
def test_unknown_specs(spec: str) -> None:
    with pytest.raises(CodecError, match="there is no codec"):
        needs_codebook(spec)


def test_every_variant_resolves_to_a_size() -> None:
    sizes = {name: payload_bytes_for(v.codec, num_tokens=64, dim=384) for name, v in VARIANTS.items()}
    assert sizes["49kb"] == sizes["raw"] == 49152
    assert sizes["1kb"] == 1024
    with pytest.raises(TypeError):
        VARIANTS["mine"] = VARIANTS["1kb"]  # type: ignore[index]


def arrays(kind: str = "pq") -> dict[str, np.ndarray]:
    values = {"centroids": np.zeros((2, 256, 4), np.float32), "mean": np.zeros((3, 8), np.float32)}
    return values | ({"rotation": np.eye(8, dtype=np.float32)} if kind == "opq" else {})


def test_codebook_and_spec_must_agree() -> None:
    book = Codebook("pq2", 3, 8, arrays())
    assert resolve("pq2", num_tokens=3, dim=8, codebook=book).payload_bytes == 6
    for spec, num_tokens, dim in (("pq4", 3, 8), ("pq2", 4, 8), ("pq2", 3, 16), ("opq2", 3, 8)):
        with pytest.raises(CodecError, match="was trained for"):
            resolve(spec, num_tokens=num_tokens, dim=dim, codebook=book)
    with pytest.raises(CodecError, match="needs a codebook"):
        resolve("pq2", num_tokens=3, dim=8)
    with pytest.raises(CodecError, match="takes no codebook"):
        resolve("int8", num_tokens=3, dim=8, codebook=book)
    with pytest.raises(CodecError, match="divisor of 8"):
        resolve("pq3", num_tokens=3, dim=8)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mean": np.zeros((3, 9), np.float32)}, "expected float32"),
        ({"mean": np.zeros((3, 8), np.float64)}, "expected float32"),
        ({"mean": np.full((3, 8), np.nan, np.float32)}, "NaN"),
        ({"more": np.zeros(1, np.float32)}, "has arrays"),
        ({"rotation": np.eye(8, dtype=np.float32)}, "has arrays"),
    ],
)
def test_wrong_arrays(change: dict[str, np.ndarray], match: str) -> None:
    with pytest.raises(CodecError, match=match):
        resolve("pq2", num_tokens=3, dim=8, codebook=Codebook("pq2", 3, 8, arrays() | change))


def test_codebooks_cannot_be_changed() -> None:
    mine = arrays()
    book = Codebook("pq2", 3, 8, mine)
    mine["mean"] += 1
    assert not book.arrays["mean"].any()
    with pytest.raises(ValueError, match="read-only"):
        book.arrays["mean"][0, 0] = 1


def test_reading_codecs_needs_neither_torch_nor_faiss() -> None:
    code = (
        "import sys, numpy as np\n"
        "from edje_pipeline.storage.codecs import Codebook, resolve\n"
        "book = Codebook('pq2', 3, 8, {'centroids': np.ones((2, 256, 4), 'f4'), 'mean': np.ones((3, 8), 'f4')})\n"
        "codec = resolve('pq2', num_tokens=3, dim=8, codebook=book)\n"
        "assert (codec.decode(codec.encode(np.ones((1, 3, 8), 'f4'))) == 2).all()\n"
        "print([name for name in ('torch', 'ray', 'faiss', 'PIL') if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
