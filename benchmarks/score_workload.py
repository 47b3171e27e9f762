"""What the scoring benchmark scores, and the sides that do it; see `benchmarks.score_speed`."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.score_model import Material, make_material
from benchmarks.score_rivals import CrossEncoderRival, Rivals
from edje_pipeline import reranker
from edje_pipeline.pipeline.score import ScoreConfig, run_score
from edje_pipeline.stages.score_pairs import BATCH_TOKENS
from edje_pipeline.storage.codecs import train_pq
from edje_pipeline.storage.index import Index
from tests.index_util import write_index

PRECISIONS = ("float32", "bfloat16", "int8")
REFINE_TOP = 3
"""Of the sides whose name ends in `refined`: each query's best, scored again in float32."""


class Workload:
    """Indexes and input files on disk, and the sides that score them."""

    def __init__(
        self,
        folder: Path,
        material: Material,
        indexes: dict[str, Index],
        texts: np.ndarray,
        images: np.ndarray,
        *,
        threads: int,
        rival_queries: int | None = None,
    ) -> None:
        """
        Args:
            indexes: by what their images take; all hold `material.tokens` in the order of their ids.
            texts: int (n,), ascending: the query of each pair.
            images: int (n,): its image.
            rival_queries: the rivals score the pairs of so many queries, spread evenly; None: all.
        """
        self.folder, self.material, self.indexes, self.threads = folder, material, indexes, threads
        self.texts, self.images = texts, images
        num_queries = len(material.queries)
        sample = np.linspace(0, num_queries - 1, rival_queries or num_queries).astype(int)
        self.sampled = np.flatnonzero(np.isin(texts, sample))
        names, ids = [f"q{number:05d}" for number in range(num_queries)], next(iter(indexes.values())).ids()
        self.pairs = [(names[t], ids[i]) for t, i in zip(texts, images, strict=True)]
        pq.write_table(pa.table({"query_id": names, "text": material.queries}), folder / "q.parquet")
        columns = {"query_id": [q for q, _ in self.pairs], "image_id": [i for _, i in self.pairs]}
        pq.write_table(pa.table(columns), folder / "c.parquet")
        self.lists = material.model.load_tokenizer().encode(material.queries)
        self.rivals = Rivals(material.model.load_joint_encoder(), self.lists, material.tokens)
        self.cross_encoder, self.missing = self._cross_encoder()
        self.scores: dict[str, np.ndarray] = {}
        self.summaries: dict[str, str] = {}
        self.num_pairs: dict[str, int] = {}

    def _cross_encoder(self) -> tuple[CrossEncoderRival | None, str]:
        """The rival, or None and why there is none."""
        tokenizer = self.material.model.load_tokenizer().to_json()
        try:
            return CrossEncoderRival(self.rivals, tokenizer, self.material.queries, self.folder / "cross-encoder"), ""
        except ImportError as error:
            missing = f"CrossEncoder left out: {error}; pip install edje-pipeline[bench]"
            print(missing, flush=True)
            return None, missing

    def ours(self, name: str, size: str, precision: str, refine_top: int) -> None:
        """Scores one index and keeps the scores and the summary."""
        out = self.folder / "out"
        result = run_score(
            ScoreConfig(
                index=str(self.indexes[size].location),
                queries=str(self.folder / "q.parquet"),
                candidates=str(self.folder / "c.parquet"),
                out=str(out),
                precision=precision,
                refine_top=refine_top,
                device="cpu",
                num_workers=0,
                num_threads=self.threads,
                overwrite=True,
                quiet=True,
            )
        )
        found = pq.read_table(out / "results")
        keys = zip(found["query_id"].to_pylist(), found["image_id"].to_pylist(), strict=True)
        scores = dict(zip(keys, found["score"].to_pylist(), strict=True))
        self.scores[name] = np.array([scores[pair] for pair in self.pairs], np.float32)
        self.summaries[name] = result.to_text()
        shutil.rmtree(out)

    def sides(self, refined: Sequence[str] = ()) -> dict[str, Callable[[], None]]:
        """Name -> what scores its pairs. Args: refined: precisions that come with `REFINE_TOP` as well."""

        def rival(name: str, call: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[], None]:
            def run() -> None:
                torch.set_num_threads(self.threads)
                self.scores[name] = call(self.texts[self.sampled], self.images[self.sampled])

            self.num_pairs[name] = len(self.sampled)
            return run

        def our_side(name: str, size: str, precision: str, refine_top: int) -> Callable[[], None]:
            self.num_pairs[name] = len(self.pairs)
            return lambda: self.ours(name, size, precision, refine_top)

        rivals = self.rivals
        sides = {
            "authors": rival("authors", rivals.authors),
            "transformers": rival("transformers", rivals.padded),
            "transformers dense": rival("transformers dense", lambda t, i: rivals.dense(t, i, BATCH_TOKENS["cpu"])),
            "text only": rival("text only", lambda t, _: rivals.text_only(t)),
        }
        if self.cross_encoder is not None:
            cross_encoder = self.cross_encoder
            sides["CrossEncoder"] = rival("CrossEncoder", lambda t, _: cross_encoder.predict(t))
        for size in self.indexes:
            for precision in PRECISIONS:
                name = f"ours {precision}, {size}"
                sides[name] = our_side(name, size, precision, 0)
                if precision in refined:
                    name = f"ours {precision} refined, {size}"
                    sides[name] = our_side(name, size, precision, REFINE_TOP)
        return sides


