"""A compressed student of a trained local model: the same parts around a fresh adapter, for distillation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.adapter import create_adapter
from edje_pipeline.models.checkpoint import ModelDirectory, save_model
from edje_pipeline.models.model_directory import HEADS_FILE, WEIGHT_FILES


def make_student(
    directory: Path, name: str, teacher: ModelDirectory, *, num_compressed_tokens: int, mlp_dim: int | None = None,
    key_positions: bool = True, seed: int = 0,
) -> ModelDirectory:  # fmt: skip
    """Writes a model directory with the teacher's backbone, joint encoder, text tower and tokenizer.

    Args:
        directory: of the student; must not exist.
        name: of the student.
        teacher: with a local adapter.
        num_compressed_tokens: M, at most the teacher's N.
        mlp_dim: hidden units of the adapter; None: the teacher's.
        key_positions: see `AdapterSpec`; `adapter-start = "local-teacher"` needs them.
        seed: of the adapter's random weights.

    Raises:
        ConfigError: the teacher's adapter is not local, or has fewer tokens.
    """
    local = teacher.spec.adapter
    if local.kind != "local":
        raise ConfigError(f"{teacher.path} has a {local.kind} adapter; a student needs a model with a local one")
    if num_compressed_tokens > local.num_compressed_tokens:
        raise ConfigError(
            f"{num_compressed_tokens} tokens are more than the {local.num_compressed_tokens} of {teacher.path}"
        )
    adapter_spec = replace(
        local, kind="compressed", num_compressed_tokens=num_compressed_tokens, mlp_dim=mlp_dim or local.mlp_dim,
        num_key_positions=local.num_compressed_tokens if key_positions else 0, weights_sha256="",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = create_adapter(adapter_spec)
    card = (
        f"# {name}\n\nA student of {teacher.spec.name}: its backbone, joint encoder and text tower around a fresh "
        f"adapter of {num_compressed_tokens} tokens. The adapter's weights are random: train it before use.\n"
    )
    heads = {HEADS_FILE: teacher.file(HEADS_FILE)} if HEADS_FILE in teacher.files else None
    tower = teacher.file(WEIGHT_FILES["text_tower"]) if teacher.spec.text_tower is not None else None
    return save_model(
        directory, replace(teacher.spec, adapter=adapter_spec, name=name),
        backbone=teacher.file(WEIGHT_FILES["backbone"]), adapter=adapter,
        joint_encoder=teacher.file(WEIGHT_FILES["joint_encoder"]), tokenizer=teacher.load_tokenizer(),
        text_tower=tower, card=card, extra=heads,
    )  # fmt: skip
