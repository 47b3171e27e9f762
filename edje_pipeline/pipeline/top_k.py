"""The k best images of each query over blocks of embeddings, exact to the last tie, in flat memory.

Shape letters: Q queries, n images of a block, k places, De embedding width.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SCORES_AT_ONCE = 1 << 24
"""Elements of one (Q, n) score matrix: 64 MB."""


class TopK:
    """Keeps the k best images of each query: by score, equal scores by image_id.

    Image ids that are somebody's candidate live in a sorted pool, so that comparing pool positions
    compares ids.
    """

    def __init__(self, num_queries: int, k: int) -> None:
        self.k = k
        self._num_queries = num_queries
        self._pool = pa.array([], pa.string())
        # Flat lists of the kept (query, image), sorted by query and rank.
        self._query = np.empty(0, np.int64)
        self._image = np.empty(0, np.int64)
        self._score = np.empty(0, np.float32)

    def add(self, scores: np.ndarray, image_ids: pa.Array) -> None:
        """Takes a block into account.

        Args:
            scores: float32 (Q, n).
            image_ids: string (n,); ids of other blocks do not come again.
        """
        threshold = self._thresholds(scores)
        # Equal scores pass: the image_id decides between them.
        query, column = np.nonzero(scores >= threshold[:, None])
        if not len(query):
            return
        entering, column_of = np.unique(column, return_inverse=True)
        held, held_of = np.unique(self._image, return_inverse=True)
        names = pa.concat_arrays([self._pool.take(pa.array(held)), image_ids.take(pa.array(entering))])
        order = pc.sort_indices(names).to_numpy()
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        self._pool = names.take(pa.array(order))
        queries = np.concatenate([self._query, query])
        images = np.concatenate([place[held_of], place[len(held) + column_of]])
        values = np.concatenate([self._score, scores[query, column]]) + np.float32(0)
        sorting = np.lexsort((images, -values, queries))
        queries, images, values = queries[sorting], images[sorting], values[sorting]
        kept = _position_in_run(queries) < self.k
        self._query, self._image, self._score = queries[kept], images[kept], values[kept]

    def _thresholds(self, scores: np.ndarray) -> np.ndarray:
        """A score that an image of this block must reach to be one of the k best: float32 (Q,)."""
        threshold = np.full(self._num_queries, -np.inf, np.float32)
        if len(self._query):
            last = np.append(np.flatnonzero(np.diff(self._query)), len(self._query) - 1)
            full = last[_position_in_run(self._query)[last] == self.k - 1]
            threshold[self._query[full]] = self._score[full]
        open_rows = np.flatnonzero(np.isneginf(threshold))
        if len(open_rows) and scores.shape[1] > self.k:
            place = scores.shape[1] - self.k
            threshold[open_rows] = np.partition(scores[open_rows], place, axis=1)[:, place]
        return threshold

    def result(self) -> tuple[np.ndarray, pa.Array, np.ndarray, np.ndarray]:
        """Query number (m,), image_id (m,), score (m,), rank from 1 (m,), by query and rank."""
        ranks = (_position_in_run(self._query) + 1).astype(np.int32)
        return self._query, self._pool.take(pa.array(self._image)), self._score, ranks


def queries_at_once(block_images: int) -> int:
    """Queries whose scores against a block are held at a time."""
    return max(1, SCORES_AT_ONCE // max(block_images, 1))


def _position_in_run(values: np.ndarray) -> np.ndarray:
    """0, 1, 2 ... within each run of equal neighbours."""
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1)) if len(values) else np.empty(0, np.int64)
    sizes = np.diff(np.append(starts, len(values)))
    return np.arange(len(values)) - np.repeat(starts, sizes)
