"""Run the nodes of a loss (`actpass.passes.loss_region`) on some of their rows."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from actpass.errors import GraphUnsupported
from actpass.ir.joint_graph import builtin_name, is_view, rule_of, value
from actpass.ir.op_queries import is_pointwise, is_reduction
from actpass.passes.loss_region import LossRegion, factors, leading_axes, summed_axes, trailing_shape
from actpass.torch_compat import is_same_size

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Operand:
    """A node that an operation reads: so many of its ``rows``, the ``whole`` of it, or a ``constant`` that each piece makes in
    the loop that reads it: a table of the words that comes from outside makes Inductor write what the labels select to memory,
    as large as the logits."""

    node: fx.Node
    read: Literal["rows", "whole", "constant"]


@dataclass(frozen=True, slots=True)
class RowOperation:
    """One node on some rows: ``function(number of rows, operands)``. operands: `Operand`, or numbers and the like."""

    operands: tuple[Any, ...]
    function: Callable[[int | torch.SymInt, Sequence[Any]], Any]


@dataclass(frozen=True)
class RowInterpreter:
    """Runs what a region does for any number of its rows. operations: by node, in the graph's order. row_inputs, whole_inputs:
    what they read from outside, by rows or whole."""

    operations: Mapping[fx.Node, RowOperation]
    row_inputs: tuple[fx.Node, ...]
    whole_inputs: tuple[fx.Node, ...]

    @classmethod
    def of(cls, region: LossRegion) -> RowInterpreter:
        """Raises `GraphUnsupported` where a node of ``region`` can't be run on a part of the rows."""
        translator = _Translator(region.rows, region.sums, frozenset(_constants(region.head.graph)))
        operations: dict[fx.Node, RowOperation] = {}
        inputs: dict[fx.Node, Literal["rows", "whole"]] = {}
        for node in region.body:
            operations[node] = translator.translate(node, operations.keys() | inputs.keys())
            for operand in operations[node].operands:
                if isinstance(operand, Operand) and operand.read != "constant" and operand.node not in operations:
                    inputs.setdefault(operand.node, operand.read)
        late = next((n for n in inputs if n in region.below), None)
        if late is not None:
            raise GraphUnsupported(f"{late.name}, which is formed of the logits of all rows, is read with the first")
        rows, whole = (tuple(n for n, read in inputs.items() if read == kind) for kind in ("rows", "whole"))
        return cls(operations, rows, whole)

    def run(self, nodes: Sequence[fx.Node], inputs: Sequence[Any], rows: int | torch.SymInt) -> Mapping[fx.Node, Any]:
        """The values of ``nodes`` of the body (in its order, with all that they read of it) for as many ``rows``.

        inputs: values of `row_inputs`, that many rows of each, and of `whole_inputs`.
        """
        values: dict[fx.Node, Any] = dict(zip((*self.row_inputs, *self.whole_inputs), inputs, strict=True))

        def known(operand: Any) -> Any:
            if not isinstance(operand, Operand):
                return operand
            return _evaluated(operand.node, {}) if operand.read == "constant" else values[operand.node]

        for node in nodes:
            operation = self.operations[node]
            values[node] = operation.function(rows, [known(o) for o in operation.operands])
        return values


