"""What several workers of one run exchange: gathered tokens, averaged gradients, a shared alarm.

Every worker computes the batch plan of all of them (it is a pure function of the step), so only
vision tokens and gradients travel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Collective:
    """This worker's place; `Collective()` is a run of one."""

    rank: int = 0
    num_workers: int = 1

    @classmethod
    def from_process_group(cls) -> Collective:
        """The initialised default group of torch.distributed."""
        return cls(dist.get_rank(), dist.get_world_size())

    def gather(self, own: Tensor) -> Tensor:
        """Every worker's tensor (equal shapes), interleaved: position i is row i // W of worker i % W.

        No gradient flows through: what is gathered is frozen.
        """
        if self.num_workers == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.num_workers)]
        dist.all_gather(parts, own.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Mean over workers, in one message; absent gradients count as zero."""
        if self.num_workers == 1:
            return
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in wanted if parameter.grad is not None])
        dist.all_reduce(flat)
        flat /= self.num_workers
        start = 0
        for parameter in wanted:
            assert parameter.grad is not None
            parameter.grad.copy_(flat[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()

    def any(self, flag: bool, device: torch.device) -> bool:
        """True on every worker when it is True on one."""
        if self.num_workers == 1:
            return flag
        value = torch.tensor([float(flag)], device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def mean(self, values: Tensor) -> Tensor:
        """Mean over workers of a small tensor of numbers to report."""
        if self.num_workers == 1:
            return values
        summed = values.detach().clone()
        dist.all_reduce(summed)
        return summed / self.num_workers
