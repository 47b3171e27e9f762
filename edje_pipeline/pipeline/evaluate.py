"""Recall and MRR before and after reranking, text to image and image to text, with confidence intervals.

The first stage ranks the gallery by embedding similarity; the joint encoder reorders the first k.
Metrics per query come from ir-measures; "recall@k" is the share of queries with a right answer among
the first k (Success@k there), as image-text retrieval reports it.

Shape letters: Q queries, n answers of the gallery, k pool size, d depth of a ranking.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edje_pipeline.errors import ConfigError, IndexStateError
from edje_pipeline.pipeline.evaluate_result import METRICS, EvaluateResult, Interval, Row
from edje_pipeline.pipeline.evaluation_sets import EvaluationSet, from_captions, from_qrels
from edje_pipeline.reranker import Reranker, model_name_of
from edje_pipeline.storage.index import Index

DEPTH = 100
"""Answers a ranking keeps at least; the reciprocal rank of a right answer below counts as 0."""
QUERIES_AT_ONCE = 512
PAIRS_AT_ONCE = 20_000
CONFIDENCE = 0.95
DIRECTIONS = ("t2i", "i2t")

Score = Callable[[list[tuple[str, str]]], np.ndarray]


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure."""

    index: str
    captions: tuple[str, ...] = ()
    """Caption files; or `queries` and `qrels`."""
    queries: str = ""
    qrels: str = ""
    model: str | None = None
    directions: tuple[str, ...] = DIRECTIONS
    pool_sizes: tuple[int, ...] = (10,)
    """k: how many of the first stage's answers the joint encoder reorders."""
    fusion_weights: tuple[float, ...] = (0.0,)
    """Score = logit + weight x first-stage similarity; 0 is the reranker alone."""
    gallery: str = "captions"
    include: str = ""
    split: str | None = None
    templates: tuple[str, ...] = ()
    first_caption: bool = False
    on_unknown: str = "error"
    max_queries: int | None = None
    num_resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if bool(self.captions) == bool(self.queries or self.qrels) or bool(self.queries) != bool(self.qrels):
            problems.append("give either --captions, or --queries together with --qrels")
        if not self.pool_sizes or min(self.pool_sizes) < 1:
            problems.append(f"pool sizes are {list(self.pool_sizes)}, expected numbers from 1")
        if not self.fusion_weights or min(self.fusion_weights) < 0:
            problems.append(f"fusion weights are {list(self.fusion_weights)}, expected numbers from 0")
        if set(self.directions) - set(DIRECTIONS) or not self.directions:
            problems.append(f"directions are {list(self.directions)}, expected some of {', '.join(DIRECTIONS)}")
        if self.gallery not in ("captions", "index"):
            problems.append(f"gallery is {self.gallery!r}, expected captions or index")
        if problems:
            raise ConfigError("; ".join(problems))


def run_evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Opens the index and measures.

    Raises:
        IndexStateError: no embeddings in the index, or made with another model.
        InputFileError: captions, queries or judgements that do not fit.
    """
    from edje_pipeline.models.checkpoint import open_model

    begun = time.monotonic()
    index = Index.open(config.index)
    if not index.manifest.embedding_dim:
        raise IndexStateError(f"{config.index} stores no embeddings, so there is no first stage to rerank")
    reranker = Reranker.open(index, config.model)
    if config.captions:
        questions = from_captions(
            config.captions, index.ids(), gallery=config.gallery, include=config.include, split=config.split,
            templates=config.templates, first_only=config.first_caption, on_unknown=config.on_unknown,
        )  # fmt: skip
    else:
        questions = from_qrels(config.queries, config.qrels, index.ids())
    tower = open_model(model_name_of(index, config.model)).load_text_tower()
    similarity = Similarity(tower.encode(questions.texts), index.embeddings(questions.image_ids))
    rows = measure(config, questions, similarity, reranker.predict)
    return EvaluateResult(
        config.index, reranker.spec.name, len(questions.image_ids), len(questions.texts), rows, time.monotonic() - begun
    )


@dataclass(frozen=True)
class Similarity:
    """The first stage's embeddings: texts (T, C) and images (n, C), unit length."""

    texts: np.ndarray
    images: np.ndarray


