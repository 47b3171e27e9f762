"""Import of the authors' training checkpoint into a model directory, and export back to its names.

What scoring does not use (the heads of training, the frozen SigLIP copy) is kept in further files of the
model directory, so that an export gives every tensor back, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edje_pipeline.errors import ModelError, ShapeMismatchError
from edje_pipeline.models import official_names as names
from edje_pipeline.models.assemble import BackboneSource, LoadedBackbone, bert_tokenizer, load_backbone
from edje_pipeline.models.backbone import create_backbone, describe
from edje_pipeline.models.bert_weights import from_hf_names
from edje_pipeline.models.checkpoint import ModelDirectory, save_model
from edje_pipeline.models.families import SIGLIP
from edje_pipeline.models.hf_weights.trunk import to_hf_names
from edje_pipeline.models.model_directory import HEADS_FILE
from edje_pipeline.models.preprocess import Interpolation
from edje_pipeline.models.spec import BackboneSpec, JointEncoderSpec, ModelSpec, PreprocessSpec, TextTowerSpec
from edje_pipeline.models.tensor_files import SAFETENSORS_SUFFIX, key_problems, read_tensors, write_tensors
from edje_pipeline.models.text_sources import hf_text_spec, hf_text_tensors, pad_id_of
from edje_pipeline.models.text_tower import TOKENIZER_KEY

FROZEN_FILE = "official_clip.safetensors"
"""`clip.*` tensors that the backbone and the text tower of the directory do not already hold."""

RECORD_FILE = "official_names.json"
CLIP_VISION, CLIP_TEXT = f"{names.CLIP_MODEL}vision_model.", f"{names.CLIP_MODEL}text_model."
TEMPERATURE = (f"{names.CLIP_MODEL}logit_scale", f"{names.CLIP_MODEL}logit_bias")
SIGLIP2_VOCAB = 256000
"""Gemma's vocabulary: SigLIP 2's text tower has it, SigLIP's has 32,000 words."""


@dataclass(frozen=True)
class ImportOptions:
    """What a checkpoint cannot say of itself."""

    tokenizer: Path
    """The language model's tokenizer.json, vocab.txt, or the BERT directory that holds one."""
    name: str = "edje"
    backbone: BackboneSource | None = None
    """Where the vision tower comes from when the checkpoint holds none."""
    text_tokenizer: Path | None = None
    """SigLIP's tokenizer.json: without it the model gets no text tower."""
    joint_heads: int | None = None
    vision_heads: int | None = None
    interpolation: Interpolation | None = None
    """Of the image processor: None follows the text tower's vocabulary (SigLIP bicubic, SigLIP 2 bilinear)."""


