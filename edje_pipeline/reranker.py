"""Scoring in process, without ray: a joint encoder over an open index.

index = Index.open("photos.edje")
reranker = Reranker.open(index)
reranker.predict([("a red apple", "a.jpg")])            # float32 (n,)
reranker.rank("a red apple", ["a.jpg", "b.jpg"], top_k=1)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from edje_pipeline.errors import (
    ConfigError,
    CorruptionError,
    IndexStateError,
    ModelError,
    ShapeMismatchError,
    UnknownIdError,
)
from edje_pipeline.models.checkpoint import ModelDirectory, open_model
from edje_pipeline.models.spec import ModelSpec
from edje_pipeline.models.tokenizer import Tokenizer
from edje_pipeline.stages.score_pairs import PairScorer, TextTokens
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.manifest import Manifest
from edje_pipeline.storage.payloads import read_payloads

CHUNK_BYTES = 256 << 20
"""Payload bytes read at a time by `predict`."""
MODEL_PARTS = ("backbone", "preprocess", "adapter")
"""What decides the stored tokens: an index fits a model only when all of these are the same."""


class RankedImage(NamedTuple):
    """One place of a ranked list."""

    image_id: str
    score: float
    """The joint encoder's logit."""
    rank: int
    """From 1."""


@dataclass(frozen=True)
class OpenScorer:
    """A model opened for an index."""

    model: ModelDirectory
    tokenizer: Tokenizer
    scorer: PairScorer


def model_name_of(index: Index, model: str | Path | None) -> str:
    """The model to open: the one given, else the one the index was made with.

    Raises:
        IndexStateError: the index does not say.
    """
    if model is not None:
        return str(model)
    head = index.manifest.head
    name = head.config.get("model") or head.model.get("location")
    if not name:
        raise IndexStateError("the index does not name the model it was made with; give it with --model (model=)")
    return str(name)


def open_fitting_model(index: Index, model: str | Path | None) -> ModelDirectory:
    """Opens the model and checks that the index's tokens are its own; loads no weights.

    Raises:
        ModelNotFoundError: there is no such model.
        ShapeMismatchError, IndexStateError: see `check_fits`.
    """
    directory = open_model(model_name_of(index, model))
    check_fits(index.manifest, directory.spec)
    return directory


def check_fits(manifest: Manifest, spec: ModelSpec) -> None:
    """A joint encoder may differ from the index's, the parts that made the tokens may not.

    Raises:
        ShapeMismatchError: the token widths differ.
        IndexStateError: the index holds tokens of another backbone, preprocessing or adapter, or raw
            vision tokens; names every part that differs.
    """
    tokens = manifest.tokens
    stored = manifest.fingerprints
    hint = "give the model the index was made with, or run `edje-pipeline rebuild` with this one"
    if manifest.head.model.get("tokens") == "vision" or stored.get("adapter") in ("", "none"):
        raise IndexStateError(
            "the index holds raw vision tokens, without an adapter, and cannot be scored; "
            "make a variant with an adapter from it with `edje-pipeline rebuild`"
        )
    if tokens.dim != spec.joint_encoder.width:
        raise ShapeMismatchError(
            f"the index holds tokens of width {tokens.dim} ({tokens.codec}), "
            f"the joint encoder of model {spec.name!r} reads width {spec.joint_encoder.width}; {hint}"
        )
    differing = []
    for part in MODEL_PARTS:
        ours = getattr(spec, part).fingerprint
        if stored[part] != ours:
            differing.append(f"{part} ({stored[part][:12]} in the index, {ours[:12]} in the model)")
    if differing:
        raise IndexStateError(f"the index was not made with model {spec.name!r}: {'; '.join(differing)} differ; {hint}")


def open_scorer(
    index: Index,
    model: str | Path | None = None,
    *,
    precision: str | None = None,
    device: str | None = None,
    batch_tokens: int | None = None,
    compiled: bool = False,
    kernels: str = "torch",
) -> OpenScorer:
    """Loads the joint encoder that goes with an index; see `PairScorer` for the options.

    Raises:
        ModelNotFoundError, ShapeMismatchError, IndexStateError: see `open_fitting_model`.
        ConfigError, DeviceError: the device, the precision or the kernels cannot be had here.
    """
    directory = open_fitting_model(index, model)
    encoder = directory.load_joint_encoder()
    scorer = PairScorer(
        encoder,
        index.codec,
        device=device,
        precision=precision,
        batch_tokens=batch_tokens,
        compiled=compiled,
        kernels=kernels,
    )
    return OpenScorer(directory, directory.load_tokenizer(), scorer)


