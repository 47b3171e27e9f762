"""The corpus on planted packages, and the real one against the ready-made tars where both can be had."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from edje_pipeline.errors import SourceError
from recipes import emoji_corpus
from recipes.emoji_drawings import Concept, Drawing, draw
from recipes.emoji_packages import PACKAGES, Package, fetch, integrity_of
from tests.shared_data import shared_path
from tests.unit.recipes.test_emoji_drawings import SQUARE, emoji_entry
from tests.unit.recipes.test_emoji_packages import npm_tarball

pytest.importorskip("resvg_py")

POINTS = [f"{point:X}" for point in range(0x1F300, 0x1F300 + 40)]


def read_tar(path):
    """key -> suffix -> bytes, in the tar's order."""
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            key, _, suffix = member.name.rpartition(".")
            found.setdefault(key, {})[suffix] = archive.extractfile(member).read()
    return found


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Two packages in a cache: 40 OpenMoji drawings and 39 icons of another set, each of its own colour."""
    colours = [f"#{number * 6:02x}80{number:02x}" for number in range(40)]
    openmoji = {
        "package.json": json.dumps({"license": "CC-BY-SA-4.0", "homepage": "https://openmoji.org/"}).encode(),
        "data/openmoji.json": json.dumps([emoji_entry(point, f"thing {point}") for point in POINTS]).encode(),
    } | {f"color/svg/{p}.svg": SQUARE.format(c).encode() for p, c in zip(POINTS, colours, strict=True)}
    icons = {
        f"thing-{point.lower()}": {"body": f'<path fill="{colour}" d="M0 0h8v4H0z"/>'}
        for point, colour in zip(POINTS[1:], colours[1:], strict=True)
    }
    info = {
        "name": "Other",
        "author": {"name": "Somebody", "url": "https://a"},
        "license": {"spdx": "MIT", "url": "https://b"},
    }
    other = {
        "icons.json": json.dumps({"icons": icons, "width": 8, "height": 8}).encode(),
        "info.json": json.dumps(info).encode(),
    }
    packages = []
    cache = tmp_path / "cache"
    cache.mkdir()
    for style, name, files in (("openmoji", "openmoji", openmoji), ("other", "@scope/other", other)):
        content = npm_tarball(files)
        packages.append(Package(style, name, "1.0.0", integrity_of(content)))
        (cache / packages[-1].file_name).write_bytes(content)
    monkeypatch.setattr(emoji_corpus, "PACKAGES", tuple(packages))
    return cache


def test_a_planted_corpus(planted, tmp_path, capsys):
    out = tmp_path / "corpus"
    assert emoji_corpus.main(["--out", str(out), "--cache", str(planted), "--quiet"]) == 0
    parts = {part: read_tar(out / f"{part}.tar") for part in ("train", "val")}
    want = {
        part: [f"{style}-{point}" for style in ("openmoji", "other") for point in POINTS
               if Concept(point, "", (), "").part == part and (style, point) != ("other", POINTS[0])]
        for part in parts
    }  # fmt: skip
    assert {part: list(rows) for part, rows in parts.items()} == want
    assert 0 < len(want["val"]) < len(want["train"]) < 79 - len(want["val"])
    key = want["val"][0]
    assert json.loads(parts["val"][key]["json"]) == {
        "concept": key.partition("-")[2], "style": "openmoji", "name": f"thing {key.partition('-')[2]}",
        "keywords": ["a", "b", "c"], "group": "objects",
    }  # fmt: skip
    with Image.open(io.BytesIO(parts["val"][key]["webp"])) as image:
        assert (image.mode, image.size) == ("RGB", (128, 128))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    assert "MIT" in printed
    summary = json.loads((out / "corpus.json").read_text())
    assert summary["artists"][1]["license_url"] == "https://b"
    assert sum(summary["num_drawings"]["other"].values()) == sum(len(rows) for rows in want.values()) - sum(
        key.startswith("openmoji") for rows in want.values() for key in rows
    )


def test_the_same_corpus_has_the_same_bytes(planted, tmp_path):
    first, second = (emoji_corpus.build(tmp_path / name, cache=planted, quiet=True) for name in ("a", "b"))
    assert first.to_dict() == second.to_dict()
    for name in ("train.tar", "val.tar", "corpus.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with tarfile.open(tmp_path / "a" / "train.tar") as archive:
        member = archive.next()
    assert (member.mtime, member.uid, member.mode) == (0, 0, 0o644)


def test_a_failure_is_one_line(monkeypatch, tmp_path, capsys):
    def refuse(package, cache):
        raise SourceError(f"`npm pack {package.spec}` failed")

    monkeypatch.setattr(emoji_corpus, "fetch", refuse)
    assert emoji_corpus.main(["--out", str(tmp_path), "--quiet"]) == 1
    assert capsys.readouterr().err == "error: `npm pack openmoji@17.0.0` failed\n"


ONLY_READY_MADE = {"emojione-1F199"}
"""`UP! button` under an alias of `upwards button`: another thing, left out here."""
ONLY_BUILT = {"emojione-1F53C"}
"""`upwards button`, whose picture that alias had taken."""
REDRAWN = ("noto", "twemoji")
"""In the ready-made tars enlarged from small pictures, some of older drawings: other pixels, a few other keys."""


@pytest.fixture(scope="module")
def ready_made():
    return {part: read_tar(shared_path("emoji", f"{part}.tar")) for part in ("train", "val")}


@pytest.fixture(scope="module")
def real_sources(ready_made, tmp_path_factory):
    """Concepts, and SVG text by style and concept, of the real packages."""
    cache = tmp_path_factory.mktemp("packages")
    try:
        tarballs = {package: fetch(package, cache) for package in PACKAGES}
    except SourceError as error:
        pytest.skip(f"no package registry: {error}")
    concepts, svgs = [], {}
    for package, tarball in tarballs.items():
        if package.style == "openmoji":
            concepts, svgs[package.style], _ = emoji_corpus.read_openmoji(package, tarball)
        else:
            svgs[package.style], _ = emoji_corpus.read_icons(package, tarball, concepts)
    return concepts, svgs


def test_every_ready_made_drawing_has_a_source_in_the_same_part_with_the_same_texts(ready_made, real_sources):
    concepts, svgs = real_sources
    by_key = {concept.key: concept for concept in concepts}
    absent = set()
    for part, rows in ready_made.items():
        for key, row in rows.items():
            texts = json.loads(row["json"])
            concept = by_key[texts["concept"]]
            assert concept.part == part
            assert Drawing(texts["style"], concept, None).to_dict() == texts
            if concept.key not in svgs[texts["style"]]:
                absent.add(key)
    assert {key for key in absent if not key.startswith(REDRAWN)} == ONLY_READY_MADE
    assert len(absent) <= 8


def test_real_drawings_equal_the_ready_made_ones(ready_made, real_sources):
    """All of one artist, all people of another (who look alike most), and samples: the whole takes 40 s."""
    concepts, svgs = real_sources
    ready = {key: row["webp"] for rows in ready_made.values() for key, row in rows.items()}
    people = [concept.key for concept in concepts if concept.group == "people-body"]
    chosen = {
        "emojione": list(svgs["emojione"]),
        "openmoji": [key for key in people if key in svgs["openmoji"]],
        "fluent-emoji-flat": list(svgs["fluent-emoji-flat"])[::20],
    }
    built = {
        drawing.key: drawing.image
        for style, keys in chosen.items()
        for drawing in draw(style, {key: svgs[style][key] for key in keys}, concepts, size_px=128)
    }
    asked = {f"{style}-{key}" for style, keys in chosen.items() for key in keys}
    assert built.keys() - ready.keys() == ONLY_BUILT
    assert (ready.keys() & asked) <= built.keys()
    for key in built.keys() & ready.keys():
        with Image.open(io.BytesIO(ready[key])) as picture:
            np.testing.assert_array_equal(np.asarray(built[key]), np.asarray(picture.convert("RGB")), err_msg=key)
