"""The parts of a micro-batch's losses against the modules called by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from edje_pipeline.errors import TrainingError
from edje_pipeline.models.checkpoint import ModelDirectory
from edje_pipeline.storage.codecs import resolve
from edje_pipeline.training.collective import Collective
from edje_pipeline.training.heads import mask_text
from edje_pipeline.training.objective import (
    Learner,
    MicroBatch,
    SpecialIds,
    Teacher,
    compute_losses,
    drop_tokens,
    total_loss,
)
from edje_pipeline.training.recipe import LossWeights, NegativeSpec, Phase
from edje_pipeline.training.sampler import PairSampler
from tests.training_helpers import tiny_corpus, tiny_learner, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    return tiny_model(tmp_path_factory.mktemp("objective") / "model")


@pytest.fixture
def learner(model: ModelDirectory) -> Learner:
    return tiny_learner(model)


@pytest.fixture
def batch(model: ModelDirectory) -> MicroBatch:
    corpus = tiny_corpus(model)
    pairs = PairSampler(corpus.captions, 0).batch(Phase("p", 1, captions="first"), 0, 0, 5)
    return corpus.micro_batch(pairs, Collective(), CPU)


def special(model: ModelDirectory) -> SpecialIds:
    tokenizer = model.load_tokenizer()
    return SpecialIds(tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)


def losses_of(
    model: ModelDirectory, learner: Learner, batch: MicroBatch, phase: Phase, **extra: object
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return compute_losses(learner, batch, phase, special(model), generator, **extra)  # type: ignore[arg-type]


def test_whole_matrix_of_pairs(model: ModelDirectory, learner: Learner, batch: MicroBatch) -> None:
    phase = Phase("p", 1, weights=LossWeights(itm=1.0), negatives=NegativeSpec(0, 4))
    found = losses_of(model, learner, batch, phase)["itm"]
    tokens = learner.adapter(batch.vision_tokens)
    rows = [
        learner.encoder(batch.input_ids[i : i + 1].expand(5, -1), batch.attention_mask[i : i + 1].expand(5, -1), tokens)
        for i in range(5)
    ]
    matrix = torch.stack(rows)
    target = torch.arange(5)
    expected = (F.cross_entropy(matrix, target) + F.cross_entropy(matrix.T, target)) / 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_distillation_from_itself_has_no_gradient(model: ModelDirectory, batch: MicroBatch) -> None:
    learner, teacher = tiny_learner(model), tiny_learner(model).requires_grad_(False)
    phase = Phase("p", 1, weights=LossWeights(distillation=1.0), negatives=NegativeSpec(1, 1))
    loss = losses_of(model, learner, batch, phase, teacher=Teacher(teacher.adapter, teacher.encoder))["distillation"]
    loss.backward()
    largest = max(float(p.grad.abs().max()) for p in learner.parameters() if p.grad is not None)
    assert largest < 1e-5
    with pytest.raises(TrainingError, match="--teacher"):
        losses_of(model, learner, batch, phase)


def test_token_distillation_trains_the_adapter_alone(
    model: ModelDirectory, learner: Learner, batch: MicroBatch
) -> None:
    teacher = tiny_learner(model).requires_grad_(False)
    phase = Phase("p", 1, weights=LossWeights(tokens=1.0))
    losses_of(model, learner, batch, phase, teacher=Teacher(teacher.adapter, teacher.encoder))["tokens"].backward()
    touched = {name.split(".")[0] for name, value in learner.named_parameters() if value.grad is not None}
    assert touched == {"adapter"}
    with pytest.raises(TrainingError, match="--teacher"):
        losses_of(model, learner, batch, phase)


def test_mlm_sees_the_image(model: ModelDirectory, learner: Learner, batch: MicroBatch) -> None:
    phase = Phase("p", 1, weights=LossWeights(mlm=1.0))
    losses_of(model, learner, batch, phase)["mlm"].backward()
    assert learner.adapter.projection.weight.grad is not None  # type: ignore[union-attr]
    assert float(learner.adapter.projection.weight.grad.abs().sum()) > 0  # type: ignore[union-attr]


def test_recovery_is_text_alone(model: ModelDirectory, learner: Learner, batch: MicroBatch) -> None:
    phase = Phase("p", 1, weights=LossWeights(recovery=1.0))
    found = losses_of(model, learner, batch, phase)["recovery"]
    first = learner.encoder.encode_text(batch.input_ids, batch.attention_mask)[:, 0]
    projected = learner.heads.text_projection(first)
    expected = (1 - F.cosine_similarity(projected, batch.text_embeddings)).mean()
    torch.testing.assert_close(found, expected)


def test_quantized_tokens_change_the_logits(model: ModelDirectory, learner: Learner, batch: MicroBatch) -> None:
    phase = Phase("p", 1, weights=LossWeights(itm=1.0), negatives=NegativeSpec(0, 4))
    spec = learner.adapter.spec
    codec = resolve("int4", num_tokens=spec.num_compressed_tokens, dim=spec.output_dim)
    plain = losses_of(model, learner, batch, phase)["itm"]
    quantized = losses_of(model, learner, batch, phase, codec=codec)["itm"]
    assert 0 < abs(float(plain.detach() - quantized.detach())) < 0.1
    quantized.backward()
    assert learner.adapter.query.grad is not None  # type: ignore[union-attr]


def test_words_move_the_adapter_only(model: ModelDirectory, learner: Learner, batch: MicroBatch) -> None:
    phase = Phase("p", 1, weights=LossWeights(words=1.0))
    loss = losses_of(model, learner, batch, phase)["words"]
    assert 0 < float(loss.detach()) < 50
    loss.backward()
    assert learner.adapter.query.grad is not None  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in learner.encoder.parameters())


def test_total_is_the_weighted_sum() -> None:
    phase = Phase("p", 1, weights=LossWeights(itm=2.0, mlm=0.5))
    assert total_loss({"itm": torch.tensor(1.5), "mlm": torch.tensor(4.0)}, phase).item() == pytest.approx(5.0)


def test_mask_text_takes_half_of_the_words() -> None:
    ids = torch.tensor([[101, 7, 8, 9, 10, 102], [101, 7, 102, 0, 0, 0]])
    is_word = (ids > 0) & (ids < 100)
    masked, chosen = mask_text(ids, is_word, 0.5, 99, torch.Generator().manual_seed(0))
    assert chosen.sum(dim=1).tolist() == [2, 1]
    assert not (chosen & ~is_word).any()
    assert torch.equal(masked == 99, chosen)
    assert torch.equal(masked[~chosen], ids[~chosen])


def test_dropped_tokens_keep_their_order() -> None:
    vision = torch.arange(40.0).view(2, 20, 1)
    kept = drop_tokens(vision, 0.9, torch.Generator().manual_seed(1))
    assert 2 <= kept.shape[1] < 20
    assert (kept[:, 1:] > kept[:, :-1]).all()
    assert torch.equal(drop_tokens(vision, 0.0, torch.Generator()), vision)
