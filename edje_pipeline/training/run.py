"""A training run from what a user gives: a model to start from, images or an index, captions, a recipe.

OUT/checkpoints/step-*.pt   metrics.jsonl   metrics.png   tokens/ (the cache)
OUT/model/                  written last: a model directory
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edje_pipeline.errors import ConfigError, ModelError, TrainingError
from edje_pipeline.models.backbone import Backbone
from edje_pipeline.models.checkpoint import ModelDirectory, open_model, save_model
from edje_pipeline.models.model_directory import HEADS_FILE
from edje_pipeline.models.spec import ModelSpec, fingerprint_of
from edje_pipeline.stages.score_pairs import resolve_device
from edje_pipeline.storage.codecs import Codec, needs_codebook, resolve, save_codec, train_pq
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.training.augment import Augmentation
from edje_pipeline.training.batches import Corpus
from edje_pipeline.training.calibrate import calibrate_adapter
from edje_pipeline.training.collective import Collective
from edje_pipeline.training.data import Captions, read_captions
from edje_pipeline.training.heads import TrainingHeads
from edje_pipeline.training.local_start import start_from_local
from edje_pipeline.training.metrics_log import read_metrics
from edje_pipeline.training.objective import Learner, Teacher
from edje_pipeline.training.recipe import Phase, Recipe
from edje_pipeline.training.ridge import LinearMap, choose_penalty, fit_ridge
from edje_pipeline.training.sampler import PairSampler, confused_texts, nearest_texts
from edje_pipeline.training.token_source import ImageTokens, IndexTokens, TokenSource, cache_tokens
from edje_pipeline.training.trainer import Trainer, TrainState
from edje_pipeline.training.validation import Validator

CODEC_SAMPLE_IMAGES = 4096
CALIBRATION_IMAGES = 64
START_IMAGES = 768


@dataclass(frozen=True)
class TrainJob:
    """Everything a run is told; plain values, so that it can travel to a worker."""

    model: str
    """Model to start from."""
    out: str
    captions: tuple[str, ...]
    recipe: Recipe
    images: str = ""
    """A corpus, as for extraction; its tokens are cached below `out` unless `cache` is False."""
    index: str = ""
    """Or an index of variant raw."""
    val_captions: tuple[str, ...] = ()
    val_images: str = ""
    val_index: str = ""
    templates: tuple[str, ...] = ()
    teacher: str = ""
    """A trained model with the local adapter and the same backbone."""
    first_stage: str = "auto"
    """ridge: fit the backbone's embedding map to the captions; keep: use it as it is; auto: ridge when the
    model has such a map."""
    cache: bool = True
    cache_dir: str = ""
    """Where the cached tokens lie; default: below `out`. Runs over the same images and backbone can share one."""
    on_unknown: str = "error"
    on_empty: str = "error"
    name: str = ""
    device: str | None = None
    restart: bool = False


@dataclass(frozen=True)
class TrainResult:
    """What a finished run reports."""

    out: str
    model: str
    steps: int
    wall_s: float
    last: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {"out": self.out, "model": self.model, "steps": self.steps, "wall_s": self.wall_s, "last": self.last}

    def to_text(self) -> str:
        lines = [f"trained {self.steps:,} steps in {self.wall_s:,.0f} s", f"model:   {self.model}"]
        lines += [f"{name:>20} {value:.3f}" for name, value in self.last.items() if isinstance(value, float)]
        return "\n".join(lines)


@dataclass
class Prepared:
    """A job with everything read, the same on every worker."""

    job: TrainJob
    model: ModelDirectory
    backbone: Backbone
    learner: Learner
    state: TrainState
    linear_map: LinearMap | None


def train(job: TrainJob, *, report: Callable[[dict[str, Any]], None] | None = None) -> TrainResult:
    """Trains in this process and writes `OUT/model`.

    Raises:
        TrainingError, InputFileError, ModelError, ResumeMismatchError: see their places.
    """
    import time

    begun = time.monotonic()
    if job.restart:
        for name in ("checkpoints", "metrics.jsonl", "metrics.png"):
            path = Path(job.out) / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    prepared = prepare(job, Collective())
    prepared.state.report = report
    steps = Trainer(job.recipe, prepared.state).run()
    model = finish(prepared)
    return TrainResult(job.out, str(model.path), steps, time.monotonic() - begun, last_values(Path(job.out)))


def last_values(out: Path) -> dict[str, Any]:
    """The last number of each kind in the metrics."""
    values: dict[str, Any] = {}
    for record in read_metrics(out / "metrics.jsonl"):
        values.update(record)
    return values


def prepare(job: TrainJob, collective: Collective) -> Prepared:
    """Reads model, captions and tokens, fits the first stage, builds the learner."""
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    model = open_model(job.model)
    device = resolve_device(job.device)
    backbone = model.load_backbone()
    captions = read_captions(job.captions, templates=job.templates, on_empty=job.on_empty)
    root = Path(job.cache_dir or out)
    views = None if job.recipe.views == 1 else Views(job.recipe.views, job.recipe.seed)
    source = _open_tokens(
        job.images, job.index, model.spec, backbone, root / "tokens", device, cache=job.cache, views=views
    )
    captions = captions.keep(source.image_ids, where=job.index or job.images, on_unknown=job.on_unknown)
    captions.require_trainable()
    tower = model.load_text_tower()
    text_embeddings = tower.encode(captions.texts)
    positions = positions_in(source, captions)
    linear_map, image_embeddings = _first_stage(job, model.spec, backbone, source, captions, positions, text_embeddings)
    tokenizer = model.load_tokenizer()
    corpus = Corpus(captions, source, positions, text_embeddings, image_embeddings, tokenizer)
    learner = _learner(model, text_embeddings.shape[1], job.recipe.seed)
    teacher = _teacher(job, model.spec, device)
    _start_adapter(job.recipe, learner, teacher, source, positions)
    wants_neighbours = any(phase.neighbours for phase in job.recipe.phases)
    neighbours = nearest_texts(text_embeddings) if wants_neighbours else None
    if neighbours is not None and job.recipe.neighbours_by == "first-stage":
        if image_embeddings is None:
            raise ConfigError(
                "neighbours-by = 'first-stage' needs the first stage's image embeddings, which cannot be had from "
                "this model and these tokens; train from --images, use a model with a first stage, or "
                "neighbours-by = 'texts'"
            )
        neighbours = np.concatenate([neighbours, confused_texts(text_embeddings, image_embeddings, captions)], axis=1)
    sampler = PairSampler(captions, job.recipe.seed, neighbours, num_views=job.recipe.views)
    state = TrainState(
        learner, corpus, sampler, out, _fingerprints(job, model, captions),
        device=device, collective=collective, teacher=teacher,
        fit_codec=_codec_fitter(out, corpus, device),
    )  # fmt: skip
    if job.val_captions:
        state.validator = _validator(job, model.spec, backbone, root, device, linear_map, corpus, tower)
    return Prepared(job, model, backbone, learner, state, linear_map)


def finish(prepared: Prepared) -> ModelDirectory:
    """Writes the model directory of a trained learner."""
    learner, source, spec = prepared.learner.cpu().eval(), prepared.model, prepared.model.spec
    if prepared.linear_map is not None:
        apply_map(prepared.backbone, prepared.linear_map)
    name = prepared.job.name or f"{spec.name}-trained"
    # Loading lengthened the position table where text and image tokens needed more rows.
    positions = learner.encoder.position_embeddings.num_embeddings
    spec = replace(spec, name=name, joint_encoder=replace(spec.joint_encoder, max_positions=positions))
    card = (
        f"# {name}\n\nTrained from {spec.name} with {len(prepared.state.corpus.captions):,} captioned images; "
        f"{prepared.job.recipe.total_steps:,} steps. Recipe fingerprint {prepared.job.recipe.fingerprint[:16]}.\n"
    )
    return save_model(
        Path(prepared.job.out) / "model", spec,
        backbone=prepared.backbone, adapter=learner.adapter, joint_encoder=learner.encoder,
        tokenizer=source.load_tokenizer(), text_tower=source.load_text_tower() if spec.text_tower else None,
        card=card, extra={HEADS_FILE: learner.heads.state_dict()}, overwrite=True,
    )  # fmt: skip


def apply_map(backbone: Backbone, linear_map: LinearMap) -> None:
    """Puts a fitted map into the backbone's embedding map."""
    assert backbone.embedding_map is not None
    with torch.no_grad():
        backbone.embedding_map.weight.copy_(torch.from_numpy(linear_map.weight))
        backbone.embedding_map.bias.copy_(torch.from_numpy(linear_map.bias))


