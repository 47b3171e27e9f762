"""The picture of a reading, the text of a result, and the inputs of `explain`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.spec import PreprocessSpec
from edje_pipeline.models.token_reading import Word
from edje_pipeline.pipeline.explain import ExplainConfig
from edje_pipeline.pipeline.explain_inputs import read_files, read_ids
from edje_pipeline.pipeline.explain_picture import Panel, Picture, draw, overlay, shade
from edje_pipeline.pipeline.explain_result import ExplainResult, ImageReading, Peak, TokenReading, Unreadable

SPEC = PreprocessSpec((32, 40), "squash")


def opened(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("L"), np.float32)


def panels(num: int, weights: np.ndarray | None, change: float | None = None) -> tuple[Panel, ...]:
    return tuple(Panel(number + 1, ("apple", "red"), change, weights) for number in range(num))


@pytest.mark.parametrize("brightness", [0, 128, 255])
def test_the_planted_patch_is_the_brightest_whatever_the_image_shows(brightness: int) -> None:
    rng = np.random.default_rng(0)
    pixels = np.clip(rng.integers(-120, 120, (64, 96, 3)) + brightness, 0, 255).astype(np.uint8)
    weights = np.full((4, 6), 0.01)
    weights[2, 4] = 0.77
    drawn = np.asarray(overlay(pixels, weights, (96, 64)).convert("L"), np.float32)
    assert drawn.shape == (64, 96)
    means = drawn.reshape(4, 16, 6, 16).mean(axis=(1, 3))
    assert np.unravel_index(means.argmax(), means.shape) == (2, 4)
    assert means[2, 4] > 1.5 * np.sort(means.ravel())[-2]


def test_even_attention_stays_dark_and_shade_keeps_proportions() -> None:
    assert shade(np.full((4, 4), 1 / 16)) == pytest.approx(0.25)
    weights = np.array([[0.6, 0.3], [0.05, 0.05]])
    assert shade(weights) == pytest.approx(weights)
    sharp = np.zeros((4, 4))
    sharp[0, 0], sharp[0, 1] = 0.8, 0.2
    assert shade(sharp)[0, :2] == pytest.approx([1, 0.25])


@pytest.mark.parametrize("num", [1, 2, 8, 64])
def test_sheets_have_a_panel_a_token(num: int) -> None:
    weights = np.full((4, 4), 0.02)
    weights[1, 3] = 0.7
    pixels = np.zeros((32, 32, 3), np.uint8)
    drawn = opened(draw(Picture(("cat.jpg",), pixels, panels(num, weights, 0.5), (4, 4), weights, is_cells=False)))
    assert 300 < drawn.shape[1] < 2000
    assert 250 < drawn.shape[0] < 2000
    # One bright patch for every token and for the sum of them, on black pictures and white paper.
    rgb = Image.open(
        io.BytesIO(draw(Picture(("cat.jpg",), pixels, panels(num, weights), (4, 4), weights, is_cells=False)))
    )
    yellow = (np.abs(np.asarray(rgb, int) - [209, 197, 125]).max(axis=2) < 6).sum()
    side = 208 if num <= 16 else 152
    assert yellow == pytest.approx((num + 1) * (side / 4) ** 2, rel=0.05)


def test_words_stand_on_the_patches_of_a_local_adapter() -> None:
    pixels = np.full((32, 32, 3), 255, np.uint8)
    words = tuple(
        Panel(number + 1, ("wwww",) if number == 5 else (".",), None if number else -1.0, None) for number in range(16)
    )
    drawn = opened(draw(Picture(("cat.jpg", '"text": logit 1.00'), pixels, words, (4, 4), None, is_cells=True)))
    cells = drawn[-(4 * 74 + 16) : -16, 16:-16]
    ink = (255 - cells[: 4 * 74, : 4 * 74]).reshape(4, 74, 4, 74).sum(axis=(1, 3))
    # The long word on patch 6, the change of the logit on patch 1.
    order = np.argsort(ink.ravel())[::-1]
    assert set(order[:2].tolist()) == {5, 0}


def test_letters_without_a_glyph_are_written_as_code_points_and_long_words_cut() -> None:
    word = Panel(1, ("猫", "donaudampfschifffahrtsgesellschaft" * 4), None, np.full((2, 2), 0.25))
    drawn = opened(draw(Picture(("x" * 300,), np.zeros((9, 30, 3), np.uint8), (word,), (2, 2), None, is_cells=False)))
    assert (drawn[:, -16:] == 255).all()


PEAK = Peak(12, 14, 0.31, 60.8)


def reading(num: int = 3, *, peak: Peak | None = PEAK, change: float | None = None) -> ImageReading:
    words = (Word("apple", 0.5), *(Word("internationalisation", 0.31) for _ in range(5)))
    tokens = tuple(TokenReading(number + 1, words, peak, change) for number in range(num))
    return ImageReading("a/very/long/path/" * 6 + "cat.jpg", 196, (14, 14), tokens, None if change is None else 2.5)


def result(images: tuple[ImageReading, ...], rejected: tuple[Unreadable, ...] = (), kind: str = "compressed"):
    return ExplainResult("m", kind, False, 0.2, 22000, "a red apple", images, rejected)


def test_text_fits_and_exit_codes_follow_the_rejects() -> None:
    bad = Unreadable("bad.jpg", "corrupt", "it ends " * 30)
    for kind, image in (("compressed", reading(change=-12.25)), ("local", reading(28, peak=None, change=1.0))):
        text = result((image,), (bad,), kind).to_text()
        long = [line for line in text.splitlines() if len(line) > 80 and "a/very/long" not in line]
        assert not long
        assert "\N{NO-BREAK SPACE}" not in text
        assert "named most (by so many tokens): apple (" in text
    shown = result((reading(change=-12.25),)).to_text()
    assert "    1    12,14  60.8x -12.250  apple 0.50, internationalisation 0.31," in shown
    assert result((reading(),)).exit_code == 0
    assert result((reading(),), (bad,)).exit_code == 3
    assert result((), (bad,)).exit_code == 1
    assert result((reading(),)).to_dict()["images"][0]["named_most"] == [{"word": "apple", "num_tokens": 3}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": ()}, "no image was given"),
        ({"top_k": 0}, "--top-k is 0"),
        ({"text": " "}, "--text is empty"),
        ({"images": ("a.jpg", "b.jpg"), "out": "x.png"}, "one file for 2 images"),
        ({"images": ("x.png",), "out": "./x.png"}, "is the image itself"),
    ],
)
def test_options_that_make_no_sense(options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExplainConfig(**{"images": ("a.jpg",), "model": "m", **options})


def test_files_and_ids_give_what_the_model_sees(tmp_path: Path) -> None:
    for number in range(20):
        Image.new("RGB", (80, 64), (number * 10, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_text("no image")
    names = [*(str(tmp_path / f"{number}.png") for number in range(20)), str(tmp_path / "bad.png"), str(tmp_path)]
    seen = [*read_files(names, SPEC), *read_files([str(tmp_path / "none.png")], SPEC)]
    assert [image.name for image in seen] == [*names, str(tmp_path / "none.png")]
    assert [image.pixels[0, 0, 0] for image in seen[:20]] == [number * 10 for number in range(20)]
    assert seen[0].pixels.shape == (32, 40, 3)
    assert [image.reason for image in seen[20:]] == ["unknown_format", "unreadable", "missing"]

    ids = ["7.png", "none.png", "bad.png", "3.png", "7.png"]
    found = list(read_ids(ids, str(tmp_path), SPEC))
    assert [image.name for image in found] == ids
    assert [image.reason for image in found] == ["", "missing", "unknown_format", "", ""]
    assert [int(found[number].pixels[0, 0, 0]) for number in (0, 3, 4)] == [70, 30, 70]
