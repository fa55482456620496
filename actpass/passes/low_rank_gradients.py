"""Leave weight gradients in their factors: the backward returns the coefficients C, and G = C Pᵀ is never formed.

A parameter's gradient qualifies if it is one rewritten contraction, or a sum of several through one basis, moved and cast on
its way. In the compiled region its coefficients come back as the gradient of an input of their own
(`actpass.low_rank_gradient.Coefficients`), which hands them on to the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from actpass.codecs import LEARNED
from actpass.errors import GraphUnsupported
from actpass.ir.joint_graph import Joint, rule_of, size_hint, value
from actpass.passes.project_weight_gradients import Rewritten, splice
from actpass.plan import Decision, Factored

aten = torch.ops.aten


@dataclass(frozen=True)
class _Found:
    """Coefficients that are somewhere in the graph. swapped: whether the gradient is the transpose of what they lift to.
    dtypes: what it is cast to, in order."""

    nodes: tuple[fx.Node, ...]
    decision: Decision
    left: bool
    swapped: bool = False
    dtypes: tuple[torch.dtype, ...] = ()

    @property
    def way(self) -> Any:
        """Equal for coefficients that may be added: through one basis, which a seeded method has for all of one size."""
        d = self.decision
        basis = (d.method, d.width, d.rank, d.scale, d.site if d.method in LEARNED else None)
        return basis, self.left, self.swapped, self.dtypes


def factor_gradients(joint: Joint, done: Rewritten, wanted: Callable[[str], bool]) -> tuple[Factored, ...]:
    """The weight gradients of the rewritten ``joint`` that can stay in factors. wanted: path -> whether it shall. Where the
    inputs that get the coefficients have arrived, the graph returns these in place of the gradients."""
    found = [(p, g, f) for p, g, f in _candidates(joint, done) if wanted(joint.parameter_path[p])]
    plan = tuple(_factored(joint.parameter_path[p], p, f) for p, _, f in found)
    if joint.coefficients:
        if len(joint.coefficients) != len(plan):
            raise GraphUnsupported(
                f"places for {len(joint.coefficients)} low-rank gradients arrived, and there are {len(plan)}"
            )
        _return(joint, [(p, f) for p, _, f in found], plan, done)
    return plan


def _candidates(joint: Joint, done: Rewritten) -> Iterator[tuple[fx.Node, fx.Node, _Found]]:
    known: dict[fx.Node, _Found | None] = {}
    for node in joint.gm.graph.nodes:
        known[node] = _coefficients(node, done, known)
    for primal, gradient in joint.gradients:
        if primal in joint.parameter_path:
            found = known[gradient]
            if found is not None and value(primal).dim() in (2, 3):
                yield primal, gradient, found


_MOST_TERMS = 64
"""Of a sum that stays in factors. A weight that is used in more places has a dense gradient."""


def _coefficients(node: fx.Node, done: Rewritten, known: Mapping[fx.Node, _Found | None]) -> _Found | None:
    """The coefficients of a gradient, if ``node`` is one. known: what was found of all nodes before it."""
    if node in done.lifts:
        factor, contraction, decision = done.lifts[node]
        return _Found((factor,), decision, contraction.left)
    if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
        a, b = (known[n] if isinstance(n, fx.Node) else None for n in node.args)
        if a is None or b is None or a.way != b.way or len(a.nodes) + len(b.nodes) > _MOST_TERMS:
            return None
        return replace(a, nodes=(*a.nodes, *b.nodes))
    row = rule_of(node)
    if not row.cast and row.moves not in ("copy", "permute", "reshape"):
        return None
    source = node.all_input_nodes[0]
    inner = known[source]
    if inner is None or row.moves == "copy":
        return inner
    if row.cast:
        if value(node).device != value(source).device:
            return None
        return replace(inner, dtypes=(*inner.dtypes, value(node).dtype))
    if row.moves == "permute":
        dims = value(source).dim()
        order = _order(node, dims)
        if order == tuple(range(dims)):
            return inner
        swap = (*range(dims - 2), dims - 1, dims - 2)
        return replace(inner, swapped=not inner.swapped) if order == swap else None
    return inner if tuple(value(node).shape) == tuple(value(source).shape) else None


def _order(node: fx.Node, dims: int) -> tuple[int, ...]:
    places = list(range(dims))
    if node.target is aten.permute.default:
        given: Any = node.args[1]
        return tuple(int(i) % dims for i in given)
    a, b = (0, 1) if node.target is aten.t.default else (int(i) % dims for i in node.args[1:3])  # pyright: ignore[reportArgumentType]
    places[a], places[b] = places[b], places[a]
    return tuple(places)


def _factored(path: str, primal: fx.Node, found: _Found) -> Factored:
    rank, left = found.decision.rank, found.left != found.swapped
    assert rank is not None
    *outer, rows, columns = (size_hint(s) for s in value(primal).shape)
    shape = (*outer, rank, columns) if left else (*outer, rows, rank)
    return Factored(path, found.decision.site, left, shape)


def _return(joint: Joint, found: Sequence[tuple[fx.Node, _Found]], plan: Sequence[Factored], done: Rewritten) -> None:
    (output,) = joint.gm.graph.find_nodes(op="output")
    leaves, spec = pytree.tree_flatten(output.args[0])
    places = {p: joint.num_fwd_outputs + i for i, p in enumerate(joint.primals)}
    for (primal, coefficients), factored, place in zip(found, plan, joint.coefficients, strict=True):
        if tuple(value(place).shape) != factored.shape:
            raise GraphUnsupported(f"a place of {tuple(value(place).shape)} arrived for coefficients of {factored.shape}")

        def collect(*parts: torch.Tensor, _found: _Found = coefficients) -> torch.Tensor:
            whole = parts[0]
            for part in parts[1:]:
                whole = whole + part
            whole = whole.transpose(-1, -2) if _found.swapped else whole
            for dtype in _found.dtypes:
                whole = whole.to(dtype)
            return whole.contiguous()

        last = max(coefficients.nodes)
        leaves[places[primal]] = None
        node = splice(joint.gm.graph, collect, coefficients.nodes, after=last, like=last, inserted=done.inserted)
        leaves[places[place]] = node
    output.args = (pytree.tree_unflatten(leaves, spec),)
    joint.gm.graph.eliminate_dead_code()
    joint.gm.graph.lint()
    done.inserted = {n for n in done.inserted if n.graph is joint.gm.graph and not n._erased}
