"""Puts models together: a backbone with weights from where people keep them, an adapter, a BERT.

The counterpart of model_directory.py, which reads what is written here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from edje_pipeline.errors import ConfigError, ModelError
from edje_pipeline.models.adapter import create_adapter
from edje_pipeline.models.backbone import (
    Backbone,
    create_backbone,
    describe,
    load_library_tensors,
    load_weights,
    parse_source,
)
from edje_pipeline.models.bert_weights import load_hf_bert
from edje_pipeline.models.checkpoint import ModelDirectory, save_model
from edje_pipeline.models.dinov2_onnx import load_dinov2_onnx
from edje_pipeline.models.families import DINOV2
from edje_pipeline.models.hf_weights.directory import read_hf_model
from edje_pipeline.models.hub import HUB_ID, parse_hub_id, snapshot
from edje_pipeline.models.spec import AdapterSpec, ModelSpec
from edje_pipeline.models.tensor_files import read_tensors
from edje_pipeline.models.text_sources import sentence_text_tower, text_tower_from_hf, text_tower_from_open_clip
from edje_pipeline.models.text_tower import TextTower
from edje_pipeline.models.tokenizer import Tokenizer

PRETRAINED = "pretrained"
RANDOM_PREFIX = "random:"
HUB_FILES = ("*.json", "*.safetensors", "*.txt")


@dataclass(frozen=True)
class BackboneSource:
    """Where a backbone and its text tower come from."""

    source: str
    """`timm:NAME`, `open_clip:ARCH[/PRETRAINED]`, `hf:DIRECTORY_OR_ID[@REVISION]`, `dinov2-onnx:FILE`."""
    weights: str = PRETRAINED
    """`pretrained` (downloaded by the library), `random:SEED`, or a weights file."""
    options: dict[str, Any] | None = None
    """See `describe`."""
    text_tower: bool = True
    """Take the text tower along where the source has one."""
    text_tokenizer: Path | None = None
    """tokenizer.json of the text tower, where it does not come with the weights."""


@dataclass(frozen=True)
class LoadedBackbone:
    """A backbone with its weights."""

    backbone: Backbone
    text_tower: TextTower | None


def load_backbone(wanted: BackboneSource) -> LoadedBackbone:
    """Builds a backbone and reads its weights.

    Raises:
        ConfigError: an unknown source or option. ModelError: weights that cannot be had or do not fit.
    """
    kind, name, inline = parse_source(wanted.source)
    options = {**inline, **(wanted.options or {})}
    if kind == "dinov2-onnx":
        return LoadedBackbone(load_dinov2_onnx(Path(name), **options), None)
    if kind == "hf":
        return _from_hf(name, options, wanted)
    spec, preprocess = describe(f"{kind}:{name}", **options)
    if wanted.weights.startswith(RANDOM_PREFIX):
        seed = wanted.weights.removeprefix(RANDOM_PREFIX)
        if not seed.isdigit():
            raise ConfigError(f"weights {wanted.weights!r} is not random:SEED with a number")
        with torch.random.fork_rng():
            torch.manual_seed(int(seed))
            return LoadedBackbone(create_backbone(replace(spec, revision=wanted.weights), None, preprocess), None)
    backbone = create_backbone(spec, None, preprocess)
    if kind == "open_clip":
        return _from_open_clip(backbone, name, wanted)
    if wanted.weights == PRETRAINED:
        load_library_tensors(backbone, _timm_pretrained(name), where=f"timm's weights of {name}")
    else:
        load_weights(backbone, Path(wanted.weights))
    return LoadedBackbone(backbone, None)


def _from_hf(name: str, options: dict[str, Any], wanted: BackboneSource) -> LoadedBackbone:
    directory, revision = Path(name), ""
    if not directory.is_dir() and HUB_ID.fullmatch(name):
        repo, asked = parse_hub_id(name)
        directory, revision = snapshot(repo, asked, patterns=HUB_FILES), name
    model = read_hf_model(directory)
    spec, preprocess = describe(f"hf:{model.family}", **{**model.options, **options})
    asked_size = options.get("image_size")
    preprocess = replace(model.preprocess, image_size=preprocess.image_size) if asked_size else model.preprocess
    backbone = create_backbone(replace(spec, revision=revision), None, preprocess)
    tensors = model.tensors()
    load_library_tensors(backbone, tensors, where=str(directory))
    has_text = wanted.text_tower and model.family != DINOV2.name and any(n.startswith("text_model.") for n in tensors)
    if not has_text:
        return LoadedBackbone(backbone, None)
    tokenizer = wanted.text_tokenizer or directory / "tokenizer.json"
    return LoadedBackbone(backbone, text_tower_from_hf(model.family, model.config, tensors, tokenizer))


def _from_open_clip(backbone: Backbone, name: str, wanted: BackboneSource) -> LoadedBackbone:
    import open_clip

    from edje_pipeline.models.open_clip_backbone import model_config, pretrained_config

    arch, _, tag = name.partition("/")
    path = Path(wanted.weights)
    if wanted.weights == PRETRAINED:
        if not tag:
            raise ConfigError(f"open_clip:{arch} names no weights; write open_clip:{arch}/TAG or give --weights FILE")
        try:
            path = Path(open_clip.download_pretrained(pretrained_config(arch, tag)))
        except (OSError, RuntimeError) as error:
            raise ModelError(f"the weights of open_clip:{name} could not be fetched: {error}") from error
    tensors = read_tensors(path)
    load_library_tensors(backbone, tensors, where=str(path))
    tower = None
    if wanted.text_tower:
        options = backbone.spec.options
        config = model_config(arch, options)
        tower = text_tower_from_open_clip(config, bool(options["quick_gelu"]), tensors, wanted.text_tokenizer)
    return LoadedBackbone(backbone, tower)


def _timm_pretrained(name: str) -> dict[str, Tensor]:
    import timm

    try:
        return dict(timm.create_model(name, pretrained=True, num_classes=0).state_dict())
    except (OSError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(
            f"timm could not fetch the weights of {name}: {reason}; give a file with --weights, or random:SEED"
        ) from error


@dataclass(frozen=True)
class ModelParts:
    """What `make_model` puts around a backbone."""

    joint_encoder: Path
    """A Hugging Face BERT directory (config.json, model.safetensors, tokenizer.json or vocab.txt)."""
    num_compressed_tokens: int | None = 64
    """M; None for the local adapter, which keeps every vision token."""
    adapter: Path | None = None
    """adapter.safetensors of another model; None starts with random weights."""
    adapter_mlp_dim: int = 8192
    sentence_encoder: Path | None = None
    """A BERT directory used as text tower of a backbone that has none."""
    joint_layers: int | None = None
    """Only the first so many layers of `joint_encoder`; None: all."""
    key_positions: bool = False
    """Learned positions in the keys of a compressed adapter; see `AdapterSpec`."""
    squash: bool = False
    """Squeeze the whole image into the backbone's square instead of its own resize and crop."""
    seed: int = 0


