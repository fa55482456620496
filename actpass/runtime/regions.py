"""The regions that ran in this process, found again by the parameters they ran with."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from actpass.report import Record


@dataclass(eq=False)
class Region:
    """One compiled graph.

    positions: which of its arguments are parameters. parameters: every parameter it ever ran with (one graph may serve
    several modules). follows: for a region without parameters (a loss behind a graph break), the region that ran before.
    """

    record: Record
    positions: tuple[int, ...]
    parameters: weakref.WeakSet[torch.Tensor] = field(default_factory=weakref.WeakSet)
    follows: Region | None = None
    _seen: int | None = None

    def note(self, args: tuple[Any, ...]) -> None:
        """Remember whose call this is (cheap when it is the same module's again)."""
        global _last
        if not self.positions:
            self.follows = self.follows or _last
            return
        _last = self
        if id(args[self.positions[0]]) != self._seen:
            self._seen = id(args[self.positions[0]])
            self.parameters.update(args[i] for i in self.positions)


_regions: list[Region] = []
_last: Region | None = None
"""The region with parameters that ran last."""


def register(region: Region) -> None:
    _regions.append(region)


def clear() -> None:
    """Forget all regions (`torch.compiler.reset()` forgets the compiled code, not what we know of it)."""
    global _last
    _regions.clear()
    _last = None


def regions_of(model: torch.nn.Module) -> list[Region]:
    """The regions that ran with this model's parameters, in the order they were compiled.

    Under FSDP2 a forward runs with unsharded stand-ins of the parameters; there the match is by the names and shapes that
    the region's record holds.
    """
    own = {id(p) for p in model.parameters()}
    found = {r for r in _regions if any(id(p) in own for p in r.parameters)}
    if not found:
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        found = {r for r in _regions if r.record.parameters and _fits(r.record, shapes)}
    return [r for r in _regions if r in found or r.follows in found]


def _fits(record: Record, shapes: dict[str, tuple[int, ...]]) -> bool:
    return all(
        any(shape == s and (name == n or name.endswith(f".{n}")) for name, s in shapes.items())
        for n, shape in record.parameters
    )
