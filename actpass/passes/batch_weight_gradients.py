"""Form the gradients of many small weights at once: one product G = C Pᵀ of all coefficients in one basis, and one batched
product of those in bases of one size.

A small model on a GPU takes as long for a product as it takes to launch it. The gradients of a batch are parts of one
tensor: memory is free again when all of them are.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from actpass.codecs import contract
from actpass.ir.editor import GraphEditor
from actpass.ir.joint_graph import tensor_bytes, value
from actpass.ir.outputs import output_values, set_output_values
from actpass.ir.traversal import ancestors
from actpass.passes import in_batches
from actpass.passes.base import RegionState
from actpass.passes.gradient_factors import GradientFactors, find_gradient_factors

_VECTOR = 8
"""Elements of two bytes in 16."""


@dataclass
class _Bundle:
    """Gradients in one basis, formed by one product: the basis is the second factor of all, or the first of a single one. A
    batch is bundles of one ``kind``, stacked."""

    basis: fx.Node
    members: list[tuple[fx.Node, GradientFactors]] = field(default_factory=list[tuple[fx.Node, GradientFactors]])

    @property
    def nbytes(self) -> int:
        return sum(tensor_bytes(primal) for primal, _ in self.members)

    @property
    def rows(self) -> tuple[int, ...]:
        """Of the gradients, one below the other."""
        return tuple(int(value(primal).shape[0]) for primal, _ in self.members)

    @property
    def kind(self) -> object:
        """Equal for bundles that may be formed in one batched product."""
        primal, factors = self.members[0]
        return (
            self.rows,
            value(primal).shape[1],
            value(self.basis).shape,
            value(self.basis).dtype,
            factors.basis_first,
            factors.dtypes,
        )


@dataclass(frozen=True)
class BatchWeightGradients:
    """Of weights whose gradients are formed of factors, and only returned. A batch has at most `in_batches.MOST` bytes of them,
    and so has a bundle. Coefficients wait until their batch is whole."""

    name: str = "batch_weight_gradients"
    serves: str | None = "projections"

    def run(self, state: RegionState) -> RegionState:
        if not state.lifts or not in_batches.launches_cost(state.joint):
            return state
        state = state.on_a_copy()
        found = (sorted(batch, key=lambda b: b.basis) for batch in _batches(state))
        batches = [batch for batch in found if sum(len(b.members) for b in batch) > 1]
        editor = GraphEditor(state.joint.gm)
        values = output_values(editor.graph)
        places = {p: state.joint.num_fwd_outputs + i for i, p in enumerate(state.joint.primals)}
        for batch in batches:
            for (primal, _), gradient in zip(_members(batch), _form(editor, batch), strict=True):
                values[places[primal]] = gradient
        set_output_values(editor.graph, values)
        editor.clean()
        inserted = frozenset(n for n in (*state.inserted, *editor.inserted) if not n._erased)
        return replace(state.with_graph(editor.module), inserted=inserted, lifts={})

    def check(self, before: RegionState, after: RegionState) -> None:
        """Every gradient has the shape and dtype that it had, and outputs of the forward but the sketches read no inserted
        node."""
        for (primal, old), (_, new) in zip(before.joint.gradients, after.joint.gradients, strict=True):
            if value(old).shape != value(new).shape or value(old).dtype != value(new).dtype:
                raise AssertionError(f"the gradient of {primal.name} became {tuple(value(new).shape)}, {value(new).dtype}")
        own = (o for o in after.joint.forward_outputs if o not in after.sketches)
        if ancestors(own).intersection(after.inserted):
            raise AssertionError("weight gradients reached an output of the forward")


def _members(batch: Sequence[_Bundle]) -> Iterator[tuple[fx.Node, GradientFactors]]:
    for bundle in batch:
        yield from bundle.members


def _batches(state: RegionState) -> Iterator[list[_Bundle]]:
    """Bundles of one size, as the backward comes to them."""
    return in_batches.batches(_bundles(state), lambda b: b.kind, lambda b: b.nbytes, in_batches.MOST)


def _bundles(state: RegionState) -> Iterator[_Bundle]:
    gradients = dict(state.joint.gradients)
    shared = {g for g, count in Counter(gradients.values()).items() if count > 1}
    found = [(p, f) for p, f in find_gradient_factors(state) if gradients[p] not in shared]
    known = [(p, f) for p, f in found if _can_be_batched(p, gradients[p])]
    open_bundles: dict[object, _Bundle] = {}
    for primal, factors in sorted(known, key=lambda found: max(found[1].nodes)):
        alone = _Bundle(factors.basis, [(primal, factors)])
        if factors.basis_first:
            yield alone
            continue
        key = factors.basis, factors.dtypes
        bundle = open_bundles.get(key)
        if bundle is None or bundle.nbytes + alone.nbytes > in_batches.MOST:
            if bundle is not None:
                yield bundle
            open_bundles[key] = alone
        else:
            bundle.members += alone.members
    yield from open_bundles.values()


def _can_be_batched(primal: fx.Node, gradient: fx.Node) -> bool:
    """Whether the gradient of ``primal`` is a small matrix that nothing but the caller reads, and the next one behind it begins
    where vector loads may: every 16 bytes."""
    val = value(primal)
    plain = val.dim() == 2 and all(type(size) is int for size in val.shape)
    return plain and val.numel() % _VECTOR == 0 and len(gradient.users) == 1 and 2 * tensor_bytes(primal) <= in_batches.MOST


def _form(editor: GraphEditor, batch: Sequence[_Bundle]) -> Sequence[fx.Node]:
    """The gradients of ``batch``, bundle by bundle."""
    _, factors = batch[0].members[0]
    given, stacked = _stacked([b.basis for b in batch])
    coefficients = [n for _, f in _members(batch) for n in f.nodes]

    def gradients(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        basis, arrived = stacked(*arguments[: len(given)]), iter(arguments[len(given) :])
        parts = [[f.of([next(arrived) for _ in f.nodes]) for _, f in b.members] for b in batch]
        bundled = [torch.cat(p) if len(p) > 1 else p[0] for p in parts]
        whole = factors.cast(contract(bundled[0] if len(batch) == 1 else torch.stack(bundled), basis, left=factors.basis_first))
        formed = [whole] if len(batch) == 1 else whole.unbind()
        return tuple(g for part, b in zip(formed, batch, strict=True) for g in part.split_with_sizes(b.rows))

    last = max(coefficients)
    return editor.splice(gradients, [*given, *coefficients], after=last, like=last)


def _stacked(bases: Sequence[fx.Node]) -> tuple[Sequence[fx.Node], Callable[..., torch.Tensor]]:
    """What the bases of a batch, (B, N, R), are made of, and how; where all have one it is that, (N, R). Bases that were drawn
    together, and lie at equal distances in what was drawn, are a part of that: none is copied."""

    def stack(*given: torch.Tensor) -> torch.Tensor:
        return given[0] if alike else torch.stack(given)

    def part(drawn: torch.Tensor) -> torch.Tensor:
        return drawn[places]

    alike = len(set(bases)) == 1
    draws = {b.all_input_nodes[0] if b.target is operator.getitem else b for b in bases}
    source = next(iter(draws))
    if alike or len(draws) > 1 or source.target is not torch.ops.aten.unbind.int:
        return bases[:1] if alike else bases, stack
    numbers: list[Any] = [b.args[1] for b in bases]
    places = slice(numbers[0], numbers[-1] + 1, numbers[1] - numbers[0])
    if numbers[1] <= numbers[0] or numbers != list(range(places.start, places.stop, places.step)):
        return bases, stack
    return source.all_input_nodes, part
