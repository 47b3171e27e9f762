from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from edje_pipeline.errors import ConfigError
from edje_pipeline.stages.score_pairs import (
    PairScorer,
    TextTokens,
    check_kernels,
    distinct_of_batches,
    length_batches,
    resolve_precision,
)
from edje_pipeline.storage.codecs import resolve
from tests.index_util import random_tokens
from tests.score_util import tiny_model


def make_scorer(**options: object) -> PairScorer:
    codec = resolve("float16", num_tokens=4, dim=32)
    return PairScorer(tiny_model().load_joint_encoder(), codec, device="cpu", **options)  # type: ignore[arg-type]


def padded(scorer: PairScorer, lists: list[list[int]], tokens: np.ndarray) -> np.ndarray:
    width = max(map(len, lists))
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in lists])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in lists])
    with torch.inference_mode():
        return scorer.encoder.forward_padded(input_ids, mask, torch.from_numpy(tokens).float()).numpy()  # type: ignore[attr-defined]


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_scores_equal_one_padded_batch(batch_tokens: int) -> None:
    rng = np.random.default_rng(0)
    tokens = random_tokens(6, 4, 32)
    lists = [[2, *rng.integers(5, 60, length).tolist(), 3] for length in (1, 1, 4, 9, 4, 2)]
    images, texts = rng.integers(0, 6, 50), rng.integers(0, 6, 50)
    scorer = make_scorer(batch_tokens=batch_tokens)
    found = scorer.score(scorer.codec.encode(tokens), images, TextTokens.from_lists(lists), texts)
    expected = padded(scorer, [lists[n] for n in texts], tokens[images])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_no_pairs() -> None:
    scorer = make_scorer()
    nothing = np.empty(0, np.int64)
    found = scorer.score(np.empty((0, 256), np.uint8), nothing, TextTokens.from_lists([]), nothing)
    assert found.shape == (0,)
    assert found.dtype == np.float32


def test_text_tokens_keep_every_list() -> None:
    lists = [[1, 2, 3], [4], [], [5, 6, 7]]
    texts = TextTokens.from_lists(lists)
    assert len(texts) == 4
    assert texts.lengths.tolist() == [3, 1, 0, 3]
    assert texts.rows(np.array([3, 0, 3]), 3).tolist() == [[5, 6, 7], [1, 2, 3], [5, 6, 7]]


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "expected"),
    [
        ([3, 3, 3, 5], 100, [(0, 3, 3), (3, 4, 5)]),
        ([3, 3, 3, 3, 3], 32, [(0, 2, 3), (2, 5, 3)]),  # 8 tokens a pair: four a batch fit; 2 + 3, not 4 + 1
        ([7], 1, [(0, 1, 7)]),  # one pair always fits
        ([], 10, []),
    ],
)
def test_length_batches(lengths: list[int], max_tokens: int, expected: list[tuple[int, int, int]]) -> None:
    assert list(length_batches(np.array(lengths, np.int64), max_tokens, 4)) == expected


def test_length_batches_of_few_sizes() -> None:
    cut = list(length_batches(np.array([3] * 11 + [5] * 8), 32, 4, sizes="powers"))  # 4 and 3 a batch
    assert cut == [(0, 4, 3), (4, 8, 3), (8, 10, 3), (10, 11, 3), (11, 14, 5), (14, 17, 5), (17, 19, 5)]
    sizes = {
        stop - start
        for number in range(1, 500)
        for start, stop, _ in length_batches(np.full(number, 3), 2048, 4, sizes="powers")
    }
    assert sizes == {256, 128, 64, 32, 16, 8, 4, 2, 1}  # whatever the number of pairs


def test_length_batches_of_full_size() -> None:
    cut = list(length_batches(np.array([3] * 11 + [5] * 6), 32, 4, sizes="full"))  # 4 and 3 a batch
    assert cut == [(0, 4, 3), (4, 8, 3), (8, 11, 3), (11, 14, 5), (14, 17, 5)]


def test_precision_follows_the_device() -> None:
    assert resolve_precision(None, torch.device("cpu")) == "float32"
    assert resolve_precision("bfloat16", torch.device("cpu")) == "bfloat16"
    with pytest.raises(ConfigError, match="expected one of float32, bfloat16"):
        resolve_precision("float8", torch.device("cpu"))


