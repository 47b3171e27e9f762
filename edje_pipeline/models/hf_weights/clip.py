"""CLIP (`CLIPModel`: OpenAI, DFN, MetaCLIP): Hugging Face names onto timm and open_clip modules."""

from __future__ import annotations

from typing import Any

from edje_pipeline.models.hf_weights.rules import Rule, layer, same
from edje_pipeline.models.hf_weights.siglip import open_clip_blocks, timm_blocks

FIRST_EOS_ID = 2
"""`eos_token_id` of configurations written before the id was fixed; there the end of text is the highest id."""


def vision_rules(options: dict[str, Any]) -> list[Rule]:
    """Names inside `vision_model.` (and `visual_projection` beside it) -> names of `HfTrunk`."""
    return [
        same("embeddings.class_embedding", "model.cls_token", lead=2),
        same("embeddings.patch_embedding.weight", "model.patch_embed.proj.weight"),
        same("embeddings.position_embedding.weight", "model.pos_embed", lead=1),
        *layer("pre_layrnorm", "model.norm_pre"),
        *timm_blocks(int(options["num_layers"])),
        *layer("post_layernorm", "model.norm"),
        same("visual_projection.weight", "projection.weight"),
    ]


def text_rules(num_layers: int) -> list[Rule]:
    """Names inside `text_model.` (and `text_projection` beside it) -> names of open_clip's TextTransformer."""
    return [
        same("embeddings.token_embedding.weight", "token_embedding.weight"),
        same("embeddings.position_embedding.weight", "positional_embedding"),
        *open_clip_blocks(num_layers),
        *layer("final_layer_norm", "ln_final"),
        same("text_projection.weight", "text_projection", transpose=True),
    ]


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """`text_config` of a Hugging Face config.json -> open_clip's text tower arguments."""
    width = int(config.get("hidden_size", 512))
    eos_id = int(config.get("eos_token_id", 49407))
    pooling = {"pool_type": "argmax"} if eos_id == FIRST_EOS_ID else {"pool_type": "eos", "eos_id": eos_id}
    return {
        "context_length": int(config.get("max_position_embeddings", 77)),
        "vocab_size": int(config.get("vocab_size", 49408)),
        "width": width,
        "heads": int(config.get("num_attention_heads", 8)),
        "layers": int(config.get("num_hidden_layers", 12)),
        "mlp_ratio": (int(config.get("intermediate_size", 2048)) + 0.5) / width,
        "norm_kwargs": {"eps": float(config.get("layer_norm_eps", 1e-5))},
        **pooling,
    }
