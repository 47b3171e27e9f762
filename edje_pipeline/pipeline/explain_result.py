"""What `explain` found, as data, JSON and text of 80 columns."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from edje_pipeline.models.token_reading import Word

WIDTH = 80
NUM_NAMED = 5
UNTRAINED_NOTE = (
    "the adapter of {model} still has the random weights it was made with: its words and its attention mean nothing"
)


@dataclass(frozen=True)
class Peak:
    """The patch that a token attends to most."""

    row: int
    """From 1, top to bottom."""
    column: int
    """From 1, left to right."""
    weight: float
    """Share of the token's attention, heads averaged."""
    times_even: float
    """That share over 1/N, what even attention would give."""


@dataclass(frozen=True)
class TokenReading:
    """One image token."""

    token: int
    """From 1, in the order of the joint encoder's sequence. For a local adapter also the patch, row by row."""
    words: tuple[Word, ...]
    """The nearest first."""
    peak: Peak | None
    """None where the adapter does not attend, or the vision tokens form no grid."""
    logit_change: float | None = None
    """Logit minus the logit with this token hidden: positive when the token speaks for the text."""


@dataclass(frozen=True)
class ImageReading:
    """All tokens of one image."""

    image: str
    num_vision_tokens: int
    grid: tuple[int, int] | None
    """Rows and columns of patches."""
    tokens: tuple[TokenReading, ...]
    logit: float | None = None
    """Of the pair with the text, before any codec."""
    picture: str | None = None

    @property
    def named_most(self) -> list[tuple[str, int]]:
        """The words that most tokens have as their first, with the number of those tokens."""
        return Counter(token.words[0].text for token in self.tokens if token.words).most_common(NUM_NAMED)


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be used."""

    image: str
    reason: str
    """Of the closed list of rejects."""
    message: str


@dataclass(frozen=True)
class ExplainResult:
    """The readings."""

    model: str
    adapter: str
    """compressed or local."""
    is_untrained: bool
    chance_cosine: float
    """19 of 20 random directions have no vocabulary word nearer than this."""
    num_words: int
    """Words that were compared."""
    text: str | None
    images: tuple[ImageReading, ...]
    rejected: tuple[Unreadable, ...]

    @property
    def exit_code(self) -> int:
        """3 when some images could not be used, 1 when none could."""
        if not self.rejected:
            return 0
        return 3 if self.images else 1

    def to_dict(self) -> dict[str, Any]:
        value = asdict(self)
        for entry, image in zip(value["images"], self.images, strict=True):
            entry["named_most"] = [{"word": word, "num_tokens": num} for word, num in image.named_most]
        return {**value, "exit_code": self.exit_code}

    def to_text(self) -> str:
        """A table an image; for a local adapter the words as the patches lie."""
        blocks = []
        if self.is_untrained:
            blocks.append(_wrap(f"note: {UNTRAINED_NOTE.format(model=self.model)}"))
        for image in self.images:
            lines = self._header(image)
            lines += self._patches(image) if self.adapter == "local" else self._table(image)
            if image.picture is not None:
                lines += ["", f"picture: {image.picture}"]
            blocks.append("\n".join(lines))
        blocks += [_wrap(f"rejected: {bad.image}: {bad.reason}: {bad.message}") for bad in self.rejected]
        if self.images:
            blocks.append("\n".join(_wrap(line) for line in self._legend()))
        return "\n\n".join(blocks)

    def _header(self, image: ImageReading) -> list[str]:
        shape = image.grid
        grid = f"{shape[0]} x {shape[1]} patches" if shape else f"{image.num_vision_tokens} vision tokens"
        lines = [_wrap(f"{image.image}: {len(image.tokens)} tokens over {grid}")]
        if image.logit is not None:
            lines.append(_wrap(f'"{self.text}": logit {image.logit:.3f}', indent=2))
        named = ", ".join(f"{word} ({num})" for word, num in image.named_most)
        return [*lines, _wrap(f"named most (by so many tokens): {named}", indent=2), ""]

    def _table(self, image: ImageReading) -> list[str]:
        has_logit = image.logit is not None
        start = f"{'token':>5}  {'patch':>7} {'peak':>6}" + (f" {'logit':>7}" if has_logit else "") + "  "
        lines = [start + "nearest words (cosine)"]
        for token in image.tokens:
            peak = token.peak
            left = f"{token.token:>5}  "
            left += f"{f'{peak.row},{peak.column}':>7} {f'{peak.times_even:.1f}x':>6}" if peak else f"{'-':>7} {'-':>6}"
            left += f" {token.logit_change:>+7.3f}" if token.logit_change is not None else ""
            words = ", ".join(f"{word.text}\N{NO-BREAK SPACE}{word.cosine:.2f}" for word in token.words)
            lines.append(_hang(left + "  ", words))
        return lines

    def _patches(self, image: ImageReading) -> list[str]:
        columns = image.grid[1] if image.grid else len(image.tokens)
        lines = []
        for start in range(0, len(image.tokens), columns):
            cells = (
                (token.words[0].text if token.words else "-")
                + (f"\N{NO-BREAK SPACE}{token.logit_change:+.3f}" if token.logit_change is not None else "")
                for token in image.tokens[start : start + columns]
            )
            lines.append(_hang(f"row {start // columns + 1:>2}  ", ", ".join(cells)))
        return lines

    def _legend(self) -> list[str]:
        lines = []
        if self.adapter != "local":
            lines.append("patch: row,column the token attends to most, and how many times an even share it gets")
        if self.text is not None:
            change = "the number behind a word" if self.adapter == "local" else "logit"
            lines.append(f"{change}: what the token adds to the text's logit; positive speaks for the match")
        lines.append(
            f"cosine: to {self.num_words:,} word embeddings of the joint encoder; a random direction reaches "
            f"{self.chance_cosine:.2f} by chance"
        )
        return lines


def _wrap(text: str, *, indent: int = 0) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2), break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip


def _hang(left: str, text: str) -> str:
    """`left text`, further lines below the text; no-break spaces hold a word and its number together."""
    filled = textwrap.fill(
        text, WIDTH - len(left), break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return (left + filled.replace("\n", "\n" + " " * len(left))).replace("\N{NO-BREAK SPACE}", " ")
