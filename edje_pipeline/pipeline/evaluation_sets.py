"""What `evaluate` asks and which answers are right: from captions, or from queries and a qrels file.

Shape letters: Q queries, T distinct texts, n images of the gallery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from edje_pipeline.errors import InputFileError
from edje_pipeline.storage.location import Location
from edje_pipeline.training.data import Captions, read_captions

MAX_QRELS_BYTES = 1 << 30
QRELS_FIELDS = 4


@dataclass(frozen=True)
class EvaluationSet:
    """A gallery of images, texts, and which belong together."""

    image_ids: tuple[str, ...]
    texts: tuple[str, ...]
    images_of_text: tuple[frozenset[int], ...]
    """For each text, the right images as positions in the gallery."""

    @property
    def texts_of_image(self) -> tuple[frozenset[int], ...]:
        """For each image, the right texts."""
        found: list[set[int]] = [set() for _ in self.image_ids]
        for text, images in enumerate(self.images_of_text):
            for image in images:
                found[image].add(text)
        return tuple(frozenset(texts) for texts in found)

    def sample(self, num_texts: int | None, seed: int) -> np.ndarray:
        """Positions of the texts to ask, all or a random sample in ascending order."""
        total = len(self.texts)
        if num_texts is None or num_texts >= total:
            return np.arange(total)
        return np.sort(np.random.default_rng(seed).permutation(total)[:num_texts])


def from_captions(
    uris: Sequence[str],
    indexed: Sequence[str],
    *,
    gallery: str = "captions",
    include: str = "",
    split: str | None = None,
    templates: Sequence[str] = (),
    first_only: bool = False,
    on_unknown: str = "error",
) -> EvaluationSet:
    """Every caption is a query for its image, and the other way round.

    Args:
        uris: caption files, see `training.data.read_captions`.
        indexed: image_ids of the index.
        gallery: `captions`: the captioned images (as the benchmarks of the field do); `index`: all of it.
        include: only image_ids that this pattern matches (`openmoji-*`), in queries and gallery.
        split: of a Karpathy file.
        templates: see `read_captions`.
        first_only: ask only with an image's first caption.
        on_unknown: `error`, or `skip` for captions of images that the index does not hold.

    Raises:
        InputFileError: nothing is left to evaluate, or images are unknown.
    """
    captions = read_captions(uris, templates=templates, split=split)
    if include:
        pairs = [
            pair for pair in zip(captions.image_ids, captions.captions, strict=True) if fnmatchcase(pair[0], include)
        ]
        captions = Captions(tuple(name for name, _ in pairs), tuple(group for _, group in pairs))
    captions = captions.keep(indexed, where="the index", on_unknown=on_unknown)
    if len(captions) < 2:
        raise InputFileError(
            f"{len(captions)} captioned images are left to evaluate; ranking takes at least two. "
            "Check the caption file, --split and --include"
        )
    if first_only:
        captions = Captions(captions.image_ids, tuple(group[:1] for group in captions.captions))
    image_ids = captions.image_ids
    if gallery == "index":
        rest = set(captions.image_ids)
        image_ids += tuple(name for name in indexed if name not in rest and (not include or fnmatchcase(name, include)))
    owners: list[set[int]] = [set() for _ in captions.texts]
    for image, numbers in enumerate(captions.text_numbers):
        for number in numbers.tolist():
            owners[number].add(image)
    return EvaluationSet(image_ids, captions.texts, tuple(frozenset(images) for images in owners))


def from_qrels(queries: str, qrels: str, indexed: Sequence[str]) -> EvaluationSet:
    """Queries with judged images; the gallery is the whole index.

    Args:
        queries: query_id and text, as for `score`.
        qrels: TREC format, `query_id 0 image_id relevance` a line; above 0 is right.
        indexed: image_ids of the index.

    Raises:
        InputFileError: a malformed line, a query without a right image in the index, unknown query ids.
    """
    from edje_pipeline.storage.text_inputs import read_queries

    table = read_queries(queries)
    text_of = dict(zip(table["query_id"].to_pylist(), table["text"].to_pylist(), strict=True))
    place = {image_id: position for position, image_id in enumerate(indexed)}
    right: dict[str, set[int]] = {}
    location = Location.parse(qrels)
    try:
        lines = location.read_bytes(max_bytes=MAX_QRELS_BYTES).decode("utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise InputFileError(f"the qrels file {location} does not exist") from error
    except UnicodeDecodeError as error:
        raise InputFileError(f"{location} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != QRELS_FIELDS or not parts[3].lstrip("-").isdigit():
            raise InputFileError(f"{location}:{number} is {line!r:.60}, expected `query_id 0 image_id relevance`")
        if parts[0] not in text_of:
            raise InputFileError(f"{location}:{number} judges the query {parts[0]!r}, which {queries} does not hold")
        if int(parts[3]) > 0 and parts[2] in place:
            right.setdefault(parts[0], set()).add(place[parts[2]])
    unjudged = [query for query in text_of if query not in right]
    if unjudged:
        raise InputFileError(
            f"{len(unjudged):,} of {len(text_of):,} queries have no right image in the index: "
            f"{', '.join(map(repr, unjudged[:5]))}; remove them or add their images"
        )
    merged: dict[str, set[int]] = {}
    for query, text in text_of.items():
        merged.setdefault(text, set()).update(right[query])
    return EvaluationSet(tuple(indexed), tuple(merged), tuple(frozenset(images) for images in merged.values()))