def positions_in(source: TokenSource, captions: Captions) -> np.ndarray:
    """Where each captioned image stands in the source, int64 (n,)."""
    place = {image_id: position for position, image_id in enumerate(source.image_ids)}
    return np.array([place[image_id] for image_id in captions.image_ids], np.int64)


def mean_text(captions: Captions, text_embeddings: np.ndarray) -> np.ndarray:
    """Mean caption embedding of each image, float32 (n, C)."""
    return np.stack([text_embeddings[numbers].mean(axis=0) for numbers in captions.text_numbers])


@dataclass(frozen=True)
class Views:
    """How many views of each image, and their seed."""

    num: int
    seed: int
    augmentation: Augmentation = field(default_factory=Augmentation)


def _open_tokens(
    images: str, index: str, spec: ModelSpec, backbone: Backbone, cache_dir: Path, device: torch.device, *, cache: bool,
    views: Views | None = None,
) -> TokenSource:  # fmt: skip
    if bool(images) == bool(index):
        raise ConfigError("give the images either as --images CORPUS or as --raw-index INDEX, one of the two")
    if index:
        if views is not None:
            raise ConfigError("an index of raw tokens holds each image as it is; views above 1 need --images")
        kind = str(spec.backbone.options.get("embedding", ""))
        return IndexTokens(Index.open(index), spec.backbone.width, spec.backbone.num_vision_tokens, kind)
    source = ImageTokens(
        images, backbone, device=str(device), augmentation=views.augmentation if views else None,
        seed=views.seed if views else 0,
    )  # fmt: skip
    if not cache:
        return source
    described: list[Any] = [spec.backbone.fingerprint, spec.preprocess.fingerprint, source.fingerprint()]
    described.append(asdict(views) if views else None)
    return cache_tokens(source, cache_dir, fingerprint_of(described), views.num if views else 1)


