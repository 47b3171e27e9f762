"""Names and shapes of every tensor of the adapter and the joint encoder, from their specs alone.

What lets the driver find a mismatch in milliseconds from file headers, without torch. A test holds
it equal to the modules' own state dicts.
"""

from __future__ import annotations

from edje_pipeline.models.spec import AdapterSpec, JointEncoderSpec

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, output_dim: int, input_dim: int) -> Shapes:
    return {f"{name}.weight": (output_dim, input_dim), f"{name}.bias": (output_dim,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def adapter_shapes(spec: AdapterSpec) -> Shapes:
    """Tensors of `create_adapter(spec)`."""
    width = spec.input_dim
    if spec.kind == "local":
        return _linear("mlp.fc1", spec.mlp_dim, width) | _linear("mlp.fc2", spec.output_dim, spec.mlp_dim)
    positions: Shapes = {"key_positions": (1, spec.num_key_positions, width)} if spec.num_key_positions else {}
    return positions | {
        "query": (1, spec.num_compressed_tokens, width),
        **_linear("key", width, width),
        **_linear("value", width, width),
        "attention.in_proj_weight": (3 * width, width),
        "attention.in_proj_bias": (3 * width,),
        **_linear("attention.out_proj", width, width),
        **_norm("layernorm", width),
        **_linear("mlp.fc1", spec.mlp_dim, width),
        **_linear("mlp.fc2", width, spec.mlp_dim),
        **_linear("projection", spec.output_dim, width),
    }


def joint_encoder_shapes(spec: JointEncoderSpec) -> Shapes:
    """Tensors of `JointEncoder(spec)`."""
    width = spec.width
    shapes: Shapes = {
        "word_embeddings.weight": (spec.vocab_size, width),
        "position_embeddings.weight": (spec.max_positions, width),
        "type_embeddings.weight": (2, width),
        **_norm("embedding_norm", width),
    }
    for number in range(spec.num_layers):
        prefix = f"layers.{number}"
        shapes |= _linear(f"{prefix}.qkv", 3 * width, width) | _linear(f"{prefix}.attention_output", width, width)
        shapes |= _norm(f"{prefix}.attention_norm", width) | _linear(f"{prefix}.mlp_in", spec.mlp_dim, width)
        shapes |= _linear(f"{prefix}.mlp_out", width, spec.mlp_dim) | _norm(f"{prefix}.mlp_norm", width)
    return shapes | _linear("pooler.dense", width, width) | _linear("classifier", 1, width)
