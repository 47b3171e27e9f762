"""BERT weights between Hugging Face's names and ours, and from any Hugging Face BERT directory.

Only safetensors and JSON are read. Hugging Face keeps query, key and value apart; here they are one matrix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edje_pipeline.errors import ModelError, ModelNotFoundError, ShapeMismatchError
from edje_pipeline.models.spec import JointEncoderSpec

EMBEDDING_NAMES = {
    "embeddings.word_embeddings.weight": "word_embeddings.weight",
    "embeddings.position_embeddings.weight": "position_embeddings.weight",
    "embeddings.token_type_embeddings.weight": "type_embeddings.weight",
    "embeddings.LayerNorm.weight": "embedding_norm.weight",
    "embeddings.LayerNorm.bias": "embedding_norm.bias",
}
LAYER_MODULES = {
    "attention.output.dense": "attention_output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp_in",
    "output.dense": "mlp_out",
    "output.LayerNorm": "mlp_norm",
}
QKV_MODULES = ("attention.self.query", "attention.self.key", "attention.self.value")
HEAD_NAMES = ("pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias")
MAX_LISTED = 20
MAX_JSON_BYTES = 16 << 20


def from_hf_names(
    tensors: Mapping[str, Tensor], num_layers: int, *, where: str = "the BERT weights"
) -> dict[str, Tensor]:
    """Encoder weights under `embeddings.*` and `encoder.layer.*` -> our names, without pooler and classifier.

    Raises:
        ModelError: some are missing; lists them all.
    """
    wanted = [*EMBEDDING_NAMES]
    for number in range(num_layers):
        wanted += [
            f"encoder.layer.{number}.{module}.{kind}"
            for module in (*QKV_MODULES, *LAYER_MODULES)
            for kind in ("weight", "bias")
        ]
    missing = [name for name in wanted if name not in tensors]
    if missing:
        more = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        raise ModelError(
            f"{where}: {len(missing)} of {len(wanted)} BERT tensors are missing: "
            f"{', '.join(missing[:MAX_LISTED])}{more}"
        )
    ours = {own: tensors[theirs] for theirs, own in EMBEDDING_NAMES.items()}
    for number in range(num_layers):
        source, target = f"encoder.layer.{number}", f"layers.{number}"
        for kind in ("weight", "bias"):
            parts = [tensors[f"{source}.{module}.{kind}"] for module in QKV_MODULES]
            ours[f"{target}.qkv.{kind}"] = torch.cat(parts)
            for theirs, own in LAYER_MODULES.items():
                ours[f"{target}.{own}.{kind}"] = tensors[f"{source}.{theirs}.{kind}"]
    return ours


def to_hf_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_hf_names`; pooler and classifier are left out."""
    theirs = {name: tensors[own] for name, own in EMBEDDING_NAMES.items()}
    number = 0
    while f"layers.{number}.qkv.weight" in tensors:
        source, target = f"layers.{number}", f"encoder.layer.{number}"
        for kind in ("weight", "bias"):
            for module, part in zip(QKV_MODULES, tensors[f"{source}.qkv.{kind}"].chunk(3), strict=True):
                theirs[f"{target}.{module}.{kind}"] = part.contiguous()
            for name, own in LAYER_MODULES.items():
                theirs[f"{target}.{name}.{kind}"] = tensors[f"{source}.{own}.{kind}"]
        number += 1
    return theirs


def extend_rows(table: Tensor, num_rows: int) -> Tensor:
    """A longer position table: the last row is repeated, as the authors do."""
    if num_rows <= len(table):
        return table
    return torch.cat([table, table[-1:].expand(num_rows - len(table), -1)]).contiguous()


def layer_number(name: str) -> int:
    """Which layer a tensor of transformers' BERT belongs to, from 0; -1 for the rest."""
    parts = name.split(".")
    return int(parts[parts.index("layer") + 1]) if "layer" in parts[:-1] else -1


