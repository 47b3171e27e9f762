"""What a change costs against a full extraction: 1 % new images, another codec, the second half after a crash.

python -m benchmarks.changes --images FOLDER_OF_JPEGS

One process, the local executor, one model: torch's import and the first forward pass are paid before the
clock starts. The model is a ViT-S/16 with random weights and a 64-token adapter, so that the backbone dominates
as it does in production; scale decides how much the fixed costs weigh.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.corpus import make_corpus
from benchmarks.report import table, write_report
from edje_pipeline.errors import EdjeError
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.pipeline.extract import ExtractConfig, run_extract
from edje_pipeline.pipeline.rebuild import RebuildConfig, run_rebuild
from edje_pipeline.pipeline.runner import ExecutorOptions
from edje_pipeline.pipeline.train_codec import train_from_index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.snapshots import rollback

LOCAL = ExecutorOptions(executor="local")


def timed(function: Any, config: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function(config)
    return time.perf_counter() - started, result


def train_codebook(paths: tuple[str, str]) -> Any:
    return train_from_index(paths[0], "opq16", paths[1])


class StopError(EdjeError):
    """The benchmark's own crash."""


def interrupted(config: ExtractConfig, after_rows: int) -> None:
    """Runs until so many rows are journalled, then fails the way a full disk does."""
    from edje_pipeline.storage.staging import Staging

    original = Staging.journal

    def journal(self: Staging, receipts: Any) -> Any:
        if self.covered.num_rows >= after_rows:
            raise StopError("stopped by the benchmark")
        return original(self, receipts)

    Staging.journal = journal  # type: ignore[method-assign]
    try:
        run_extract(config)
    except StopError:
        return
    finally:
        Staging.journal = original  # type: ignore[method-assign]
    raise SystemExit("the run ended before the benchmark could stop it; give more --num-images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=600)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=Path, help="folder of JPEG files; else synthetic ones")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        corpus, about = make_corpus(root / "images", options.num_images, images=options.images)
        model = write_random_model(
            root / "model",
            size="demo",
            num_compressed_tokens=64,
            backbone="timm:vit_small_patch16_224",
            backbone_options={"img_size": options.image_size},
        )
        base = {"corpus": str(corpus), "model": str(model.path), "executor": LOCAL, "quiet": True}
        run_extract(ExtractConfig(**base, index=str(root / "warm"), limit=32))
        full_s, full = timed(run_extract, ExtractConfig(**base, index=str(root / "index")))
        rows = [["full extract", options.num_images, f"{full_s:.2f}", "1", ""]]

        again_s, again = timed(run_extract, ExtractConfig(**base, index=str(root / "index")))
        assert again.num_computed == 0
        rows.append(["the same command again", 0, f"{again_s:.2f}", f"{again_s / full_s:.4f}", ""])

        num_new = max(1, options.num_images // 100)
        for number, source in enumerate(sorted(corpus.iterdir())[:num_new]):
            data = source.read_bytes()
            (corpus / f"new-{number}.jpg").write_bytes(data + b"\0" * (number + 1))
        more_s, more = timed(run_extract, ExtractConfig(**base, index=str(root / "index")))
        assert more.num_accepted == num_new
        assert more.num_unchanged == options.num_images
        rows.append(["1 % new images", num_new, f"{more_s:.2f}", f"{more_s / full_s:.4f}", "<= 0.03"])

        codebook = root / "opq16.safetensors"
        train_s, _ = timed(train_codebook, (str(root / "index"), str(codebook)))
        rows.append(["train-codec opq16 (once)", 0, f"{train_s:.2f}", f"{train_s / full_s:.4f}", ""])
        for variant, book in (("1kb", str(codebook)), ("int8", None)):
            config = RebuildConfig(
                index=str(root / "index"),
                variant=variant,
                codebook=book,
                executor=LOCAL,
                quiet=True,
                allow_lossy=True,
            )
            rebuild_s, _ = timed(run_rebuild, config)
            ratio = f"{rebuild_s / full_s:.4f}"
            rows.append([f"rebuild to {variant}", full.num_accepted + num_new, f"{rebuild_s:.2f}", ratio, "<= 0.05"])
            rollback(Location.parse(root / "index"))
        for path in corpus.glob("new-*.jpg"):
            path.unlink()
        broken = ExtractConfig(**base, index=str(root / "broken"))
        interrupted(broken, options.num_images // 2)
        resumed_s, resumed = timed(run_extract, broken)
        share = resumed.num_resumed / options.num_images
        rows.append(
            [
                f"resume after {share:.0%}",
                resumed.num_computed,
                f"{resumed_s:.2f}",
                f"{resumed_s / full_s:.3f}",
                "<= 0.55",
            ]
        )
        shutil.rmtree(root / "broken")
    setting = f"ViT-S/16 at {options.image_size} px, random weights, 64 x 384 tokens, local executor"
    lines = [
        f"{about}. {setting}, {len(os.sched_getaffinity(0))} cores.",
        "",
        *table(["what", "images computed", "wall s", "ratio to full", "budget"], rows),
    ]
    write_report("changes", "What a change costs", lines, out=options.out)


if __name__ == "__main__":
    main()
