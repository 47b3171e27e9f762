"""The vision tower of an open_clip model as a trunk: its own VisionTransformer, or a timm model (SigLIP).

Shape letters: B batch, H W pixels, N vision tokens, D width, De embedding width.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import open_clip
from open_clip.model import _build_vision_tower, resize_pos_embed
from open_clip.pretrained import get_pretrained_cfg
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from edje_pipeline.errors import ConfigError, ModelError
from edje_pipeline.models.backbone import TrunkPlan
from edje_pipeline.models.families import OPEN_CLIP, TIMM
from edje_pipeline.models.preprocess import from_open_clip_config
from edje_pipeline.models.timm_backbone import last_num_heads

CONFIG_KEYS = ("vision_cfg", "text_cfg", "embed_dim")
VISUAL_PREFIX = "visual."


def model_config(arch: str, options: dict[str, Any]) -> dict[str, Any]:
    """open_clip's own configuration of an architecture with the options written over it.

    Raises:
        ConfigError: open_clip has no such architecture.
    """
    config = open_clip.get_model_config(arch)
    if config is None:
        near = [name for name in open_clip.list_models() if name.startswith(arch[:5])][:6]
        raise ConfigError(f"open_clip has no architecture {arch!r}; near names: {', '.join(near) or 'none'}")
    merged = copy.deepcopy(config)
    for key in ("vision_cfg", "text_cfg"):
        merged[key] = {**merged.get(key, {}), **options.get(key, {})}
    merged["embed_dim"] = int(options.get("embed_dim", merged["embed_dim"]))
    if "img_size" in options:
        merged["vision_cfg"]["image_size"] = options["img_size"]
    return merged


def pretrained_config(arch: str, tag: str) -> dict[str, Any]:
    """What open_clip publishes about one set of weights; empty for no tag.

    Raises:
        ConfigError: open_clip has no such weights for the architecture.
    """
    if not tag:
        return {}
    config = get_pretrained_cfg(arch, tag)
    if not config:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
        raise ConfigError(f"open_clip has no weights {tag!r} for {arch}; known: {known}")
    return dict(config)


def plan(name: str, options: dict[str, Any]) -> TrunkPlan:
    """The preprocessing and resolved options of `ARCH[/PRETRAINED]`."""
    arch, _, tag = name.partition("/")
    config, published = model_config(arch, options), pretrained_config(arch, tag)
    family = TIMM if config["vision_cfg"].get("timm_model_name") else OPEN_CLIP
    resolved = {
        "tokens": family.hidden_layer,
        # A timm tower ends in its own pooling and open_clip's head: one value for both kinds of towers.
        "embedding": OPEN_CLIP.embedding,
        # Which activation was trained with is a fact of the weights, not of the architecture's name.
        "quick_gelu": bool(published.get("quick_gelu", config.get("quick_gelu", False))),
        **options,
    }
    preprocess = from_open_clip_config(published, image_size=config["vision_cfg"].get("image_size", 224))
    return TrunkPlan(preprocess, resolved, revision=tag)


class OpenClipTrunk(nn.Module):
    """The vision tower of an architecture, its projection included."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        super().__init__()
        arch = name.partition("/")[0]
        config = model_config(arch, options)
        self.arch = arch
        try:
            visual = _build_vision_tower(
                config["embed_dim"], copy.deepcopy(config["vision_cfg"]), bool(options.get("quick_gelu", False))
            )
            if isinstance(visual, TimmModel) and "img_size" in options:
                visual.set_input_size(options["img_size"])
        except (TypeError, RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(f"open_clip:{name} does not take its options: {error}") from error
        if not isinstance(visual, VisionTransformer | TimmModel):
            raise ConfigError(
                f"open_clip:{name} has a {type(visual).__name__} vision tower, which gives no tokens; "
                f"expected a vision transformer"
            )
        self.visual = visual
        self.hidden_layer = str(options.get("tokens", OPEN_CLIP.hidden_layer))
        self.embedding = str(options.get("embedding", OPEN_CLIP.embedding))
        if self.embedding not in ("projection", "none"):
            raise ConfigError(f"open_clip:{name} gives its own embedding only; use embedding=projection or none")
        if isinstance(visual, TimmModel):
            self.num_heads = last_num_heads(visual.trunk)
            norm = getattr(visual.trunk, "norm", None)
        else:
            self.num_heads = int(visual.transformer.resblocks[-1].attn.num_heads)
            norm = visual.ln_post
        self.norm_eps = float(norm.eps) if isinstance(norm, nn.LayerNorm) else OPEN_CLIP.norm_eps

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> tokens (B, N, D), projected (B, De) or None."""
        normed = self.hidden_layer == "final_norm"
        output = self.visual.forward_intermediates(
            pixel_values, indices=1, normalize_intermediates=normed, output_fmt="NLC"
        )
        embedding = output["image_features"] if self.embedding == "projection" else None
        return output["image_intermediates"][0], embedding

    def convert_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """An open_clip state dict (whole model, `module.` allowed) -> this module's names."""
        plain = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
        visual = {name: tensor for name, tensor in plain.items() if name.startswith(VISUAL_PREFIX)}
        if not visual:
            raise ModelError(
                f"weights for open_clip:{self.arch} hold no name starting with {VISUAL_PREFIX!r}; expected an "
                f"open_clip state dict (found {', '.join(sorted(plain)[:3])} ...)"
            )
        if isinstance(self.visual, VisionTransformer):
            resize_pos_embed(visual, SimpleNamespace(visual=self.visual))
        return visual