def _first_stage(
    job: TrainJob, spec: ModelSpec, backbone: Backbone, source: TokenSource, captions: Captions, positions: np.ndarray,
    text_embeddings: np.ndarray,
) -> tuple[LinearMap | None, np.ndarray | None]:  # fmt: skip
    """The fitted map where there is one, and the images' embeddings in the texts' space where they can be known."""
    has_map = backbone.embedding_map is not None
    mode = ("ridge" if has_map else "keep") if job.first_stage == "auto" else job.first_stage
    if mode not in ("ridge", "keep"):
        raise ConfigError(f"first-stage is {job.first_stage!r}, expected auto, ridge or keep")
    pooled = source.pooled(positions)
    if mode == "ridge":
        if not has_map:
            raise ConfigError(f"model {spec.name!r} has no embedding map to fit; use --first-stage keep")
        if pooled is None:
            raise ConfigError(
                "the pooled vectors that the first stage is fitted to are not in this index; train from --images, "
                "or from a raw index of the backbone without an embedding map"
            )
        targets = mean_text(captions, text_embeddings)
        groups = np.array([int(numbers[0]) for numbers in captions.text_numbers])
        linear_map = fit_ridge(pooled, targets, choose_penalty(pooled, targets, groups, seed=job.recipe.seed))
        return linear_map, linear_map.embed(pooled)
    if pooled is None or spec.backbone.embedding_dim != text_embeddings.shape[1]:
        return None, None
    return None, _embed(backbone, pooled)


