"""The regions that ran in this process, found again by the parameters they ran with, and what the optimizers that step these
parameters mean for their budgets."""

from __future__ import annotations

import gc
import types
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from actpass.errors import ActpassWarning, BudgetError
from actpass.memory import optimizer_state as optimizers
from actpass.memory.footprint import MARGIN
from actpass.memory.resident import Resident, again
from actpass.options import Config
from actpass.planner.peak_budget import PeakBudget
from actpass.reporting import Record
from actpass.runtime import replan as steps
from actpass.torch_compat import after_backward, has_all_graphs, reset_code, stand_ins, uncompiled

Tensors = weakref.WeakValueDictionary[int, torch.Tensor]
"""By id."""


def weakly(tensors: Iterable[torch.Tensor]) -> Tensors:
    return Tensors({id(t): t for t in tensors})


@dataclass(eq=False)
class Region:
    """One compiled graph.

    config: the options it was compiled with. positions: which of its arguments are parameters. parameters: every parameter it
    ever ran with (one graph may serve several modules), by id. follows: for a region without parameters (a loss behind a
    graph break), the region that ran before. frame: Dynamo's number for the code that was compiled; a recompilation has the
    same. called: when it ran last. code: the Python code that it was compiled from. shapes: of its inputs. peak: its budget, if
    that is one of peak bytes, beside what is resident now. arguments: (path, shape) where the parameters are arguments of the
    compiled function; positions are theirs then. planned: what was resident when it was compiled. compiled_with: the parameters
    of the call that compiled it, which ``planned.inputs`` counts. beside: what was counted beside them then. superseded:
    whether it will be compiled again. refused: the error that its next call raises. missed: why the last step of its
    parameters did not run it. is_counted: whether all it ran with is counted in its budget.
    """

    record: Record
    config: Config
    positions: tuple[int, ...]
    frame: int | None = None
    called: int = 0
    parameters: Tensors = field(default_factory=Tensors)
    follows: Region | None = None
    code: types.CodeType | None = None
    shapes: str = ""
    peak: PeakBudget | None = None
    arguments: tuple[tuple[str, tuple[int, ...]], ...] = ()
    planned: Resident | None = None
    compiled_with: Tensors = field(default_factory=Tensors)
    beside: Tensors = field(default_factory=Tensors)
    superseded: bool = False
    refused: BudgetError | None = None
    missed: str | None = None
    is_counted: bool = False

    def __post_init__(self) -> None:
        self.planned = self.peak.resident if self.peak is not None else None

    def note(self, args: tuple[Any, ...]) -> None:
        """Remember whose call this is (cheap when it is the same module's again). Raises `BudgetError` where it became known
        that the budget can't be met."""
        global _last, _calls
        if self.refused is not None:
            error, self.refused = self.refused, None
            raise error
        _calls += 1
        self.called, self.missed = _calls, None
        if self.peak is not None:
            steps.note(self, id(args[self.positions[0]]) if self.positions else None)
        if not self.positions:
            self.follows = _last
            return
        if self._is_planned_without_gradients() and any(args[i].grad is not None for i in self.positions):
            self.compile_again()  # at the next call: gradients are accumulated, and take what the plan gave away
        elif self._has_more_room():
            self.compile_again()
        _last = self
        first = args[self.positions[0]]
        if self.parameters.get(id(first)) is not first:
            self.parameters.update((id(args[i]), args[i]) for i in self.positions)
            self.is_counted = False

    def compile_again(self) -> None:
        """Forget the code that was compiled: it is compiled again at the next call. Not within a backward: what a checkpoint
        runs again has to save what the forward did."""
        if self.code is not None:
            after_backward(partial(reset_code, self.code))
        self.superseded = True

    def _is_planned_without_gradients(self) -> bool:
        if self.peak is None or self.peak.part or self.superseded:
            return False
        return not self.peak.resident.accumulated

    def _has_more_room(self) -> bool:
        """Whether another plan may be better, because the optimizer that came takes less than was assumed."""
        if self.peak is None or self.peak.part or self.planned is None or self.superseded or not self.record.limited:
            return False
        return self.planned.total - self.peak.resident.total > MARGIN * self.peak.nbytes

    def meet(self, others: Iterable[torch.Tensor]) -> BudgetError | None:
        """Take what the known optimizers hold, and ``others``, which the step runs with, for what is resident. A plan that does
        not hold beside it is made anew at the next call. Returns the error if none can: while the optimizer steps there is too
        little room, whatever the plan."""
        self.is_counted = True
        if self.peak is None:
            return None
        others = [*self.beside.values(), *others]
        now = again(self.peak.resident, self.compiled_with.values(), others, self.config.optimizer_state_bytes)
        self.peak = replace(self.peak, resident=now)
        totals = replace(self.record.totals, resident_bytes=now.total, scratch_bytes=now.scratch)
        self.record = replace(self.record, totals=totals)
        footprint = self.record.footprint
        if self.peak.part or self.superseded or footprint is None or self.peak.nbytes >= self.peak.needs_of(footprint):
            return None
        error = self.peak.error_of_step(footprint)
        if error is None:
            self.compile_again()
        return error


