"""Trains the models of the recall tables and evaluates each: artists never trained on, concepts never trained on,
photographs; numbers of tokens, codecs, parts of the objective.

    python -m benchmarks.recall_plan --emoji DIR --photos DIR --dino FILE --bert DIR --work DIR --plan explore

--emoji holds train.tar and val.tar (recipes/emoji_corpus.py makes them), --photos images/, train.jsonl and
val.jsonl, --dino a safetensors file of timm's vit_small_patch14_dinov2, --bert a Hugging Face BERT
directory. Runs of one stage share the device, `--workers` at a time. WORK/results/RUN.json appears as each ends;
`python -m benchmarks.recall_tables WORK/results` makes the tables. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.recall_runs import HELD_OUT_ARTIST, Plans, Run
from edje_pipeline.models.assemble import BackboneSource, ModelParts, make_model
from edje_pipeline.models.checkpoint import open_model, save_model
from edje_pipeline.pipeline.evaluate import EvaluateConfig, run_evaluate
from edje_pipeline.pipeline.extract import ExtractConfig, run_extract
from edje_pipeline.pipeline.runner import ExecutorOptions
from edje_pipeline.training.collective import Collective
from edje_pipeline.training.run import TrainJob, prepare, train
from recipes.bundled_model import captions_of

FUSION_WEIGHTS = (0.0, 5.0, 10.0, 20.0, 40.0)
ADAPTER_MLP = 2048
ARTISTS = ("emojione", "fluent", "noto", "openmoji", "twemoji")


@dataclass(frozen=True)
class Inputs:
    """Where everything lies."""

    emoji: Path
    photos: Path | None
    dino: Path
    bert: Path
    work: Path


def write_captions(inputs: Inputs) -> None:
    """Caption files, and the held-out artist's drawings as a tar of their own."""
    folder = inputs.work / "captions"
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = {split: _read_tar(inputs.emoji / f"{split}.tar") for split in ("train", "val")}
    chosen = {
        "artists5": rows["train"],
        "artists4": [row for row in rows["train"] if row["style"] != HELD_OUT_ARTIST],
        "artist": [row for row in rows["train"] if row["style"] == HELD_OUT_ARTIST],
        "val": rows["val"],
    }
    for name, part in chosen.items():
        lines = [json.dumps({"image_id": row["id"], "captions": captions_of(row)}) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    keep = {row["id"].rsplit(".", 1)[0] for row in chosen["artist"]}
    with tarfile.open(inputs.emoji / "train.tar") as source, tarfile.open(folder / "artist.tar", "w") as target:
        for member in source:
            if member.name.rsplit(".", 1)[0] in keep:
                target.addfile(member, source.extractfile(member))
    (folder / "done").write_text("")


def _read_tar(path: Path) -> list[dict[str, Any]]:
    found = []
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name.endswith(".json"):
                data = archive.extractfile(member)
                assert data is not None
                found.append({**json.load(data), "id": member.name.removesuffix(".json")})
    return found


def start_of(inputs: Inputs, run: Run) -> Path:
    """The untrained start of a run."""
    places = "-positions" if run.key_positions else ""
    target = inputs.work / "starts" / f"{run.tokens}-{run.image_size}-{run.num_layers}{places}"
    if (target / "config.json").exists():
        return target
    source = BackboneSource(
        f"timm:vit_small_patch14_dinov2?img_size={run.image_size}&embedding=cls_mean", weights=str(inputs.dino)
    )
    parts = ModelParts(
        joint_encoder=inputs.bert, joint_layers=run.num_layers, sentence_encoder=inputs.bert, squash=True,
        num_compressed_tokens=None if run.tokens == "local" else int(run.tokens), adapter_mlp_dim=ADAPTER_MLP,
        key_positions=run.key_positions,
    )  # fmt: skip
    return make_model(target, target.name, source, parts).path


def continued(inputs: Inputs, run: Run) -> Path:
    """The trained joint encoder of another run behind this run's backbone, whose image size may differ, and its
    adapter, where it gives as many tokens."""
    target = inputs.work / "starts" / run.name
    if (target / "config.json").exists():
        return target
    fresh, trained = open_model(start_of(inputs, run)), open_model(inputs.work / "runs" / run.start / "model")
    old, new = trained.spec.adapter, fresh.spec.adapter
    has_same_adapter = (old.kind, old.num_compressed_tokens) == (new.kind, new.num_compressed_tokens)
    spec = replace(
        fresh.spec, adapter=old if has_same_adapter else new, joint_encoder=trained.spec.joint_encoder, name=run.name
    )
    owner = {"backbone": fresh, "text_tower": fresh, "joint_encoder": trained,
             "adapter": trained if has_same_adapter else fresh}  # fmt: skip
    files = {part: model.path / f"{part}.safetensors" for part, model in owner.items()}
    save_model(target, spec, tokenizer=fresh.path / "tokenizer.json", **files)  # type: ignore[arg-type]
    return target


def job_of(inputs: Inputs, run: Run) -> TrainJob:
    """What `train` is told."""
    out, captions = inputs.work / "runs" / run.name, inputs.work / "captions"
    model = continued(inputs, run) if run.start else start_of(inputs, run)
    teacher = str(inputs.work / "runs" / run.teacher / "model") if run.teacher else ""
    cache = inputs.work / "cache" / f"{run.data.rstrip('45')}-{run.image_size}-{run.recipe.views}"
    common: dict[str, Any] = {"model": str(model), "out": str(out), "recipe": run.recipe, "teacher": teacher,
                              "cache_dir": str(cache), "name": run.name}  # fmt: skip
    if run.data == "photos":
        assert inputs.photos is not None
        images = str(inputs.photos / "images")
        return TrainJob(captions=(str(inputs.photos / "train.jsonl"),), images=images,
                        val_captions=(str(inputs.photos / "val.jsonl"),), **common)  # fmt: skip
    validate = ("artist.jsonl", "") if run.data == "artists4" else ("val.jsonl", str(inputs.emoji / "val.tar"))
    return TrainJob(captions=(str(captions / f"{run.data}.jsonl"),), images=str(inputs.emoji / "train.tar"),
                    val_captions=(str(captions / validate[0]),), val_images=validate[1], **common)  # fmt: skip


def tests_of(inputs: Inputs, run: Run) -> dict[str, tuple[str, str, str]]:
    """Test sets: name -> (images, captions, pattern of image_ids)."""
    captions = inputs.work / "captions"
    if run.data == "photos":
        assert inputs.photos is not None
        return {"photos": (str(inputs.photos / "images"), str(inputs.photos / "val.jsonl"), "")}
    val = (str(inputs.emoji / "val.tar"), str(captions / "val.jsonl"))
    found = {f"concepts-{artist}": (*val, f"{artist}-*") for artist in ARTISTS}
    if run.data == "artists4":
        found["artist"] = (str(captions / "artist.tar"), str(captions / "artist.jsonl"), "")
    return found


def codebook_of(inputs: Inputs, run: Run) -> str | None:
    """The codebook that a quantized phase trained with; None: extraction trains one on its first images."""
    found = sorted((inputs.work / "runs" / run.name / "codecs").glob("*"))
    return str(found[-1]) if found else None


def measure(inputs: Inputs, run: Run) -> dict[str, Any]:
    """Trains, extracts the test images with each codec, evaluates; returns what WORK/results keeps."""
    begun = time.monotonic()
    result = train(job_of(inputs, run), report=_say)
    trained = time.monotonic()
    model, rows = result.model, []
    indexes: dict[tuple[str, str], str] = {}
    for test, (images, captions, include) in tests_of(inputs, run).items():
        # Codecs are compared on the unseen artist alone, or the extraction of a CPU run takes longer than its training.
        codecs = run.codecs if test == "artist" else run.codecs[:1]
        for codec in ("local",) if run.tokens == "local" else codecs:
            if (images, codec) not in indexes:
                index = inputs.work / "runs" / run.name / f"index-{Path(images).stem}-{codec}"
                options = ExecutorOptions(executor="local")
                codebook = codebook_of(inputs, run) if codec.startswith("opq") else None
                run_extract(ExtractConfig(
                    corpus=images, index=str(index), model=model, variant=None if codebook else codec,
                    codebook=codebook, executor=options, quiet=True,
                ))  # fmt: skip
                indexes[(images, codec)] = str(index)
            found = run_evaluate(EvaluateConfig(
                index=indexes[(images, codec)], captions=(captions,), include=include, directions=("t2i",),
                pool_sizes=run.pools, fusion_weights=FUSION_WEIGHTS, first_caption=run.data != "photos",
            ))  # fmt: skip
            rows += [{"test": test, "codec": codec, "texts": found.num_texts, "images": found.num_images, **asdict(row)}
                     for row in found.rows]  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"run": asdict(run), "rows": rows, "train_s": trained - begun, "test_s": time.monotonic() - trained,
            "device": device, "torch": torch.__version__, "last": result.last}  # fmt: skip


