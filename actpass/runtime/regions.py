"""The regions that ran in this process, found again by the parameters they ran with."""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from actpass._torch import reset_code
from actpass.budget import PeakBudget
from actpass.config import Config
from actpass.report import Record
from actpass.runtime import steps


@dataclass(eq=False)
class Region:
    """One compiled graph.

    config: the options it was compiled with. positions: which of its arguments are parameters. parameters: every parameter it
    ever ran with (one graph may serve several modules), by id. follows: for a region without parameters (a loss behind a
    graph break), the region that ran before. frame: Dynamo's number for the code that was compiled; a recompilation has the
    same. called: when it ran last. code: the Python code that it was compiled from. shapes: of its inputs. peak: its budget, if
    that is one of peak bytes. arguments: (path, shape) where the parameters are arguments of the compiled function; positions
    are theirs then.
    """

    record: Record
    config: Config
    positions: tuple[int, ...]
    frame: int | None = None
    called: int = 0
    parameters: weakref.WeakValueDictionary[int, torch.Tensor] = field(default_factory=weakref.WeakValueDictionary)
    follows: Region | None = None
    code: types.CodeType | None = None
    shapes: str = ""
    peak: PeakBudget | None = None
    arguments: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def note(self, args: tuple[Any, ...]) -> None:
        """Remember whose call this is (cheap when it is the same module's again)."""
        global _last, _calls
        _calls += 1
        self.called = _calls
        if self.peak is not None and self.peak.part:
            steps.note(self, id(args[self.positions[0]]) if self.positions else None)
        if not self.positions:
            self.follows = _last
            return
        if self._is_planned_without_gradients() and any(args[i].grad is not None for i in self.positions):
            recompile(self)  # the next call: gradients are accumulated, and take what the plan gave away
        _last = self
        first = args[self.positions[0]]
        if self.parameters.get(id(first)) is not first:
            self.parameters.update((id(args[i]), args[i]) for i in self.positions)

    def _is_planned_without_gradients(self) -> bool:
        return self.peak is not None and not self.peak.part and not self.peak.resident.accumulated


_regions: list[Region] = []
_calls = 0
_last: Region | None = None
"""The region with parameters that ran last."""


def register(region: Region) -> None:
    """Add a region, and forget those whose parameters are all gone."""
    _regions[:] = [r for r in _regions if r.parameters or not r.called or (r.follows is not None and r.follows.parameters)]
    _regions.append(region)


def clear() -> None:
    """Forget all regions (`torch.compiler.reset()` forgets the compiled code, not what we know of it)."""
    global _last
    _regions.clear()
    _last = None
    steps.clear()


def recompile(region: Region) -> None:
    """Forget the code that was compiled for ``region``: it is compiled again when it is next called."""
    if region.code is not None:
        reset_code(region.code)
    if region in _regions:
        _regions.remove(region)


def following_global_budget() -> list[Region]:
    return [r for r in _regions if r.config.follows_global_budget]


def regions_of(model: torch.nn.Module) -> list[Region]:
    """The regions that ran with this model's parameters, in the order in which they last ran: one that was compiled again keeps
    its place in a step. Of several compilations of one frame for the same parameters (another shape, another mode) the one that
    ran last.

    Under FSDP2 a forward runs with unsharded stand-ins of the parameters; there the match is by the names and shapes that
    the region's record holds. So it is where parameters are arguments of the compiled function.
    """
    own = {id(p) for p in model.parameters()}
    found = {r for r in _regions if own & set(r.parameters.keys())}
    if not found:
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        is_sharded = any(type(p.data).__name__ == "DTensor" for p in model.parameters())
        named = {r: r.record.parameters if is_sharded else r.arguments for r in _regions}
        found = {r for r, parameters in named.items() if parameters and _fits(parameters, shapes)}
    latest: dict[Any, Region] = {}
    for region in sorted(_regions, key=lambda r: r.called):
        if region in found:
            latest[frozenset(region.parameters.keys())] = region
    for region in sorted(_regions, key=lambda r: r.called):
        if not region.positions and region.follows in latest.values():
            latest[region.frame, id(region.follows)] = region
    return sorted(latest.values(), key=lambda r: r.called)


def _fits(parameters: Iterable[tuple[str, tuple[int, ...]]], shapes: dict[str, tuple[int, ...]]) -> bool:
    return all(
        any(shape == s and (name == n or name.endswith(f".{n}")) for name, s in shapes.items()) for n, shape in parameters
    )
