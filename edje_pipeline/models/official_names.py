"""Names and shapes in the checkpoint of the authors' training program, and what its tensors say about sizes.

    vision_encoder.*                    SigLIP's vision tower (SiglipVisionModel)
    vision_projection.*                 the token adapter, compressed or local
    language_model.bert.*               the joint encoder
    language_model.cls.predictions.*    masked language modelling head       training only
    classification_head.0.dense.*, .1.* pooler and logit
    text_projection.*                   text-embedding recovery head         training only
    clip.*                              the whole SiglipModel, frozen        first stage only

(Facts from the authors' `pretrain_model.py`, `token_compression.py` and `train.py`.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from edje_pipeline.errors import ModelError
from edje_pipeline.models.bert_weights import to_hf_names as bert_to_hf_names
from edje_pipeline.models.families import SIGLIP
from edje_pipeline.models.hf_weights.rules import convert, inverted
from edje_pipeline.models.hf_weights.trunk import HfTrunk, to_hf_names
from edje_pipeline.models.layout import adapter_shapes, joint_encoder_shapes
from edje_pipeline.models.spec import AdapterSpec, JointEncoderSpec, TextTowerSpec
from edje_pipeline.models.text_sources import hf_text_rules
from edje_pipeline.models.text_tower import ContrastiveTextTower

BERT, MLM = "language_model.bert.", "language_model.cls.predictions."
ADAPTER, POOLER, LOGIT = "vision_projection.", "classification_head.0.dense.", "classification_head.1."
RECOVERY, CLIP_MODEL = "text_projection.", "clip."
VISION_PREFIXES = ("vision_encoder.vision_model.", "vision_encoder.")
"""As transformers 4 and 5 write it."""

WORDS = f"{BERT}embeddings.word_embeddings.weight"
POSITIONS = f"{BERT}embeddings.position_embeddings.weight"
TIED_WORDS = f"{MLM}decoder.weight"
LATENTS, LOCAL_FIRST = f"{ADAPTER}query", f"{ADAPTER}0.weight"
IGNORED_ENDINGS = (".position_ids",)
"""Constant buffers that old versions of transformers stored."""

LOCAL_NAMES = {"mlp.fc1": "0", "mlp.fc2": "2"}
"""Our names of the local adapter -> places in the authors' Sequential."""

SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}
"""Width -> attention heads of the published SigLIP towers; weights do not show it."""

BERT_HEADS = {384: 12, 768: 12, 1024: 16}
"""Width -> attention heads of the published BERT and MiniLM models."""


