"""Complete model directories with fixed random weights: for tests, and for trying the program without a trained model.

Everything about them is real but the training: a timm vision transformer, an adapter, a BERT, a
WordPiece tokenizer. The numbers come from numpy's PCG64 seeded by (seed, tensor name), so they are
the same on every machine and do not change when another part changes its size.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.checkpoint import ModelDirectory, save_model
from edje_pipeline.models.layout import adapter_shapes, joint_encoder_shapes
from edje_pipeline.models.spec import AdapterSpec, JointEncoderSpec, ModelSpec, TextTowerSpec
from edje_pipeline.models.tokenizer import Tokenizer
from edje_pipeline.models.words import word_pieces

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RandomSize:
    """The sizes of one random model."""

    backbone: str
    image_size: int
    """Pixels, both sides."""
    num_compressed_tokens: int
    adapter_mlp_dim: int
    joint_encoder: JointEncoderSpec
    backbone_options: dict[str, Any] = field(default_factory=dict)


SIZES: dict[str, RandomSize] = {
    "tiny": RandomSize(
        backbone="timm:vit_tiny_patch16_224",
        image_size=32,
        num_compressed_tokens=4,
        adapter_mlp_dim=64,
        joint_encoder=JointEncoderSpec(width=32, num_layers=2, num_heads=4, mlp_dim=64),
        backbone_options={"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    ),
    "demo": RandomSize(
        backbone="timm:vit_tiny_patch16_224",
        image_size=112,
        num_compressed_tokens=16,
        adapter_mlp_dim=768,
        joint_encoder=JointEncoderSpec(width=384, num_layers=6, num_heads=12, mlp_dim=1536),
        backbone_options={"depth": 4},
    ),
}


def write_random_model(
    directory: str | Path,
    *,
    size: str = "tiny",
    seed: int = 0,
    name: str = "",
    num_compressed_tokens: int | None = None,
    adapter_kind: Literal["compressed", "local"] = "compressed",
    image_size: int | None = None,
    backbone: str | None = None,
    backbone_options: dict[str, Any] | None = None,
    text_tower: bool = True,
    overwrite: bool = False,
) -> ModelDirectory:
    """Writes a model directory whose weights are random numbers.

    Args:
        directory: must not exist, unless `overwrite`.
        size: a key of `SIZES`.
        seed: other weights for another seed.
        name: of the model; `random-SIZE` when empty.
        num_compressed_tokens: M; the size's own when None. The local adapter keeps all N.
        adapter_kind: `compressed` or `local`.
        image_size: pixels of both sides of the backbone's input.
        backbone: another source (`timm:resnet10t`), with the options given here and no others.
        backbone_options: constructor arguments of the backbone, instead of the size's.
        text_tower: write one too, of the joint encoder's sizes, where the backbone has an embedding.

    Raises:
        ConfigError: an unknown size.
    """
    import torch

    from edje_pipeline.models.backbone import create_backbone, describe

    if size not in SIZES:
        raise ConfigError(f"no random model of size {size!r}; expected one of {', '.join(SIZES)}")
    sizes = SIZES[size]
    options = dict(backbone_options or {})
    if backbone is None and backbone_options is None:
        options = dict(sizes.backbone_options)
    if image_size is not None or backbone is None:
        options["img_size"] = image_size or sizes.image_size
    backbone_spec, preprocess = describe(backbone or sizes.backbone, **options)
    tokenizer = Tokenizer.from_vocab(word_pieces())
    num_tokens = num_compressed_tokens or sizes.num_compressed_tokens
    joint_spec = replace(
        sizes.joint_encoder,
        vocab_size=tokenizer.vocab_size,
        max_positions=tokenizer.max_text_tokens
        + (backbone_spec.num_vision_tokens if adapter_kind == "local" else num_tokens),
    )
    adapter_spec = AdapterSpec(
        kind=adapter_kind,
        input_dim=backbone_spec.width,
        output_dim=joint_spec.width,
        num_compressed_tokens=backbone_spec.num_vision_tokens if adapter_kind == "local" else num_tokens,
        num_heads=backbone_spec.num_heads,
        mlp_dim=sizes.adapter_mlp_dim,
        norm_eps=backbone_spec.norm_eps,
    )
    tower_spec, tower = None, None
    # Modules draw initial weights that are replaced here; the caller's generator shall not notice.
    with torch.random.fork_rng(devices=[]):
        trunk = create_backbone(backbone_spec, None, preprocess=preprocess)
        if text_tower and backbone_spec.embedding_dim:
            tower_spec, tower = _text_tower(joint_spec, backbone_spec.embedding_dim, tokenizer, seed)
    return save_model(
        directory,
        ModelSpec(name or f"random-{size}", backbone_spec, preprocess, adapter_spec, joint_spec, tower_spec),
        backbone=random_like(trunk.state_dict(), seed, "backbone"),
        adapter=random_tensors(adapter_shapes(adapter_spec), seed, "adapter"),
        joint_encoder=random_tensors(joint_encoder_shapes(joint_spec), seed, "joint_encoder"),
        tokenizer=tokenizer,
        text_tower=tower,
        card=_card(name or f"random-{size}", seed),
        overwrite=overwrite,
    )


def _text_tower(
    bert: JointEncoderSpec, embedding_dim: int, tokenizer: Tokenizer, seed: int
) -> tuple[TextTowerSpec, dict[str, Tensor]]:
    from edje_pipeline.models.text_tower import create_text_tower

    options = {"bert": asdict(bert), "map": True, "max_tokens": bert.max_text_tokens - 1}
    spec = TextTowerSpec("sentence_map", embedding_dim, options)
    tower = create_text_tower(spec, tokenizer_json=tokenizer.to_json())
    return spec, random_like(tower.state_dict(), seed, "text_tower")


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int, part: str) -> dict[str, Tensor]:
    """Random float32 tensors of these names and shapes, of a scale at which activations neither vanish nor explode."""
    import torch

    return {name: torch.from_numpy(_random(f"{part}.{name}", shape, seed)) for name, shape in shapes.items()}


def random_like(tensors: dict[str, Tensor], seed: int, part: str) -> dict[str, Tensor]:
    """As `random_tensors`, for a state dict; counters and running statistics of normalisation stay as they are."""
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not tensor.is_floating_point() or name.endswith(("running_mean", "running_var"))
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in kept}
    return random_tensors(shapes, seed, part) | kept


def _random(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = generator.standard_normal(shape, dtype=np.float32)
    if len(shape) <= 1:
        # A norm's or layer scale's weight is near one, every bias near zero.
        return (1.0 if name.endswith(("weight", "gamma")) else 0.0) + 0.1 * values
    if "embed" in name.rpartition(".")[0].rpartition(".")[2] or shape[0] == 1:
        return 0.5 * values
    return values / np.float32(np.sqrt(np.prod(shape[1:])))


def _card(name: str, seed: int) -> str:
    return (
        f"# {name}\n\n"
        f"Random weights (seed {seed}), never trained. Scores and rankings made with this model mean nothing;\n"
        "it exists to try the program and to test it. Made by the project; no licence restricts its use.\n"
    )
