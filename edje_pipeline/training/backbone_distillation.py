"""A small vision backbone that imitates a large one on the images at hand.

The large one's tokens are the targets, averaged down to the small one's grid; its pooled vector and the
captions' sentence embeddings are targets of the small one's pooled vector. What comes out is a backbone
like any other, frozen from then on. Not in the paper; the bundled model is made with it.

Shape letters: n images, B batch, H W pixels, N tokens, D width, C text-embedding width; s student, t teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edje_pipeline.errors import ConfigError, TrainingError
from edje_pipeline.models.backbone import Backbone
from edje_pipeline.training import losses
from edje_pipeline.training.augment import Augmentation, augment

STATISTICS_IMAGES = 256
SMALLEST_STD = 1e-6


@dataclass(frozen=True)
class DistillationPlan:
    """How long, how fast, what counts how much."""

    steps: int = 1000
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_fraction: float = 0.05
    pooled_weight: float = 1.0
    text_weight: float = 0.3
    temperature: float = 0.07
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0
    log_every: int = 50


@dataclass(frozen=True)
class Pictures:
    """Decoded images and what they are called."""

    pixels: np.ndarray
    """uint8 (n, H, W, 3), at the student's size."""
    texts: np.ndarray
    """int64 (n,): which text an image has; the same text means the same thing is shown."""
    text_embeddings: np.ndarray
    """float32 (T, C), unit length."""