def without_prefix(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Finds the common prefix (`module.`, `model.`, ...) by the joint encoder's word table and takes it off.

    Raises:
        ModelError: there is no such tensor, or some names lack the prefix.
    """
    ends = [name for name in tensors if name.endswith(WORDS)]
    if len(ends) != 1:
        raise ModelError(
            f"expected one tensor named {WORDS} (any prefix), found {len(ends)}; this is not a checkpoint of the "
            f"authors' training program (its names start with {', '.join(sorted(tensors)[:3])} ...)"
        )
    prefix = ends[0].removesuffix(WORDS)
    outside = sorted(name for name in tensors if not name.startswith(prefix))
    if outside:
        raise ModelError(f"{len(outside)} names lack the common prefix {prefix!r}: {', '.join(outside[:20])}")
    stripped = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return prefix, {name: t for name, t in stripped.items() if not name.endswith(IGNORED_ENDINGS)}


def heads_of(width: int, table: Mapping[int, int], given: int | None, part: str, option: str) -> int:
    """Number of attention heads: as given, else of the published model of that width."""
    heads = given or table.get(width)
    if not heads or width % heads:
        raise ModelError(
            f"the number of attention heads of the {part} (width {width}) is not in its weights"
            f"{f', and {heads} does not divide the width' if heads else ''}; give {option}"
        )
    return heads


def joint_encoder_spec(tensors: Mapping[str, Tensor], num_heads: int | None) -> JointEncoderSpec:
    """Sizes of the BERT."""
    rows, width = tensors[WORDS].shape
    layers = count_layers(tensors, f"{BERT}encoder.layer.")
    first = tensors.get(f"{BERT}encoder.layer.0.intermediate.dense.weight")
    positions = tensors.get(POSITIONS)
    return JointEncoderSpec(
        width=int(width), num_layers=layers,
        num_heads=heads_of(int(width), BERT_HEADS, num_heads, "joint encoder", "--joint-heads"),
        mlp_dim=int(first.shape[0]) if first is not None else 4 * int(width), vocab_size=int(rows),
        max_positions=int(positions.shape[0]) if positions is not None else 512,
    )  # fmt: skip


def adapter_spec(tensors: Mapping[str, Tensor], output_dim: int, num_tokens: int, num_heads: int) -> AdapterSpec:
    """Sizes of the adapter; its kind from the names that are there.

    Raises:
        ModelError: neither kind's first tensor is there.
    """
    latents, first = tensors.get(LATENTS), tensors.get(LOCAL_FIRST)
    if latents is not None and latents.ndim == 3:
        hidden = tensors.get(f"{ADAPTER}mlp.fc1.weight")
        mlp_dim = int(hidden.shape[0]) if hidden is not None else 8192
        return AdapterSpec(
            "compressed", int(latents.shape[2]), output_dim, int(latents.shape[1]), num_heads, mlp_dim, SIGLIP.norm_eps
        )
    if first is not None:
        mlp_dim, width = (int(size) for size in first.shape)
        return AdapterSpec("local", width, output_dim, num_tokens, num_heads, mlp_dim, SIGLIP.norm_eps)
    raise ModelError(
        f"expected {LATENTS} (1, M, D) of a compressed adapter or {LOCAL_FIRST} of a local one; found neither"
    )


def count_layers(tensors: Iterable[str], prefix: str) -> int:
    """Number of different layer indices behind a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def vision_prefix(tensors: Iterable[str]) -> str | None:
    """Which of VISION_PREFIXES the checkpoint uses; None when it holds no vision tower."""
    names = [name for name in tensors if name.startswith("vision_encoder.")]
    return next((p for p in VISION_PREFIXES if any(name.startswith(p) for name in names)), None)


def vision_options(tensors: Mapping[str, Tensor], prefix: str, num_heads: int | None) -> dict[str, Any]:
    """Trunk options of the SigLIP tower.

    Raises:
        ModelError: tensors that show the sizes are missing; names them.
    """
    wanted = {
        "patch": f"{prefix}embeddings.patch_embedding.weight",
        "positions": f"{prefix}embeddings.position_embedding.weight",
        "mlp": f"{prefix}encoder.layers.0.mlp.fc1.weight",
    }
    missing = [name for name in wanted.values() if name not in tensors]
    if missing:
        raise ModelError(f"the vision tower's sizes cannot be read, missing: {', '.join(missing)}")
    patch, positions, mlp = (tensors[name] for name in wanted.values())
    width, patch_size = int(patch.shape[0]), int(patch.shape[-1])
    return {
        "image_size": round(len(positions) ** 0.5) * patch_size,
        "patch_size": patch_size,
        "width": width,
        "num_layers": count_layers(tensors, f"{prefix}encoder.layers."),
        "num_heads": heads_of(width, SIGLIP_HEADS, num_heads, "vision tower", "--vision-heads"),
        "mlp_dim": int(mlp.shape[0]),
        "activation": "gelu_pytorch_tanh",
        "norm_eps": SIGLIP.norm_eps,
    }


def adapter_name(own: str) -> str:
    """Our name of an adapter's tensor -> the authors', for the local adapter; the compressed one has theirs."""
    module, _, kind = own.rpartition(".")
    return f"{LOCAL_NAMES[module]}.{kind}"


def adapter_to_official(spec: AdapterSpec, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Adapter tensors (or shapes) under the authors' names."""
    return {ADAPTER + (adapter_name(name) if spec.kind == "local" else name): value for name, value in tensors.items()}


def joint_to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joint encoder tensors under the authors' names."""
    named = {BERT + name: tensor for name, tensor in bert_to_hf_names(tensors).items()}
    for kind in ("weight", "bias"):
        named[POOLER + kind] = tensors[f"pooler.dense.{kind}"]
        named[LOGIT + kind] = tensors[f"classifier.{kind}"]
    return named


def expected_shapes(joint: JointEncoderSpec, adapter: AdapterSpec) -> dict[str, torch.Size]:
    """What every checkpoint must hold."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in joint_encoder_shapes(joint).items()}
    shapes = {name: tensor.shape for name, tensor in joint_to_official(empty).items()}
    adapter_official = adapter_to_official(adapter, adapter_shapes(adapter))
    return shapes | {name: torch.Size(shape) for name, shape in adapter_official.items()}


def training_shapes(joint: JointEncoderSpec, embedding_dim: int) -> dict[str, torch.Size]:
    """The heads that only training uses. Weight and bias of the decoder are tied to others and may be left out."""
    width = joint.width
    return {
        f"{MLM}bias": torch.Size([joint.vocab_size]),
        f"{MLM}transform.dense.weight": torch.Size([width, width]),
        f"{MLM}transform.dense.bias": torch.Size([width]),
        f"{MLM}transform.LayerNorm.weight": torch.Size([width]),
        f"{MLM}transform.LayerNorm.bias": torch.Size([width]),
        TIED_WORDS: torch.Size([joint.vocab_size, width]),
        f"{MLM}decoder.bias": torch.Size([joint.vocab_size]),
        f"{RECOVERY}weight": torch.Size([embedding_dim, width]),
        f"{RECOVERY}bias": torch.Size([embedding_dim]),
    }


def vision_shapes(options: dict[str, Any], prefix: str) -> dict[str, torch.Size]:
    """Every tensor of the SigLIP tower."""
    with torch.device("meta"):
        trunk = HfTrunk(SIGLIP.name, options)
    return {prefix + name: tensor.shape for name, tensor in to_hf_names(trunk).items()}


def text_shapes(spec: TextTowerSpec, prefix: str) -> dict[str, torch.Size]:
    """Every tensor of the SigLIP text tower."""
    with torch.device("meta"):
        tower = ContrastiveTextTower(
            TextTowerSpec(spec.kind, spec.embedding_dim, {**spec.options, "tokenizer": ""}), b""
        )
    return {prefix + name: tensor.shape for name, tensor in text_to_hf(tower.state_dict(), spec).items()}


def text_to_hf(state: Mapping[str, Tensor], spec: TextTowerSpec) -> dict[str, Tensor]:
    """A text tower's weights under the names inside `text_model.`."""
    inside = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    rules = hf_text_rules(SIGLIP.name, int(spec.options["text_cfg"]["layers"]))
    return convert(inverted(rules), inside).tensors
