"""DINOv2 (`Dinov2Model`): Hugging Face names onto timm's VisionTransformer."""

from __future__ import annotations

from typing import Any

from edje_pipeline.models.hf_weights.rules import Rule, for_blocks, layer, merged, same

KINDS = ("weight", "bias")
PUBLISHED_ATTENTION = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
RENAMED_ATTENTION = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
"""Names in memory since transformers 5; files that it writes keep the published ones."""


def vision_rules(options: dict[str, Any], *, renamed: bool = False) -> list[Rule]:
    """Names of the model -> names of `HfTrunk`. `mask_token` has no use outside training."""
    hf, ours = "encoder.layer.{i}.", "model.blocks.{i}."
    first, second, third = RENAMED_ATTENTION if renamed else PUBLISHED_ATTENTION
    output = "attention.o_proj" if renamed else "attention.output.dense"
    swiglu = bool(options.get("swiglu"))
    mlp = [("weights_in", "fc1"), ("weights_out", "fc2")] if swiglu else [("fc1", "fc1"), ("fc2", "fc2")]
    mlp_rules = [rule for source, target in mlp for rule in layer(f"{hf}mlp.{source}", f"{ours}mlp.{target}")]
    if swiglu and renamed:
        parts = (f"{hf}mlp.gate_proj.", f"{hf}mlp.up_proj.")
        mlp_rules = [
            *(Rule(tuple(p + kind for p in parts), (f"{ours}mlp.fc1.{kind}",), (1, 1), (2,)) for kind in KINDS),
            *layer(f"{hf}mlp.down_proj", f"{ours}mlp.fc2"),
        ]
    block = [
        *layer(f"{hf}norm1", f"{ours}norm1"),
        *merged((hf + first, hf + second, hf + third), f"{ours}attn.qkv.weight", f"{ours}attn.qkv.bias"),
        *layer(f"{hf}{output}", f"{ours}attn.proj"),
        same(f"{hf}layer_scale1.lambda1", f"{ours}ls1.gamma"),
        *layer(f"{hf}norm2", f"{ours}norm2"),
        *mlp_rules,
        same(f"{hf}layer_scale2.lambda1", f"{ours}ls2.gamma"),
    ]
    return [
        same("embeddings.cls_token", "model.cls_token"),
        same("embeddings.position_embeddings", "model.pos_embed"),
        *layer("embeddings.patch_embeddings.projection", "model.patch_embed.proj"),
        *for_blocks(block, int(options["num_layers"])),
        *layer("layernorm", "model.norm"),
    ]
