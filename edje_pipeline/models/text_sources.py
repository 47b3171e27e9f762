"""Where text towers come from: SiglipModel and CLIPModel directories, open_clip state dicts, BERT directories."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from edje_pipeline.errors import ModelError, ModelNotFoundError
from edje_pipeline.models.bert_weights import load_hf_bert
from edje_pipeline.models.families import CLIP, SIGLIP
from edje_pipeline.models.hf_weights import clip, siglip
from edje_pipeline.models.hf_weights.directory import CLIP_PROJECTION_DIM, read_json
from edje_pipeline.models.hf_weights.rules import Rule, convert
from edje_pipeline.models.hf_weights.trunk import IGNORED_KEYS
from edje_pipeline.models.spec import TextTowerSpec
from edje_pipeline.models.tensor_files import load_exactly
from edje_pipeline.models.text_tower import TOKENIZER_CLIP, TOKENIZER_KEY, TextTower, create_text_tower

TEXT_PREFIX = "text_model."
PADDING_WORDS = ("<pad>", "[PAD]", "</s>", "<|endoftext|>")
"""Looked for in this order when no tokenizer_config.json names the padding token."""

OPEN_CLIP_TEXT_NAMES = ("positional_embedding", "text_projection", "token_embedding.", "transformer.", "ln_final.")
"""Text tensors of open_clip models that keep them beside the vision tower's, not under `text.`."""


def pad_id_of(tokenizer_path: Path) -> int:
    """The padding id of a tokenizer.json, from the tokenizer_config.json beside it where there is one."""
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    config = tokenizer_path.with_name("tokenizer_config.json")
    words: list[str] = list(PADDING_WORDS)
    if config.is_file():
        declared = read_json(config).get("pad_token")
        words.insert(0, declared["content"] if isinstance(declared, dict) else str(declared))
    return next((int(i) for i in map(tokenizer.token_to_id, words) if i is not None), 0)


def hf_text_rules(family: str, num_layers: int) -> list[Rule]:
    """The table of a family, names inside `text_model.`."""
    return siglip.text_rules(num_layers) if family == SIGLIP.name else clip.text_rules(num_layers)


def hf_text_spec(family: str, config: dict[str, Any], pad_id: int) -> TextTowerSpec:
    """From the config.json of a SiglipModel or CLIPModel."""
    declared = dict(config.get("text_config", {}))
    if family == SIGLIP.name:
        text_cfg = siglip.text_config(declared)
        embedding_dim = int(declared.get("projection_size", text_cfg["width"]))
        quick_gelu = False
    else:
        text_cfg = clip.text_config(declared)
        embedding_dim = int(config.get("projection_dim", CLIP_PROJECTION_DIM))
        quick_gelu = declared.get("hidden_act", "quick_gelu") == "quick_gelu"
    options = {"family": family, "text_cfg": text_cfg, "quick_gelu": quick_gelu, "tokenizer": "file", "pad_id": pad_id}
    return TextTowerSpec("hf", embedding_dim, options)


def hf_text_tensors(family: str, tensors: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The text part of a Hugging Face state dict -> names of ContrastiveTextTower's model."""
    inside = {n[len(TEXT_PREFIX) :]: t for n, t in tensors.items() if n.startswith(TEXT_PREFIX)}
    if family == CLIP.name and "text_projection.weight" in tensors:
        inside["text_projection.weight"] = tensors["text_projection.weight"]
    inside = {name: tensor for name, tensor in inside.items() if name not in IGNORED_KEYS}
    done = convert(hf_text_rules(family, num_layers), inside)
    return {**done.tensors, **{f"(source) {name}": inside[name] for name in done.unused}}


def text_tower_from_hf(
    family: str, config: dict[str, Any], tensors: dict[str, Tensor], tokenizer_path: Path
) -> TextTower:
    """The text tower of a SiglipModel or CLIPModel.

    Raises:
        ModelNotFoundError: no tokenizer. ShapeMismatchError: the weights do not fit; lists every key.
    """
    if not tokenizer_path.is_file():
        raise ModelNotFoundError(f"no {tokenizer_path} for the text tower; it is part of the model on the Hub")
    spec = hf_text_spec(family, config, pad_id_of(tokenizer_path))
    tower = create_text_tower(spec, tokenizer_json=tokenizer_path.read_bytes())
    converted = hf_text_tensors(family, tensors, int(spec.options["text_cfg"]["layers"]))
    return _loaded(tower, converted, where=f"the text tower of {tokenizer_path.parent}")


def text_tower_from_open_clip(
    arch_config: dict[str, Any], quick_gelu: bool, tensors: dict[str, Tensor], tokenizer_path: Path | None
) -> TextTower:
    """The text tower of an open_clip model.

    Raises:
        ModelError: the tower is a Hugging Face encoder, or needs a tokenizer.json that was not given.
    """
    text_cfg = dict(arch_config["text_cfg"])
    if text_cfg.get("hf_model_name"):
        raise ModelError(
            f"text tower {text_cfg['hf_model_name']} of this open_clip model is not supported; leave it out"
        )
    options: dict[str, Any] = {"text_cfg": text_cfg, "quick_gelu": quick_gelu, "tokenizer": TOKENIZER_CLIP}
    content = b""
    if text_cfg.get("hf_tokenizer_name"):
        if tokenizer_path is None:
            raise ModelError(
                f"this open_clip model's text tower needs the tokenizer.json of {text_cfg['hf_tokenizer_name']}; "
                f"give its path with --text-tokenizer, or leave the text tower out with --no-text-tower"
            )
        clean = str(text_cfg.get("tokenizer_kwargs", {}).get("clean", "whitespace"))
        options |= {"tokenizer": "file", "pad_id": pad_id_of(tokenizer_path), "clean": clean}
        content = tokenizer_path.read_bytes()
    plain = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    text = {name[len("text.") :]: tensor for name, tensor in plain.items() if name.startswith("text.")}
    if not text:
        text = {name: tensor for name, tensor in plain.items() if name.startswith(OPEN_CLIP_TEXT_NAMES)}
    tower = create_text_tower(
        TextTowerSpec("open_clip", int(arch_config["embed_dim"]), options), tokenizer_json=content
    )
    return _loaded(tower, text, where="the text tower's weights")


def sentence_text_tower(bert_directory: Path, *, max_tokens: int = 256) -> TextTower:
    """A BERT sentence encoder (mean pooling) with its own tokenizer.json, e.g. all-MiniLM-L6-v2."""
    bert, tensors = load_hf_bert(bert_directory)
    tokenizer_path = bert_directory / "tokenizer.json"
    if not tokenizer_path.is_file():
        raise ModelNotFoundError(f"no tokenizer.json in {bert_directory}")
    options = {"bert": asdict(bert), "map": False, "max_tokens": min(max_tokens, bert.max_positions)}
    spec = TextTowerSpec("sentence_map", bert.width, options)
    tower = create_text_tower(spec, tokenizer_json=tokenizer_path.read_bytes())
    heads = ("pooler.", "classifier.")
    encoder = {name: tensor for name, tensor in tensors.items() if not name.startswith(heads)}
    return _loaded(tower, encoder, where=str(bert_directory))


def _loaded(tower: TextTower, tensors: dict[str, Tensor], *, where: str) -> TextTower:
    own = {f"model.{name}": tensor for name, tensor in tensors.items()}
    load_exactly(tower, {**own, TOKENIZER_KEY: tower.tokenizer_json}, where=where)
    return tower
