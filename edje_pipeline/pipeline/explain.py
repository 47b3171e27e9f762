"""`explain`: what the image tokens of a trained model are near to in words, and where they look.

Everything is computed from the image in float32, before any codec.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from edje_pipeline.errors import ConfigError, ModelError
from edje_pipeline.models.checkpoint import ModelDirectory, open_model
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.models.spec import PreprocessSpec
from edje_pipeline.models.token_reading import (
    Vocabulary,
    logits_without,
    nearest_words,
    over_grid,
    patch_grid,
    readable_vocabulary,
    token_attention,
)
from edje_pipeline.models.untrained import is_untrained
from edje_pipeline.pipeline.explain_inputs import SeenImage, read_files, read_ids
from edje_pipeline.pipeline.explain_picture import Panel, Picture, draw
from edje_pipeline.pipeline.explain_result import ExplainResult, ImageReading, Peak, TokenReading, Unreadable
from edje_pipeline.stages.score_pairs import resolve_device
from edje_pipeline.storage import files
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.schema import RejectReason

PICTURE_ENDING = "-tokens.png"
CHANCE_DIRECTIONS = 256
CHANCE_QUANTILE = 0.95


@dataclass(frozen=True)
class ExplainConfig:
    """What the command was asked."""

    images: tuple[str, ...]
    """Files or URIs; with `corpus`, image ids."""
    model: str
    corpus: str = ""
    text: str | None = None
    top_k: int = 5
    pieces: bool = False
    out: str = ""
    """Picture: a .png file, or a folder for `NAME-tokens.png`; empty for none."""
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.images:
            raise ConfigError("no image was given; give image files, or --corpus and image ids")
        if self.top_k < 1:
            raise ConfigError(f"--top-k is {self.top_k}; expected at least 1")
        if self.text is not None and not self.text.strip():
            raise ConfigError("--text is empty; give a text, or leave the option out")
        if not self.out.lower().endswith(".png"):
            return
        if len(self.images) > 1:
            raise ConfigError(f"--out {self.out} is one file for {len(self.images)} images; give a folder")
        if not self.corpus and files.absolute_uri(self.out) == files.absolute_uri(self.images[0]):
            raise ConfigError(f"--out {self.out} is the image itself; give another name")


class TokenReader:
    """The parts of a model that read tokens, on one device."""

    def __init__(self, model: ModelDirectory, *, pieces: bool = False, device: str = "auto") -> None:
        self.device = resolve_device(device)
        self.preprocess: PreprocessSpec = model.spec.preprocess
        adapter = model.load_adapter()
        self.is_untrained = is_untrained(adapter)
        self.adapter = adapter.to(self.device)
        self.backbone: nn.Module = model.load_backbone().float().to(self.device)
        self.encoder: JointEncoder = model.load_joint_encoder().to(self.device)
        self.tokenizer = model.load_tokenizer()
        self.vocabulary: Vocabulary = readable_vocabulary(
            self.tokenizer, self.encoder.word_embeddings.weight, pieces=pieces
        )
        if not self.vocabulary.words:
            raise ModelError(f"the vocabulary of model {model.spec.name!r} has no readable word; try --pieces")

    def chance_cosine(self) -> float:
        """The cosine that 1 - `CHANCE_QUANTILE` of random directions exceed with their nearest word."""
        generator = torch.Generator().manual_seed(0)
        embeddings = self.vocabulary.embeddings
        directions = torch.randn(CHANCE_DIRECTIONS, embeddings.shape[1], generator=generator)
        best = (nn.functional.normalize(directions, dim=-1) @ embeddings.cpu().T).amax(dim=1)
        return float(best.quantile(CHANCE_QUANTILE))

    @torch.inference_mode()
    def read(self, seen: SeenImage, *, text: str | None, top_k: int) -> tuple[ImageReading, Tensor | None] | Unreadable:
        """The reading of one image, and its tokens' attention (M, rows, columns) if there is any."""
        assert seen.pixels is not None
        vision, _ = self.backbone(torch.from_numpy(seen.pixels.copy()).unsqueeze(0).to(self.device))
        tokens = self.adapter(vision)[0]
        if not torch.isfinite(tokens).all():
            return Unreadable(seen.name, RejectReason.NON_FINITE_TOKENS.value, "the model gave NaN or infinite tokens")
        num_vision = vision.shape[1]
        grid = patch_grid(num_vision, self.preprocess.image_size)
        weights = token_attention(self.adapter, vision)
        maps = over_grid(weights[0], grid).cpu() if grid is not None and weights is not None else None
        logit, changes = self._changes(tokens, text)
        words = nearest_words(tokens, self.vocabulary, top_k)
        readings = tuple(
            TokenReading(number + 1, tuple(near), _peak(maps, number, num_vision), changes[number])
            for number, near in enumerate(words)
        )
        shape = (grid.rows, grid.columns) if grid is not None else None
        return ImageReading(seen.name, num_vision, shape, readings, logit), maps

    def _changes(self, tokens: Tensor, text: str | None) -> tuple[float | None, list[float | None]]:
        if text is None:
            return None, [None] * len(tokens)
        ids = torch.tensor(self.tokenizer.encode([text])[0], device=self.device)
        logit, without = logits_without(self.encoder, ids, tokens)
        return logit, [logit - other for other in without.tolist()]