_regions: list[Region] = []
_calls = 0
_last: Region | None = None
"""The region with parameters that ran last."""


def register(region: Region) -> None:
    """Add a region, and forget those whose parameters are all gone."""
    watch()
    _regions[:] = [r for r in _regions if r.parameters or not r.called or (r.follows is not None and r.follows.parameters)]
    _regions.append(region)


def clear() -> None:
    """Forget all regions (`torch.compiler.reset()` forgets the compiled code, not what we know of it)."""
    global _last, _calls
    _regions.clear()
    _last, _calls = None, 0
    steps.clear()
    optimizers.clear()
    _seen.clear()


def is_compiled(code: types.CodeType | None) -> bool:
    """Whether there is a region of ``code`` whose plan is no older one."""
    return code is not None and any(r.code is code and not r.superseded for r in _regions)


def recompile(region: Region) -> None:
    """Forget ``region``: it is compiled again when it is next called."""
    region.compile_again()
    if region in _regions:
        _regions.remove(region)


_hooks: list[RemovableHandle] = []
_seen: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
"""How many calls there had been when an optimizer stepped last."""


def watch() -> None:
    """See every torch optimizer step (once a process)."""
    if not _hooks:
        before: Any = uncompiled(_before_step)  # of a step that is compiled, too
        after: Any = uncompiled(_after_step)
        _hooks.extend((register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)))


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Raises `BudgetError` if the regions of ``optimizer`` can't meet their budget beside it, before it makes any state."""
    is_new = optimizer not in optimizers.known()
    changed = optimizers.note(optimizer)
    own = _stepped_by(optimizer)
    if not own:
        return
    if is_new and len(optimizers.stepping(optimizers.stepped_by(optimizer))) > 1:
        gc.collect()  # one that was deleted may live on in a cycle with its scheduler, and its state with it
    errors = _meet(own) if changed or not all(r.is_counted for r in own) else {}
    if error := next(iter(errors.values()), None):
        optimizers.forget(optimizer)
        raise error
    _tell_missed(optimizer, own)
    after_backward(partial(_complete, own))


def _complete(own: set[Region]) -> None:
    """An optimizer of ``own`` steps, and so the step is complete, of which they are regions. Of optimizers that step within the
    backward, one for each parameter, the first that is told of it ends the step."""
    if not own.isdisjoint(steps.running()):
        steps.complete()


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """The first step has made the state: what it takes is known, and no guess."""
    if not optimizers.note(optimizer):
        return
    own = _stepped_by(optimizer)
    _refuse(own)
    after_backward(partial(_plan_again, own))


def _plan_again(own: set[Region]) -> None:
    try:
        if any(r.peak is not None and r.peak.part for r in own):
            steps.plan_again()
    except BudgetError as error:  # the weights have moved: it is for the next step
        for region in own:
            region.refused = error


def step_done() -> None:
    """A training loop without a torch optimizer has made a step. Raises as an optimizer's step does."""
    running = set(steps.running())
    if not running:
        return
    own = {r for r in _regions if r in running}
    if not all(r.is_counted for r in own):
        _refuse(own)
    steps.complete()


