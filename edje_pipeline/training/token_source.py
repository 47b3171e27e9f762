"""Where a training step gets its vision tokens from: an index of raw tokens, the images themselves, or a cache.

The backbone is frozen, so its tokens never change: with an index of variant `raw`, or with the cache
that `cache_tokens` writes, an epoch costs no vision forward.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from edje_pipeline.errors import ConfigError, InputFileError, ShapeMismatchError
from edje_pipeline.models.backbone import Backbone
from edje_pipeline.models.cpu_linear import with_frozen_linears
from edje_pipeline.models.spec import fingerprint_of
from edje_pipeline.stages.decode import decode_batch
from edje_pipeline.storage.arrow import numpy_from_fixed_binary
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location, fsync_dir
from edje_pipeline.storage.sources import SourceOptions, open_source, read_images
from edje_pipeline.training.augment import Augmentation, augment

BATCH_IMAGES = 64
DECODE_THREADS = 8


class TokenSource(Protocol):
    """Vision tokens of a fixed list of images, by position in that list.

    Shape letters: n images asked for, N vision tokens, D backbone width, R pooled width.
    """

    image_ids: Sequence[str]

    def tokens(self, positions: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """(n,) int64 -> (n, N, D) float16 or float32.

        Args:
            positions: which images.
            views: (n,) int64, which view of each; view 0, the default, is the image as it is. A source
                without views gives every image as it is.
        """

    def pooled(self, positions: np.ndarray) -> np.ndarray | None:
        """(n,) -> the backbone's pooled vectors before any map or normalisation, float32 (n, R); None: not known."""


