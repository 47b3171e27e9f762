"""Builds the drawings that the bundled model is trained on: `python recipes/emoji_corpus.py --out DIR`.

Five artists' emoji from the npm registry, rendered at 128 px on white, as two WebDataset tars (lossless WebP, and JSON
with concept, style, name, keywords, group). Split 80/10/10 by concept, the same for man, woman and person; the last
tenth is never written. The same versions of the packages, resvg-py and Pillow give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edje_pipeline.errors import EdjeError
from edje_pipeline.progress import format_duration, progress
from recipes.emoji_drawings import PARTS, Concept, Drawing, concepts_from, draw, match_icons
from recipes.emoji_packages import PACKAGES, Package, fetch, read_files, read_json

SIZE_PX = 128
SUMMARY_FILE = "corpus.json"


@dataclass(frozen=True)
class Artist:
    """Where one artist's drawings come from and under which terms, from the package's own metadata."""

    style: str
    title: str
    author: str
    homepage: str
    license: str
    """SPDX identifier."""
    license_url: str
    package: str
    integrity: str


@dataclass(frozen=True)
class Corpus:
    """What was built."""

    directory: str
    artists: tuple[Artist, ...]
    num_drawings: dict[str, dict[str, int]]
    """By style and part."""
    num_concepts: dict[str, int]
    """By part."""
    versions: dict[str, str]
    """Of what decides the bytes."""
    wall_s: float = field(default=0.0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Without times and places: what `corpus.json` holds, equal for equal corpora."""
        return {name: value for name, value in asdict(self).items() if name not in ("directory", "wall_s")}

    def to_text(self) -> str:
        lines = [f"{'artist':18} {'licence':13} {'train':>6} {'val':>5}  package"]
        for artist in self.artists:
            counts = self.num_drawings[artist.style]
            lines.append(
                f"{artist.style:18} {artist.license:13} {counts['train']:>6,} {counts['val']:>5,}  {artist.package}"
            )
        total = {part: sum(counts[part] for counts in self.num_drawings.values()) for part in PARTS}
        lines += [
            f"{'drawings':32} {total['train']:>6,} {total['val']:>5,}",
            f"{'concepts':32} {self.num_concepts['train']:>6,} {self.num_concepts['val']:>5,}",
            f"written to {self.directory} in {format_duration(self.wall_s)}",
        ]
        return "\n".join(lines)


def build(out: Path, *, cache: Path | None = None, size_px: int = SIZE_PX, quiet: bool = False) -> Corpus:
    """Fetches the packages into `cache` (default `out/packages`), renders, and writes train.tar, val.tar, corpus.json.

    Raises:
        SourceError, CorruptionError: a package could not be fetched, or is not the pinned one.
    """
    started = time.monotonic()
    cache = cache or out / "packages"
    tarballs = {}
    with progress("fetch", len(PACKAGES), unit="packages", quiet=quiet) as report:
        for package in PACKAGES:
            tarballs[package.style] = fetch(package, cache)
            report.update(1)
    concepts: list[Concept] = []
    artists: list[Artist] = []
    svgs: dict[str, dict[str, str]] = {}
    for package in PACKAGES:
        if package.style == "openmoji":
            concepts, svgs[package.style], artist = read_openmoji(package, tarballs[package.style])
        else:
            svgs[package.style], artist = read_icons(package, tarballs[package.style], concepts)
        artists.append(artist)
    drawings: dict[str, list[tuple[Drawing, bytes]]] = {part: [] for part in PARTS}
    with progress("render", sum(map(len, svgs.values())), unit="drawings", quiet=quiet) as report:
        for style in sorted(svgs):
            for drawing in draw(style, svgs[style], concepts, size_px=size_px, on_progress=report.update):
                drawings[str(drawing.concept.part)].append((drawing, lossless_webp(drawing)))
    out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        write_tar(out / f"{part}.tar", drawings[part])
    counts = {part: Counter(drawing.style for drawing, _ in drawings[part]) for part in PARTS}
    corpus = Corpus(
        str(out),
        tuple(artists),
        {artist.style: {part: counts[part][artist.style] for part in PARTS} for artist in artists},
        {part: len({drawing.concept.key for drawing, _ in drawings[part]}) for part in PARTS},
        {"size_px": str(size_px), **{name: version(name) for name in ("resvg-py", "pillow")}},
        time.monotonic() - started,
    )
    (out / SUMMARY_FILE).write_text(json.dumps(corpus.to_dict(), indent=2) + "\n", encoding="utf-8")
    return corpus


def read_openmoji(package: Package, tarball: Path) -> tuple[list[Concept], dict[str, str], Artist]:
    """Concepts, SVG text by concept key, and the terms."""
    files = read_files(
        tarball, lambda name: name in ("package.json", "data/openmoji.json") or name.startswith("color/svg/")
    )
    concepts = concepts_from(read_json(files, "data/openmoji.json", package))
    paths = {concept.key: f"color/svg/{concept.hexcode}.svg" for concept in concepts}
    svgs = {key: files[path].decode() for key, path in paths.items() if path in files}
    metadata = read_json(files, "package.json", package)
    terms = str(metadata["license"])
    artist = Artist(
        package.style, "OpenMoji", "the OpenMoji project, HfG Schwäbisch Gmünd", str(metadata["homepage"]), terms,
        "https://creativecommons.org/licenses/by-sa/4.0/", package.spec, package.integrity,
    )  # fmt: skip
    return concepts, svgs, artist


def read_icons(package: Package, tarball: Path, concepts: list[Concept]) -> tuple[dict[str, str], Artist]:
    """SVG text by concept key from an Iconify package, and the terms."""
    files = read_files(tarball, lambda name: name in ("icons.json", "info.json"))
    info = read_json(files, "info.json", package)
    artist = Artist(
        package.style, str(info["name"]), str(info["author"]["name"]), str(info["author"].get("url", "")),
        str(info["license"]["spdx"]), str(info["license"].get("url", "")), package.spec, package.integrity,
    )  # fmt: skip
    return match_icons(read_json(files, "icons.json", package), concepts), artist


def lossless_webp(drawing: Drawing) -> bytes:
    """The picture's bytes."""
    buffer = io.BytesIO()
    drawing.image.save(buffer, "WEBP", lossless=True, quality=80, method=4)
    return buffer.getvalue()


def write_tar(path: Path, drawings: Iterable[tuple[Drawing, bytes]]) -> None:
    """A WebDataset tar in order of keys, with fixed owners and times, under its final name when it is whole."""
    temporary = path.with_suffix(".tmp")
    with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
        for drawing, picture in sorted(drawings, key=lambda pair: pair[0].key):
            texts = json.dumps(drawing.to_dict(), ensure_ascii=False).encode()
            for suffix, content in ((".webp", picture), (".json", texts)):
                member = tarfile.TarInfo(drawing.key + suffix)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    temporary.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 and one line where it fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.tar, val.tar, corpus.json")
    parser.add_argument("--cache", type=Path, help="folder of the npm tarballs (default: OUT/packages)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(arguments)
    try:
        corpus = build(options.out, cache=options.cache, quiet=options.quiet)
    except EdjeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(corpus.to_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