def import_checkpoint(path: Path, directory: Path, options: ImportOptions) -> ModelDirectory:
    """Writes a complete model directory from the authors' checkpoint.

    Args:
        path: `torch.save` file with an entry `model`, or the tensors as safetensors; names may have a common prefix.
        directory: The model directory to write.
        options: What the checkpoint cannot say.

    Raises:
        ShapeMismatchError: unknown, missing or misshapen keys; lists all of them.
        ModelError: the file cannot be read, or holds no vision tower and none was given.
    """
    _, tensors = names.without_prefix(read_tensors(path))
    joint = names.joint_encoder_spec(tensors, options.joint_heads)
    prefix = names.vision_prefix(tensors)
    if prefix is not None:
        sizes = names.vision_options(tensors, prefix, options.vision_heads)
        spec, preprocess = describe(f"hf:{SIGLIP.name}", **sizes)
        preprocess = replace(preprocess, interpolation=options.interpolation or _interpolation(tensors))
        loaded = None
    elif options.backbone is not None:
        loaded = load_backbone(options.backbone)
        spec, preprocess = loaded.backbone.spec, loaded.backbone.preprocess
        sizes = {}
    else:
        raise ModelError(
            f"{path} holds no vision tower (vision_encoder.*); name one with --backbone, e.g. hf:DIRECTORY"
        )
    adapter = names.adapter_spec(tensors, joint.width, spec.num_vision_tokens, spec.num_heads)
    text_spec = _text_spec(tensors, options)
    embedding_dim = int(tensors[f"{names.RECOVERY}weight"].shape[0]) if f"{names.RECOVERY}weight" in tensors else 0
    _check(tensors, path, joint=joint, adapter=adapter, prefix=prefix, sizes=sizes, text=text_spec, width=embedding_dim)
    tokenizer = bert_tokenizer(options.tokenizer)
    if tokenizer.vocab_size != joint.vocab_size:
        raise ShapeMismatchError(
            f"{options.tokenizer} has {tokenizer.vocab_size} ids with <image>, the checkpoint's word table "
            f"{joint.vocab_size} rows; give the tokenizer that the checkpoint was trained with"
        )
    if loaded is None:
        trunk_tensors = _trunk_tensors(tensors, prefix or "", spec, preprocess)
        frozen = _frozen(tensors, prefix or "", has_text_tower=options.text_tokenizer is not None)
        text_state = _text_state(tensors, text_spec, options.text_tokenizer)
    else:
        trunk_tensors, frozen = loaded.backbone.state_dict(), _frozen(tensors, "", has_text_tower=False)
        text_spec, text_state = _given_text(loaded)
    if text_state is None:
        text_spec = None
    heads = {n: t for n, t in tensors.items() if n.startswith((names.MLM, names.RECOVERY))}
    extra: dict[str, Any] = {}
    if heads:
        if names.TIED_WORDS in heads and torch.equal(heads[names.TIED_WORDS], tensors[names.WORDS]):
            del heads[names.TIED_WORDS]
        extra[HEADS_FILE] = heads
    if frozen:
        extra[FROZEN_FILE] = frozen
    record = {"names": sorted(tensors), "vision_prefix": prefix}
    extra[RECORD_FILE] = (json.dumps(record, indent=1) + "\n").encode()
    model = ModelSpec(options.name, spec, preprocess, adapter, joint, text_spec)
    return save_model(
        directory, model, backbone=trunk_tensors, adapter=_adapter_tensors(tensors, adapter.kind),
        joint_encoder=_joint_tensors(tensors, joint), tokenizer=tokenizer, text_tower=text_state,
        card=_card(model, path), extra=extra,
    )  # fmt: skip


def export_checkpoint(model: ModelDirectory, path: Path) -> int:
    """Writes a model under the authors' names; returns the number of tensors.

    Args:
        model: Imported from their checkpoint, or trained here on a SigLIP backbone (`hf:siglip`).
        path: `.safetensors`, or anything else for a `torch.save` file with the entry `model`.

    Raises:
        ModelError: the backbone is no SigLIP with Hugging Face names, or the adapter has key positions.
    """
    spec = model.spec
    if spec.adapter.num_key_positions:
        raise ModelError(f"the adapter of {model.path} has key positions, for which the authors have no name")
    record = json.loads(model.file(RECORD_FILE).read_text()) if RECORD_FILE in model.files else {}
    joint = read_tensors(model.file("joint_encoder.safetensors"))
    available: dict[str, Tensor] = names.joint_to_official(joint)
    available |= names.adapter_to_official(spec.adapter, read_tensors(model.file("adapter.safetensors")))
    available[names.TIED_WORDS] = joint["word_embeddings.weight"]
    if spec.backbone.source == f"hf:{SIGLIP.name}":
        backbone = create_backbone(spec.backbone, None, spec.preprocess)
        state = read_tensors(model.file("backbone.safetensors"))
        vision = _as_stored(backbone.trunk, state)
        prefix = record.get("vision_prefix") or names.VISION_PREFIXES[0]
        available |= {prefix + name: tensor for name, tensor in vision.items()}
        available |= {CLIP_VISION + name: tensor for name, tensor in vision.items()}
    elif not record:
        raise ModelError(
            f"the backbone of {model.path} is {spec.backbone.source}; the authors' names exist for SigLIP only"
        )
    if spec.text_tower is not None and spec.text_tower.kind == "hf":
        state = read_tensors(model.file("text_tower.safetensors"))
        available |= {CLIP_TEXT + name: tensor for name, tensor in names.text_to_hf(state, spec.text_tower).items()}
    for extra in (HEADS_FILE, FROZEN_FILE):
        if extra in model.files:
            available |= model.load_tensors(extra)
    wanted = record.get("names", sorted(available))
    missing = [name for name in wanted if name not in available]
    if missing:
        raise ModelError(f"{model.path} was imported with tensors it no longer holds: {', '.join(missing[:20])}")
    exported = {name: available[name].contiguous() for name in wanted}
    if path.suffix == SAFETENSORS_SUFFIX:
        write_tensors(path, exported)
    else:
        torch.save({"model": exported}, path)
    return len(exported)