class Reranker:
    """Scores texts against stored images; threads must not share one."""

    def __init__(self, index: Index, opened: OpenScorer) -> None:
        self.index = index
        self.spec = opened.model.spec
        self._tokenizer, self._scorer = opened.tokenizer, opened.scorer

    @classmethod
    def open(
        cls,
        index: Index | str | Path,
        model: str | Path | None = None,
        precision: str | None = None,
        device: str | None = None,
        kernels: str = "torch",
    ) -> Reranker:
        """Opens the model for an index.

        Args:
            index: an open index, or its directory or URI.
            model: directory, `hf:org/name` or bundled name; None: the one the index was made with.
            precision: `float32`, `bfloat16` or `int8` (CPU only); None: what suits the device.
            device: `cpu`, `cuda`, `cuda:1`; None: the GPU when there is one.
            kernels: `torch`, or `own`: an experiment for bfloat16 on a GPU, see docs/performance.md.

        Raises:
            ModelNotFoundError: there is no such model.
            IndexStateError, ShapeMismatchError: the index was made with another model.
            ConfigError: precision or kernels are not for the device.
            DeviceError: the device is not there, or cannot run the kernels.
        """
        opened = index if isinstance(index, Index) else Index.open(str(index))
        return cls(opened, open_scorer(opened, model, precision=precision, device=device, kernels=kernels))

    @property
    def precision(self) -> str:
        """What it computes in."""
        return self._scorer.precision

    @property
    def device(self) -> str:
        """Where it computes."""
        return str(self._scorer.device)

    def predict(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Scores (text, image_id) pairs.

        Returns:
            Logits, float32 (n,), in the order of the pairs.

        Raises:
            UnknownIdError: an image is not in the index.
            CorruptionError, ModelError: a score is not finite; the message names the pair.
        """
        if not len(pairs):
            return np.empty(0, np.float32)
        texts = pa.array([text for text, _ in pairs], pa.string()).dictionary_encode()
        images = pa.array([image_id for _, image_id in pairs], pa.string()).dictionary_encode()
        names = texts.dictionary.to_pylist()
        return self._score(
            names, texts.indices.to_numpy().astype(np.int64), images.dictionary, images.indices.to_numpy()
        )

    def rank(self, query: str, ids: Sequence[str], top_k: int | None = None) -> list[RankedImage]:
        """Orders images by their score for one text; equal scores by image_id. An id given twice counts once.

        Raises:
            UnknownIdError: an image is not in the index.
            ConfigError: `top_k` is not positive.
        """
        if top_k is not None and top_k < 1:
            raise ConfigError(f"top_k is {top_k}; expected at least 1, or None for all")
        if isinstance(ids, str):
            raise ConfigError("ids is one string; expected a sequence of image ids")
        distinct = list(dict.fromkeys(ids))
        if not distinct:
            return []
        everywhere = np.zeros(len(distinct), np.int64)
        scores = self._score([query], everywhere, pa.array(distinct, pa.string()), np.arange(len(distinct))).tolist()
        ordered = sorted(zip(distinct, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))
        return [RankedImage(name, score, rank) for rank, (name, score) in enumerate(ordered[:top_k], start=1)]

    def _score(
        self, texts: list[str], text_index: np.ndarray, image_ids: pa.Array, image_index: np.ndarray
    ) -> np.ndarray:
        tokens = TextTokens.from_lists(self._tokenizer.encode(texts))
        shards, rows = self._locate(image_ids)
        order = np.lexsort((rows, shards))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))  # of each image in the order of the index
        pair_places = place[image_index]
        pair_order = np.argsort(pair_places, kind="stable")
        sorted_places = pair_places[pair_order]
        scores = np.empty(len(image_index), np.float32)
        for start, stop in self._chunks(len(order)):
            first, last = np.searchsorted(sorted_places, [start, stop])
            chosen = pair_order[first:last]
            payloads, names, _ = read_payloads(self.index, shards[order[start:stop]], rows[order[start:stop]])
            local = sorted_places[first:last] - start
            found = self._scorer.score(payloads, local, tokens, text_index[chosen])
            if not np.isfinite(found).all():
                bad = int(np.flatnonzero(~np.isfinite(found))[0])
                text, image = texts[int(text_index[chosen[bad]])], int(local[bad])
                raise_not_finite(self._scorer, payloads[image], f"text {text!r}", names[image].as_py(), found[bad])
            scores[chosen] = found
        return scores

    def _locate(self, image_ids: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        shards, rows = self.index.locate(image_ids)
        shards, rows = np.asarray(shards), np.asarray(rows)
        if (shards < 0).any():
            missing = image_ids.filter(pa.array(shards < 0))
            shown = ", ".join(repr(name) for name in missing.slice(0, 3).to_pylist())
            raise UnknownIdError(f"the index does not hold {len(missing):,} of the image ids, such as {shown}")
        return shards, rows

    def _chunks(self, num_images: int) -> Iterator[tuple[int, int]]:
        size = max(1, CHUNK_BYTES // self.index.manifest.tokens.payload_bytes)
        for start in range(0, num_images, size):
            yield start, min(start + size, num_images)


def raise_not_finite(scorer: Any, payload: np.ndarray, query: str, image_id: str, logit: float) -> None:
    """Says whether the stored tokens or the model is to blame for a score that is not finite.

    Raises:
        CorruptionError: the tokens. ModelError: the model.
    """
    if not np.isfinite(scorer.codec.decode(payload[None])).all():
        raise CorruptionError(
            f"the stored tokens of image {image_id!r} are not finite, so {query} cannot be scored with it; "
            "extract the image again"
        )
    raise ModelError(
        f"the joint encoder gave {logit} for {query} and image {image_id!r}, whose stored tokens are finite; "
        "check the model, or use precision float32"
    )
