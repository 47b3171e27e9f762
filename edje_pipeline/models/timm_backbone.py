"""Any timm model as a trunk: vision transformers (token sequences) and convolutional networks (feature maps).

Shape letters: B batch, H W pixels, N vision tokens, D width, P prefix tokens.
"""

from __future__ import annotations

import sys
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from edje_pipeline.errors import ConfigError, ModelError
from edje_pipeline.models.backbone import TrunkPlan
from edje_pipeline.models.families import TIMM
from edje_pipeline.models.preprocess import from_timm_config

TOKENS_NDIM = 3
HEAD_WIDTH = 64
"""Width of an attention head assumed for backbones that have none; the adapter's head count follows from it."""

CHANNELS_LAST_FORMAT = "NHWC"
OWN_OPTIONS = frozenset({"tokens", "embedding"})


def heads_for(width: int) -> int:
    """Number of adapter heads for a backbone without attention: the largest divisor with heads of at least 64."""
    return max((n for n in range(1, max(1, width // HEAD_WIDTH) + 1) if width % n == 0), default=1)


def last_num_heads(model: nn.Module) -> int:
    """Heads of the last attention layer, 0 without attention; hierarchical models widen towards the end."""
    counts = [getattr(module, "num_heads", None) for module in model.modules()]
    return next((count for count in reversed(counts) if isinstance(count, int)), 0)


def plan(name: str, options: dict[str, Any]) -> TrunkPlan:
    """The preprocessing and resolved options of a timm model.

    Raises:
        ConfigError: timm has no such model.
    """
    config = get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    if config is None:
        near = timm.list_models(f"*{name[:8]}*")[:5]
        raise ConfigError(f"timm has no model {name!r}; near names: {', '.join(near) or 'none'} (timm.list_models())")
    resolved = {"tokens": TIMM.hidden_layer, "embedding": TIMM.embedding, **options}
    data = resolve_data_config(pretrained_cfg=config.to_dict())
    size = options.get("img_size")
    return TrunkPlan(from_timm_config(data, image_size=size), resolved, revision=str(config.tag or ""))


class TimmTrunk(nn.Module):
    """A timm model without its classifier."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        """Args: name: of the model, tag allowed. options: constructor arguments and `tokens`, `embedding`."""
        super().__init__()
        arguments = {key: value for key, value in options.items() if key not in OWN_OPTIONS}
        try:
            self.model = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
        except (TypeError, RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(f"timm:{name} does not take the options {arguments}: {error}") from error
        self.name = name
        self.hidden_layer = str(options.get("tokens", TIMM.hidden_layer))
        self.embedding = str(options.get("embedding", TIMM.embedding))
        self.num_prefix_tokens = int(getattr(self.model, "num_prefix_tokens", 0) or 0)
        self.channels_last = getattr(self.model, "output_fmt", "") == CHANNELS_LAST_FORMAT
        self.num_heads = last_num_heads(self.model) or heads_for(self.model.num_features)
        norm = getattr(self.model, "norm", None)
        self.norm_eps = float(norm.eps) if isinstance(norm, nn.LayerNorm) else TIMM.norm_eps
        if self.embedding in ("cls", "cls_mean") and not self.num_prefix_tokens:
            raise ConfigError(f"timm:{name} has no [CLS] token for embedding={self.embedding}; use pool or mean")
        if self.embedding == "projection":
            raise ConfigError(f"timm:{name} is built without a projection head; use embedding=pool, or open_clip:")
        if self.hidden_layer == "before_final_norm" and not isinstance(norm, nn.LayerNorm):
            raise ConfigError(f"timm:{name} has no final LayerNorm, so tokens=before_final_norm means nothing here")

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> tokens (B, N, D), pooled (B, D) or (B, 2D) or None."""
        if self.hidden_layer == "before_final_norm":
            hidden, intermediate = self.model.forward_intermediates(pixel_values, indices=1, output_fmt="NLC")
            tokens = intermediate[0]
        else:
            hidden = self.model.forward_features(pixel_values)
            tokens = self.as_tokens(hidden)
        return tokens, self.pool(hidden)

    def as_tokens(self, hidden: Tensor) -> Tensor:
        """What `forward_features` gives -> (B, N, D), row by row for feature maps."""
        if hidden.ndim == TOKENS_NDIM:
            return hidden[:, self.num_prefix_tokens :]
        return hidden.flatten(1, 2) if self.channels_last else hidden.flatten(2).transpose(1, 2)

    def pool(self, hidden: Tensor) -> Tensor | None:
        """The pooled vector that `embedding` names."""
        if self.embedding == "none":
            return None
        if self.embedding == "pool":
            pooled: Tensor = self.model.forward_head(hidden, pre_logits=True)
            return pooled
        mean = self.as_tokens(hidden).mean(dim=1)
        if self.embedding == "mean":
            return mean
        return hidden[:, 0] if self.embedding == "cls" else torch.cat([hidden[:, 0], mean], dim=1)

    def convert_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A timm state dict (any resolution, with or without classifier) -> names and shapes of this module."""
        return {f"model.{key}": value for key, value in _fitted(self.model, self.name, tensors).items()}


def _fitted(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's own conversion of a published state dict: position embeddings resized, old names mapped, head dropped.

    timm offers this inside `create_model(pretrained=True)` only, where names that do not fit are logged
    and passed over; here they must stay visible. By timm's convention each model file has one
    `checkpoint_filter_fn(state_dict, model)`.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        fitted = dict(convert(dict(tensors), model)) if convert is not None else dict(tensors)
    except (KeyError, RuntimeError, IndexError, AttributeError) as error:
        raise ModelError(
            f"the weights file does not look like timm's {name}: {type(error).__name__} {error}"
        ) from error
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    for head in (classifier,) if isinstance(classifier, str) else classifier:
        fitted.pop(f"{head}.weight", None)
        fitted.pop(f"{head}.bias", None)
    return fitted
