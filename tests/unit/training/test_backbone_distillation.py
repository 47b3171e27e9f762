"""A tiny student learns from a tiny teacher; what it is given is checked first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from edje_pipeline.errors import ConfigError, TrainingError
from edje_pipeline.models.assemble import BackboneSource, load_backbone
from edje_pipeline.models.backbone import Backbone
from edje_pipeline.training.backbone_distillation import DistillationPlan, Pictures, Targets, distil_backbone

PLAN = DistillationPlan(steps=20, batch_size=8, learning_rate=3e-3, log_every=1)
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


def vit(seed: int, **options: Any) -> Backbone:
    merged = {**VIT, "embedding": "mean", **options}
    return load_backbone(BackboneSource("timm:vit_tiny_patch16_224", weights=f"random:{seed}", options=merged)).backbone


def teacher_of(**options: Any) -> Backbone:
    """64 tokens of 8 x 8 pixels."""
    return vit(1, **{"img_size": 64, "embed_dim": 36, "num_heads": 3, "embedding": "cls_mean", **options})


def convnet(seed: int) -> Backbone:
    """With batch normalisation, as the bundled model's student; 2 x 2 tokens of 64 x 64 pixels."""
    made = load_backbone(BackboneSource("timm:test_resnet?embedding=mean", weights=f"random:{seed}")).backbone
    spec, preprocess = replace(made.spec, num_vision_tokens=4), replace(made.preprocess, image_size=(64, 64))
    return Backbone(spec, preprocess, made.trunk)


def pictures(size: int = 32, num: int = 16, seed: int = 0) -> Pictures:
    """Noise in large squares, two pictures of each text."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (num, 4, 4, 3), dtype=np.uint8)
    texts = rng.standard_normal((num // 2, 12)).astype(np.float32)
    pixels = coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)
    return Pictures(pixels, np.arange(num) // 2, texts / np.linalg.norm(texts, axis=1, keepdims=True))


def train(student: Backbone, size: int = 32, plan: DistillationPlan = PLAN) -> tuple[list[dict[str, Any]], Any]:
    records: list[dict[str, Any]] = []
    held_out = pictures(size, 4, seed=1)
    found = distil_backbone(student, teacher_of(), pictures(size), held_out, plan, report=records.append)
    return records, found


def total(record: dict[str, Any]) -> float:
    return float(record["tokens"] + PLAN.pooled_weight * record["pooled"] + PLAN.text_weight * record["text"])


@pytest.mark.parametrize("kind", ["vit", "convnet"])
def test_the_loss_falls_and_the_student_ends_frozen(kind: str) -> None:
    student, size = (vit(0), 32) if kind == "vit" else (convnet(0), 64)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    records, found = train(student, size)
    assert [record["step"] for record in records] == list(range(1, 21))
    losses = [total(record) for record in records]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    assert not any(parameter.requires_grad for parameter in student.parameters())
    assert not any(module.training for module in student.modules())
    assert any(not torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert set(found) == {"token_cosine", "pooled_cosine"}
    assert all(-1 <= value <= 1 for value in found.values())
    # What is reported is measured after training: better than with no step worth the name.
    idle = distil_backbone(
        vit(0) if kind == "vit" else convnet(0), teacher_of(), pictures(size), pictures(size, 4, seed=1),
        replace(PLAN, steps=1, learning_rate=1e-9),
    )  # fmt: skip
    assert found["pooled_cosine"] > idle["pooled_cosine"]


def test_the_teacher_is_left_as_it_is() -> None:
    teacher = teacher_of()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distil_backbone(vit(0), teacher, pictures(), pictures(num=2, seed=1), replace(PLAN, steps=2))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_same_seed_gives_the_same_weights() -> None:
    plan = replace(PLAN, steps=4)
    students = [vit(0), vit(0), vit(0)]
    for student, seed in zip(students, (3, 3, 4), strict=True):
        torch.rand(3)  # another state of the process
        train(student, plan=replace(plan, seed=seed))
    first, again, other = (student.state_dict() for student in students)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_targets_are_block_means_standardised_by_channel() -> None:
    teacher, pixels = teacher_of(), torch.from_numpy(pictures(64, 6).pixels)
    targets = Targets(teacher, (4, 4), torch.device("cpu"))
    with torch.inference_mode():
        fine, expected_pooled = teacher.trunk(teacher.normalise(pixels))
    found, pooled = targets.raw(pixels)
    assert found.shape == (6, 16, 36)
    for row in range(4):
        for column in range(4):
            members = [(2 * row + down) * 8 + 2 * column + right for down in (0, 1) for right in (0, 1)]
            expected = fine[:, members].mean(dim=1)
            torch.testing.assert_close(found[:, 4 * row + column], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, expected_pooled)
    targets.fit(pixels)
    standardised, _ = targets(pixels)
    flat = standardised.flatten(0, 1)
    torch.testing.assert_close(flat.mean(dim=0), torch.zeros(36), atol=1e-4, rtol=0)
    torch.testing.assert_close(flat.std(dim=0), torch.ones(36), atol=1e-3, rtol=0)


def test_pictures_are_brought_to_the_teachers_size() -> None:
    teacher = teacher_of()
    small = torch.full((1, 32, 32, 3), 200, dtype=torch.uint8)
    large = torch.full((1, 64, 64, 3), 200, dtype=torch.uint8)
    targets = Targets(teacher, (4, 4), torch.device("cpu"))
    torch.testing.assert_close(targets.raw(small)[0], targets.raw(large)[0])


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({"img_size": [32, 64]}, {}, "student's 32 tokens of a 32 x 64 image are no square grid"),
        ({"img_size": [16, 64]}, {}, "student's 16 tokens of a 16 x 64 image are no square grid"),
        ({}, {"img_size": [32, 64]}, "teacher's 32 tokens of a 32 x 64 image are no square grid"),
        ({"embedding": "none"}, {}, "student has no pooled vector"),
        ({}, {"embedding": "none"}, "teacher has no pooled vector"),
    ],
)
def test_backbones_that_do_not_work(student: dict[str, Any], teacher: dict[str, Any], message: str) -> None:
    height, width = student.get("img_size", (32, 32))
    data = Pictures(np.zeros((8, height, width, 3), np.uint8), np.arange(8), np.eye(8, dtype=np.float32))
    with pytest.raises(ConfigError, match=message):
        distil_backbone(vit(0, **student), teacher_of(**teacher), data, data, PLAN)


def test_pictures_that_do_not_work() -> None:
    with pytest.raises(ConfigError, match="16 images do not fill a batch of 17; lower batch_size"):
        distil_backbone(vit(0), teacher_of(), pictures(), pictures(), replace(PLAN, batch_size=17))
    with pytest.raises(ConfigError, match="no held-out images"):
        distil_backbone(vit(0), teacher_of(), pictures(), pictures(num=0), PLAN)


def test_a_loss_that_is_not_finite_ends_the_run_with_the_student_frozen() -> None:
    student = vit(0)
    with pytest.raises(TrainingError, match=r"not finite.*lower learning_rate"):
        train(student, plan=replace(PLAN, learning_rate=1e30))
    assert not any(parameter.requires_grad for parameter in student.parameters())
    assert not any(module.training for module in student.modules())