def make_model(directory: Path, name: str, source: BackboneSource, parts: ModelParts) -> ModelDirectory:
    """Assembles a model directory; what is not given is random and has to be trained.

    Raises:
        ModelError: parts that cannot be read or do not fit together.
    """
    loaded = load_backbone(source)
    backbone, text_tower = loaded.backbone, loaded.text_tower
    if parts.squash:
        backbone = squashed(backbone)
    if text_tower is None and parts.sentence_encoder is not None:
        text_tower = sentence_text_tower(parts.sentence_encoder)
        # Equal widths by chance are still two spaces: only a map leads from one to the other.
        if backbone.spec.options.get("embedding_map") != text_tower.spec.embedding_dim:
            backbone = with_embedding_map(backbone, text_tower.spec.embedding_dim, seed=parts.seed)
    tokenizer = bert_tokenizer(parts.joint_encoder)
    num_tokens = parts.num_compressed_tokens or backbone.spec.num_vision_tokens
    joint_spec, joint_tensors = load_hf_bert(
        parts.joint_encoder, vocab_size=tokenizer.vocab_size,
        max_positions=tokenizer.max_text_tokens + num_tokens, num_layers=parts.joint_layers, seed=parts.seed,
    )  # fmt: skip
    kind: Literal["compressed", "local"] = "local" if parts.num_compressed_tokens is None else "compressed"
    adapter_spec = AdapterSpec(
        kind, backbone.spec.width, joint_spec.width, num_tokens, backbone.spec.num_heads,
        parts.adapter_mlp_dim, backbone.spec.norm_eps,
        num_key_positions=backbone.spec.num_vision_tokens if parts.key_positions and kind == "compressed" else 0,
    )  # fmt: skip
    spec = ModelSpec(
        name, backbone.spec, backbone.preprocess, adapter_spec, joint_spec,
        text_tower.spec if text_tower is not None else None,
    )  # fmt: skip
    spec.validate()
    with torch.random.fork_rng():
        torch.manual_seed(parts.seed)
        adapter = parts.adapter if parts.adapter is not None else create_adapter(adapter_spec)
    return save_model(
        directory, spec, backbone=backbone, adapter=adapter, joint_encoder=joint_tensors, tokenizer=tokenizer,
        text_tower=text_tower, card=_card(spec, source, parts),
    )  # fmt: skip