def load_hf_bert(
    directory: str | Path,
    *,
    vocab_size: int | None = None,
    max_positions: int | None = None,
    num_layers: int | None = None,
    seed: int = 0,
) -> tuple[JointEncoderSpec, dict[str, Tensor]]:
    """Reads a Hugging Face BERT directory as the start of a joint encoder, in float32.

    Args:
        directory: with config.json and model.safetensors (one file, or an index and its parts). The
            weights may stand under `bert.` or bare.
        vocab_size: rows wanted in the word table, usually the vocabulary plus `<image>`; new rows are
            the mean of the old ones. None: one more than the table has.
        max_positions: wanted at least, text and image tokens together; see `extend_rows`.
        num_layers: only the first so many; None: all.
        seed: for the classifier, which BERT has not, and for the pooler where it is absent.

    Returns:
        The spec and every tensor of a `JointEncoder` of it.

    Raises:
        ModelError: not a BERT, weights missing or misshapen, or fewer layers than wanted.
    """
    directory = Path(directory)
    config = read_bert_config(directory)
    if num_layers is not None:
        there = int(config.get("num_hidden_layers", 0))
        if not 1 <= num_layers <= there:
            raise ModelError(f"{directory} has {there} layers, {num_layers} were asked for")
        config = {**config, "num_hidden_layers": num_layers}
    spec = spec_from_hf_config(config, where=str(directory / "config.json"))
    raw = {_plain_name(name): tensor.float() for name, tensor in _read_all(directory).items()}
    if num_layers is not None:
        raw = {name: tensor for name, tensor in raw.items() if layer_number(name) < num_layers}
    tensors = from_hf_names(raw, spec.num_layers, where=str(directory))
    words = tensors["word_embeddings.weight"]
    rows = len(words) + 1 if vocab_size is None else vocab_size
    if rows < len(words):
        raise ModelError(f"{directory}: the word table has {len(words)} rows, the tokenizer only {rows}; not a pair")
    tensors["word_embeddings.weight"] = torch.cat([words, words.mean(0, keepdim=True).expand(rows - len(words), -1)])
    positions = extend_rows(tensors["position_embeddings.weight"], max_positions or 0)
    tensors["position_embeddings.weight"] = positions
    generator = torch.Generator().manual_seed(seed)
    for name, shape in (("pooler.dense.weight", (spec.width, spec.width)), ("classifier.weight", (1, spec.width))):
        found = raw.get(name) if name.startswith("pooler.") else None
        tensors[name] = torch.randn(shape, generator=generator) * 0.02 if found is None else found
    has_pooler = "pooler.dense.weight" in raw and "pooler.dense.bias" in raw
    tensors["pooler.dense.bias"] = raw["pooler.dense.bias"] if has_pooler else torch.zeros(spec.width)
    tensors["classifier.bias"] = torch.zeros(1)
    spec = JointEncoderSpec(
        width=spec.width, num_layers=spec.num_layers, num_heads=spec.num_heads, mlp_dim=spec.mlp_dim,
        vocab_size=rows, max_positions=len(positions), norm_eps=spec.norm_eps,
    )  # fmt: skip
    _check_shapes(tensors, spec, directory)
    return spec, {name: tensor.contiguous() for name, tensor in tensors.items()}


def read_bert_config(directory: Path) -> dict[str, Any]:
    """The directory's config.json as a dict."""
    path = directory / "config.json"
    if not path.is_file():
        raise ModelNotFoundError(f"no config.json in {directory}; expected a Hugging Face BERT directory")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ModelError(f"{path} has {path.stat().st_size:,} bytes; that is no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}, expected an object")
    return config


def spec_from_hf_config(config: Mapping[str, Any], *, where: str = "config.json") -> JointEncoderSpec:
    """Sizes of a BERT from its config.

    Raises:
        ModelError: another kind of model, or a setting that this encoder does not compute; lists all.
    """
    required = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "type_vocab_size": 2}
    problems = [
        f"{key} is {config.get(key, value)!r}, expected {value!r}"
        for key, value in required.items()
        if config.get(key, value) != value
    ]
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
             "max_position_embeddings")  # fmt: skip
    problems += [
        f"{key} is {config.get(key)!r}, expected a positive integer"
        for key in sizes
        if not isinstance(config.get(key), int) or config[key] < 1
    ]
    if problems:
        raise ModelError(f"{where} does not describe a BERT encoder: {'; '.join(problems)}")
    return JointEncoderSpec(
        width=config["hidden_size"], num_layers=config["num_hidden_layers"], num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"], vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"], norm_eps=float(config.get("layer_norm_eps", 1e-12)),
    )  # fmt: skip


def _plain_name(name: str) -> str:
    """Without `bert.`; the norm's weights were once called gamma and beta."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _read_all(directory: Path) -> dict[str, Tensor]:
    from edje_pipeline.models.tensor_files import read_tensors

    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return read_tensors(single)
    if not index.is_file():
        raise ModelNotFoundError(
            f"no model.safetensors in {directory}; a pytorch_model.bin can run code when it is read, "
            "convert it to safetensors first"
        )
    names = sorted(set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()))
    if any(Path(name).name != name for name in names):
        raise ModelError(f"{index} names files outside its directory; refused")
    merged: dict[str, Tensor] = {}
    for name in names:
        merged.update(read_tensors(directory / name))
    return merged


def _check_shapes(tensors: Mapping[str, Tensor], spec: JointEncoderSpec, directory: Path) -> None:
    from edje_pipeline.models.layout import joint_encoder_shapes

    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in joint_encoder_shapes(spec).items()
        if tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise ShapeMismatchError(f"{directory}: config.json and weights differ: " + "; ".join(wrong[:MAX_LISTED]))