def measure(config: EvaluateConfig, questions: EvaluationSet, similarity: Similarity, score: Score) -> tuple[Row, ...]:
    """All rows of the table; `score` gives the joint encoder's logits of (text, image_id) pairs."""
    rows: list[Row] = []
    for direction in config.directions:
        if direction == "t2i":
            asked, answers = similarity.texts, similarity.images
            right: Sequence[frozenset[int]] = questions.images_of_text
            queries = questions.sample(config.max_queries, config.seed)
        else:
            asked, answers = similarity.images, similarity.texts
            right = questions.texts_of_image
            judged = np.array([position for position, texts in enumerate(right) if texts])
            chosen = np.random.default_rng(config.seed).permutation(len(judged))[: config.max_queries]
            queries = judged[np.sort(chosen)]
        order, first = rank_first_stage(asked[queries], answers, max(DEPTH, *config.pool_sizes))
        judgements = [right[int(query)] for query in queries]
        before = per_query(order, judgements)
        rows.append(_row(direction, "first stage", 0, 0.0, before, None, config))
        widest = min(max(config.pool_sizes), order.shape[1])
        logits = score_pool(direction, questions, queries, order[:, :widest], score)
        for pool in config.pool_sizes:
            for weight in config.fusion_weights:
                after = per_query(rerank(order, first, logits, min(pool, widest), weight), judgements)
                rows.append(_row(direction, "reranked", pool, weight, after, before, config))
    return tuple(rows)


def rank_first_stage(asked: np.ndarray, answers: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The best `depth` answers of each query, best first: positions (Q, d) and similarities (Q, d)."""
    depth = min(depth, len(answers))
    orders, scores = [], []
    for start in range(0, len(asked), QUERIES_AT_ONCE):
        block = asked[start : start + QUERIES_AT_ONCE] @ answers.T
        best = np.argsort(-block, axis=1, kind="stable")[:, :depth]
        orders.append(best)
        scores.append(np.take_along_axis(block, best, axis=1))
    return np.concatenate(orders), np.concatenate(scores)


def score_pool(
    direction: str, questions: EvaluationSet, queries: np.ndarray, pool: np.ndarray, score: Score
) -> np.ndarray:
    """Logits (Q, k) of every query with its pool."""
    texts, images = questions.texts, questions.image_ids
    parts = []
    step = max(1, PAIRS_AT_ONCE // pool.shape[1])
    for start in range(0, len(queries), step):
        pairs = [
            (texts[query], images[answer]) if direction == "t2i" else (texts[answer], images[query])
            for query, answers in zip(
                queries[start : start + step].tolist(), pool[start : start + step].tolist(), strict=True
            )
            for answer in answers
        ]
        parts.append(score(pairs))
    return np.concatenate(parts).reshape(pool.shape)


def rerank(order: np.ndarray, first: np.ndarray, logits: np.ndarray, pool: int, weight: float) -> np.ndarray:
    """The first `pool` answers by logit + weight x similarity, ties as before; the rest stay behind them."""
    fused = logits[:, :pool] + weight * first[:, :pool]
    new = np.argsort(-fused, axis=1, kind="stable")
    return np.concatenate([np.take_along_axis(order[:, :pool], new, axis=1), order[:, pool:]], axis=1)


def per_query(order: np.ndarray, right: Sequence[frozenset[int]]) -> dict[str, np.ndarray]:
    """Metric name -> value of each query (Q,), by ir-measures."""
    import ir_measures
    from ir_measures import RR, Success

    measures = {Success @ 1: "R@1", Success @ 5: "R@5", Success @ 10: "R@10", RR: "MRR"}
    depth = order.shape[1]
    run = {str(query): {str(answer): float(depth - place) for place, answer in enumerate(answers)}
           for query, answers in enumerate(order.tolist())}  # fmt: skip
    qrels = {str(query): {str(answer): 1 for answer in sorted(answers)} for query, answers in enumerate(right)}
    values = {name: np.zeros(len(order)) for name in METRICS}
    for metric in ir_measures.iter_calc(list(measures), qrels, run):
        values[measures[metric.measure]][int(metric.query_id)] = metric.value
    return values


def bootstrap(values: np.ndarray, num_resamples: int, seed: int) -> Interval:
    """Mean of per-query values in percent, and the percentiles of its bootstrap distribution."""
    values = 100 * values
    if not num_resamples or len(values) < 2:
        return Interval(float(values.mean()), float(values.mean()), float(values.mean()))
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(num_resamples)])
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def _row(
    direction: str, stage: str, pool: int, weight: float, values: dict[str, np.ndarray],
    before: dict[str, np.ndarray] | None, config: EvaluateConfig,
) -> Row:  # fmt: skip
    metrics = {name: bootstrap(values[name], config.num_resamples, config.seed) for name in METRICS}
    gain = None
    if before is not None:
        gain = bootstrap(values["R@1"] - before["R@1"], config.num_resamples, config.seed)
    return Row(direction, stage, pool, weight, metrics, gain)
