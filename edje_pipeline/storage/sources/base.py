"""What every source of images shares: options, the listing's builder, and a failed read as a value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import pyarrow as pa

from edje_pipeline.storage.schema import LISTING_SCHEMA, RejectReason

# The last three of the second line have no decoder here: they are listed and rejected, which is seen,
# rather than passed over.
IMAGE_SUFFIXES = frozenset(
    suffix
    for line in (
        "jpg jpeg jpe jfif png apng webp gif bmp dib tif tiff avif avifs jp2 j2k jpc jpf jpx j2c ppm pgm pbm pnm pfm",
        "qoi tga ico icns cur psd pcx sgi dds mpo xbm xpm heic heif jxl",
    )
    for suffix in line.split()
)
"""Suffixes (lower case, no dot) that mean "this is an image" in folders and tars."""

LISTING_BATCH_ROWS = 4096
WHOLE_FILE = -1
"""`length` of a listing row whose image is a whole file."""


@dataclass(frozen=True)
class SourceOptions:
    """How to read a corpus; part of the corpus fingerprint."""

    id_column: str | None = None
    """Column of a Parquet file or list that holds the image_id; guessed from common names when None."""
    image_column: str | None = None
    """Column with image bytes, paths or URIs; guessed when None."""
    suffixes: tuple[str, ...] | None = None
    """Suffixes to take as images (with or without dot); None: the known ones; ("all",): every file."""
    qualify_ids: bool = False
    """Puts the container's name before the id (`00000/000017`): for tars that repeat keys of other tars."""

    def takes(self, name: str) -> bool:
        """Whether a file or member of this name is an image by its suffix."""
        return self.stem_length(name) is not None

    def stem_length(self, name: str) -> int | None:
        """Length of `name` without its image suffix and dot; None when it is not an image."""
        directory_end = name.rfind("/") + 1
        dot = name.rfind(".")
        if self._wanted is None:
            return dot if dot > directory_end else len(name)
        if dot <= directory_end or name[dot + 1 :].lower() not in self._wanted:
            return None
        return dot

    @property
    def _wanted(self) -> frozenset[str] | None:
        if self.suffixes is None:
            return IMAGE_SUFFIXES
        if self.suffixes == ("all",):
            return None
        return frozenset(suffix.lower().lstrip(".") for suffix in self.suffixes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "suffixes": list(self.suffixes) if self.suffixes is not None else None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SourceOptions:
        """The inverse of `to_dict`."""
        suffixes = data.get("suffixes")
        return cls(**{**data, "suffixes": tuple(suffixes) if suffixes is not None else None})


@dataclass(frozen=True)
class ReadFailure:
    """Why an image's bytes could not be had; travels in the place of the bytes."""

    reason: RejectReason
    message: str


@dataclass
class ListingNotes:
    """What a listing passed over or tolerated, for the summary; counts and the first few examples."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, example: str, count: int = 1) -> None:
        """Counts `what`; keeps three examples of it."""
        self.counts[what] = self.counts.get(what, 0) + count
        shown = self.examples.setdefault(what, [])
        if len(shown) < 3:
            shown.append(example)

    def to_lines(self) -> list[str]:
        """`3 truncated tar files (a.tar, b.tar, c.tar)`."""
        return [
            f"{count:,} {what} ({', '.join(self.examples[what])}{', ...' if count > len(self.examples[what]) else ''})"
            for what, count in self.counts.items()
        ]


class Source(ABC):
    """A corpus of images that can be listed. Reading goes through `read.read_images` and `to_dict`."""

    kind: ClassVar[str]

    def __init__(self, uri: str, options: SourceOptions) -> None:
        self.uri = uri
        self.options = options
        self.notes = ListingNotes()
        self.num_listed = 0

    @abstractmethod
    def describe(self) -> str:
        """One sentence of what was found; has the count once the listing is done."""

    @abstractmethod
    def _entries(self) -> Iterator[tuple[str, str, str, int, int]]:
        """Listing rows (image_id, uri, container, offset, length) in a deterministic order."""

    def looked_for(self) -> str:
        """What an image of this source is, for the message about an empty corpus."""
        wanted = self.options.suffixes
        if wanted == ("all",):
            return "any file"
        names = sorted(wanted) if wanted is not None else ["jpg", "jpeg", "png", "webp", "gif", "tif", "bmp", "avif"]
        return f"files ending in {', '.join('.' + name.lstrip('.') for name in names)}" + (
            "" if wanted is not None else " and other image suffixes"
        )

    def list_batches(self) -> Iterator[pa.RecordBatch]:
        """The listing as batches of LISTING_SCHEMA, streamed: memory does not grow with the corpus."""
        self.num_listed = 0
        self.notes = ListingNotes()
        rows: list[tuple[str, str, str, int, int]] = []
        for entry in self._entries():
            rows.append(entry)
            if len(rows) == LISTING_BATCH_ROWS:
                self.num_listed += len(rows)
                yield _batch(rows)
                rows = []
        if rows:
            self.num_listed += len(rows)
            yield _batch(rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: enough to read listed images again in another process, and to fingerprint."""
        return {"kind": self.kind, "uri": self.uri, "options": self.options.to_dict()}


def _batch(rows: list[tuple[str, str, str, int, int]]) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True))
    return pa.record_batch(
        [pa.array(values, field.type) for values, field in zip(columns, LISTING_SCHEMA, strict=True)],
        schema=LISTING_SCHEMA,
    )


def count_phrase(num: int, noun: str) -> str:
    """`1 image`, `1,234 images`."""
    return f"{num:,} {noun}" + ("" if num == 1 else "s")
