"""What a region takes beside the model's own inputs: the step's seed, learned subspaces, places for coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from actpass.codecs.generator import region_keys, round_keys
from actpass.ir.copying import copy_module
from actpass.ir.graph_inputs import GraphInputs
from actpass.ir.outputs import output_values, set_output_values
from actpass.options import Config
from actpass.plan import Plan
from actpass.planner.peak_budget import PeakBudget
from actpass.runtime import low_rank_binding as factors
from actpass.runtime import subspaces
from actpass.torch_compat import ConstantSource, detect_fake_mode, fake_input


@dataclass(frozen=True)
class StateInputs:
    """What a region takes beside the model's own inputs and the seed. sites: the learned subspaces. factors: the parameters
    whose gradients come back as coefficients. decided: the plan that it is to follow with them, where a budget was searched
    for it."""

    sites: tuple[subspaces.Site, ...] = ()
    factors: tuple[factors.Factor, ...] = ()
    decided: Plan | None = field(default=None, compare=False)

    @classmethod
    def of(cls, plan: Mapping[str, Any], paths: Sequence[str | None]) -> StateInputs:
        return cls(subspaces.sites_of(plan, paths), factors.factors_of(plan, paths))

    def __bool__(self) -> bool:
        return bool(self.sites or self.factors)

    def with_state_bytes(self, peak: PeakBudget | None) -> PeakBudget | None:
        """``peak`` beside the subspaces."""
        if peak is None or not self.sites:
            return peak
        return replace(peak, resident=peak.resident.with_more(sum(site.nbytes for site in self.sites)))


NOTHING = StateInputs()


def device_of(example_inputs: Sequence[Any]) -> torch.device:
    """The device of the region: that of its first tensor off the CPU, else the CPU."""
    devices = [e.device for e in example_inputs if isinstance(e, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class RegionRequest:
    """A training graph that is to be compiled. inputs: what its inputs are. device: of what the region takes besides. nonce: of
    its record in the cache; empty if the pass is only asked what it would do. peak: the budget, if it is one of peak bytes.
    extra: what the region takes beside the seed."""

    gm: fx.GraphModule
    example_inputs: Sequence[Any]
    config: Config
    inputs: GraphInputs
    device: torch.device
    nonce: str = ""
    peak: PeakBudget | None = None
    extra: StateInputs = NOTHING

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, **more: Any) -> RegionRequest:
        """For the graph as Dynamo gives it."""
        inputs, device = GraphInputs.of(gm, example_inputs), device_of(example_inputs)
        given: dict[str, Any] = {"inputs": inputs, "device": device, **more}
        return cls(gm=gm, example_inputs=example_inputs, config=config, **given)


def with_state(request: RegionRequest) -> RegionRequest:
    """``request`` with the step's seed and what else the region takes as inputs of its graph."""
    inputs, extra = request.inputs, request.extra
    gm, own = append_state(request.gm, request.example_inputs, request.device, extra)
    first, sites = len(inputs.paths), len(extra.sites)
    end = first + len(own)
    if sites:
        states = tuple(range(first + 3, first + 3 + sites))
        inputs = replace(inputs, learned_seed=first + 1, points=first + 2, subspaces=states)
    inputs = replace(inputs, seed=first, coefficients=tuple(range(end - len(extra.factors), end)))
    return replace(request, gm=gm, inputs=inputs, example_inputs=[*request.example_inputs, *own])


def append_state(
    gm: fx.GraphModule, example_inputs: Sequence[Any], device: torch.device, extra: StateInputs
) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """A clone of Dynamo's graph with the step's seed as its next input, and, if there are learned subspaces, a seed for their
    bases, the points of sampled tokens (as many as a call brings) and the subspaces, then the places for coefficients; it also
    returns a tensor for each subspace, where the pass will put the sketch (made by an operator that stays one node and that no
    model has, so that all others keep their names). And the new inputs as fake tensors."""
    clone, _ = copy_module(gm)
    mode = detect_fake_mode([n.meta.get("example_value") for n in gm.graph.nodes] + list(example_inputs))
    placeholders = clone.graph.find_nodes(op="placeholder")
    last, own = (placeholders[-1] if placeholders else None), list[torch.Tensor]()

    def append(name: str, real: torch.Tensor, *, most: int | None = None) -> fx.Node:
        nonlocal last
        with clone.graph.inserting_after(last) if last is not None else clone.graph.inserting_before():
            last = clone.graph.placeholder(name)
        source = ConstantSource(name)
        fake = real if mode is None else fake_input(mode, real, source, most=most)
        last.meta["example_value"] = fake
        last._dynamo_source = source  # pyright: ignore[reportAttributeAccessIssue]
        own.append(fake)
        return last

    append("actpass_seed", region_keys(0, 0, device))
    if extra.sites:
        append("actpass_learned_seed", round_keys(0, device))
        most = subspaces.most_points(extra.sites)  # traced so: a plan's peak holds a sketch, too
        append("actpass_points", torch.zeros(most, dtype=torch.float32, device=device), most=most)
        empty = [torch.zeros(site.shape, dtype=torch.float32, device=device) for site in extra.sites]
        states = [append(f"actpass_subspace_{i}", state) for i, state in enumerate(empty)]
        with clone.graph.inserting_before(clone.graph.output_node()):
            stand_ins = [clone.graph.call_function(torch.ops.aten.i0.default, (state,)) for state in states]
        set_output_values(clone.graph, [*output_values(clone.graph), *stand_ins])
    for i, factor in enumerate(extra.factors):
        like = example_inputs[factor.position]
        place = torch.empty_strided(factor.shape, (0,) * len(factor.shape), dtype=like.dtype, device=like.device)
        append(f"actpass_coefficients_{i}", place.requires_grad_())
    clone.recompile()
    return clone, own
