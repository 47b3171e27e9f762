"""The vision towers of SiglipModel, CLIPModel and Dinov2Model, as timm's VisionTransformer.

Shape letters: B batch, H W pixels, N vision tokens, D width, De projected width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from edje_pipeline.errors import ConfigError, ModelError
from edje_pipeline.models.families import CLIP, DINOV2, FAMILIES, SIGLIP
from edje_pipeline.models.hf_weights import clip, dinov2, siglip
from edje_pipeline.models.hf_weights.rules import Rule, convert, inverted

SIZES = ("image_size", "patch_size", "width", "num_layers", "num_heads", "mlp_dim")
"""Options every family needs, integers."""

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}
"""Names of Hugging Face's `hidden_act` -> timm's."""

IGNORED_KEYS = frozenset({"embeddings.position_ids", "embeddings.mask_token"})
"""A constant that old versions stored, and a token that only pre-training uses."""

RULES: dict[str, Callable[[dict[str, Any]], list[Rule]]] = {
    SIGLIP.name: siglip.vision_rules,
    CLIP.name: clip.vision_rules,
    DINOV2.name: dinov2.vision_rules,
}


class HfTrunk(nn.Module):
    """A VisionTransformer with the pooling of its family, and CLIP's projection."""

    def __init__(self, family: str, options: dict[str, Any]) -> None:
        """Args: family: siglip, clip or dinov2. options: SIZES, `activation`, `norm_eps`, and what the family adds."""
        super().__init__()
        absent = [name for name in SIZES if name not in options]
        if family not in RULES or absent:
            raise ConfigError(
                f"hf:{family} needs a family of {', '.join(RULES)} and the options {', '.join(SIZES)}; "
                f"missing: {', '.join(absent) or 'none'}"
            )
        self.family = FAMILIES[family]
        self.options = options
        self.embedding = str(options.get("embedding", self.family.embedding))
        self.hidden_layer = str(options.get("tokens", self.family.hidden_layer))
        self.norm_eps = float(options.get("norm_eps", self.family.norm_eps))
        self.num_heads = int(options["num_heads"])
        width = int(options["width"])
        swiglu = bool(options.get("swiglu", False))
        self.model = VisionTransformer(
            img_size=int(options["image_size"]),
            patch_size=int(options["patch_size"]),
            embed_dim=width,
            depth=int(options["num_layers"]),
            num_heads=self.num_heads,
            # timm multiplies and truncates; half a unit more keeps the product off the next integer below.
            mlp_ratio=(int(options["mlp_dim"]) + 0.5) / width,
            act_layer="silu" if swiglu else ACTIVATIONS[str(options.get("activation", "gelu"))],
            mlp_layer=SwiGLUPacked if swiglu else Mlp,
            norm_layer=partial(nn.LayerNorm, eps=self.norm_eps),
            class_token=family != SIGLIP.name,
            pre_norm=family == CLIP.name,
            global_pool="map" if family == SIGLIP.name else "token",
            init_values=1.0 if family == DINOV2.name else None,
            num_classes=0,
        )
        self.num_prefix_tokens = self.model.num_prefix_tokens
        projected = int(options.get("projection_dim", 0))
        self.projection = nn.Linear(width, projected, bias=False) if family == CLIP.name else None

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> tokens (B, N, D), pooled (B, De) or None."""
        if self.hidden_layer == "before_final_norm":
            hidden, intermediate = self.model.forward_intermediates(pixel_values, indices=1, output_fmt="NLC")
            tokens = intermediate[0]
        else:
            hidden = self.model.forward_features(pixel_values)
            tokens = hidden[:, self.num_prefix_tokens :]
        return tokens, self.pool(hidden)

    def pool(self, hidden: Tensor) -> Tensor | None:
        """Pooled vector from the normalised hidden states (B, P + N, D)."""
        if self.embedding == "none":
            return None
        if self.embedding == "pool":
            pooled: Tensor = self.model.forward_head(hidden, pre_logits=True)
            return pooled
        if self.embedding == "projection" and self.projection is not None:
            projected: Tensor = self.projection(hidden[:, 0])
            return projected
        mean = hidden[:, self.num_prefix_tokens :].mean(dim=1)
        if self.embedding == "mean":
            return mean
        if self.num_prefix_tokens and self.embedding in ("cls", "cls_mean"):
            return hidden[:, 0] if self.embedding == "cls" else torch.cat([hidden[:, 0], mean], dim=1)
        raise ConfigError(f"hf:{self.family.name} has no embedding={self.embedding}")

    def convert_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A Hugging Face state dict, whole model or vision tower alone -> this module's names."""
        return to_trunk_names(self, tensors)


def vision_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower's part of a state dict, without its prefix; text tower and temperature are left out."""
    # Order matters: the longest prefix that occurs is the tower's; siglip, clip, dinov2 under their own or bare.
    for prefix in ("vision_model.", "dinov2.", "model.vision_model."):
        inside = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if inside:
            projection = prefix.replace("vision_model.", "") + "visual_projection.weight"
            if projection in tensors:
                inside["visual_projection.weight"] = tensors[projection]
            return inside
    return dict(tensors)


def resized_positions(table: Tensor, num_tokens: int, num_prefix: int) -> Tensor:
    """Position table (1, P + n*n, D) for another square grid: bicubic in float32, as Dinov2Model does per image."""
    grid_tokens = table.shape[1] - num_prefix
    if grid_tokens == num_tokens:
        return table
    side, new_side = round(grid_tokens**0.5), round(num_tokens**0.5)
    if side * side != grid_tokens or new_side * new_side != num_tokens:
        raise ModelError(f"position embeddings of {grid_tokens} tokens cannot become {num_tokens}: not square grids")
    grid = table[:, num_prefix:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :num_prefix].float(), grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1).to(table.dtype)


def to_trunk_names(trunk: HfTrunk, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts; names that no rule knows stay as they are, so that the caller's check reports them."""
    inside = {name: tensor for name, tensor in vision_tensors(tensors).items() if name not in IGNORED_KEYS}
    rules = RULES[trunk.family.name](trunk.options)
    if trunk.family is DINOV2 and any(".attention.q_proj." in name for name in inside):
        rules = dinov2.vision_rules(trunk.options, renamed=True)
    done = convert(rules, inside)
    converted = dict(done.tensors)
    if "model.pos_embed" in converted:
        tokens = trunk.model.patch_embed.num_patches
        table = converted["model.pos_embed"]
        converted["model.pos_embed"] = resized_positions(table, tokens, trunk.num_prefix_tokens)
    converted.update({f"(source) {name}": inside[name] for name in done.unused})
    return converted


def to_hf_names(trunk: HfTrunk) -> dict[str, Tensor]:
    """The inverse: the trunk's weights under the names inside `vision_model.`."""
    return convert(inverted(RULES[trunk.family.name](trunk.options)), trunk.state_dict()).tensors