class IndexTokens:
    """An index of variant `raw`."""

    def __init__(self, index: Index, backbone_width: int, num_vision_tokens: int, pooling: str = "") -> None:
        """Args: index: an open one. backbone_width, num_vision_tokens: of the model. pooling: its embedding kind.

        Raises:
            ShapeMismatchError: the index holds tokens of another shape, e.g. compressed ones.
        """
        spec = index.manifest.tokens
        if (spec.num_tokens, spec.dim) != (num_vision_tokens, backbone_width):
            raise ShapeMismatchError(
                f"{index.location} holds {spec.num_tokens} x {spec.dim} tokens an image, the backbone gives "
                f"{num_vision_tokens} x {backbone_width}; train from an index made with --variant raw and this model"
            )
        self.index = index
        self.image_ids: Sequence[str] = index.ids()
        self._pooling = pooling
        self._width = backbone_width

    def tokens(self, positions: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        del views
        return self.index.tokens([self.image_ids[int(position)] for position in positions])

    def pooled(self, positions: np.ndarray) -> np.ndarray | None:
        """Known for mean pooling, and for [CLS] + mean where the stored embedding is that vector at unit length:
        its mean half is known from the tokens, which gives the length back."""
        if self._pooling not in ("mean", "cls_mean"):
            return None
        parts = [self.tokens(positions[start : start + BATCH_IMAGES]).astype(np.float32).mean(axis=1)
                 for start in range(0, len(positions), BATCH_IMAGES)]  # fmt: skip
        mean = np.concatenate(parts)
        if self._pooling == "mean":
            return mean
        if self.index.manifest.embedding_dim != 2 * self._width:
            return None
        unit = self.index.embeddings([self.image_ids[int(position)] for position in positions])
        length = np.linalg.norm(mean, axis=1) / np.linalg.norm(unit[:, self._width :], axis=1)
        return unit * length[:, None]


class ImageTokens:
    """The images themselves, through the backbone every time they are asked for."""

    def __init__(
        self,
        corpus: str,
        backbone: Backbone,
        *,
        kind: str = "auto",
        device: str = "cpu",
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        """Args: corpus, kind: as for extraction. backbone: frozen. device: where it runs. augmentation: how views
        above 0 differ. seed: of the views."""
        source = open_source(corpus, kind, options=SourceOptions())
        self._listing = pa.Table.from_batches(list(source.list_batches()))
        self._source = source.to_dict()
        self.image_ids: Sequence[str] = self._listing.column("image_id").to_pylist()
        self._backbone = backbone.to(device)
        with_frozen_linears(self._backbone)
        self._device = torch.device(device)
        self._augmentation = augmentation or Augmentation()
        self._seed = seed

    def fingerprint(self) -> str:
        """Of the images as they lie there: names and places; of local files the size and time of change too.

        A cache of tokens is used again while this stays the same. Contents are not read for it, so a file in a bucket
        that was written over by another of the same name goes unnoticed.
        """
        found: list[Any] = [self._listing.column(name).to_pylist() for name in ("image_id", "offset", "length")]
        for uri in self._listing.column("container").unique().to_pylist():
            path = Path(Location.parse(uri).path) if uri.startswith("file://") else None
            state = path.stat() if path is not None and path.exists() else None
            found.append([uri, state.st_size, state.st_mtime_ns] if state else [uri])
        return fingerprint_of(found)

    def tokens(self, positions: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        return self.encode(self.pixels(positions), positions, views)[0]

    def pooled(self, positions: np.ndarray) -> np.ndarray | None:
        parts = [
            self.encode(self.pixels(chunk), chunk)[1]
            for chunk in (positions[start : start + BATCH_IMAGES] for start in range(0, len(positions), BATCH_IMAGES))
        ]
        found = [part for part in parts if part is not None]
        return np.concatenate(found) if len(found) == len(parts) and found else None

    def pixels(self, positions: np.ndarray) -> np.ndarray:
        """Decoded and resized images, uint8 (n, H, W, 3).

        Raises:
            InputFileError: an image cannot be read or decoded; names it and why.
        """
        listed = self._listing.take(pa.array(positions))
        rows = listed.add_column(0, "row", pa.array(positions, pa.int64()))
        decoded = decode_batch(rows, read_images(self._source, rows), self._backbone.preprocess)
        for image_id, message in zip(
            decoded["image_id"].to_pylist(), decoded["reject_message"].to_pylist(), strict=True
        ):
            if message is not None:
                raise InputFileError(
                    f"image {image_id!r} cannot be used for training: {message}; "
                    "fix it, remove it, or train from an index, which leaves such images out"
                )
        height, width = self._backbone.preprocess.image_size
        return numpy_from_fixed_binary(decoded["pixels"]).reshape(-1, height, width, 3)

    @torch.inference_mode()
    def encode(
        self, pixels: np.ndarray, positions: np.ndarray, views: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens (n, N, D) float16 and pooled vectors (n, R) of one pass through the backbone."""
        values = torch.from_numpy(pixels.copy()).to(self._device)
        changed = np.flatnonzero(views) if views is not None else np.empty(0, np.int64)
        if len(changed):
            assert views is not None
            keys = [[self._seed, int(views[place]), int(positions[place])] for place in changed]
            place_t = torch.from_numpy(changed).to(self._device)
            values[place_t] = augment(values[place_t], self._augmentation.draw(keys), self._augmentation)
        normalised = self._backbone.normalise(values)
        tokens, pooled = self._backbone.trunk(normalised.to(self._backbone.dtype))
        return tokens.half().cpu().numpy(), None if pooled is None else pooled.float().cpu().numpy()

    def decoded_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions, pixels) of all images in order; some batches are decoded ahead, in threads."""
        total = len(self.image_ids)
        chunks = [np.arange(start, min(start + BATCH_IMAGES, total)) for start in range(0, total, BATCH_IMAGES)]
        with ThreadPoolExecutor(DECODE_THREADS) as pool:
            ahead: deque[tuple[np.ndarray, Future[np.ndarray]]] = deque()
            for chunk in chunks:
                ahead.append((chunk, pool.submit(self.pixels, chunk)))
                if len(ahead) > DECODE_THREADS:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()


class CachedTokens:
    """Tokens on disk, memory-mapped; see `cache_tokens`."""

    def __init__(self, directory: Path, image_ids: Sequence[str]) -> None:
        self.image_ids = image_ids
        self._tokens = np.load(directory / "tokens.npy", mmap_mode="r")
        path = directory / "pooled.npy"
        self._pooled = np.load(path, mmap_mode="r") if path.exists() else None

    def tokens(self, positions: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        return np.asarray(self._tokens[0 if views is None else views % len(self._tokens), positions])

    def pooled(self, positions: np.ndarray) -> np.ndarray | None:
        return None if self._pooled is None else np.asarray(self._pooled[positions])


def cache_tokens(source: ImageTokens, directory: Path, fingerprint: str, num_views: int = 1) -> CachedTokens:
    """Passes every image through the backbone once a view and keeps the tokens as float16 in `directory`.

    Args:
        source: the images.
        directory: kept and used again while `fingerprint` is the same.
        fingerprint: of backbone, preprocessing, list of images and views.
        num_views: V; the file holds (V, n, N, D).
    """
    marker = directory / "fingerprint"
    if marker.exists() and marker.read_text() == fingerprint:
        return CachedTokens(directory, source.image_ids)
    directory.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    if not source.image_ids:
        raise ConfigError("the corpus has no image to train on")
    # Renamed when whole: another run may have the old file mapped, which must not change or shrink under it.
    unfinished = directory / f"tokens-{os.getpid()}.tmp.npy"
    try:
        pooled = _encode_all(source, unfinished, num_views)
        unfinished.replace(directory / "tokens.npy")
    finally:
        unfinished.unlink(missing_ok=True)
    (directory / "pooled.npy").unlink(missing_ok=True)
    if pooled is not None:
        np.save(directory / "pooled.npy", pooled)
    fsync_dir(directory)
    # Written last: a cache without it is not used.
    Location.parse(marker).write_bytes(fingerprint.encode())
    return CachedTokens(directory, source.image_ids)


def _encode_all(source: ImageTokens, path: Path, num_views: int) -> np.ndarray | None:
    """Writes the tokens of all views to `path`; returns the pooled vectors of view 0."""
    total = len(source.image_ids)
    pooled_parts: list[np.ndarray] = []
    tokens: np.ndarray | None = None
    for positions, pixels in source.decoded_batches():
        for view in range(num_views):
            part, pooled = source.encode(pixels, positions, np.full(len(positions), view))
            if tokens is None:
                tokens = np.lib.format.open_memmap(
                    path, mode="w+", dtype=np.float16, shape=(num_views, total, *part.shape[1:])
                )
            tokens[view, positions] = part
            if pooled is not None and view == 0:
                pooled_parts.append(pooled)
    assert isinstance(tokens, np.memmap)
    tokens.flush()
    return np.concatenate(pooled_parts) if pooled_parts else None