def _check(
    tensors: Mapping[str, Tensor], path: Path, *, joint: JointEncoderSpec, adapter: Any, prefix: str | None,
    sizes: dict[str, Any], text: TextTowerSpec | None, width: int,
) -> None:  # fmt: skip
    """Raises ShapeMismatchError with every unknown, missing and misshapen key."""
    expected = names.expected_shapes(joint, adapter)
    optional = names.training_shapes(joint, width)
    if prefix is not None:
        expected |= names.vision_shapes(sizes, prefix)
        if any(name.startswith(CLIP_VISION) for name in tensors):
            expected |= names.vision_shapes(sizes, CLIP_VISION)
    elif any(name.startswith(CLIP_VISION) for name in tensors):
        clip_sizes = names.vision_options(tensors, CLIP_VISION, None)
        expected |= names.vision_shapes(clip_sizes, CLIP_VISION)
    if text is not None:
        expected |= names.text_shapes(text, CLIP_TEXT)
    optional |= {name: tensors[name].shape for name in TEMPERATURE if name in tensors}
    expected |= {name: shape for name, shape in optional.items() if name in tensors}
    problems = key_problems(tensors, expected, ignore=frozenset())
    if problems:
        raise ShapeMismatchError(f"{path} is not a checkpoint of the authors' model: " + "; ".join(problems))


def _interpolation(tensors: Mapping[str, Tensor]) -> Interpolation:
    words = tensors.get(f"{CLIP_TEXT}embeddings.token_embedding.weight")
    # Without a text tower: the authors' published models are all SigLIP 2.
    return "bilinear" if words is None or len(words) == SIGLIP2_VOCAB else "bicubic"


def _text_spec(tensors: Mapping[str, Tensor], options: ImportOptions) -> TextTowerSpec | None:
    words = tensors.get(f"{CLIP_TEXT}embeddings.token_embedding.weight")
    head, mlp = tensors.get(f"{CLIP_TEXT}head.weight"), tensors.get(f"{CLIP_TEXT}encoder.layers.0.mlp.fc1.weight")
    positions = tensors.get(f"{CLIP_TEXT}embeddings.position_embedding.weight")
    if words is None or head is None or mlp is None or positions is None:
        return None
    width = int(words.shape[1])
    config = {
        "hidden_size": width, "vocab_size": int(words.shape[0]), "projection_size": int(head.shape[0]),
        "max_position_embeddings": int(positions.shape[0]), "intermediate_size": int(mlp.shape[0]),
        "num_hidden_layers": names.count_layers(tensors, f"{CLIP_TEXT}encoder.layers."),
        "num_attention_heads": names.heads_of(
            width, names.SIGLIP_HEADS, options.vision_heads, "text tower", "--vision-heads"
        ),
    }  # fmt: skip
    pad_id = pad_id_of(options.text_tokenizer) if options.text_tokenizer is not None else 0
    return hf_text_spec(SIGLIP.name, {"text_config": config}, pad_id)


def _given_text(loaded: LoadedBackbone) -> tuple[TextTowerSpec | None, dict[str, Tensor] | None]:
    tower = loaded.text_tower
    return (None, None) if tower is None else (tower.spec, tower.state_dict())