@dataclass(frozen=True, slots=True)
class _Translator:
    """What a node is on a part of the rows. rows: all of them. sums: nodes that add up rows. constants: of the graph."""

    rows: int | torch.SymInt
    sums: frozenset[fx.Node]
    constants: frozenset[fx.Node]

    def translate(self, node: fx.Node, known: Set[fx.Node]) -> RowOperation:
        """known: what was translated or read before."""
        target: Any = node.target
        given: Any = node.args
        kwargs: dict[str, Any] = dict(node.kwargs)
        row = rule_of(node)
        if node in self.sums:
            return self._sum(node, known)
        if row.best:
            return self._best(node, known)
        if target is operator.getitem:
            return RowOperation((self._rows_of(given[0], known), given[1]), lambda _, read: read[0][read[1]])
        lead, trail = self._lead(node), trailing_shape(node, self.rows)
        if target in (aten.mm.default, aten.addmm.default):
            *bias, left, right = given
            biases = [self._operand(b, node, known) for b in bias]
            return _same(node, *biases, self._rows_of(left, known), self._whole(right))
        if row.moves == "reshape":
            return RowOperation((self._rows_of(given[0], known),), lambda rows, read: read[0].reshape(rows, *trail))
        if target is aten.full.default:
            return RowOperation((), lambda rows, _: torch.full((rows, *trail), given[1], **kwargs))
        if target is aten.expand.default:
            return RowOperation((self._operand(given[0], node, known),), lambda rows, read: read[0].expand(rows, *trail))
        if is_reduction(node):
            return self._reduction(node, known)
        if row.axis is not None:
            x, axis, *rest = given
            axis = axis % value(node).dim()
            if axis < lead:
                raise GraphUnsupported(f"{node.name} picks from other rows")
            return _same(node, self._rows_of(x, known), axis - lead + 1, *(self._operand(r, node, known) for r in rest))
        if is_pointwise(node) and not is_view(node):
            return _same(node, *(self._operand(a, node, known) for a in given))
        raise GraphUnsupported(f"{target} can't be run on a part of the rows")

    def _lead(self, node: fx.Node) -> int:
        return leading_axes(node, self.rows)

    def _rows_of(self, node: fx.Node, known: Set[fx.Node]) -> Operand:
        """An operand that has the rows."""
        if node not in known:
            self._lead(node)
        return Operand(node, "rows")

    def _operand(self, node: Any, like: fx.Node, known: Set[fx.Node]) -> Any:
        """An operand of a pointwise operator: with rows if it has the axes of ``like``, else whole."""
        if not isinstance(node, fx.Node):
            return node
        if not isinstance(node.meta.get("val"), torch.Tensor):
            raise GraphUnsupported(f"{like.name} reads the size {node.name}, which changes with the number of rows")
        if node in known:
            return Operand(node, "rows")
        shape, wanted, lead = tuple(value(node).shape), tuple(value(like).shape), self._lead(like)
        if len(shape) == len(wanted) and all(map(is_same_size, shape[:lead], wanted[:lead])):
            return self._rows_of(node, known)
        leading = shape[: max(0, len(shape) - (len(wanted) - lead))]
        if not all(is_same_size(s, 1) for s in leading):
            raise GraphUnsupported(f"{node.name} {shape} is spread over a part of the rows")
        return self._whole(node)

    def _whole(self, node: fx.Node) -> Operand:
        """An operand that every piece reads whole."""
        return Operand(node, "constant" if node in self.constants else "whole")

    def _reduction(self, node: fx.Node, known: Set[fx.Node]) -> RowOperation:
        given: Any = node.args
        source, *more = given
        axes: list[int] = more[0] if more and _is_listed(more[0]) else []
        x = self._rows_of(source, known)
        within, lead = value(source).dim(), self._lead(source)
        if not axes or any(d % within < lead for d in axes):
            raise GraphUnsupported(f"{node.name} reduces over the rows before the gradients are formed")
        return _same(node, x, [d % within - lead + 1 for d in axes], *more[1:])

    def _sum(self, node: fx.Node, known: Set[fx.Node]) -> RowOperation:
        if node.target is aten.mm.default:
            left, right = (self._rows_of(factor, known) for factor in factors(node))
            return RowOperation((left, right), lambda _, read: torch.mm(read[0].t(), read[1]))
        source = node.all_input_nodes[0]
        x = self._rows_of(source, known)
        if node.target is aten.sum.default:
            return RowOperation((x,), lambda _, read: read[0].sum())
        lead = self._lead(source)
        axes = [0, *(d - lead + 1 for d in summed_axes(node) if d >= lead)]
        return RowOperation((x,), lambda _, read: read[0].sum(axes))

    def _best(self, node: fx.Node, known: Set[fx.Node]) -> RowOperation:
        target: Any = node.target
        source, at = node.args[0], rule_of(node).axis
        assert isinstance(source, fx.Node)
        assert at is not None
        axis: Any = node.args[at] if len(node.args) > at else None if at == 1 else -1
        if axis is None or axis % value(source).dim() < self._lead(source):
            raise GraphUnsupported(f"{node.name} looks for the best among other rows")
        before, after = node.args[1:at], node.args[at + 1 :]
        axis = axis % value(source).dim() - self._lead(source) + 1
        return RowOperation((self._rows_of(source, known),), lambda _, read: target(read[0], *before, axis, *after))


def _is_listed(axes: Any) -> bool:
    return isinstance(axes, list | tuple)


def _same(node: fx.Node, *operands: Any) -> RowOperation:
    """The operator of ``node`` itself on ``operands``."""
    target: Any = node.target
    kwargs = {} if target is aten.clone.default else node.kwargs

    def function(_: int | torch.SymInt, args: Sequence[Any]) -> Any:
        try:
            return target(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            raise GraphUnsupported(f"{target} does not run on a part of the rows: {error}") from error

    return RowOperation(operands, function)


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """What torch's own operators compute from nothing, the same each time."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if builtin_name(node) in ("", "empty") or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if torch.Tag.nondeterministic_seeded not in node.target.tags and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _evaluated(constant: fx.Node, known: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    """The value of ``constant``. known: those that were computed for it."""
    if constant not in known:
        target: Any = constant.target
        args, kwargs = fx.map_arg((constant.args, constant.kwargs), lambda n: _evaluated(n, known))
        known[constant] = target(*args, **kwargs)
    return known[constant]
