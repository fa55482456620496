"""What goes together. A small model on a GPU takes as long for a product as it takes to launch it, so there what is done alike
for many layers is done at once. What is done at once is in memory at once: a batch has a limit. On a CPU a launch costs
nothing, and one by one compiles faster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from actpass.ir.joint_graph import Joint, value

MOST = 32 << 20
"""Bytes of a batch."""
_SHARE = 200
"""Of what Inductor would save, the part that a batch of bases, or of sampled tokens, may take beside it. (llama-60m, 64 x 256,
on a GPU: of a 200th the peak is that of making one by one; of a hundredth it is 2 % higher with `oasis`, 11 % with `prac`.)"""
T = TypeVar("T")


def batches(members: Iterable[T], kind: Callable[[T], object], nbytes: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Members of one kind, in their order, as many as have no more than ``most`` bytes; one that has more by itself."""
    open_batches: dict[object, list[T]] = {}
    for member in members:
        of_kind = kind(member)
        batch = open_batches.setdefault(of_kind, [])
        if batch and sum(map(nbytes, batch)) + nbytes(member) > most:
            yield batch
            batch = open_batches[of_kind] = []
        batch.append(member)
    yield from open_batches.values()


def launches_cost(joint: Joint) -> bool:
    """Whether any of the kernels of ``joint`` is launched, on a device that is no CPU."""
    return any(isinstance(p.meta.get("val"), torch.Tensor) and value(p).device.type != "cpu" for p in joint.primals)


def most_beside(joint: Joint, saved_bytes: int) -> int:
    """Bytes of a batch of what a step without it has one by one, where Inductor would save ``saved_bytes``; 0: one by one."""
    return min(MOST, saved_bytes // _SHARE) if launches_cost(joint) else 0
