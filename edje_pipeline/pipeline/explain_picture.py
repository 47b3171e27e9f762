"""Draws a reading with Pillow alone: a small picture a token, or the words on the patches.

A panel's shade is a patch's attention over the panel's own peak, but over at least `EVEN_SHARES` times an even
share: attention that is spread evenly stays dark instead of being stretched into a pattern.

H W: pixels of the image as the model saw it; R C: rows and columns of patches.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

EVEN_SHARES = 4.0
PANEL_SIDES = ((16, 208), (36, 176), (math.inf, 152))
"""(tokens up to, pixels of a panel's longer side)."""
GAP, MARGIN, LINE = 14, 16, 19
TITLE_SIZE, HEAD_SIZE, DETAIL_SIZE = 17, 15, 13
PAPER, INK, GREY = (255, 255, 255), (20, 20, 20), (105, 105, 105)
FOR, AGAINST = (0, 120, 60), (180, 40, 30)
WARM, HOT = (235, 95, 20), (255, 240, 150)
OPACITY = 0.8
"""Of the brightest patch: what is below it stays visible."""
GROUND = (25.0, 115.0)
"""Brightness that black and white of the image keep below the shade: below WARM's, so that shade is always brighter."""
MIN_ASPECT_COLUMNS = 1.4
CELL_WIDTH, CELL_HEIGHT = 74, 40
PALE = 0.35
"""What is left of the colours below the words of a local adapter."""
MIN_COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """One token."""

    number: int
    words: tuple[str, ...]
    change: float | None
    """Of the text's logit."""
    weights: np.ndarray | None
    """float (R, C)"""


@dataclass(frozen=True)
class Picture:
    """What is drawn for an image."""

    title: tuple[str, ...]
    pixels: np.ndarray
    """uint8 (H, W, 3)"""
    panels: tuple[Panel, ...]
    grid: tuple[int, int] | None
    evidence: np.ndarray | None
    """float (R, C): attention of the tokens that speak for the text."""
    is_cells: bool
    """One token a patch: words on the patches instead of panels."""


def draw(picture: Picture) -> bytes:
    """The picture as a PNG file."""
    image = draw_cells(picture) if picture.is_cells and picture.grid else draw_panels(picture)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def shade(weights: np.ndarray) -> np.ndarray:
    """Weights that sum to about 1 (R, C) -> shades 0 to 1; see the module docstring."""
    scale = max(float(weights.max()), EVEN_SHARES / weights.size)
    shades: np.ndarray = np.clip(weights / scale, 0.0, 1.0)
    return shades


def overlay(pixels: np.ndarray, weights: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The image in dim grey with the attention in warm colours on it, patch by patch; size is (width, height)."""
    small = Image.fromarray(np.ascontiguousarray(pixels)).convert("L").resize(size, Image.Resampling.BICUBIC)
    grey = GROUND[0] + np.asarray(small, np.float32)[..., None] / 255 * (GROUND[1] - GROUND[0])
    patches = Image.fromarray(shade(weights).astype(np.float32)).resize(size, Image.Resampling.NEAREST)
    amount = np.asarray(patches, np.float32)[..., None]
    warm, hot = np.array(WARM, np.float32), np.array(HOT, np.float32)
    colour = warm + (hot - warm) * amount
    mixed = grey * (1 - OPACITY * amount) + colour * OPACITY * amount
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def panel_size(pixels: np.ndarray, num_panels: int) -> tuple[int, int]:
    """(width, height) of a panel with the image's shape."""
    side = next(side for limit, side in PANEL_SIDES if num_panels <= limit)
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def draw_panels(picture: Picture) -> Image.Image:
    """The image as the model saw it, then every token's attention with its number and words."""
    size = panel_size(picture.pixels, len(picture.panels))
    drawings: list[tuple[Image.Image, float | None]] = [
        (Image.fromarray(np.ascontiguousarray(picture.pixels)).resize(size, Image.Resampling.BICUBIC), None)
    ]
    heads: list[tuple[str, str]] = [("the image", "as the model sees it")]
    if picture.evidence is not None:
        drawings.append((overlay(picture.pixels, picture.evidence, size), None))
        heads.append(("for the text", "where its tokens look"))
    for panel in picture.panels:
        image = drawings[0][0] if panel.weights is None else overlay(picture.pixels, panel.weights, size)
        drawings.append((image, panel.change))
        heads.append((f"{panel.number}  {panel.words[0] if panel.words else '-'}", ", ".join(panel.words[1:])))
    columns = _num_columns(len(drawings))
    rows = math.ceil(len(drawings) / columns)
    cell = size[0] + GAP, size[1] + 2 * LINE + GAP
    top = MARGIN + LINE * len(picture.title) + GAP // 2
    sheet = Image.new("RGB", (2 * MARGIN + columns * cell[0] - GAP, top + rows * cell[1] + MARGIN - GAP), PAPER)
    pen = Pen(sheet)
    _write_title(pen, picture.title)
    for number, ((image, change), (head, detail)) in enumerate(zip(drawings, heads, strict=True)):
        left, upper = MARGIN + number % columns * cell[0], top + number // columns * cell[1]
        sheet.paste(image, (left, upper))
        below = upper + size[1] + 2
        room = size[0]
        if change is not None:
            room -= pen.right((left + size[0], below), f"{change:+.2f}", HEAD_SIZE, FOR if change > 0 else AGAINST) + 4
        pen.text((left, below), head, HEAD_SIZE, INK, room)
        pen.text((left, below + LINE - 1), detail, DETAIL_SIZE, GREY, size[0])
    return sheet


def _num_columns(num: int) -> int:
    """Wider than high, with the last row as full as it can be."""
    about = max(MIN_COLUMNS, round(math.sqrt(num * MIN_ASPECT_COLUMNS)))
    return min(num, min(range(about, about + 3), key=lambda columns: -num % columns))


def draw_cells(picture: Picture) -> Image.Image:
    """The image, dimmed, with each patch's word on it; the colour of a word says what it does to the text's logit."""
    assert picture.grid is not None
    rows, columns = picture.grid
    height, width = picture.pixels.shape[:2]
    scale = max(CELL_WIDTH * columns / width, CELL_HEIGHT * rows / height)
    size = round(width * scale), round(height * scale)
    top = MARGIN + LINE * len(picture.title) + GAP // 2
    sheet = Image.new("RGB", (size[0] + 2 * MARGIN, size[1] + top + MARGIN), PAPER)
    dim = np.asarray(Image.fromarray(np.ascontiguousarray(picture.pixels)).resize(size, Image.Resampling.BICUBIC))
    # Paler rather than darker: dark words are easier to read than bright ones.
    sheet.paste(Image.fromarray((255 - (255 - dim.astype(np.float32)) * PALE).astype(np.uint8)), (MARGIN, top))
    pen = Pen(sheet)
    _write_title(pen, picture.title)
    for panel in picture.panels[: rows * columns]:
        row, column = divmod(panel.number - 1, columns)
        left, right = (MARGIN + round(size[0] * edge / columns) for edge in (column, column + 1))
        upper, lower = (top + round(size[1] * edge / rows) for edge in (row, row + 1))
        pen.draw.rectangle((left, upper, right, lower), outline=(255, 255, 255))
        middle = (upper + lower) // 2 - (LINE if panel.change is not None else LINE // 2)
        word = panel.words[0] if panel.words else "-"
        pen.text((left + 4, middle), word, DETAIL_SIZE, INK, right - left - 6)
        if panel.change is not None:
            colour = FOR if panel.change > 0 else AGAINST
            pen.text((left + 4, middle + LINE - 2), f"{panel.change:+.2f}", DETAIL_SIZE, colour, right - left - 6)
    return sheet


class Pen:
    """Writes text that stays inside its room."""

    def __init__(self, sheet: Image.Image) -> None:
        self.draw = ImageDraw.Draw(sheet)
        self._fonts: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}

    def text(self, place: tuple[int, int], text: str, size: int, colour: tuple[int, int, int], room: int) -> None:
        """One line from the left; what does not fit is cut with an ellipsis."""
        shown = text = self._known(text, size)
        while shown and self.draw.textlength(shown, font=self._font(size)) > room:
            text = text[:-1]
            shown = text.rstrip(" ,") + "..." if text else ""
        self.draw.text(place, shown, fill=colour, font=self._font(size))

    def right(self, place: tuple[int, int], text: str, size: int, colour: tuple[int, int, int]) -> int:
        """One line that ends at the place; returns its width."""
        width = math.ceil(self.draw.textlength(text, font=self._font(size)))
        self.draw.text((place[0] - width, place[1]), text, fill=colour, font=self._font(size))
        return width

    def _font(self, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        if size not in self._fonts:
            self._fonts[size] = ImageFont.load_default(size)
        return self._fonts[size]

    def _known(self, text: str, size: int) -> str:
        """Pillow's own font has Latin letters only; others are written as their code point, not as a box."""
        font = self._font(size)
        missing = bytes(font.getmask("\uffff"))
        return "".join(
            char if char.isspace() or bytes(font.getmask(char)) != missing else f"U+{ord(char):04X}" for char in text
        )


def _write_title(pen: Pen, lines: tuple[str, ...]) -> None:
    for number, line in enumerate(lines):
        room = pen.draw.im.size[0] - 2 * MARGIN
        pen.text((MARGIN, MARGIN - 4 + number * LINE), line, TITLE_SIZE - 2 * number, INK, room)