def _embed(backbone: Backbone, pooled: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        embedded = backbone.embed(torch.from_numpy(np.ascontiguousarray(pooled)).to(next(backbone.parameters())))
    assert embedded is not None
    return embedded.cpu().numpy()


def _learner(model: ModelDirectory, embedding_dim: int, seed: int) -> Learner:
    encoder = model.load_joint_encoder()
    adapter = model.load_adapter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = TrainingHeads(encoder, embedding_dim)
    if HEADS_FILE in model.files:
        heads.load_state_dict(model.load_tensors(HEADS_FILE))
    learner = Learner(adapter, encoder, heads)
    learner.requires_grad_(True)
    return learner


def _start_adapter(
    recipe: Recipe, learner: Learner, teacher: Teacher | None, source: TokenSource, positions: np.ndarray
) -> None:
    """What the recipe wants done to the adapter before the first step."""
    num = START_IMAGES if recipe.adapter_start == "local-teacher" else CALIBRATION_IMAGES
    chosen = np.random.default_rng(recipe.seed).permutation(positions)[:num]
    if recipe.adapter_start == "local-teacher":
        if teacher is None:
            raise ConfigError("adapter-start = 'local-teacher' needs a local model to start from; give it as --teacher")
        local = copy.deepcopy(teacher.adapter).cpu()
        start_from_local(learner.adapter, local, torch.from_numpy(source.tokens(chosen)))
    elif recipe.calibrate_adapter:
        words = float(learner.encoder.word_embeddings.weight.detach().std())
        calibrate_adapter(learner.adapter, torch.from_numpy(source.tokens(chosen)), words)


def _teacher(job: TrainJob, spec: ModelSpec, device: torch.device) -> Teacher | None:
    if not job.teacher:
        return None
    model = open_model(job.teacher)
    if model.spec.backbone.fingerprint != spec.backbone.fingerprint:
        ours, theirs = spec.backbone, model.spec.backbone
        if (ours.source, ours.width, ours.num_vision_tokens) != (theirs.source, theirs.width, theirs.num_vision_tokens):
            raise ModelError(f"the teacher {job.teacher} reads tokens of {theirs.source}, this model of {ours.source}")
    adapter, encoder = model.load_adapter().to(device), model.load_joint_encoder().to(device)
    adapter.requires_grad_(False)
    encoder.requires_grad_(False)
    return Teacher(adapter, encoder)


def _fingerprints(job: TrainJob, model: ModelDirectory, captions: Captions) -> dict[str, str]:
    return {
        "recipe": job.recipe.fingerprint,
        "model": fingerprint_of(model.fingerprints),
        "captions": fingerprint_of([list(captions.image_ids), [list(group) for group in captions.captions]]),
    }


def _codec_fitter(out: Path, corpus: Corpus, device: torch.device) -> Callable[[Learner, Phase], Codec | None]:
    """Makes a phase's codec; codebooks are trained on the adapter's tokens at the phase's start and kept."""

    def fit(learner: Learner, phase: Phase) -> Codec:
        encoder_dim, count = learner.adapter.spec.output_dim, learner.adapter.spec.num_compressed_tokens
        if not needs_codebook(phase.quantize):
            return resolve(phase.quantize, num_tokens=count, dim=encoder_dim)
        chosen = np.random.default_rng(0).permutation(len(corpus.captions))[:CODEC_SAMPLE_IMAGES]
        learner.eval()
        with torch.no_grad():
            parts = []
            for start in range(0, len(chosen), 256):
                vision = corpus.source.tokens(corpus.positions[chosen[start : start + 256]])
                parts.append(learner.adapter(torch.from_numpy(vision).to(device).float()))
        learner.train()
        codec = _train_codec(phase.quantize, torch.cat(parts).float().cpu().numpy())
        save_codec(codec, Location.parse(out))
        return codec

    return fit


def _train_codec(spec: str, tokens: np.ndarray) -> Codec:
    kind = spec.rstrip("0123456789")
    return train_pq(tokens, int(spec[len(kind) :]), kind=kind, seed=0)


def _validator(
    job: TrainJob, spec: ModelSpec, backbone: Backbone, out: Path, device: torch.device, linear_map: LinearMap | None,
    corpus: Corpus, tower: Any,
) -> Validator:  # fmt: skip
    captions = read_captions(job.val_captions, templates=job.templates, on_empty=job.on_empty)
    if job.val_images or job.val_index:
        source = _open_tokens(
            job.val_images, job.val_index, spec, backbone, out / "val-tokens", device, cache=job.cache
        )
    else:
        source = corpus.source
    captions = captions.keep(source.image_ids, where=job.val_index or job.val_images or "the training images",
                             on_unknown=job.on_unknown)  # fmt: skip
    positions = positions_in(source, captions)
    pooled = source.pooled(positions)
    if pooled is None:
        raise TrainingError("validation needs the backbone's pooled vectors for its first stage; give --val-images")
    images = linear_map.embed(pooled) if linear_map is not None else _embed(backbone, pooled)
    return Validator(captions, source, positions, tower.encode(captions.texts), images, corpus.tokenizer)