def _text_state(
    tensors: dict[str, Tensor], spec: TextTowerSpec | None, tokenizer: Path | None
) -> dict[str, Tensor] | None:
    if spec is None or tokenizer is None:
        return None
    inside = {n.removeprefix(names.CLIP_MODEL): t for n, t in tensors.items() if n.startswith(CLIP_TEXT)}
    converted = hf_text_tensors(SIGLIP.name, inside, int(spec.options["text_cfg"]["layers"]))
    content = torch.tensor(list(tokenizer.read_bytes()), dtype=torch.uint8)
    return {**{f"model.{name}": tensor for name, tensor in converted.items()}, TOKENIZER_KEY: content}


def _trunk_tensors(
    tensors: Mapping[str, Tensor], prefix: str, spec: BackboneSpec, preprocess: PreprocessSpec
) -> dict[str, Tensor]:
    """The vision tower under the backbone's names, in the checkpoint's own dtype."""
    with torch.device("meta"):
        trunk = create_backbone(spec, None, preprocess).trunk
    inside = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    converted: dict[str, Tensor] = trunk.convert_weights(inside)  # type: ignore[operator]
    return {f"trunk.{name}": tensor for name, tensor in converted.items()}


def _as_stored(trunk: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A stored backbone under Hugging Face's names, its dtype kept."""
    plain = {name.removeprefix("trunk."): tensor for name, tensor in state.items()}
    trunk.load_state_dict(plain, strict=True, assign=True)
    return to_hf_names(trunk)


def _frozen(tensors: Mapping[str, Tensor], prefix: str, *, has_text_tower: bool) -> dict[str, Tensor]:
    """The `clip.*` tensors that nothing else in the directory holds."""
    kept = {}
    for name, tensor in tensors.items():
        if not name.startswith(names.CLIP_MODEL):
            continue
        twin = tensors.get(prefix + name[len(CLIP_VISION) :]) if prefix and name.startswith(CLIP_VISION) else None
        is_same = twin is not None and twin.dtype == tensor.dtype and torch.equal(twin, tensor)
        if not is_same and not (has_text_tower and name.startswith(CLIP_TEXT)):
            kept[name] = tensor
    return kept


def _adapter_tensors(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    inside = {n[len(names.ADAPTER) :]: t for n, t in tensors.items() if n.startswith(names.ADAPTER)}
    if kind == "compressed":
        return inside
    own = {place: module for module, place in names.LOCAL_NAMES.items()}
    return {f"{own[name.split('.')[0]]}.{name.split('.')[1]}": tensor for name, tensor in inside.items()}


def _joint_tensors(tensors: Mapping[str, Tensor], spec: JointEncoderSpec) -> dict[str, Tensor]:
    inside = {n[len(names.BERT) :]: t for n, t in tensors.items() if n.startswith(names.BERT)}
    own = from_hf_names(inside, spec.num_layers)
    for kind in ("weight", "bias"):
        own[f"pooler.dense.{kind}"] = tensors[names.POOLER + kind]
        own[f"classifier.{kind}"] = tensors[names.LOGIT + kind]
    return own


def _card(spec: ModelSpec, path: Path) -> str:
    tower = "none: first-stage search needs candidates from elsewhere" if spec.text_tower is None else "SigLIP's own"
    return (
        f"# {spec.name}\n\nImported from {path.name}, a checkpoint of the authors' training program (EDJE, arXiv "
        f"2510.06820).\n\n- Backbone: {spec.backbone.source}, {spec.backbone.num_vision_tokens} tokens of width "
        f"{spec.backbone.width}, images of {spec.preprocess.image_size[0]} pixels, {spec.preprocess.interpolation}\n"
        f"- Adapter: {spec.adapter.kind}, {spec.adapter.num_compressed_tokens} tokens of width "
        f"{spec.adapter.output_dim}\n- Joint encoder: {spec.joint_encoder.num_layers} layers of width "
        f"{spec.joint_encoder.width}\n- Text tower: {tower}\n"
    )