def run_explain(config: ExplainConfig) -> ExplainResult:
    """Reads the tokens of every image; bad images are reported and the others still done.

    Raises:
        ModelNotFoundError, ModelError: the model cannot be opened.
        SourceError: the corpus cannot be listed. StorageError: the picture cannot be written.
    """
    model = open_model(config.model)
    spec = model.spec.preprocess
    reader = TokenReader(model, pieces=config.pieces, device=config.device)
    names = _picture_names(config)
    images: list[ImageReading] = []
    rejected: list[Unreadable] = []
    for seen, target in zip(_inputs(config, spec), names, strict=True):
        if seen.pixels is None:
            rejected.append(Unreadable(seen.name, seen.reason, seen.message))
            continue
        found = reader.read(seen, text=config.text, top_k=config.top_k)
        if isinstance(found, Unreadable):
            rejected.append(found)
            continue
        reading, maps = found
        if target is not None:
            name = model.spec.name + (" (random weights)" if reader.is_untrained else "")
            picture = to_picture(reading, seen.pixels, maps, model=name, text=config.text)
            target.write_bytes(draw(picture))
            reading = replace(reading, picture=str(target))
        images.append(reading)
    return ExplainResult(
        model=config.model,
        adapter=model.spec.adapter.kind,
        is_untrained=reader.is_untrained,
        chance_cosine=reader.chance_cosine(),
        num_words=len(reader.vocabulary.words),
        text=config.text,
        images=tuple(images),
        rejected=tuple(rejected),
    )


def to_picture(
    reading: ImageReading, pixels: np.ndarray, maps: Tensor | None, *, model: str, text: str | None = None
) -> Picture:
    """The picture of a reading.

    Args:
        reading: of one image.
        pixels: uint8 (H, W, 3), as the model saw it.
        maps: attention (M, rows, columns), or None.
        model: its name.
        text: that the reading's logit is about.
    """
    lines = [f"{posixpath.basename(reading.image.rstrip('/'))}    {model}, {len(reading.tokens)} tokens"]
    if reading.logit is not None:
        lines.append(f'"{text}": logit {reading.logit:.2f}')
    panels = tuple(
        Panel(
            number=token.token,
            words=tuple(word.text for word in token.words),
            change=token.logit_change,
            weights=None if maps is None else maps[number].numpy(),
        )
        for number, token in enumerate(reading.tokens)
    )
    return Picture(tuple(lines), pixels, panels, reading.grid, _evidence(reading, maps), is_cells=_has_cells(reading))


def _has_cells(reading: ImageReading) -> bool:
    """A token for each patch: a local adapter."""
    return reading.grid is not None and all(token.peak is None for token in reading.tokens)


def _evidence(reading: ImageReading, maps: Tensor | None) -> np.ndarray | None:
    """Attention of the tokens that speak for the text, weighted by how much: (rows, columns) that sum to at most 1."""
    if maps is None or reading.logit is None:
        return None
    gains = torch.tensor([max(token.logit_change or 0.0, 0.0) for token in reading.tokens])
    if not bool(gains.any()):
        return None
    weighted: np.ndarray = torch.einsum("m,mrc->rc", gains / gains.sum(), maps).numpy()
    return weighted


def _peak(maps: Tensor | None, number: int, num_vision: int) -> Peak | None:
    if maps is None:
        return None
    place = int(maps[number].argmax())
    row, column = divmod(place, maps.shape[2])
    weight = float(maps[number, row, column])
    return Peak(row + 1, column + 1, weight, weight * num_vision)


def _inputs(config: ExplainConfig, spec: PreprocessSpec) -> Iterator[SeenImage]:
    return read_ids(config.images, config.corpus, spec) if config.corpus else read_files(config.images, spec)


def _picture_names(config: ExplainConfig) -> list[Location | None]:
    """Where each image's picture goes: names of images that are the same get a number."""
    if not config.out:
        return [None] * len(config.images)
    out = Location.parse(config.out)
    if config.out.lower().endswith(".png"):
        return [out]
    used: set[str] = set()
    targets: list[Location | None] = []
    for image in config.images:
        base = posixpath.basename(files.path_name(image).rstrip("/")) or "image"
        stem = base.rpartition(".")[0] or base
        name, number = stem, 1
        while name in used:
            number += 1
            name = f"{stem}-{number}"
        used.add(name)
        targets.append(out.child(name.replace("\\", "_") + PICTURE_ENDING))
    return targets
