"""Batches are a function of the step, cover the corpus, and hold neighbours where asked."""

from __future__ import annotations

import numpy as np
import pytest

from edje_pipeline.errors import TrainingError
from edje_pipeline.training.data import Captions
from edje_pipeline.training.recipe import Phase
from edje_pipeline.training.sampler import PairSampler, confused_texts, nearest_texts
from tests.training_helpers import tiny_captions


def test_same_step_same_batch_in_any_order() -> None:
    captions, phase = tiny_captions(), Phase("p", 10, batch_size=4)
    forward = [PairSampler(captions, 5).batch(phase, 0, step, 4) for step in range(6)]
    sampler = PairSampler(captions, 5)
    for step in (5, 2, 0, 3, 1, 4):
        again = sampler.batch(phase, 0, step, 4)
        assert np.array_equal(again.images, forward[step].images)
        assert np.array_equal(again.texts, forward[step].texts)
    other = PairSampler(captions, 6).batch(phase, 0, 0, 4)
    assert not np.array_equal(other.images, forward[0].images)


def test_an_epoch_visits_every_image_once() -> None:
    sampler, phase = PairSampler(tiny_captions(), 0), Phase("p", 10)
    seen = np.concatenate([sampler.batch(phase, 0, step, 4).images for step in range(3)])
    assert sorted(seen.tolist()) == list(range(12))


def test_images_are_distinct_over_the_seam_of_epochs() -> None:
    sampler, phase = PairSampler(tiny_captions(7), 1), Phase("p", 10)
    for step in range(12):
        images = sampler.batch(phase, 0, step, 5).images
        assert len(set(images.tolist())) == 5


def test_texts_belong_to_their_images_and_first_means_first() -> None:
    captions = tiny_captions()
    sampler = PairSampler(captions, 0)
    pairs = sampler.batch(Phase("p", 1), 0, 0, 12)
    for image, text in zip(pairs.images, pairs.texts, strict=True):
        assert captions.texts[text] in captions.captions[image]
    first = sampler.batch(Phase("p", 1, captions="first"), 0, 0, 12)
    assert all(captions.texts[t] == captions.captions[i][0] for i, t in zip(first.images, first.texts, strict=True))


def test_neighbours_are_near() -> None:
    captions = Captions(tuple(f"{n}" for n in range(40)), tuple((f"t{n}",) for n in range(40)))
    angle = np.repeat(np.arange(10), 4) * 0.6 + np.tile(np.arange(4), 10) * 0.01
    embeddings = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    nearest = nearest_texts(embeddings, 3)
    assert sorted(nearest[0].tolist()) == [1, 2, 3]
    batch = PairSampler(captions, 0, nearest).batch(Phase("p", 1, neighbours=0.5), 0, 0, 8)
    assert len(set(batch.images.tolist())) == 8
    groups, counts = np.unique(batch.images // 4, return_counts=True)
    assert counts.max() > 1
    assert len(groups) <= 4 + 1


def test_a_used_up_cluster_is_filled_with_others() -> None:
    captions = tiny_captions(6)
    nearest = np.tile(np.array([[0]], np.int32), (len(captions.texts), 1))
    batch = PairSampler(captions, 0, nearest).batch(Phase("p", 1, neighbours=0.6), 0, 0, 6)
    assert sorted(batch.images.tolist()) == list(range(6))


def test_batch_larger_than_corpus() -> None:
    with pytest.raises(TrainingError, match="asks for 13 different images a step, the corpus has 12"):
        PairSampler(tiny_captions(), 0).batch(Phase("p", 1), 0, 0, 13)


def test_parts_share_the_batch() -> None:
    batch = PairSampler(tiny_captions(), 0).batch(Phase("p", 1), 0, 0, 8)
    parts = [batch.part(number, 2) for number in range(2)]
    assert sorted(np.concatenate([part.images for part in parts]).tolist()) == sorted(batch.images.tolist())


def test_views_are_a_function_of_seed_phase_and_step() -> None:
    captions, phase = tiny_captions(), Phase("p", 10, batch_size=8)
    sampler = PairSampler(captions, 5, num_views=4)
    forward = [sampler.batch(phase, 1, step, 8).views for step in range(40)]
    fresh = PairSampler(captions, 5, num_views=4)
    for step in (39, 0, 17):
        assert np.array_equal(fresh.batch(phase, 1, step, 8).views, forward[step])
    assert np.unique(np.concatenate(forward)).tolist() == [0, 1, 2, 3]
    for other in (
        PairSampler(captions, 6, num_views=4).batch(phase, 1, 0, 8),
        fresh.batch(phase, 2, 0, 8),
        fresh.batch(phase, 1, 1, 8),
    ):
        assert not np.array_equal(other.views, forward[0])


def test_the_number_of_views_does_not_change_the_pairs() -> None:
    captions, phase = tiny_captions(), Phase("p", 10, batch_size=6, neighbours=0.5)
    nearest = np.tile(np.arange(8, dtype=np.int32), (len(captions.texts), 1))
    for step in range(5):
        one = PairSampler(captions, 5, nearest).batch(phase, 0, step, 6)
        eight = PairSampler(captions, 5, nearest, num_views=8).batch(phase, 0, step, 6)
        assert np.array_equal(one.images, eight.images)
        assert np.array_equal(one.texts, eight.texts)
        assert not one.views.any()


def test_parts_split_views_along() -> None:
    batch = PairSampler(tiny_captions(), 0, num_views=9).batch(Phase("p", 1), 0, 0, 8)
    for number in range(3):
        part = batch.part(number, 3)
        places = [place for place in range(8) if place % 3 == number]
        for name in ("images", "texts", "views"):
            assert getattr(part, name).tolist() == [getattr(batch, name)[place] for place in places]


def test_confused_texts_by_hand() -> None:
    # Images 0 and 2 share their first caption; text 3 is a second caption of image 1.
    captions = Captions(("i0", "i1", "i2", "i3"), (("cat",), ("dog", "pet"), ("cat",), ("car",)))
    assert captions.texts == ("cat", "dog", "pet", "car")
    images = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]], np.float32)
    texts = np.array([[1, 0], [0.6, 0.8], [0.28, 0.96], [0, 1]], np.float32)
    # Scores of "cat": 1, .8, .6, 0; "dog": .6, .96, 1, .8; "pet": .28, .8, .936, .96; "car": 0, .6, .8, 1.
    found = confused_texts(texts, images, captions, num=2)
    assert found.dtype == np.int32
    assert [sorted(row) for row in found.tolist()] == [[0, 1], [0, 1], [0, 3], [0, 3]]
    every = confused_texts(texts, images, captions, num=48)
    assert [sorted(row) for row in every.tolist()] == [[0, 0, 1, 3]] * 4


def test_confused_texts_become_neighbours() -> None:
    captions = Captions(tuple(f"{n}" for n in range(40)), tuple((f"t{n}",) for n in range(40)))
    angle = (np.arange(40) * 7 % 40) * 2 * np.pi / 40
    images = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    # The first stage takes the image 20 further on for a text's own.
    confused = confused_texts(np.roll(images, -20, axis=0), images, captions, num=1)
    assert confused[:, 0].tolist() == [(n + 20) % 40 for n in range(40)]
    images_of = set(PairSampler(captions, 0, confused).batch(Phase("p", 1, neighbours=0.5), 0, 0, 8).images.tolist())
    assert sum((image + 20) % 40 in images_of for image in images_of) >= 6