@pytest.mark.parametrize(
    ("kernels", "device", "precision", "compiled", "message"),
    [
        ("fused", "cpu", "float32", False, "expected one of torch, own"),
        ("own", "cpu", "bfloat16", False, "here are bfloat16 on cpu; use --kernels torch"),
        ("own", "cuda", "float32", False, "here are float32 on cuda"),
        ("own", "cuda", "bfloat16", True, "bfloat16 on cuda with --compile"),
    ],
)
def test_kernels_that_do_not_fit(kernels: str, device: str, precision: str, compiled: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_kernels(kernels, torch.device(device), precision, compiled=compiled)
    check_kernels("torch", torch.device(device), precision, compiled=compiled)
    check_kernels("own", torch.device("cuda:1"), "bfloat16")


def test_int8_scores_are_near_and_refused_on_a_gpu() -> None:
    rng = np.random.default_rng(0)
    lists = [[2, *rng.integers(5, 60, length).tolist(), 3] for length in (1, 4, 9)]
    images, texts = rng.integers(0, 6, 50), rng.integers(0, 3, 50)
    scores = []
    for precision in ("float32", "int8"):
        scorer = make_scorer(precision=precision)
        payloads = scorer.codec.encode(random_tokens(6, 4, 32))
        scores.append(scorer.score(payloads, images, TextTokens.from_lists(lists), texts))
    assert 0 < np.abs(scores[0] - scores[1]).max() < 0.1 * scores[0].std()
    with pytest.raises(ConfigError, match="int8 is for the CPU"):
        resolve_precision("int8", torch.device("cuda"))


@pytest.mark.slow
def test_compiled_scores_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # The eager backend traces and guards as any other and needs no compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    rng = np.random.default_rng(0)
    lists = [[2, *rng.integers(5, 60, length).tolist(), 3] for length in (3, 4, 9)]
    images, texts = rng.integers(0, 6, 20), rng.integers(0, 3, 20)
    scores = []
    for compiled in (False, True):
        scorer = make_scorer(compiled=compiled, precision="bfloat16")
        payloads = scorer.codec.encode(random_tokens(6, 4, 32))
        scores.append(scorer.score(payloads, images, TextTokens.from_lists(lists), texts))
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-6)


@pytest.mark.parametrize("starts", [[0], [0, 1, 4], [0, 2, 3, 6]])
def test_distinct_images_of_batches(starts: list[int]) -> None:
    images = np.array([3, 3, 7, 7, 7, 9, 1, 1], np.int64)
    used, which, edges = distinct_of_batches(images, starts)
    for first, last, start, stop in zip(edges[:-1], edges[1:], starts, [*starts[1:], len(images)], strict=True):
        np.testing.assert_array_equal(used[first:last][which[start:stop]], images[start:stop])
        assert last - first == len(set(images[start:stop].tolist()))


def test_launched_calls_keep_their_own_results() -> None:
    rng = np.random.default_rng(3)
    scorer = make_scorer(batch_tokens=60)
    payloads = scorer.codec.encode(random_tokens(6, 4, 32))
    texts = TextTokens.from_lists([[2, *rng.integers(5, 60, length).tolist(), 3] for length in (1, 4, 4)])
    calls = [(rng.integers(0, 6, count), rng.integers(0, 3, count)) for count in (9, 30)]
    pending = [scorer.launch(payloads, images, texts, owners) for images, owners in calls]
    for (images, owners), one in zip(calls, pending, strict=True):
        np.testing.assert_allclose(one.result(), scorer.score(payloads, images, texts, owners), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "kernels", "bound"),
    [("float32", "torch", 1e-4), ("bfloat16", "torch", 0.1), ("bfloat16", "own", 0.1)],
)
def test_recorded_passes_on_a_gpu_give_what_a_cpu_gives(precision: str, kernels: str, bound: float) -> None:
    rng = np.random.default_rng(0)
    lists = [[2, *rng.integers(5, 60, length).tolist(), 3] for length in (3, 4, 9, 9)]
    texts = TextTokens.from_lists(lists)
    codec = resolve("float16", num_tokens=4, dim=32)
    payloads = codec.encode(random_tokens(40, 4, 32))
    want = make_scorer(precision="float32")
    encoder = tiny_model().load_joint_encoder()
    on_gpu = PairScorer(encoder, codec, device="cuda", precision=precision, batch_tokens=64, kernels=kernels)
    assert on_gpu._graphs is not None
    for _ in range(4):  # other pairs each time, so that what a recording holds of an older batch would show
        images, owners = rng.integers(0, 40, 300), rng.integers(0, 4, 300)
        expected = want.score(payloads, images, texts, owners)
        pending = [on_gpu.launch(payloads, images, texts, owners) for _ in range(2)]
        for one in pending:
            assert np.abs(one.result() - expected).max() < bound * max(1.0, expected.std())
    assert on_gpu._graphs.num_recorded == 3  # one for each length
