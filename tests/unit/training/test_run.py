"""A run's preparation: views, neighbours by the first stage, a cache that runs share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.assemble import BackboneSource, ModelParts, make_model
from edje_pipeline.models.student import make_student
from edje_pipeline.training.collective import Collective
from edje_pipeline.training.losses import token_loss
from edje_pipeline.training.recipe import LossWeights, Phase, Recipe
from edje_pipeline.training.run import TrainJob, prepare, train
from edje_pipeline.training.token_source import CachedTokens, ImageTokens
from tests.training_helpers import draw_shapes, write_tiny_bert

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "embedding": "mean"}
PHASE = Phase("warm-up", 2, batch_size=4, weights=LossWeights(contrastive=1.0), neighbours=0.5)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """Copied by each test with a folder of its own."""
    folder = tmp_path_factory.mktemp("run")
    bert = write_tiny_bert(folder / "bert")
    captions = draw_shapes(folder / "images", num_copies=1)
    source = BackboneSource("timm:vit_tiny_patch16_224", weights="random:0", options=dict(TINY))
    make_model(folder / "start", "tiny", source, ModelParts(bert, 4, adapter_mlp_dim=64, sentence_encoder=bert))
    recipe = Recipe((PHASE,), views=2, neighbours_by="first-stage")
    return TrainJob(str(folder / "start"), "", (str(captions),), recipe, images=str(folder / "images"))


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images of every pass through the backbone from now on."""
    passes: list[int] = []
    encode = ImageTokens.encode

    def counted(
        self: ImageTokens, pixels: np.ndarray, positions: np.ndarray, views: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        passes.append(len(positions))
        return encode(self, pixels, positions, views)

    monkeypatch.setattr(ImageTokens, "encode", counted)
    return passes


def test_two_runs_share_the_cache(tmp_path: Path, job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = count_passes(monkeypatch)
    shared = replace(job, cache_dir=str(tmp_path / "cache"))
    first = prepare(replace(shared, out=str(tmp_path / "first")), Collective())
    assert passes == [12, 12]  # two views
    second = prepare(replace(shared, out=str(tmp_path / "second")), Collective())
    assert passes == [12, 12]
    rows, views = np.arange(12), np.arange(12) % 2
    sources = [prepared.state.corpus.source for prepared in (first, second)]
    assert np.array_equal(sources[0].tokens(rows, views), sources[1].tokens(rows, views))
    assert not (tmp_path / "first" / "tokens").exists()
    changed_image = next(Path(job.images).glob("*.png"))
    changed_image.write_bytes(changed_image.read_bytes() + b"\0")
    prepare(replace(shared, out=str(tmp_path / "first")), Collective())
    assert passes == [12, 12] * 2
    for changed in (replace(shared.recipe, seed=1), replace(shared.recipe, views=3), replace(shared.recipe, views=1)):
        before = len(passes)
        prepare(replace(shared, out=str(tmp_path / "third"), recipe=changed), Collective())
        assert len(passes) - before == changed.views


def test_the_sampler_draws_views_and_confused_neighbours(tmp_path: Path, job: TrainJob) -> None:
    by_texts = replace(job.recipe, neighbours_by="texts", views=1)
    near = prepare(replace(job, out=str(tmp_path / "out"), recipe=by_texts), Collective()).state.sampler
    both = prepare(replace(job, out=str(tmp_path / "out")), Collective()).state.sampler
    assert (near.num_views, both.num_views) == (1, 2)
    assert near.neighbours is not None
    assert both.neighbours is not None
    assert both.neighbours.shape == (12, 11 + 12)
    assert np.array_equal(both.neighbours[:, :11], near.neighbours)


def test_views_need_images(tmp_path: Path, job: TrainJob) -> None:
    with pytest.raises(ConfigError, match="views above 1 need --images"):
        prepare(replace(job, out=str(tmp_path), images="", index=str(tmp_path / "index")), Collective())


def test_neighbours_by_first_stage_need_one(tmp_path: Path, job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    # As with an index whose pooled vectors are not known.
    monkeypatch.setattr(CachedTokens, "pooled", lambda *_: None)
    kept = replace(job, out=str(tmp_path), first_stage="keep")
    with pytest.raises(ConfigError, match=r"'first-stage' needs the first stage's image embeddings.*'texts'"):
        prepare(kept, Collective())
    by_texts = prepare(replace(kept, recipe=replace(job.recipe, neighbours_by="texts")), Collective())
    assert by_texts.state.corpus.image_embeddings is None
    # No phase wants neighbours: nothing is missing.
    prepare(replace(kept, recipe=replace(job.recipe, phases=(replace(PHASE, neighbours=0.0),))), Collective())


def test_a_squashed_start_sees_the_whole_image_and_keeps_its_map(tmp_path: Path) -> None:
    from edje_pipeline.models.assemble import BackboneSource, load_backbone, squashed, with_embedding_map

    source = BackboneSource("timm:vit_tiny_patch16_224", weights="random:0", options={"img_size": 32, "depth": 1})
    before = with_embedding_map(load_backbone(source).backbone, 8)
    after = squashed(before)
    assert before.preprocess.crop_pct < 1
    assert (after.preprocess.resize_mode, after.preprocess.crop_pct) == ("squash", 1.0)
    assert after.embedding_map is before.embedding_map


def test_a_student_starts_from_its_teacher(tmp_path: Path, job: TrainJob) -> None:
    bert = Path(job.model).parent / "bert"
    source = BackboneSource("timm:vit_tiny_patch16_224", weights="random:0", options=dict(TINY))
    parts = ModelParts(bert, None, adapter_mlp_dim=64, sentence_encoder=bert)
    teacher = make_model(tmp_path / "local", "local", source, parts)
    student = make_student(tmp_path / "student", "student", teacher, num_compressed_tokens=4)
    phase = Phase("tokens", 2, batch_size=4, weights=LossWeights(tokens=1.0))
    recipe = Recipe((phase,), adapter_start="local-teacher")
    wanted = replace(job, model=str(student.path), recipe=recipe, cache_dir=str(tmp_path / "cache"))

    with pytest.raises(ConfigError, match="give it as --teacher"):
        prepare(replace(wanted, out=str(tmp_path / "none")), Collective())
    prepared = prepare(replace(wanted, out=str(tmp_path / "out"), teacher=str(teacher.path)), Collective())
    vision = torch.from_numpy(prepared.state.corpus.source.tokens(np.arange(12))).float()
    with torch.inference_mode():
        wanted_tokens = teacher.load_adapter()(vision)
        started = token_loss(prepared.learner.adapter(vision), wanted_tokens).item()
        fresh = token_loss(student.load_adapter()(vision), wanted_tokens).item()
    assert started < 0.3 < 0.9 < fresh
    train(replace(wanted, out=str(tmp_path / "out"), teacher=str(teacher.path)))
    assert (tmp_path / "out" / "model" / "config.json").exists()
