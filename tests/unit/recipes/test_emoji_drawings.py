"""Split rule, slugs, matching and rendering, on a tiny planted set."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from edje_pipeline.pipeline.openmoji import split_key
from recipes.emoji_drawings import Concept, concepts_from, draw, icon_svg, match_icons, render, slug

pytest.importorskip("resvg_py")

SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><path fill="{}" d="M0 0h4v8H0z"/></svg>'


def emoji_entry(hexcode, name, *, group="objects", skintone="", tags="a, b", more="c"):
    return {
        "hexcode": hexcode, "annotation": name, "group": group, "skintone": skintone, "tags": tags,
        "openmoji_tags": more,
    }  # fmt: skip


def concept_in(part, count=1, *, after=0x1F300):
    """Concepts of one part, found by the rule itself."""
    found = [Concept(f"{point:X}", f"thing {point:x}", (), "objects") for point in range(after, after + 400)]
    return [concept for concept in found if concept.part == part][:count]


@pytest.mark.parametrize(
    ("hexcode", "want"),
    [
        ("1F34E", "1F34E-"),
        ("1f34e", "1F34E-"),
        ("2764-FE0F", "2764-"),
        ("2640-FE0F", "2640-"),
        ("1F468-200D-1F527", "P-1F527"),
        ("1F469-200D-1F527", "P-1F527"),
        ("1F9D1-200D-1F527", "P-1F527"),
        ("1F3C3-200D-2640-FE0F", "1F3C3-"),
        ("1F3C3", "1F3C3-"),
        ("1F468-200D-1F469-200D-1F466", "P-1F469-1F466"),
        ("0031-FE0F-20E3", "0031-20E3"),
    ],
)
def test_the_split_key_is_the_same_for_man_woman_and_person(hexcode, want):
    assert split_key(hexcode) == want


def test_parts_are_tenths_of_sha1():
    concepts = [Concept(f"{point:X}", "", (), "") for point in range(0x1F300, 0x1F300 + 2000)]
    parts = [concept.part for concept in concepts]
    assert {part: round(parts.count(part) / 2000, 1) for part in ("train", "val", None)} == {
        "train": 0.8, "val": 0.1, None: 0.1,
    }  # fmt: skip
    bucket = int(hashlib.sha1(b"1F34E-").hexdigest(), 16) % 100
    assert (Concept("1F34E", "red apple", (), "").part == "train") == (bucket < 80)


def test_concepts_leave_out_skin_tones_flags_and_extras():
    entries = [
        emoji_entry("1F44B", "waving hand", tags="hand, wave", more=""),
        emoji_entry("1F44B-1F3FB", "waving hand: light", skintone="1F3FB"),
        emoji_entry("1F1E9", "flag", group="flags"),
        emoji_entry("E000", "brand", group="extras-openmoji"),
        emoji_entry("2702-FE0F", "scissors"),
        emoji_entry("1F6B6-200D-2642-FE0F", "man walking"),
        emoji_entry("1F6B6", "person walking"),
    ]
    concepts = concepts_from(entries)
    assert [concept.key for concept in concepts] == ["1F44B", "1F6B6-200D-2642", "1F6B6", "2702"]
    assert concepts[0].keywords == ("hand", "wave")
    assert concepts[3].keywords == ("a", "b", "c")


@pytest.mark.parametrize(
    ("name", "want"),
    [("red apple", "red-apple"), ("man: red hair", "man-red-hair"), ("piñata", "pinata"), ("Mrs. Claus", "mrs-claus"),
     ("“here” button", "here-button"), ("ON! arrow", "on-arrow")],
)  # fmt: skip
def test_slugs(name, want):
    assert slug(name) == want


def test_icons_are_matched_by_slug_and_by_honest_aliases():
    names = {"1": "red apple", "2": "panda", "3": "UP! button", "4": "upwards button", "5": "keycap: *",
             "6": "keycap: #", "7": "pointing right", "8": "missing"}  # fmt: skip
    icon_set = {
        "width": 8, "height": 8,
        "icons": {name: {"body": f"<!--{name}-->"} for name in
                  ("red-apple", "panda-face", "upwards-button", "keycap", "pointing-left")},
        "aliases": {"panda": {"parent": "panda-face"}, "up-button": {"parent": "upwards-button"},
                    "pointing-right": {"parent": "pointing-left", "hFlip": True}},
    }  # fmt: skip
    svgs = match_icons(icon_set, [Concept(key, name, (), "") for key, name in names.items()])
    assert set(svgs) == {"1", "2", "4"}
    assert "<!--panda-face-->" in svgs["2"]


def test_rendering_lays_on_white_and_centres():
    image = np.asarray(render(SQUARE.format("#ff0000"), 16))
    assert image.shape == (16, 16, 3)
    assert (image[:, :8] == [255, 0, 0]).all()
    assert (image[:, 8:] == 255).all()
    icon = {"body": '<path fill="#000" d="M0 0h4v8H0z"/>', "width": 4}
    tall = np.asarray(render(icon_svg(icon, {"width": 8, "height": 8}), 16))
    assert tall.shape == (16, 16, 3)
    assert (tall[:, 4:12] == 0).all()
    assert (tall[:, :4] == 255).all()
    assert (tall[:, 12:] == 255).all()


def test_of_equal_pictures_the_first_in_train_stays_and_what_is_kept_apart_is_never_drawn():
    train, val, apart = concept_in("train", 2), concept_in("val", 2), concept_in(None, 2)
    red, green, blue, black = (SQUARE.format(colour) for colour in ("#f00", "#0f0", "#00f", "#000"))
    svgs = {
        val[0].key: red, train[0].key: red, train[1].key: green, apart[0].key: blue, val[1].key: blue,
        apart[1].key: black,
    }  # fmt: skip
    seen = []
    drawings = list(draw("x", svgs, [*val, *apart, *train], size_px=8, on_progress=seen.append))
    assert [drawing.key for drawing in drawings] == [f"x-{train[0].key}", f"x-{train[1].key}"]
    assert sum(seen) == 6