def _say(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def run_all(options: argparse.Namespace, inputs: Inputs, runs: list[Run]) -> int:
    """Stage by stage, each run in a process of its own; returns the number of failed runs."""
    results, logs = inputs.work / "results", inputs.work / "logs"
    for folder in (results, logs):
        folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.limit_s
    failed: list[str] = []

    def one(run: Run) -> None:
        if (results / f"{run.name}.json").exists():
            return
        left = deadline - time.monotonic()
        needs = [name for name in (run.teacher, run.start) if name]
        if left < 20 or any(name in failed for name in needs):
            failed.append(run.name)
            return
        command = [sys.executable, "-m", "benchmarks.recall_plan", *sys.argv[1:], "--one", run.name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (logs / f"{run.name}.log").open("w") as log:
            try:
                code = subprocess.run(command, check=False, stdout=log, stderr=log, env=environment, timeout=left)
                is_bad = code.returncode != 0
            except subprocess.TimeoutExpired:
                is_bad = True
        if is_bad:
            failed.append(run.name)
            print(f"{run.name} FAILED; {logs / run.name}.log ends: {(logs / f'{run.name}.log').read_text()[-1500:]}")
        else:
            print(f"{run.name} done, {deadline - time.monotonic():.0f} s left", flush=True)

    for stage in sorted({run.stage for run in runs}):
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(one, [run for run in runs if run.stage == stage]))
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("emoji", "dino", "bert", "work"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--plan", required=True, choices=sorted(Plans().plans))
    parser.add_argument("--only", nargs="+", help="these runs alone")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=1e9, help="no run goes on after this")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--fill", help=argparse.SUPPRESS)
    options = parser.parse_args()
    inputs = Inputs(options.emoji, options.photos, options.dino, options.bert, options.work)
    runs = Plans().plans[options.plan]
    if options.fill:
        begun = time.monotonic()
        prepare(job_of(inputs, next(run for run in runs if run.name == options.fill)), Collective())
        print(f"tokens for {options.fill}: {time.monotonic() - begun:.1f} s", flush=True)
        return 0
    if options.one:
        run = next(run for run in runs if run.name == options.one)
        found = measure(inputs, run)
        target = inputs.work / "results" / f"{run.name}.json"
        target.with_suffix(".tmp").write_text(json.dumps(found, indent=1) + "\n")
        target.with_suffix(".tmp").rename(target)
        return 0
    runs = [run for run in runs if not options.only or run.name in options.only]
    write_captions(inputs)
    fill_caches(inputs, runs)
    return run_all(options, inputs, runs)


def fill_caches(inputs: Inputs, runs: list[Run]) -> None:
    """Starts and token caches, once, so that the runs' processes need not wait for each other."""
    first: dict[tuple[str, int, int], Run] = {}
    for run in runs:
        start_of(inputs, run)
        needed = [inputs.work / "runs" / name / "model" / "config.json" for name in (run.start, run.teacher) if name]
        if all(path.exists() for path in needed):
            first.setdefault((run.data.rstrip("45"), run.image_size, run.recipe.views), run)
    commands = [
        [sys.executable, "-m", "benchmarks.recall_plan", *sys.argv[1:], "--fill", run.name] for run in first.values()
    ]
    for process in [subprocess.Popen(command) for command in commands]:
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
