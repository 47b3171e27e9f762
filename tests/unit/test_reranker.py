from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edje_pipeline import Reranker, reranker
from edje_pipeline.errors import ConfigError, CorruptionError, DeviceError, IndexStateError, UnknownIdError
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.storage.index import Index
from tests.index_util import random_tokens, write_index
from tests.score_util import plain_scores, sentence, tiny_model


@pytest.fixture(scope="module")
def rerank_index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_index(tmp_path_factory.mktemp("index") / "index", tiny_model(), num_images=60)


@pytest.mark.parametrize("codec", ["float16", "int8", "int4"])
def test_predict_equals_a_plain_padded_batch(tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write_index(tmp_path / "index", tiny_model(), num_images=40, codec=codec)
    rng = np.random.default_rng(3)
    texts = [sentence(rng, int(rng.integers(1, 9))) for _ in range(30)]
    ids = [index.ids()[n] for n in rng.integers(0, 40, 30)]
    expected = plain_scores(index, tiny_model(), texts, ids)
    scores = Reranker.open(index).predict(list(zip(texts, ids, strict=True)))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    monkeypatch.setattr(reranker, "CHUNK_BYTES", 3 * index.manifest.tokens.payload_bytes)
    np.testing.assert_allclose(Reranker.open(index).predict(list(zip(texts, ids, strict=True))), expected, atol=1e-5)


def test_rank_orders_like_predict(rerank_index: Index) -> None:
    opened = Reranker.open(str(rerank_index.location))
    ids = rerank_index.ids()[::3]
    scores = dict(zip(ids, opened.predict([("a red apple", name) for name in ids]).tolist(), strict=True))
    ranked = opened.rank("a red apple", [*ids, ids[0]])
    assert [item.rank for item in ranked] == list(range(1, len(ids) + 1))
    assert [item.image_id for item in ranked] == sorted(ids, key=lambda name: (-scores[name], name))
    assert opened.rank("a red apple", ids, top_k=2) == ranked[:2]
    image_id, score, rank = ranked[0]
    assert (image_id, rank) == (ranked[0].image_id, 1)
    assert score == pytest.approx(scores[image_id], abs=1e-5)


def test_equal_scores_rank_by_image_id(tmp_path: Path) -> None:
    tokens = np.repeat(random_tokens(1, 4, 32), 3, axis=0)
    index = write_index(tmp_path / "index", tiny_model(), ids=["c", "a", "b"], tokens=tokens)
    # A batch a pair: rows of one matrix product may differ in their last bits, and then nothing is equal.
    one_by_one = Reranker(index, reranker.open_scorer(index, batch_tokens=1))
    assert len(set(one_by_one.predict([("dog", image_id) for image_id in "abc"]).tolist())) == 1
    assert [item.image_id for item in one_by_one.rank("dog", ["c", "b", "a"])] == ["a", "b", "c"]


def test_nothing_to_do(rerank_index: Index) -> None:
    opened = Reranker.open(rerank_index)
    assert opened.predict([]).shape == (0,)
    assert opened.rank("dog", []) == []
    assert (opened.precision, opened.device) == ("float32", "cpu")


def test_bfloat16_is_close(rerank_index: Index) -> None:
    pairs = [("a red apple on the table", name) for name in rerank_index.ids()]
    full = Reranker.open(rerank_index).predict(pairs)
    half = Reranker.open(rerank_index, precision="bfloat16").predict(pairs)
    assert 0 < np.abs(full - half).max() < 0.05 * np.abs(full).max()


def test_bad_calls_say_what_is_wrong(rerank_index: Index, tmp_path: Path) -> None:
    opened = Reranker.open(rerank_index)
    with pytest.raises(UnknownIdError, match=r"does not hold 1 of the image ids, such as 'gone'"):
        opened.predict([("dog", "gone"), ("dog", rerank_index.ids()[0])])
    with pytest.raises(ConfigError, match="top_k is 0"):
        opened.rank("dog", rerank_index.ids(), top_k=0)
    with pytest.raises(ConfigError, match="one string"):
        opened.rank("dog", "img-00001.jpg")
    with pytest.raises(ConfigError, match="own kernels are for bfloat16 on a GPU"):
        Reranker.open(rerank_index, kernels="own", device="cpu")
    with pytest.raises(ConfigError, match="unknown precision 'int3'"):
        Reranker.open(rerank_index, precision="int3")
    with pytest.raises(ConfigError, match="device"):
        Reranker.open(rerank_index, device="toaster")
    with pytest.raises(IndexStateError, match="differ; give the model"):
        Reranker.open(rerank_index, model=write_random_model(tmp_path / "other", seed=9).path)


def test_a_device_that_is_not_there(rerank_index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(DeviceError, match="0 CUDA devices"):
        Reranker.open(rerank_index, device="cuda")


def test_tokens_that_are_not_finite_name_the_pair(rerank_index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = reranker.read_payloads

    def damaged(*args: object) -> object:
        payloads, names, count = plain(*args)  # type: ignore[arg-type]
        payloads[0].view(np.float16)[0] = np.inf
        return payloads, names, count

    monkeypatch.setattr(reranker, "read_payloads", damaged)
    with pytest.raises(CorruptionError, match=r"tokens of image .* are not finite, so text 'dog'"):
        Reranker.open(rerank_index).rank("dog", rerank_index.ids()[:2])


def test_a_joint_encoder_may_differ_from_the_index_s_own(rerank_index: Index, tmp_path: Path) -> None:
    from edje_pipeline.models.checkpoint import save_model

    ours = tiny_model()
    other = write_random_model(tmp_path / "other", seed=9)
    mixed = save_model(
        tmp_path / "mixed",
        ours.spec,
        backbone=ours.file("backbone.safetensors"),
        adapter=ours.file("adapter.safetensors"),
        joint_encoder=other.file("joint_encoder.safetensors"),
        tokenizer=ours.file("tokenizer.json"),
        text_tower=ours.file("text_tower.safetensors") if ours.spec.text_tower else None,
    )
    pairs = [("dog", name) for name in rerank_index.ids()[:5]]
    found = Reranker.open(rerank_index, model=mixed.path).predict(pairs)
    np.testing.assert_allclose(found, plain_scores(rerank_index, mixed, ["dog"] * 5, [i for _, i in pairs]), atol=1e-5)


def test_scoring_in_process_needs_no_ray() -> None:
    code = "import sys; from edje_pipeline import Reranker; assert Reranker; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.gpu
def test_gpu_equals_cpu(rerank_index: Index) -> None:
    pairs = [(text, name) for text in ("dog", "a red apple") for name in rerank_index.ids()]
    cpu = Reranker.open(rerank_index, device="cpu", precision="float32").predict(pairs)
    gpu = Reranker.open(rerank_index, device="cuda", precision="float32").predict(pairs)
    np.testing.assert_allclose(gpu, cpu, atol=1e-4)
    half = Reranker.open(rerank_index, device="cuda")
    assert half.precision == "bfloat16"
    assert np.abs(half.predict(pairs) - cpu).max() < 0.1 * np.abs(cpu).max()
