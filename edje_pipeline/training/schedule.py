"""Learning rate and optimizer of a phase."""

from __future__ import annotations

import math

import torch
from torch import nn

from edje_pipeline.training.objective import Learner
from edje_pipeline.training.recipe import Phase, Recipe


def rate_factor(step: int, phase: Phase) -> float:
    """Multiple of the peak rate at step 0 <= step < steps: linear warm-up, then a cosine to `final_fraction`."""
    warmup = max(1, round(phase.steps * phase.warmup_fraction)) if phase.warmup_fraction else 0
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, phase.steps - warmup)
    return phase.final_fraction + (1 - phase.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def create_optimizer(learner: Learner, recipe: Recipe, phase: Phase) -> torch.optim.AdamW:
    """AdamW; biases, norms and the latent queries are not decayed, frozen parameters are left out."""
    learner.encoder.word_embeddings.weight.requires_grad_(not phase.freeze_words)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            rate = 1.0 if name.startswith("encoder.") else phase.adapter_rate
            is_matrix = parameter.ndim == 2 and "embeddings" not in name
            groups.setdefault((rate, recipe.weight_decay if is_matrix else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "scale": rate, "lr": phase.learning_rate * rate}
            for (rate, decay), parameters in sorted(groups.items(), key=lambda group: group[0])
        ],
        betas=recipe.betas,
    )


def set_rate(optimizer: torch.optim.Optimizer, phase: Phase, step: int) -> float:
    """Sets the rate of a step and returns the joint encoder's."""
    rate = phase.learning_rate * rate_factor(step, phase)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    return rate