def meet(given: Iterable[torch.optim.Optimizer]) -> None:
    """Optimizers were named. Regions that run already are planned anew beside them, if they must."""
    for optimizer in given:
        optimizers.note(optimizer)
        _refuse(_stepped_by(optimizers.inner(optimizer)))


def _refuse(own: set[Region]) -> None:
    """Count what is resident anew for ``own``. Where a budget has no room for it, the region's next call raises the error."""
    errors = _meet(own)
    for region in own:
        region.refused = errors.get(region)


def _meet(own: set[Region]) -> dict[Region, BudgetError]:
    """Count what is resident anew for ``own``: with all that they, and the regions of their step, ran with."""
    others = [p for r in steps.together(own) for p in list(r.parameters.values())]
    errors = {r: r.meet(others) for r in own}
    return {r: error for r, error in errors.items() if error is not None}


def _stepped_by(optimizer: torch.optim.Optimizer) -> set[Region]:
    """Regions that ran with a parameter of ``optimizer``."""
    stepped = optimizers.stepped_by(optimizer)
    ids, shapes = {id(p) for p in stepped}, {tuple(p.shape) for p in stepped if optimizers.is_shard(p)}
    return {
        r
        for r in _regions
        if any(i in ids for i in list(r.parameters.keys()))
        or (shapes and any(tuple(p.shape) in shapes for p in r.parameters.values()))
    }


def _tell_missed(optimizer: torch.optim.Optimizer, own: set[Region]) -> None:
    """Say so where ``optimizer`` is about to step parameters whose gradients no compiled region has made. Raises `BudgetError`
    under a budget in bytes where that is because Dynamo makes no more graphs."""
    before = _seen.get(optimizer)
    _seen[optimizer] = _calls
    if before is None:
        return
    ran = {i for r in own if r.called > before for i in list(r.parameters.keys())}
    missed = [r for r in own if r.called <= before and all(i not in ran for i in list(r.parameters.keys()))]
    missed = [r for r in missed if all(p.grad is not None for p in list(r.parameters.values()) if p.requires_grad)]
    told = any(r.missed is not None for r in missed)
    for region in missed:
        outside = "the last step ran outside of what was compiled"
        gave_up = region.code is not None and has_all_graphs(region.code)
        region.missed = f"{outside}: {why_no_more_graphs(region.code)}" if gave_up and region.code is not None else outside
    region = next((r for r in missed if r.peak is not None), None)
    if region is None or region.peak is None:
        return
    if region.code is not None and has_all_graphs(region.code):
        raise BudgetError(f"memory_budget={region.peak.nbytes} bytes of peak is not held, because {region.missed}.")
    if not told:
        warnings.warn(f"actpass: memory_budget is not held, because {region.missed}", ActpassWarning, stacklevel=2)


def why_no_more_graphs(code: types.CodeType) -> str:
    """Of a code of which Dynamo has as many graphs as it makes."""
    return (
        f"Dynamo has as many graphs of {code.co_name} ({code.co_filename}:{code.co_firstlineno}) as its limit allows, and runs "
        "what fits none of them uncompiled. Show it the largest batch first, pad batches to few sizes, mark what changes "
        "(torch._dynamo.mark_dynamic), or raise torch._dynamo.config.recompile_limit; with fullgraph=True it is an error"
    )


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


def modules_of(model: torch.nn.Module, regions: Iterable[Region]) -> tuple[int, ...]:
    """How many modules of ``model`` ran with each of ``regions``: by the parameters that it was seen with. One at least."""
    own = {id(p) for p in model.parameters()}
    own |= {id(p) for module in model.modules() for p in stand_ins(module).values()}
    return tuple(max(1, len(own & set(r.parameters.keys())) // max(1, len(r.positions))) for r in regions)


def _fits(parameters: Iterable[tuple[str, tuple[int, ...]]], shapes: dict[str, tuple[int, ...]]) -> bool:
    return all(
        any(shape == s and (name == n or name.endswith(f".{n}")) for name, s in shapes.items()) for n, shape in parameters
    )
