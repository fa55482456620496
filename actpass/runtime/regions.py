"""The regions that ran in this process, found again by the parameters they ran with."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from actpass.report import Record


@dataclass(eq=False)
class Region:
    """One compiled graph. parameters: every parameter it ever ran with (one graph may serve several modules)."""

    record: Record
    positions: tuple[int, ...]
    parameters: weakref.WeakSet[torch.Tensor] = field(default_factory=weakref.WeakSet)
    _seen: int | None = None

    def note(self, args: tuple[Any, ...]) -> None:
        """Remember the parameters among the arguments of a call (cheap when the call is the same module's again)."""
        if self.positions and id(args[self.positions[0]]) != self._seen:
            self._seen = id(args[self.positions[0]])
            self.parameters.update(args[i] for i in self.positions)


_regions: list[Region] = []


def register(region: Region) -> None:
    _regions.append(region)


def clear() -> None:
    """Forget all regions (`torch.compiler.reset()` forgets the compiled code, not what we know of it)."""
    _regions.clear()


def regions_of(model: torch.nn.Module) -> list[Region]:
    """The regions that ran with this model's parameters, in the order they were compiled.

    Under FSDP2 a forward runs with unsharded stand-ins of the parameters; there the match is by the names and shapes that
    the region's record holds.
    """
    own = {id(p) for p in model.parameters()}
    by_identity = [r for r in _regions if any(id(p) in own for p in r.parameters)]
    if by_identity:
        return by_identity
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return [r for r in _regions if r.record.parameters and _fits(r.record, shapes)]


def _fits(record: Record, shapes: dict[str, tuple[int, ...]]) -> bool:
    return all(
        any(shape == s and (name == n or name.endswith(f".{n}")) for name, s in shapes.items())
        for n, shape in record.parameters
    )
