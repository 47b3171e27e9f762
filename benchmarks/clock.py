"""Wall and CPU seconds of a piece of work, with all processes that it started.

On a machine that others use too, wall seconds say what the neighbours left; CPU seconds say what the work
costs. Two sides are compared in alternating rounds, and both ratios are given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil


@dataclass
class Spent:
    """Filled when the block ends."""

    wall_s: float = 0.0
    cpu_s: float = 0.0


_seen: dict[tuple[int, float], float] = {}


def tree_cpu_s() -> float:
    """CPU seconds of this process and of every descendant that a call has ever seen; those of the dead stay counted."""
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        try:
            times = process.cpu_times()
            _seen[process.pid, process.create_time()] = times.user + times.system
        except psutil.Error:
            continue
    return sum(_seen.values())


@contextmanager
def spent() -> Iterator[Spent]:
    """Measures the block. Processes that begin and end inside it without a look at them are missed."""
    result = Spent()
    cpu, wall = tree_cpu_s(), time.perf_counter()
    yield result
    result.wall_s = time.perf_counter() - wall
    result.cpu_s = tree_cpu_s() - cpu


@dataclass
class Rounds:
    """What each side took, round by round."""

    values: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def column(self, side: str, key: str) -> list[float]:
        return [value[key] for value in self.values[side]]

    def ratios(self, side: str, base: str, key: str) -> list[float]:
        """side / base of every round."""
        return [a / b for a, b in zip(self.column(side, key), self.column(base, key), strict=True)]


def alternate(sides: dict[str, Callable[[], dict[str, float]]], num_rounds: int) -> Rounds:
    """Runs the sides in turn; the order turns round every other time, so that a drift hits both."""
    found = Rounds({name: [] for name in sides})
    for number in range(num_rounds):
        for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
            found.values[name].append(sides[name]())
            shown = ", ".join(f"{key} {value:.4g}" for key, value in found.values[name][-1].items())
            print(f"round {number + 1}: {name}: {shown}", flush=True)
    return found
