"""SigLIP and fixed-resolution SigLIP 2 (`SiglipModel`): Hugging Face names onto timm and open_clip modules."""

from __future__ import annotations

from typing import Any

from edje_pipeline.models.hf_weights.rules import Rule, for_blocks, layer, merged, same

HF_BLOCK = "encoder.layers.{i}."


def clip_style_block(
    hf_block: str, target: str, attention: str, mlp: tuple[str, str], norms: tuple[str, str]
) -> list[Rule]:
    """One pre-norm block as SigLIP and CLIP name it; `attention` is the target's template for the merged matrix."""
    heads = (f"{hf_block}self_attn.q_proj", f"{hf_block}self_attn.k_proj", f"{hf_block}self_attn.v_proj")
    out = attention.rpartition(".")[0]
    separator = "_" if attention.endswith("in_proj") else "."
    projection = "out_proj" if separator == "_" else "proj"
    return [
        *layer(f"{hf_block}layer_norm1", f"{target}{norms[0]}"),
        *merged(heads, f"{target}{attention}{separator}weight", f"{target}{attention}{separator}bias"),
        *layer(f"{hf_block}self_attn.out_proj", f"{target}{out}.{projection}"),
        *layer(f"{hf_block}layer_norm2", f"{target}{norms[1]}"),
        *layer(f"{hf_block}mlp.fc1", f"{target}{mlp[0]}"),
        *layer(f"{hf_block}mlp.fc2", f"{target}{mlp[1]}"),
    ]


def timm_blocks(num_blocks: int) -> list[Rule]:
    """All blocks of a vision tower, onto timm's VisionTransformer."""
    block = clip_style_block(HF_BLOCK, "model.blocks.{i}.", "attn.qkv", ("mlp.fc1", "mlp.fc2"), ("norm1", "norm2"))
    return for_blocks(block, num_blocks)


def open_clip_blocks(num_blocks: int) -> list[Rule]:
    """All blocks of a text tower, onto open_clip's TextTransformer."""
    target = "transformer.resblocks.{i}."
    block = clip_style_block(HF_BLOCK, target, "attn.in_proj", ("mlp.c_fc", "mlp.c_proj"), ("ln_1", "ln_2"))
    return for_blocks(block, num_blocks)


def vision_rules(options: dict[str, Any]) -> list[Rule]:
    """Names inside `vision_model.` -> names of `HfTrunk`."""
    pool = "model.attn_pool."
    return [
        *layer("embeddings.patch_embedding", "model.patch_embed.proj"),
        same("embeddings.position_embedding.weight", "model.pos_embed", lead=1),
        *timm_blocks(int(options["num_layers"])),
        *layer("post_layernorm", "model.norm"),
        same("head.probe", f"{pool}latent"),
        Rule(("head.attention.in_proj_weight",), (f"{pool}q.weight", f"{pool}kv.weight"), (3,), (1, 2)),
        Rule(("head.attention.in_proj_bias",), (f"{pool}q.bias", f"{pool}kv.bias"), (3,), (1, 2)),
        *layer("head.attention.out_proj", f"{pool}proj"),
        *layer("head.layernorm", f"{pool}norm"),
        *layer("head.mlp.fc1", f"{pool}mlp.fc1"),
        *layer("head.mlp.fc2", f"{pool}mlp.fc2"),
    ]


def text_rules(num_layers: int) -> list[Rule]:
    """Names inside `text_model.` -> names of open_clip's TextTransformer."""
    return [
        same("embeddings.token_embedding.weight", "token_embedding.weight"),
        same("embeddings.position_embedding.weight", "positional_embedding"),
        *open_clip_blocks(num_layers),
        *layer("final_layer_norm", "ln_final"),
        *layer("head", "text_projection"),
    ]


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """`text_config` of a Hugging Face config.json -> open_clip's text tower arguments."""
    width = int(config.get("hidden_size", 768))
    return {
        "context_length": int(config.get("max_position_embeddings", 64)),
        "vocab_size": int(config.get("vocab_size", 32000)),
        "width": width,
        "heads": int(config.get("num_attention_heads", 12)),
        "layers": int(config.get("num_hidden_layers", 12)),
        "mlp_ratio": (int(config.get("intermediate_size", 3072)) + 0.5) / width,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": float(config.get("layer_norm_eps", 1e-6))},
        "act_kwargs": {"approximate": "tanh"},
    }
