"""Views of an image: a function of the key, no change without draws, directions as stated."""

from __future__ import annotations

import numpy as np
import torch

from edje_pipeline.training.augment import Augmentation, augment

HOW = Augmentation()
ZOOM, LEFT, UP, TURN, LIGHT, CONTRAST, COLOUR = range(7)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8))


def only(**draws: float) -> np.ndarray:
    row = np.zeros((1, 7), np.float32)
    for name, value in draws.items():
        row[0, globals()[name.upper()]] = value
    return row


def far_apart(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


def test_a_draw_depends_on_its_key_alone() -> None:
    keys = [[3, 1, 8], [3, 1, 9], [3, 2, 8], [4, 1, 8]]
    rows = HOW.draw(keys)
    assert rows.shape == (4, 7)
    assert rows.dtype == np.float32
    assert np.array_equal(HOW.draw(keys[::-1])[::-1], rows)
    assert np.array_equal(HOW.draw([keys[2]])[0], rows[2])
    assert len({row.tobytes() for row in rows}) == 4
    many = HOW.draw([[0, 1, image] for image in range(300)])
    assert np.abs(many).max() <= 1
    assert (many.min(axis=0) < -0.9).all()
    assert (many.max(axis=0) > 0.9).all()


def test_zero_draws_leave_the_image() -> None:
    images = noise(3, 20, 28)
    changed = augment(images, np.zeros((3, 7), np.float32), HOW)
    assert changed.dtype == torch.uint8
    assert changed.shape == images.shape
    assert far_apart(changed, images) <= 1


def test_a_shift_moves_by_the_share_and_repeats_the_edge() -> None:
    images, how = noise(1, 10, 20), Augmentation(shift=0.1)
    left = augment(images, only(left=1), how)
    assert far_apart(left[:, :, :18], images[:, :, 2:]) <= 1
    assert far_apart(left[:, :, 18:], images[:, :, 19:].expand(-1, -1, 2, -1)) <= 1
    right = augment(images, only(left=-1), how)
    assert far_apart(right[:, :, 2:], images[:, :, :18]) <= 1
    assert far_apart(right[:, :, :2], images[:, :, :1].expand(-1, -1, 2, -1)) <= 1
    up = augment(images, only(up=1), how)
    assert far_apart(up[:, :9], images[:, 1:]) <= 1
    assert far_apart(up[:, 9:], images[:, 9:]) <= 1
    half = augment(images, only(left=0.5), how)
    assert far_apart(half[:, :, :19], images[:, :, 1:]) <= 1


def test_a_positive_zoom_enlarges() -> None:
    image = torch.zeros(1, 40, 40, 3, dtype=torch.uint8)
    image[:, 15:25, 15:25] = 255
    area = {zoom: float(augment(image, only(zoom=zoom), HOW).float().mean()) for zoom in (-1.0, 0.0, 1.0)}
    assert np.isclose(area[1.0] / area[0.0], 1.25**2, rtol=0.02)
    assert np.isclose(area[-1.0] / area[0.0], 1.25**-2, rtol=0.02)


def test_a_turn_keeps_shapes_also_where_the_sides_differ() -> None:
    image = torch.zeros(1, 40, 80, 3, dtype=torch.uint8)
    image[:, 10:30, 30:50] = 255
    turned = augment(image, only(turn=1), Augmentation(rotation=45.0))[0, :, :, 0].float() / 255
    # A square on its corner: as large as before, its diagonal along both axes.
    assert np.isclose(float(turned.sum()), 400, rtol=0.02)
    assert abs(float(turned[20].sum()) - 20 * 2**0.5) < 1.5
    assert abs(float(turned[:, 40].sum()) - 20 * 2**0.5) < 1.5


def test_never_mirrored() -> None:
    image = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    image[:, :, :8, 0] = 255  # red to the left
    image[:, :8, :, 1] = 255  # green above
    keys = [[0, view, 0] for view in range(200)]
    views = augment(image.expand(200, -1, -1, -1), HOW.draw(keys), HOW).float()
    assert bool((views[:, :, :16, 0].mean(dim=(1, 2)) > views[:, :, 16:, 0].mean(dim=(1, 2))).all())
    assert bool((views[:, :16, :, 1].mean(dim=(1, 2)) > views[:, 16:, :, 1].mean(dim=(1, 2))).all())


def test_light_and_colour_stay_in_range_and_go_the_stated_way() -> None:
    image = noise(1, 12, 12)
    image[0, 0, 0], image[0, 0, 1] = 255, 0
    light = augment(image, only(light=1), HOW)
    expected = (image.float() * 1.25).round().clamp(0, 255)
    assert far_apart(light, expected) <= 1  # white stays 255 and does not wrap to 63
    assert augment(image, only(contrast=1), HOW).float().std() > image.float().std()
    assert augment(image, only(contrast=-1), HOW).float().std() < image.float().std()
    grey = augment(image, only(colour=-1), Augmentation(saturation=1.0))
    assert far_apart(grey[..., 0], grey[..., 2]) == 0
    luma = image.float() @ torch.tensor([0.299, 0.587, 0.114])
    assert far_apart(grey[..., 0], luma.round()) <= 1


def test_a_batch_equals_its_images_one_by_one() -> None:
    images, draws = noise(5, 24, 24, seed=1), HOW.draw([[7, 1, image] for image in range(5)])
    together = augment(images, draws, HOW)
    for place in range(5):
        assert far_apart(together[place], augment(images[place : place + 1], draws[place : place + 1], HOW)[0]) <= 1
        assert far_apart(together[place], images[place]) > 20
