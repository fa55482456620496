"""Store what crosses the cut as its projection onto a learned subspace, whatever the backward does with it: the forward returns
z = x P, the backward starts from x_hat = z P^T, which it forms in front of the first use.

Works on the two graphs that upstream's partitioner made, as `actpass.passes.quantize_saved` does, which may code z in turn. The
backward gets the subspace (an input of the region, never a saved copy) and draws the same basis from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from actpass.analysis.partitioned import Cut
from actpass.codecs import decode
from actpass.ir.copying import copy_module
from actpass.ir.joint_graph import Joint, value
from actpass.ir.op_cost import OF_A_BASIS
from actpass.passes.project_weight_gradients import Rewritten, learned_basis, returned, sketch_of, splice
from actpass.passes.quantize_saved import receive, return_payloads, saved_code, views
from actpass.plan import Decision, SavedTensor
from actpass.torch_compat import rename

_OWN = "actpass_"
"""What the names of inserted nodes begin with: a name that both passes have would pass for something that is run again."""


def decode_saved(
    joint: Joint,
    cut: Cut,
    tensors: Mapping[str, SavedTensor],
    decisions: Sequence[Decision],
    states: Mapping[Decision, fx.Node],
) -> tuple[Cut, Rewritten]:
    """``cut`` with every tensor of ``decisions`` as its projection, and what was done. tensors: what crosses, by its node.
    states: the subspaces that arrived in ``joint``; without them zeros stand for the bases."""
    done = Rewritten()
    forward, to_forward = copy_module(cut.forward)
    backward, to_backward = copy_module(cut.backward)
    before = {old.name: new for old, new in to_forward.items()}
    behind = {old.name: new for old, new in to_backward.items()}
    first = Joint(forward, joint.inputs, joint.num_fwd_outputs)
    stand_ins = returned(first)
    payloads: dict[str, tuple[fx.Node, ...]] = {}
    new: dict[str, list[fx.Node]] = {}
    bases: tuple[dict[Any, fx.Node], dict[Any, fx.Node]] = ({}, {})
    for number, decision in enumerate(decisions, 1):  # each with random numbers of its own: two may be multiplied
        x, tensor = before[decision.site], tensors[decision.site]
        state = before[states[decision].name] if decision in states else None
        seed = first.seed if state is None else first.learned_seed
        basis = learned_basis(forward.graph, bases[0], decision, value(x).dtype, state, seed, done, x, number)
        z = splice(forward.graph, torch.matmul, [x, basis], after=x, like=x, inserted=done.inserted)
        rename(z, f"{_OWN}z")  # no name that another node has in the backward
        if state is not None:
            sketch_of(first, decision, stand_ins[state], x, z, state, False, done)
        crosses = behind[tensor.crossing[0]]
        (arrived,) = receive(backward.graph, crosses, [z])
        passed = [n for n in (state, seed) if n is not None and n.name not in behind]  # a forward passes its inputs on, once
        behind |= dict(zip((n.name for n in passed), receive(backward.graph, crosses, passed), strict=True))
        draw = None if state is None else behind[state.name], None if seed is None else behind[seed.name]
        shown = [(behind[name], before[name]) for name in tensor.crossing]
        _rebuild(backward.graph, bases[1], decision, number, x, draw, arrived, shown, done)
        payloads |= {name: (z, *passed) if name == tensor.crossing[0] else () for name in tensor.crossing}
        new[tensor.crossing[0]] = [z, *(n for n in passed if n is seed)]
        done.payloads[decision] = z.name
    for node in done.inserted:
        if not node.name.startswith(_OWN):
            rename(node, f"{_OWN}{node.name}")
    return_payloads(forward.graph, joint.num_fwd_outputs, payloads)
    for module in (forward, backward):
        module.graph.lint()
        module.recompile()
    crossing = tuple(c for s in cut.saved for c in (map(saved_code, new.get(s.name, ())) if s.name in payloads else [s]))
    arrives = {k: v for k, v in cut.arrives.items() if k not in payloads} | {n.name: n.name for ns in new.values() for n in ns}
    return replace(cut, forward=forward, backward=backward, saved=crossing, arrives=arrives), done


def _rebuild(
    graph: fx.Graph,
    bases: dict[Any, fx.Node],
    decision: Decision,
    number: int,
    x: fx.Node,
    drawn_from: tuple[fx.Node | None, fx.Node | None],
    z: fx.Node,
    shown: Sequence[tuple[fx.Node, fx.Node]],
    done: Rewritten,
) -> None:
    """Form x_hat in the backward's ``graph``, and put it where ``x`` was read. number: of its random numbers. drawn_from: the
    subspace and the seed of the basis. shown: (input of the backward to replace, the view of ``x`` that it is)."""
    reader = min(user for placeholder, _ in shown for user in placeholder.users)
    basis = learned_basis(graph, bases, decision, value(x).dtype, *drawn_from, done, reader.prev, number)
    before = set(done.inserted)
    x_hat = splice(graph, decode, [z, basis], after=reader.prev, like=reader, inserted=done.inserted)
    for node in done.inserted - before:
        node.meta[OF_A_BASIS] = True  # the product that rebuilds x is no matmul of the model
    for placeholder, view in shown:
        placeholder.replace_all_uses_with(views(graph, view, x, x_hat, done.inserted))
        graph.erase_node(placeholder)
