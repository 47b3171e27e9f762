"""Moves tensors between two naming schemes, both ways, from one table.

A rule concatenates the source tensors along the first axis, adds leading axes or transposes, and splits
the result into the target tensors. Swapping its ends inverts it, so that import and export cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """One group of tensors under both names."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    source_parts: tuple[int, ...] = (1,)
    """Relative number of rows of each source."""
    target_parts: tuple[int, ...] = (1,)
    lead: int = 0
    """Leading axes of size one that the targets have more than the sources."""
    transpose: bool = False

    @property
    def inverse(self) -> Rule:
        return replace(
            self, sources=self.targets, targets=self.sources,
            source_parts=self.target_parts, target_parts=self.source_parts, lead=-self.lead,
        )  # fmt: skip

    def apply(self, tensors: list[Tensor]) -> list[Tensor]:
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if self.transpose:
            joined = joined.t()
        for _ in range(self.lead):
            joined = joined.unsqueeze(0)
        for _ in range(-self.lead):
            joined = joined.squeeze(0)
        if len(self.targets) == 1:
            return [joined]
        unit = joined.shape[0] // sum(self.target_parts)
        return list(torch.split(joined, [unit * part for part in self.target_parts]))

    def at(self, index: int) -> Rule:
        """The rule of block `index`: `{i}` filled in."""
        return replace(
            self,
            sources=tuple(name.format(i=index) for name in self.sources),
            targets=tuple(name.format(i=index) for name in self.targets),
        )


def same(source: str, target: str, *, lead: int = 0, transpose: bool = False) -> Rule:
    """One tensor under another name."""
    return Rule((source,), (target,), lead=lead, transpose=transpose)


def layer(source: str, target: str) -> list[Rule]:
    """A module with weight and bias."""
    return [same(f"{source}.weight", f"{target}.weight"), same(f"{source}.bias", f"{target}.bias")]


def merged(sources: tuple[str, str, str], target_weight: str, target_bias: str) -> list[Rule]:
    """Query, key and value layers that the target keeps in one matrix."""
    return [
        Rule(tuple(f"{name}.{kind}" for name in sources), (target,), (1, 1, 1), (3,))
        for kind, target in (("weight", target_weight), ("bias", target_bias))
    ]


def for_blocks(rules: Iterable[Rule], num_blocks: int) -> list[Rule]:
    """Rules of one block -> rules of all."""
    block = list(rules)
    return [rule.at(index) for index in range(num_blocks) for rule in block]


def inverted(rules: Iterable[Rule]) -> list[Rule]:
    """The same table read from right to left."""
    return [rule.inverse for rule in rules]


@dataclass(frozen=True)
class Conversion:
    """What a table made of a set of tensors."""

    tensors: dict[str, Tensor]
    missing: list[str]
    """Source names that the table wants and the set does not hold."""
    unused: list[str]
    """Names of the set that no rule mentions."""


def convert(rules: Iterable[Rule], tensors: Mapping[str, Tensor]) -> Conversion:
    """Applies a table; a rule with a missing source yields nothing."""
    converted: dict[str, Tensor] = {}
    missing: list[str] = []
    used: set[str] = set()
    for rule in rules:
        absent = [name for name in rule.sources if name not in tensors]
        used.update(rule.sources)
        missing.extend(absent)
        if not absent:
            converted.update(zip(rule.targets, rule.apply([tensors[name] for name in rule.sources]), strict=True))
    return Conversion(converted, missing, sorted(tensors.keys() - used))
