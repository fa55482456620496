"""Plan the training of a deep model from five of its layers: no memory for it and no weights are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from actpass.backend.inductor_options import options_within
from actpass.diagnostics.explain import explain_model
from actpass.errors import BudgetError, OptionError
from actpass.extrapolation.deep_plan import DeepPlan
from actpass.extrapolation.extrapolate import FoldedRegion
from actpass.extrapolation.fsdp import Optimizer, Sharded
from actpass.extrapolation.layer_map import TRACED
from actpass.extrapolation.layer_names import Stack
from actpass.extrapolation.outcome import UNLIMITED, Outcome
from actpass.extrapolation.sharded_budget import ShardedBudget
from actpass.memory.resident import Resident
from actpass.options import Config, parse
from actpass.passes.base import RegionState
from actpass.pipeline import WITHIN_LAYERS, carry_out, read
from actpass.planner.free_cut import no_recompute_partition
from actpass.planner.peak_budget import PeakBudget
from actpass.planner.plan_source import SearchedPlan
from actpass.planner.region import Region
from actpass.planner.storage_search import Search
from actpass.torch_compat import FakeTensorMode, inductor_config

Made = tuple[nn.Module, Mapping[str, Any]]
OPTIMIZERS = {"adamw": Optimizer(2, "all"), "adamw-fused": Optimizer(2, "none"), "none": Optimizer(0, "none")}
"""``adamw``: as torch.optim.AdamW is by default on a GPU (foreach)."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a deep model will be trained. period: how many layers take turns (of sliding and full attention, say). ranks: that
    share it under FSDP2, ``fully_shard`` on every layer and on the root; None: one device alone. optimizer: one of
    `OPTIMIZERS`. check: a depth that is also traced whole, to compare with."""

    layers: int
    period: int = 1
    ranks: int | None = None
    optimizer: str = "adamw"
    check: int | None = None

    def __post_init__(self) -> None:
        least = TRACED * self.period
        if self.layers < least or self.layers % self.period:
            raise OptionError(
                f"layers={self.layers} is not usable. Allowed: {least} or more, in steps of {self.period}; of fewer layers "
                "actpass.explain plans the whole model."
            )
        if self.check is not None and (self.check % self.period or not least <= self.check <= self.layers):
            raise OptionError(
                f"check={self.check} is not usable. Allowed: {least} to {self.layers}, in steps of {self.period}."
            )
        if self.optimizer not in OPTIMIZERS:
            raise OptionError(f"optimizer={self.optimizer!r} is not known. Known: {', '.join(OPTIMIZERS)}.")
        if self.ranks is not None and self.ranks < 1:
            raise OptionError(f"ranks={self.ranks} is not usable. Allowed: an int of 1 or more, or None.")


def plan_deep_model(make: Callable[[int], Made], training: Training, *, options: Mapping[str, Any] | None = None) -> DeepPlan:
    """See `actpass.plan_deep_model`. Raises `OptionError`, and `GraphUnsupported` where the layers are not alike."""
    config = parse(options)
    if isinstance(config.memory_budget, float):
        raise OptionError(
            f"memory_budget={config.memory_budget}: a fraction says nothing of a device. Allowed: bytes of peak, '80GiB' say."
        )
    with inductor_config.patch(options_within(config.memory_budget, config)):  # as what is planned will be compiled
        return _plan(_DeepModel.traced(make, training, config, dict(options or {})), config.memory_budget)


@dataclass(frozen=True)
class _DeepModel:
    """A deep model, of which a few layers were traced. inputs: bytes of a batch and of buffers. check: a less deep one that was
    traced whole, and the same from five layers."""

    training: Training
    region: FoldedRegion
    sharded: Sharded
    inputs: int
    check: tuple[Region, FoldedRegion] | None

    @classmethod
    def traced(cls, make: Callable[[int], Made], training: Training, config: Config, options: dict[str, Any]) -> _DeepModel:
        options.pop("memory_budget", None)  # decided after the trace
        depth, period = TRACED * training.period, training.period
        model, inputs, few = _traced(make, depth, options)
        stack = Stack(_list_of(model, depth), training.layers // period, period)
        root, units = stack.units(model)
        check = None
        if training.check is not None:
            whole = read(_traced(make, training.check, options)[2])[0]
            check = whole, FoldedRegion(few, replace(stack, layers=training.check // period))
        there = [t for t in (*model.buffers(), *inputs.values()) if isinstance(t, torch.Tensor)]
        nbytes = sum(t.numel() * t.element_size() for t in there)
        return cls(training, FoldedRegion(few, stack), Sharded(root, units, training.ranks or 1), nbytes, check)

    @property
    def parameters(self) -> int:
        return replace(self.sharded, ranks=1).parameters // self.sharded.root.element_size

    def limits(self, nbytes: int) -> Iterator[tuple[str, PeakBudget | ShardedBudget]]:
        """What to plan for."""
        optimizer, one = OPTIMIZERS[self.training.optimizer], replace(self.sharded, ranks=1)
        state, scratch = optimizer.state_bytes(one.parameters, one.count), optimizer.scratch_bytes(one.parameters, one.largest)
        resident = Resident(inputs=one.parameters + self.inputs, optimizer_state=state, accumulated=0, scratch=scratch)
        yield "one device", PeakBudget(nbytes, resident)
        if self.training.ranks is not None:
            where = f"each of {self.training.ranks} ranks under FSDP2"
            yield where, ShardedBudget(nbytes, self.sharded, optimizer, self.inputs)

    def outcome(self, where: str, limit: PeakBudget | ShardedBudget) -> Outcome:
        """The plan within ``limit``, or the one that comes nearest to it."""
        failed = None
        if limit.nbytes == UNLIMITED:
            choice = self.region.free()
        else:
            try:
                choice = self.region.choose(limit)
            except BudgetError as error:
                failed = error
                choice = self.region.choose(replace(limit, nbytes=int(error.least or 0)))
        return Outcome(where, self.region.describe(choice), limit, choice, failed)

    def checked(self, outcome: Outcome) -> str:
        """The prediction for a less deep model from five layers, against that from the whole of it, at as tight a plan."""
        assert self.check is not None
        whole, folded = self.check
        deep, direct, few = self.region.search, Search(whole, no_recompute_partition(whole)), folded.search
        share = (outcome.plan.cut.saved_bytes - deep.least) / (deep.most - deep.least)
        capacity = direct.least + int(min(max(share, 0.0), 1.0) * (direct.most - direct.least))
        want = carry_out(SearchedPlan(whole, direct.at(capacity).choice), passes=WITHIN_LAYERS).partitioned
        got = folded.carry_out(few.at(capacity).choice)
        return (
            f"checked on {folded.stack.layers * folded.stack.group} layers traced whole, as tight a plan: saved "
            f"{want.saved_bytes} bytes, extrapolated {got.saved_bytes}; peak {want.peak_bytes}, extrapolated {got.peak_bytes} "
            f"({got.peak_bytes / want.peak_bytes - 1:+.2%})"
        )


def _plan(model: _DeepModel, memory_budget: int | None) -> DeepPlan:
    limits = model.limits(UNLIMITED if memory_budget is None else memory_budget)
    outcomes = tuple(model.outcome(where, limit) for where, limit in limits)
    checks = tuple(map(model.checked, outcomes)) if model.check is not None else ()
    return DeepPlan(model.parameters, outcomes, checks)


def _traced(
    make: Callable[[int], Made], depth: int, options: Mapping[str, Any]
) -> tuple[nn.Module, Mapping[str, Any], RegionState]:
    """The model with ``depth`` layers, a batch, and its joint graph."""
    torch.compiler.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model, inputs = make(depth)
        regions = explain_model(model, (), inputs, options).regions
    if len(regions) != 1:
        raise OptionError(f"the model is traced as {len(regions)} graphs; only one can be extrapolated.")
    return model, inputs, regions[0].traced


def _list_of(model: nn.Module, depth: int) -> str:
    """The path of the module list that holds the layers."""
    modules = cast(Iterator[tuple[str, nn.Module]], model.named_modules())
    found = [name for name, m in modules if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise OptionError(f"the layers are not in one list: {len(found)} lists have {depth} members ({', '.join(found)}).")
    return found[0]
