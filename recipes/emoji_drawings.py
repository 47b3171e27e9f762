"""Which drawing shows which concept, in which part it belongs, and what it looks like: without network or files.

Texts are OpenMoji's. An icon of another set belongs to a concept when its name is the slug of the concept's name.
"""

from __future__ import annotations

import hashlib
import io
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from edje_pipeline.pipeline.openmoji import CHOOSE_BUCKETS, TRAIN_BUCKETS, concept_key, demo_module, split_bucket
from edje_pipeline.pipeline.openmoji import slug as plain_slug

PARTS = ("train", "val")
LEFT_OUT_GROUPS = ("flags", "component", "extras-openmoji", "extras-unicode")
"""Flags and modifiers show no thing; OpenMoji's own extras (brands, interface symbols) no other artist has."""


@dataclass(frozen=True)
class Concept:
    """What a drawing shows."""

    hexcode: str
    """Code points with hyphens, as OpenMoji names its files."""
    name: str
    keywords: tuple[str, ...]
    group: str

    @property
    def key(self) -> str:
        """Code points without the variation selector: how drawings of one concept find each other."""
        return concept_key(self.hexcode)

    @property
    def part(self) -> str | None:
        """`train`, `val`, or None for the tenth that is kept apart and never written."""
        bucket = split_bucket(self.hexcode)
        return "train" if bucket in TRAIN_BUCKETS else "val" if bucket in CHOOSE_BUCKETS else None


@dataclass(frozen=True)
class Drawing:
    """One picture of the corpus."""

    style: str
    concept: Concept
    image: Image.Image

    @property
    def key(self) -> str:
        return f"{self.style}-{self.concept.key}"

    def to_dict(self) -> dict[str, Any]:
        """The JSON beside the picture."""
        concept = self.concept
        return {
            "concept": concept.key, "style": self.style, "name": concept.name,
            "keywords": list(concept.keywords), "group": concept.group,
        }  # fmt: skip


def concepts_from(entries: Iterable[Mapping[str, Any]]) -> list[Concept]:
    """The concepts of OpenMoji's data file in order of file names, without skin tones and `LEFT_OUT_GROUPS`."""
    found = [
        Concept(
            str(entry["hexcode"]),
            str(entry["annotation"]),
            tuple(tag.strip() for tag in f"{entry['tags']},{entry['openmoji_tags']}".split(",") if tag.strip()),
            str(entry["group"]),
        )
        for entry in entries
        if not entry["skintone"] and entry["group"] not in LEFT_OUT_GROUPS
    ]
    return sorted(found, key=lambda concept: f"{concept.hexcode}.svg")


def slug(name: str) -> str:
    """How icon sets name a drawing: `Piñata` -> `pinata`, `man: red hair` -> `man-red-hair`."""
    return plain_slug(unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode())


def match_icons(icon_set: Mapping[str, Any], concepts: list[Concept]) -> dict[str, str]:
    """SVG text by concept key, from an icon set in Iconify's JSON form.

    A slug that two concepts share (`keycap: *`, `keycap: #`) names neither. An alias counts where it is a mere other
    name of an icon that is no other concept's own: `up-button` leads to the drawing of `upwards button`, another thing.
    """
    icons, aliases = icon_set["icons"], icon_set.get("aliases", {})
    slugs = {concept.key: slug(concept.name) for concept in concepts}
    uses = Counter(slugs.values())
    svgs = {}
    for key, name in slugs.items():
        if uses[name] > 1:
            continue
        alias = aliases.get(name)
        if name not in icons and alias is not None and alias.keys() == {"parent"} and alias["parent"] not in uses:
            svgs[key] = icon_svg(icons[alias["parent"]], icon_set)
        elif name in icons:
            svgs[key] = icon_svg(icons[name], icon_set)
    return svgs


def icon_svg(icon: Mapping[str, Any], icon_set: Mapping[str, Any]) -> str:
    """A whole, square SVG of an icon's body; an icon that is not square is centred in it."""
    left, top = icon.get("left", icon_set.get("left", 0)), icon.get("top", icon_set.get("top", 0))
    width, height = (icon.get(side, icon_set.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="128" height="128" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def render(svg: str, size_px: int) -> Image.Image:
    """The drawing on white, RGB, `size_px` square."""
    png = bytes(demo_module("resvg_py").svg_to_bytes(svg_string=svg, width=size_px, height=size_px))
    with Image.open(io.BytesIO(png)) as opened:
        drawing = opened.convert("RGBA")
    # Laid on white here: resvg's own background rounds soft edges differently.
    white = Image.new("RGBA", drawing.size, "white")
    white.alpha_composite(drawing)
    return white.convert("RGB")


def draw(
    style: str, svgs: Mapping[str, str], concepts: list[Concept], *, size_px: int,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Drawing]:  # fmt: skip
    """The drawings of one artist for `PARTS`; of equal pictures the first in train, then in order of file names.

    Some artists draw several concepts alike (a man, a woman and a person at work); a picture with two names would make
    either a wrong answer for the other. One that equals a picture of the tenth kept apart is left out too.
    """
    order: dict[str | None, int] = {None: 0, "train": 1, "val": 2}
    seen: set[bytes] = set()
    for concept in sorted((c for c in concepts if c.key in svgs), key=lambda concept: order[concept.part]):
        image = render(svgs[concept.key], size_px)
        digest = hashlib.sha256(image.tobytes()).digest()
        if concept.part is not None and digest not in seen:
            yield Drawing(style, concept, image)
        seen.add(digest)
        if on_progress is not None:
            on_progress(1)
