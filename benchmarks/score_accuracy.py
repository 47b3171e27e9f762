"""What each precision of scoring does to the ranking, on many queries; nothing is timed.

    python -m benchmarks.score_accuracy --index photos.edje --captions captions.jsonl     a trained model
    python -m benchmarks.score_accuracy --bert MINILM --captions captions.jsonl           a body with a fitted head

A query is an image's first caption. Its candidates are that image, the nearest images by mean token,
as a first stage would find them, and random ones. Reference: float32 of the same path. How often the
first image changes depends on how near the first two candidates lie, so their gap is reported too: with
a thousandth of a standard deviation between them any rounding decides.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import table, write_report
from benchmarks.score_model import make_material
from edje_pipeline.models.model_directory import ModelDirectory
from edje_pipeline.stages.score_pairs import PRECISIONS, PairScorer, TextTokens
from edje_pipeline.storage.codecs import Codec, resolve


@dataclass
class Pool:
    """Queries, their candidates, and what scores them."""

    model: ModelDirectory
    codec: Codec
    payloads: np.ndarray
    """uint8 (images, P)"""
    texts: list[str]
    """A text an image."""
    described: str


def pool_of_index(uri: str, captions: Path) -> Pool:
    """The images of an index that have a caption, with the index's own model."""
    from edje_pipeline.reranker import open_fitting_model
    from edje_pipeline.storage.index import Index

    index = Index.open(uri)
    rows = {row["image_id"]: row["captions"][0] for row in map(json.loads, captions.read_text().splitlines())}
    ids = [name for name in index.ids() if name in rows]
    model = open_fitting_model(index, None)
    spec = model.spec.joint_encoder
    described = f"model `{model.spec.name}`, {spec.num_layers} layers, {len(ids)} images of codec {index.codec.name}"
    return Pool(model, index.codec, index.payloads(ids), [rows[name] for name in ids], described)


def pool_of_material(folder: Path, options: argparse.Namespace) -> Pool:
    """The model and tokens of the speed benchmark."""
    material = make_material(folder, num_images=options.images, num_queries=options.images, num_layers=options.layers,
                             bert=options.bert, captions=options.captions)  # fmt: skip
    codec = resolve("float16", num_tokens=material.tokens.shape[1], dim=material.tokens.shape[2])
    return Pool(material.model, codec, codec.encode(material.tokens), material.queries, material.described)


def candidates_of(pool: Pool, num_queries: int, per_query: int) -> tuple[np.ndarray, np.ndarray]:
    """(text, image) of each pair; an image's number is its text's number."""
    rng = np.random.default_rng(0)
    means = pool.codec.decode(pool.payloads).astype(np.float32).mean(axis=1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    queries = rng.permutation(len(means))[:num_queries]
    images = []
    for query in queries.tolist():
        order = np.argsort(-(means @ means[query]))
        order = order[order != query]
        num_near = min((per_query - 1) // 2, len(order))
        rest = order[num_near:]
        others = rng.choice(rest, min(per_query - 1 - num_near, len(rest)), replace=False)
        images.append(np.concatenate([[query], order[:num_near], others]))
    return np.repeat(queries, [len(row) for row in images]), np.concatenate(images)


def ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort()


def compare(found: np.ndarray, expected: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """Differences in standard deviations of the logits, and what happens to each query's ranking."""
    rows = [(found[texts == query], expected[texts == query]) for query in np.unique(texts)]
    spearman = np.array([np.corrcoef(ranks(a), ranks(b))[0, 1] for a, b in rows])
    difference = (found - expected) / expected.std()
    return {
        "rms": float(np.sqrt(np.square(difference).mean())),
        "max": float(np.abs(difference).max()),
        "spearman_mean": float(spearman.mean()),
        "spearman_p1": float(np.quantile(spearman, 0.01)),
        "spearman_min": float(spearman.min()),
        "spearman_99": float((spearman >= 0.99).mean()),
        "same_first": float(np.mean([a.argmax() == b.argmax() for a, b in rows])),
        "all_pairs": float(np.corrcoef(ranks(found), ranks(expected))[0, 1]),
    }


def spread_of(expected: np.ndarray, texts: np.ndarray) -> str:
    """How far the logits lie apart."""
    rows = [np.sort(expected[texts == query]) for query in np.unique(texts)]
    gaps = np.array([row[-1] - row[-2] for row in rows]) / expected.std()
    inside = float(np.mean([row.std() for row in rows]))
    return (
        f"Standard deviation of the logits {expected.std():.3g}, within a query {inside:.3g}; the first candidate "
        f"leads the second by {np.median(gaps):.3f} standard deviations (median), {np.quantile(gaps, 0.1):.3f} "
        f"(a tenth of the queries), {np.quantile(gaps, 0.01):.4f} (a hundredth)."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--per-query", type=int, default=20)
    parser.add_argument("--index", help="extracted with a trained model")
    parser.add_argument("--bert", type=Path, help="without --index: Hugging Face BERT directory")
    parser.add_argument("--captions", type=Path, help="JSONL with `captions`, and `image_id` for --index")
    parser.add_argument("--images", type=int, default=400, help="without --index")
    parser.add_argument("--layers", type=int, default=6, help="without --index")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.index and options.captions is None:
        parser.error("--index needs --captions")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="edje-accuracy-") as name:
        pool = (
            pool_of_index(options.index, options.captions) if options.index else pool_of_material(Path(name), options)
        )
        encoder, lists = pool.model.load_joint_encoder, pool.model.load_tokenizer().encode(pool.texts)
        texts, images = candidates_of(pool, options.queries, options.per_query)
        tokens, found = TextTokens.from_lists(lists), {}
        for precision in PRECISIONS:
            scorer = PairScorer(encoder(), pool.codec, device="cpu", precision=precision)
            found[precision] = scorer.score(pool.payloads, images, tokens, texts)
            print(f"{precision}: {len(texts)} pairs scored", flush=True)
    expected, rows = found["float32"], []
    for precision in PRECISIONS[1:]:
        value = compare(found[precision], expected, texts)
        rows.append([precision, f"{value['rms']:.4f}", f"{value['max']:.3f}", f"{value['spearman_mean']:.4f}",
                     f"{value['spearman_p1']:.4f}", f"{value['spearman_min']:.4f}", f"{value['spearman_99']:.1%}",
                     f"{value['all_pairs']:.5f}", f"{value['same_first']:.2%}"])  # fmt: skip
    header = ["precision", "rms difference", "largest difference", "Spearman, mean of the queries", "1st percentile",
              "least", "queries of 0.99 or more", "Spearman of all pairs", "same first"]  # fmt: skip
    about = (
        f"{len(np.unique(texts))} queries x {options.per_query} candidates; {pool.described}. "
        f"{spread_of(expected, texts)} Differences from float32, in standard deviations of the logits."
    )
    write_report("score_accuracy", "Accuracy of the scoring precisions", [about, "", *table(header, rows)],
                 out=options.out, module="score_accuracy", packages=("torch", "numpy"))  # fmt: skip


if __name__ == "__main__":
    main()