class Targets:
    """The teacher's tokens and pooled vectors, on the student's grid and standardised by channel."""

    def __init__(self, teacher: Backbone, grid: tuple[int, int], device: torch.device) -> None:
        self.teacher = teacher.to(device)
        self.grid = grid
        self.device = device
        self.size = teacher.preprocess.image_size
        self.mean = self.std = torch.zeros(())

    @torch.inference_mode()
    def fit(self, pixels: Tensor) -> None:
        """Mean and spread of each channel over a sample."""
        flat = self.raw(pixels)[0].flatten(0, 1)
        self.mean, self.std = flat.mean(dim=0), flat.std(dim=0).clamp(min=SMALLEST_STD)

    @torch.inference_mode()
    def raw(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, 3) uint8 -> (B, Ns, Dt), (B, R)."""
        values = pixels.permute(0, 3, 1, 2).float()
        values = F.interpolate(values, self.size, mode="bicubic", antialias=True, align_corners=False)
        resized = values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            tokens, pooled = self.teacher.trunk(self.teacher.normalise(resized))
        if pooled is None:
            raise ConfigError("the teacher has no pooled vector; give it embedding=cls_mean or mean")
        side = square_side(self.teacher, "teacher")
        maps = tokens.float().transpose(1, 2).unflatten(2, (side, side))
        return F.adaptive_avg_pool2d(maps, self.grid).flatten(2).transpose(1, 2), pooled.float()

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens, pooled = self.raw(pixels)
        return ((tokens - self.mean) / self.std).clone(), pooled.clone()


def square_side(backbone: Backbone, role: str) -> int:
    """Tokens along each side of the grid.

    Raises:
        ConfigError: the tokens, or the image they stand for, are not square.
    """
    total, (height, width) = backbone.spec.num_vision_tokens, backbone.preprocess.image_size
    side = math.isqrt(total)
    if side * side != total or height != width:
        raise ConfigError(f"the {role}'s {total} tokens of a {height} x {width} image are no square grid")
    return side


class Imitation(nn.Module):
    """Linear maps from the student's widths to the targets' widths; thrown away afterwards."""

    def __init__(self, width: int, pooled: int, token_target: int, pooled_target: int, text_target: int) -> None:
        super().__init__()
        self.tokens = nn.Linear(width, token_target)
        self.pooled = nn.Linear(pooled, pooled_target)
        self.text = nn.Linear(pooled, text_target)


def distil_backbone(
    student: Backbone,
    teacher: Backbone,
    train: Pictures,
    held_out: Pictures,
    plan: DistillationPlan,
    *,
    device: str = "cpu",
    report: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, float]:
    """Trains the student's trunk in place; afterwards, also after an error, it is frozen and in eval mode.

    Args:
        student: any backbone with a square grid of tokens and a pooled vector.
        teacher: frozen.
        train: what it learns from, in augmented views.
        held_out: what the returned numbers are measured on, as they are.
        plan: see there.
        device: where it runs.
        report: called with the losses of every `log_every` steps.

    Returns:
        `token_cosine` and `pooled_cosine` on `held_out`: mean cosine with the (standardised) targets.

    Raises:
        ConfigError: a backbone without a square grid or a pooled vector, fewer images than a batch, none held out.
        TrainingError: a loss is not finite.
    """
    if len(train.pixels) < plan.batch_size:
        raise ConfigError(f"{len(train.pixels)} images do not fill a batch of {plan.batch_size}; lower batch_size")
    if not len(held_out.pixels):
        raise ConfigError("there are no held-out images to measure the student on")
    on = torch.device(device)
    torch.manual_seed(plan.seed)
    side = square_side(student, "student")
    targets = Targets(teacher, (side, side), on)
    pixels = torch.from_numpy(train.pixels).to(on)
    targets.fit(pixels[torch.from_numpy(_order(plan.seed, 0, len(pixels))[:STATISTICS_IMAGES]).to(on)])
    student.to(on)
    with torch.no_grad():
        sizes = [student.trunk(student.normalise(pixels[:2])), targets(pixels[:2])]
    if sizes[0][1] is None:
        raise ConfigError("the student has no pooled vector; give it embedding=mean or pool")
    heads = Imitation(
        sizes[0][0].shape[2], sizes[0][1].shape[1], sizes[1][0].shape[2], sizes[1][1].shape[1],
        train.text_embeddings.shape[1],
    ).to(on)  # fmt: skip
    modules = nn.ModuleList([student.trunk, heads])
    matrices = [p for p in modules.parameters() if p.ndim > 1]
    others = [p for p in modules.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    )
    texts = torch.from_numpy(train.text_embeddings).to(on)
    student.trunk.requires_grad_(True)
    student.trunk.train()
    try:
        for step in range(plan.steps):
            chosen = _batch(plan, step, len(pixels))
            rate = plan.learning_rate * _factor(step, plan)
            for group in optimizer.param_groups:
                group["lr"] = rate
            draws = plan.augmentation.draw([[plan.seed, step, int(image)] for image in chosen])
            views = augment(pixels[torch.from_numpy(chosen).to(on)], draws, plan.augmentation)
            numbers = torch.from_numpy(train.texts[chosen]).to(on)
            found = _losses(student, heads, targets, views, texts[numbers], numbers, plan)
            loss = found["tokens"] + plan.pooled_weight * found["pooled"] + plan.text_weight * found["text"]
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % plan.log_every == 0 or step + 1 == plan.steps:
                values = {name: round(float(value.detach()), 4) for name, value in found.items()}
                if not all(math.isfinite(value) for value in values.values()):
                    raise TrainingError(f"the loss of step {step + 1} is not finite: {values}; lower learning_rate")
                if report is not None:
                    report({"step": step + 1, "learning_rate": rate, **values})
    finally:
        student.trunk.eval()
        student.trunk.requires_grad_(False)
    return _agreement(student, heads.eval(), targets, held_out, on)


def _losses(
    student: Backbone, heads: Imitation, targets: Targets, views: Tensor, texts_bc: Tensor, numbers: Tensor,
    plan: DistillationPlan,
) -> dict[str, Tensor]:  # fmt: skip
    wanted, wanted_pooled = targets(views)
    values = student.normalise(views).contiguous(memory_format=torch.channels_last)
    with torch.autocast(views.device.type, torch.bfloat16, enabled=views.device.type == "cuda"):
        tokens, pooled = student.trunk(values)
        found, found_pooled, text = heads.tokens(tokens), heads.pooled(pooled), heads.text(pooled)
    is_same = numbers[:, None] == numbers[None]
    own = torch.arange(len(views), device=views.device)
    return {
        "tokens": F.smooth_l1_loss(found.float(), wanted),
        "pooled": (1 - F.cosine_similarity(found_pooled.float(), wanted_pooled, dim=-1)).mean(),
        "text": losses.contrastive_loss(text, texts_bc, is_same, own, plan.temperature),
    }


@torch.inference_mode()
def _agreement(
    student: Backbone, heads: Imitation, targets: Targets, held_out: Pictures, device: torch.device
) -> dict[str, float]:
    sums, count = np.zeros(2), 0
    for start in range(0, len(held_out.pixels), 128):
        pixels = torch.from_numpy(held_out.pixels[start : start + 128]).to(device)
        wanted, wanted_pooled = targets(pixels)
        tokens, pooled = student.trunk(student.normalise(pixels))
        agree = F.cosine_similarity(heads.tokens(tokens), wanted, dim=-1).mean(dim=1).sum()
        agree_pooled = F.cosine_similarity(heads.pooled(pooled), wanted_pooled, dim=-1).sum()
        sums += [float(agree), float(agree_pooled)]
        count += len(pixels)
    return {"token_cosine": float(sums[0] / count), "pooled_cosine": float(sums[1] / count)}


def _order(seed: int, epoch: int, total: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(total)


def _batch(plan: DistillationPlan, step: int, total: int) -> np.ndarray:
    """The images of a step: every epoch visits each once, the rest that fills no batch is left out."""
    epoch, place = divmod(step, total // plan.batch_size)
    return _order(plan.seed, epoch, total)[place * plan.batch_size : (place + 1) * plan.batch_size]


def _factor(step: int, plan: DistillationPlan) -> float:
    warmup = max(1, round(plan.steps * plan.warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, plan.steps - warmup)))
