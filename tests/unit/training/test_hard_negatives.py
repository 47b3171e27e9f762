"""Negatives: hardest by similarity, never of the same image or caption, both directions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edje_pipeline.errors import TrainingError
from edje_pipeline.training.hard_negatives import forbidden_pairs, plan_pairs
from edje_pipeline.training.recipe import NegativeSpec


def nothing_shared(num: int) -> torch.Tensor:
    return torch.eye(num, dtype=torch.bool)


def test_hardest_of_each_direction() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.9, 0.2], [0.3, 0.7, 0.9]])
    plan = plan_pairs(similarity, nothing_shared(3), torch.arange(3), NegativeSpec(1), torch.Generator())
    images = plan.image_p[plan.image_lists]
    texts = plan.text_p[plan.text_lists]
    assert images.tolist() == [[0, 2], [1, 0], [2, 1]]  # row-wise best wrong image
    assert texts.tolist() == [[0, 1], [1, 2], [2, 0]]  # column-wise best wrong text
    assert torch.equal(plan.text_p[plan.image_lists], torch.arange(3)[:, None].expand(3, 2))


def test_a_pair_is_scored_once() -> None:
    spec = NegativeSpec(0, num_random=3)
    plan = plan_pairs(torch.rand(4, 4), nothing_shared(4), torch.arange(4), spec, torch.Generator().manual_seed(0))
    assert len(plan.text_p) == 16
    assert len(set(zip(plan.text_p.tolist(), plan.image_p.tolist(), strict=True))) == 16


def test_same_image_and_same_caption_are_excluded() -> None:
    images, texts = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 3])
    captions = torch.tensor([[0, 1], [0, 1], [1, -1], [3, -1]])
    forbidden = forbidden_pairs(images, texts, captions)
    # Text 1, drawn for image 1 (position 2), describes image 0 too: positions 0 and 2 exclude each other.
    by_hand = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(forbidden, by_hand)


def test_too_few_admissible_negatives_are_marked() -> None:
    forbidden = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    plan = plan_pairs(torch.rand(3, 3), forbidden, torch.arange(3), NegativeSpec(2, pool=2), torch.Generator())
    assert plan.image_valid.sum(dim=1).tolist() == [2, 2, 3]


def test_batch_smaller_than_negatives() -> None:
    with pytest.raises(TrainingError, match="3 negatives were asked for, a batch of 3 pairs has 2 others"):
        plan_pairs(torch.rand(3, 3), nothing_shared(3), torch.arange(3), NegativeSpec(3, pool=3), torch.Generator())


def test_a_batch_of_one_caption_only() -> None:
    with pytest.raises(TrainingError, match="no wrong pair"):
        plan_pairs(torch.rand(3, 3), torch.ones(3, 3).bool(), torch.arange(3), NegativeSpec(1), torch.Generator())


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(3, 9),
    hard=st.integers(0, 3),
    rand=st.integers(0, 3),
    extra=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_valid_negatives_are_admissible_and_distinct(num: int, hard: int, rand: int, extra: int, seed: int) -> None:
    if not 1 <= hard + rand < num:
        return
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(num, num, generator=generator)
    groups = torch.randint(0, num - 1, (num,), generator=generator)
    forbidden = groups[:, None] == groups[None]
    if forbidden.all():
        return
    own = torch.arange(0, num, 2)
    spec = NegativeSpec(hard, rand, max(1, hard) + extra)
    plan = plan_pairs(similarity, forbidden, own, spec, generator)
    for lists, valid, side in (
        (plan.image_lists, plan.image_valid, plan.image_p),
        (plan.text_lists, plan.text_valid, plan.text_p),
    ):
        for row, position in enumerate(own.tolist()):
            chosen = side[lists[row]][valid[row]].tolist()
            assert chosen[0] == position
            assert len(set(chosen)) == len(chosen)
            assert not any(forbidden[position, other] for other in chosen[1:])
            possible = int((~forbidden[position]).sum())
            if hard == 0 or extra == 0:
                assert len(chosen) - 1 >= min(possible, rand)