def squashed(backbone: Backbone) -> Backbone:
    """The same backbone seeing the whole image: a centre crop cuts off what a drawing shows at its edges."""
    whole = replace(backbone.preprocess, resize_mode="squash", crop_pct=1.0)
    twin = Backbone(backbone.spec, whole, backbone.trunk)
    twin.embedding_map = backbone.embedding_map
    return twin


def with_embedding_map(backbone: Backbone, embedding_dim: int, *, seed: int = 0) -> Backbone:
    """The same backbone with a fresh linear map behind its pooled vector, to be fitted to a text tower's space."""
    options = {**backbone.spec.options, "embedding_map": embedding_dim}
    if not options.get("pooled_dim"):
        raise ModelError(f"backbone {backbone.spec.source} has no embedding that could be mapped to {embedding_dim}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Backbone(
            replace(backbone.spec, options=options, embedding_dim=embedding_dim), backbone.preprocess, backbone.trunk
        )


def bert_tokenizer(path: Path) -> Tokenizer:
    """From a BERT directory (tokenizer.json, else vocab.txt), a tokenizer.json, or a vocab.txt."""
    if path.is_dir():
        path = next(
            (path / n for n in ("tokenizer.json", "vocab.txt") if (path / n).is_file()), path / "tokenizer.json"
        )
    return Tokenizer.from_vocab(path) if path.suffix == ".txt" else Tokenizer.from_file(path)


def _card(spec: ModelSpec, source: BackboneSource, parts: ModelParts) -> str:
    adapter = "random weights: train it before use" if parts.adapter is None else f"from {parts.adapter.name}"
    tower = "none" if spec.text_tower is None else spec.text_tower.kind
    has_map = "embedding_map" in spec.backbone.options and parts.sentence_encoder is not None
    note = "\nThe map from the backbone's pooled vector into the text tower's space is random too.\n" if has_map else ""
    return (
        f"# {spec.name}\n\n"
        f"- Backbone: {source.source} (weights: {Path(source.weights).name}), {spec.backbone.num_vision_tokens} tokens "
        f"of width {spec.backbone.width}\n"
        f"- Adapter: {spec.adapter.kind}, {spec.adapter.num_compressed_tokens} tokens; {adapter}\n"
        f"- Joint encoder: BERT from {parts.joint_encoder.name}, {spec.joint_encoder.num_layers} layers of width "
        f"{spec.joint_encoder.width}; its scoring head is random\n"
        f"- Text tower: {tower}\n{note}"
    )
