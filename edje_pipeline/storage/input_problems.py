"""Collects everything wrong with an input file, to report it at once."""

from __future__ import annotations

from collections.abc import Iterable

from edje_pipeline.errors import InputFileError

SHOWN = 3


class Problems:
    """Kinds of problem in one file, each with its first places and a count."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._kinds: dict[str, tuple[int, list[str]]] = {}

    def add(self, what: str, places: Iterable[str], count: int | None = None) -> None:
        """Notes `what` at `places`; `count` when there are more than were given."""
        given = list(places)
        total, shown = self._kinds.get(what, (0, []))
        self._kinds[what] = total + (count if count is not None else len(given)), (shown + given)[:SHOWN]

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def raise_if_any(self, expected: str) -> None:
        """Raises InputFileError naming every kind of problem, when there is one."""
        if not self._kinds:
            return
        lines = []
        for what, (count, shown) in self._kinds.items():
            more = f" and {count - len(shown):,} more" if count > len(shown) else ""
            lines.append(f"{what} at {', '.join(shown)}{more}" if shown else what)
        raise InputFileError(f"{self.name}: {'; '.join(lines)}. Expected {expected}")