def random_workload(folder: Path, options: argparse.Namespace) -> Workload:
    """Made-up or captioned material, random candidates."""
    material = make_material(
        folder,
        num_images=options.images,
        num_queries=options.queries,
        num_layers=options.layers,
        bert=options.bert,
        captions=options.captions,
    )
    tokens, num_queries = material.tokens, len(material.queries)
    indexes = {"49 kB": write_index(folder / "49kb", material.model, num_images=len(tokens), tokens=tokens,
                                    shard_rows=1024, row_group_rows=128)}  # fmt: skip
    if not options.skip_1kb:
        codec = train_pq(tokens[:64], 16, "opq")
        indexes["1 kB"] = write_index(
            folder / "1kb", material.model, num_images=len(tokens), tokens=tokens, codec=codec, shard_rows=8192
        )
    rng = np.random.default_rng(1)
    images = [rng.choice(len(tokens), options.per_query, replace=False) for _ in range(num_queries)]
    texts = np.repeat(np.arange(num_queries), options.per_query)
    return Workload(
        folder, material, indexes, texts, np.concatenate(images), threads=options.threads,
        rival_queries=options.rival_queries,
    )  # fmt: skip


def index_workload(folder: Path, options: argparse.Namespace) -> Workload:
    """A real index with its own model; queries are captions, candidates what `retrieve` finds for them."""
    from edje_pipeline.pipeline.retrieve import RetrieveConfig, run_retrieve

    index = Index.open(options.index)
    rows = {row["image_id"]: row["captions"] for row in map(json.loads, options.captions.read_text().splitlines())}
    ids = index.ids()
    texts = [text for place in range(2) for name in ids for text in rows.get(name, [])[place : place + 1]]
    queries = list(dict.fromkeys(texts))[: options.queries]
    names = [f"q{number:05d}" for number in range(len(queries))]
    pq.write_table(pa.table({"query_id": names, "text": queries}), folder / "retrieve.parquet")
    found = folder / "found.parquet"
    run_retrieve(
        RetrieveConfig(index=str(index.location), queries=str(folder / "retrieve.parquet"), out=str(found),
                       top_k=options.per_query, quiet=True)
    )  # fmt: skip
    table = pq.read_table(found)
    number_of = {name: number for number, name in enumerate(ids)}
    images = np.array([number_of[name] for name in table["image_id"].to_pylist()])
    numbers = np.array([int(name[1:]) for name in table["query_id"].to_pylist()])
    order = np.argsort(numbers, kind="stable")
    model = reranker.open_fitting_model(index, None)
    described = f"{model.spec.joint_encoder.num_layers} layers, `{model.spec.name}`, candidates retrieved"
    material = Material(model, index.tokens(ids).astype(np.float16), queries, described)
    return Workload(
        folder, material, {index.codec.name: index}, numbers[order], images[order], threads=options.threads,
        rival_queries=options.rival_queries,
    )  # fmt: skip
