"""Image-caption pairs from JSONL, Parquet, CSV, WebDataset tars and Karpathy's JSON files.

An image has one or more captions. A row names its captions in a `captions` list or in a `caption` or
`text` column; templates such as `{name}, {keywords}` make captions of other columns.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.errors import InputFileError, TrainingError
from edje_pipeline.storage.location import Location

CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
ID_COLUMNS = ("image_id", "key", "filename", "image")
MAX_BYTES = 4 << 30
"""Of a caption file: a guard against the wrong file, not a limit on corpora (several files may be given)."""
MAX_MEMBER_BYTES = 16 << 20
_TEMPLATE_FIELD = re.compile(r"\{([A-Za-z0-9_]+)\}")


@dataclass(frozen=True)
class Captions:
    """Images and their captions, in the order of the file; every image once."""

    image_ids: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Distinct captions in the order of their first use."""
        return tuple(dict.fromkeys(text for group in self.captions for text in group))

    @cached_property
    def text_numbers(self) -> tuple[np.ndarray, ...]:
        """For each image, its captions as positions in `texts`."""
        number = {text: position for position, text in enumerate(self.texts)}
        return tuple(np.array([number[text] for text in group], np.int64) for group in self.captions)

    def require_trainable(self) -> None:
        """Raises TrainingError for a corpus from which nothing can be learned."""
        if len(self) < 2:
            raise TrainingError(
                f"the corpus has {len(self)} image; a wrong image for a text takes at least two. Give more images"
            )
        if len(self.texts) < 2:
            raise TrainingError("all images have the same caption, so no pair is wrong; give captions that differ")

    def keep(self, known: Iterable[str], *, where: str, on_unknown: str = "error") -> Captions:
        """The images that `known` holds.

        Args:
            known: image_ids with tokens.
            where: of the tokens, for the message.
            on_unknown: `error`, or `skip` to leave images without tokens out.

        Raises:
            InputFileError: some have no tokens and `on_unknown` is `error`.
        """
        have = set(known)
        missing = [image_id for image_id in self.image_ids if image_id not in have]
        if missing and on_unknown == "error":
            shown = ", ".join(repr(name) for name in missing[:5]) + (" ..." if len(missing) > 5 else "")
            raise InputFileError(
                f"{len(missing):,} of {len(self):,} captioned images are not in {where}: {shown}; "
                "extract them first, or leave them out with --on-unknown skip"
            )
        kept = [pair for pair in zip(self.image_ids, self.captions, strict=True) if pair[0] in have]
        return Captions(tuple(name for name, _ in kept), tuple(group for _, group in kept))


def read_captions(
    uris: str | Sequence[str], *, templates: Sequence[str] = (), split: str | None = None, on_empty: str = "error"
) -> Captions:
    """Reads one or several caption files; an image named by several rows gets the captions of all.

    Args:
        uris: .jsonl, .json (Karpathy), .parquet, .csv, .tsv or .tar (WebDataset: KEY.json or KEY.txt).
        templates: captions made of other columns; lists are joined by ", ". In place of `captions`.
        split: of a Karpathy file (`train`, `val`, `test`, `restval`); None takes all.
        on_empty: `error`, or `skip` to leave out captions without a word.

    Raises:
        InputFileError: a file is missing or malformed, a row has no id or no caption, a caption is empty.
    """
    groups: dict[str, list[str]] = {}
    for uri in [uris] if isinstance(uris, str) else uris:
        location = Location.parse(uri)
        for where, row in _rows(location, split):
            image_id = next((row[key] for key in ID_COLUMNS if row.get(key) not in (None, "")), None)
            if image_id is None:
                raise InputFileError(f"{where} names no image; expected one of the columns {', '.join(ID_COLUMNS)}")
            texts = _captions_of(row, templates, where)
            good = [text for text in texts if text.strip()]
            if on_empty == "error" and (len(good) < len(texts) or not good):
                raise InputFileError(
                    f"{where}: image {image_id!r} has an empty caption; fix it, or leave such out with --on-empty skip"
                )
            if good:
                groups.setdefault(str(image_id), []).extend(good)
    return Captions(tuple(groups), tuple(tuple(dict.fromkeys(group)) for group in groups.values()))


