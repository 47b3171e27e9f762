"""Other views of an image for training: moved, zoomed, turned a little, other light.

A small corpus is soon known by heart; a frozen backbone's tokens of a few views an image are the
cheapest cure, since they are computed once and cached. Never mirrored: captions say left and right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

GREY = (0.299, 0.587, 0.114)
"""Luma weights of ITU-R BT.601, as Pillow's convert("L")."""


@dataclass(frozen=True)
class Augmentation:
    """Largest changes; each is drawn evenly between none and this, to both sides."""

    zoom: float = 0.25
    """Of the scale: 0.25 draws from 1 / 1.25 to 1.25."""
    shift: float = 0.08
    """Of the width and the height; positive draws move to the left and up."""
    rotation: float = 10.0
    """Degrees."""
    brightness: float = 0.25
    contrast: float = 0.25
    saturation: float = 0.4

    def draw(self, keys: list[list[int]]) -> np.ndarray:
        """Parameters (n, 7), each row a function of its key alone, in [-1, 1]."""
        return np.stack([np.random.default_rng(key).uniform(-1, 1, 7) for key in keys]).astype(np.float32)


def augment(pixels: Tensor, draws: np.ndarray, how: Augmentation) -> Tensor:
    """Changes each image by its own draw.

    Args:
        pixels: (B, H, W, 3) uint8, on any device.
        draws: from `Augmentation.draw`, (B, 7).
        how: the largest changes.

    Returns:
        (B, H, W, 3) uint8, each image independent of the others. What comes in from outside the image repeats its edge.
    """
    device = pixels.device
    zoom, left, up, turn, light, contrast, colour = torch.from_numpy(draws).to(device).T
    scale = (1 + how.zoom) ** -zoom
    angle = turn * how.rotation * torch.pi / 180
    cos, sin = scale * angle.cos(), scale * angle.sin()
    images = pixels.permute(0, 3, 1, 2).float()
    height, width = images.shape[2:]
    # The grid says where an output pixel comes from. Its coordinates run from -1 to 1 along each side, so a shift by
    # a share of the width is twice that share, and a turn has to know how the sides differ.
    rows = [cos, -sin * (height / width), 2 * how.shift * left, sin * (width / height), cos, 2 * how.shift * up]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    weights = torch.tensor(GREY, device=device)[None, :, None, None]
    grey = (images * weights).sum(dim=1, keepdim=True)
    images = grey + (images - grey) * _factor(colour, how.saturation)
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * _factor(contrast, how.contrast)
    images = images * _factor(light, how.brightness)
    return images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _factor(draw: Tensor, most: float) -> Tensor:
    return (1 + most * draw)[:, None, None, None]
