"""Each loss against a number worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from edje_pipeline.training import losses


def test_itm_is_cross_entropy_of_the_first_column() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    valid = torch.ones(2, 3, dtype=torch.bool)
    by_hand = (-2.0 + math.log(math.e**2 + 1 + math.e) + math.log(3)) / 2
    assert losses.itm_loss(logits, valid).item() == pytest.approx(by_hand, abs=1e-6)


def test_itm_leaves_missing_negatives_out() -> None:
    logits = torch.tensor([[1.0, 0.0, 50.0]])
    valid = torch.tensor([[True, True, False]])
    assert losses.itm_loss(logits, valid).item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)


def test_itm_gradient_of_a_missing_negative_is_zero() -> None:
    logits = torch.tensor([[1.0, 0.0, 50.0]], requires_grad=True)
    losses.itm_loss(logits, torch.tensor([[True, True, False]])).backward()
    assert logits.grad is not None
    assert logits.grad[0, 2].item() == 0.0
    assert logits.grad[0, 0].item() == pytest.approx(-1 / (1 + math.e), abs=1e-6)


def test_mlm_is_mean_cross_entropy() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    loss = losses.mlm_loss(logits, torch.tensor([0, 2]))
    assert loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2, abs=1e-6)


def test_recovery_is_one_minus_cosine() -> None:
    projected = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    target = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    # cosines 3/5 and -1
    assert losses.recovery_loss(projected, target).item() == pytest.approx((0.4 + 2.0) / 2, abs=1e-6)


def test_distillation_is_binary_cross_entropy_with_soft_targets() -> None:
    student, teacher = torch.tensor([0.0, math.log(3.0)]), torch.tensor([0.0, -math.log(3.0)])
    # Pair 1: student and teacher say 1/2. Pair 2: student 3/4, teacher 1/4.
    by_hand = (math.log(2) - 0.25 * math.log(0.75) - 0.75 * math.log(0.25)) / 2
    assert losses.distillation_loss(student, teacher).item() == pytest.approx(by_hand, abs=1e-6)


def test_distillation_is_least_where_student_equals_teacher() -> None:
    teacher = torch.tensor([0.3, -2.0, 1.0])
    student = teacher.clone().requires_grad_(True)
    losses.distillation_loss(student, teacher).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.zeros(3), atol=1e-7, rtol=0)


def test_contrastive_both_directions() -> None:
    images, texts = torch.tensor([[2.0, 0.0], [0.0, 5.0]]), torch.eye(2)
    same = torch.eye(2, dtype=torch.bool)
    loss = losses.contrastive_loss(images, texts, same, torch.arange(2), temperature=0.5)
    # Cosines are the identity: each row and column is log(1 + exp((0 - 1) / 0.5)).
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)


def test_contrastive_leaves_same_captions_out() -> None:
    images, texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    same = torch.ones(2, 2, dtype=torch.bool)
    loss = losses.contrastive_loss(images, texts, same, torch.arange(2), temperature=0.1)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_words_by_hand() -> None:
    # Two image tokens along the axes, three words: cosines 1 0 r and 0 1 r with r = sqrt(1/2).
    tokens = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
    words = torch.tensor([[5.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    loss = losses.words_loss(tokens, words, torch.tensor([[0, 2, 1]]), torch.tensor([[True, True, False]]))
    near = math.log(math.exp(20) + 1)
    between = math.log(2) + 20 * 0.5**0.5
    total = math.log(2 * math.exp(near) + math.exp(between))
    assert loss.item() == pytest.approx(((total - near) + (total - between)) / 2, abs=1e-5)


def test_words_without_a_word_count_nothing() -> None:
    tokens = torch.randn(1, 2, 4, requires_grad=True)
    loss = losses.words_loss(tokens, torch.randn(3, 4), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2).bool())
    assert loss.item() == 0.0


def test_autocast_does_not_round_the_cosines() -> None:
    images, texts = torch.randn(6, 32), torch.nn.functional.normalize(torch.randn(6, 32), dim=-1)
    words, rows = torch.randn(9, 32), torch.randint(0, 9, (6, 2))
    everything = torch.ones(6, 2).bool()

    def both() -> list[float]:
        same = torch.eye(6, dtype=torch.bool)
        return [
            losses.contrastive_loss(images, texts, same, torch.arange(6), 0.05).item(),
            losses.words_loss(images[:, None], words, rows, everything).item(),
        ]

    plain = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert both() == plain


def test_average_tokens_of_a_grid_are_the_means_of_its_quarters() -> None:
    grid = torch.arange(16.0).reshape(1, 16, 1)
    found = losses.average_tokens(grid, 4)[0, :, 0].tolist()
    assert found == [(0 + 1 + 4 + 5) / 4, (2 + 3 + 6 + 7) / 4, (8 + 9 + 12 + 13) / 4, (10 + 11 + 14 + 15) / 4]


def test_average_tokens_without_a_grid_are_means_of_neighbours() -> None:
    row = torch.arange(6.0).reshape(1, 6, 1)
    assert losses.average_tokens(row, 3)[0, :, 0].tolist() == [0.5, 2.5, 4.5]


def test_token_loss_is_a_share_of_the_targets_variance() -> None:
    teacher = torch.randn(5, 16, 3, generator=torch.Generator().manual_seed(0))
    target = losses.average_tokens(teacher, 4)
    assert losses.token_loss(target, teacher).item() == 0.0
    at_the_mean = target.mean(dim=(0, 1)).expand_as(target)
    assert losses.token_loss(at_the_mean, teacher).item() == pytest.approx(1.0, rel=1e-5)
    spread = (target - target.mean(dim=(0, 1))).square().mean().item()
    assert losses.token_loss(target + 2.0, teacher).item() == pytest.approx(4.0 / spread, rel=1e-5)