def _captions_of(row: Mapping[str, Any], templates: Sequence[str], where: str) -> list[str]:
    if templates:
        return [_fill(template, row, where) for template in templates]
    for column in CAPTION_COLUMNS:
        value = row.get(column)
        if value is None:
            continue
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputFileError(f"{where}: {column} is {value!r:.60}, expected a text or a list of texts")
        return list(texts)
    raise InputFileError(
        f"{where} has no caption; expected one of the columns {', '.join(CAPTION_COLUMNS)}, or use "
        f"--caption-template with its columns ({', '.join(sorted(row)) or 'none'})"
    )


def _fill(template: str, row: Mapping[str, Any], where: str) -> str:
    def value(match: re.Match[str]) -> str:
        found = row.get(match.group(1))
        if found is None:
            raise InputFileError(f"{where} has no {match.group(1)!r} for the template {template!r}")
        return ", ".join(map(str, found)) if isinstance(found, list) else str(found)

    return _TEMPLATE_FIELD.sub(value, template)


def _rows(location: Location, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows as dicts, each with a name for messages."""
    suffix = PurePosixPath(location.path).suffix.lower()
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet, ".tar": _tar, ".csv": _csv, ".tsv": _csv}
    try:
        if suffix == ".json":
            yield from _karpathy(location, split)
        elif suffix in readers:
            yield from readers[suffix](location)
        else:
            raise InputFileError(f"{location}: unknown kind of caption file; expected {', '.join(readers)} or .json")
    except FileNotFoundError as error:
        raise InputFileError(f"the caption file {location} does not exist") from error
    except UnicodeDecodeError as error:
        raise InputFileError(f"{location} is not UTF-8 text: {error}") from error


def _jsonl(location: Location) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(location.read_bytes(max_bytes=MAX_BYTES).decode("utf-8-sig").split("\n"), start=1):
        if line.strip():
            yield f"{location}:{number}", _object(line, f"{location}:{number}")


def _csv(location: Location) -> Iterator[tuple[str, dict[str, Any]]]:
    text = location.read_bytes(max_bytes=MAX_BYTES).decode("utf-8-sig")
    delimiter = "\t" if location.name.endswith(".tsv") else ","
    for number, row in enumerate(csv.DictReader(io.StringIO(text), delimiter=delimiter), start=2):
        yield f"{location}:{number}", {key: value for key, value in row.items() if key is not None}


def _parquet(location: Location) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(location.open_input())
    except pa.ArrowInvalid as error:
        raise InputFileError(f"{location} is not a Parquet file: {error}") from error
    # Image bytes often stand in the same file; only columns a caption could be made of are read.
    columns = [field.name for field in file.schema_arrow if not _holds_bytes(field.type)]
    number = 0
    for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
            yield f"{location} row {number}", row
            number += 1


def _holds_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind))


def _tar(location: Location) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with location.open_input() as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                key, dot, suffix = member.name.rpartition(".")
                if not member.isfile() or not dot or suffix not in ("json", "txt"):
                    continue
                where = f"{location}!{member.name}"
                if member.size > MAX_MEMBER_BYTES:
                    raise InputFileError(f"{where} has {member.size:,} bytes; that is no caption")
                extracted = archive.extractfile(member)
                text = extracted.read().decode("utf-8-sig") if extracted is not None else ""
                row = _object(text, where) if suffix == "json" else {"caption": text.strip()}
                # The key is what extraction calls the image, whatever the JSON beside it says.
                yield where, {**row, "image_id": key}
    except tarfile.TarError as error:
        raise InputFileError(f"{location} is not a tar file: {error}") from error


def _karpathy(location: Location, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """`dataset_coco.json`, `dataset_flickr30k.json`: images with sentences, a split and a file name."""
    content = _object(location.read_bytes(max_bytes=MAX_BYTES).decode("utf-8-sig"), str(location))
    images = content.get("images")
    if not isinstance(images, list):
        raise InputFileError(f"{location} has no list `images`; expected Karpathy's JSON, or use .jsonl")
    for number, image in enumerate(images):
        where = f"{location} image {number}"
        try:
            name, sentences = image["filename"], [sentence["raw"] for sentence in image["sentences"]]
            folder = image.get("filepath", "")
        except (KeyError, TypeError, AttributeError) as error:
            raise InputFileError(f"{where} lacks {error}; expected filename and sentences with raw") from error
        if split is None or image.get("split") == split:
            yield where, {"image_id": f"{folder}/{name}" if folder else name, "captions": sentences}


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputFileError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputFileError(f"{where} holds a {type(value).__name__}, expected an object")
    return value
