"""Form the logits, the loss and the head's gradients in pieces of rows, so that no tensor as large as the logits ever exists.

Before, with T tokens, N features, V words (a Llama: T V is twenty times T N)::

    logits_TV = h_TN @ W; loss = f(logits_TV); dlogits_TV = g(logits_TV) * tangent; dh = dlogits @ W^T; dW = dlogits^T @ h

After::

    for each piece t of the rows: loss_t, dh_t, dW += head(h_t, labels_t, W, dW)      (in the forward, with a tangent of one)
    dh = cat(dh_t) * tangent; dW = dW * tangent                                       (in the backward)

which runs no matmul twice: every row's gradient is linear in the tangent, which is proved on the graph, operator by operator.
The idea, forward and backward of the loss in one pass over pieces, is that of Hsu et al., "Liger Kernel", 2024, arXiv
2410.10989 (fused linear cross entropy), and of Inductor's ``auto_chunker``, which gives up on casts, tied weights, biases and
rows that 8 does not divide; here the loss may be any function that treats rows one by one.

In memory: one piece of logits and of its gradient, and dW one backward earlier than before (accumulated in float32; in place
where the product is float32 itself, see `actpass.ir.products`). An embedding that is the head, too, adds its gradient to dW
(`actpass.passes.scatter_onto_sums`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from actpass.errors import GraphUnsupported
from actpass.ir.copying import copy_module
from actpass.ir.editor import GraphEditor
from actpass.ir.joint_graph import tensor_bytes, value
from actpass.ir.products import is_sum_in_place
from actpass.ir.traversal import ancestors
from actpass.passes.base import Chunked, GraphPass, RegionState
from actpass.passes.loss_region import (
    LossRegion,
    factors,
    find_head,
    find_loss_region,
    leading_axes,
    summed_axes,
    trailing_shape,
)
from actpass.passes.row_interpreter import RowInterpreter
from actpass.torch_compat import invoke_subgraph, size_hint

aten = torch.ops.aten

_LEAST_ROWS = 128
_ROWS_PER_FEATURE = {"cpu": 0.5}
_ROWS_PER_FEATURE_ELSEWHERE = 4
"""Rows of a piece to features N. Each piece reads and writes dW, some 10 N V bytes, beside some 12 bytes of each of its logits:
with 4 N rows that is a fifth. A CPU is faster with pieces that its cache holds."""


@dataclass(frozen=True)
class Pieces:
    """``count`` pieces of ``size`` rows, the last of what is left; size None: of as many as each other, but for the last, of a
    number of rows that changes from call to call."""

    count: int
    size: int | None

    @classmethod
    def of(cls, rows: int | torch.SymInt, size: int) -> Pieces:
        """Pieces of nearly ``size`` rows, two or more. Of a known number of rows they are multiples of 16."""
        count = max(2, -(-size_hint(rows) // size))
        if not isinstance(rows, int):
            if rows < count:  # a guard: for fewer rows there is another graph
                raise GraphUnsupported(f"{size_hint(rows)} rows make no {count} pieces")
            return cls(count, None)
        size = -(-rows // (count * 16)) * 16
        return cls(-(-rows // size), size)

    def span(self, number: int, rows: Any) -> tuple[Any, Any]:
        """The first row of a piece of ``rows``, and the one behind its last."""
        size = self.size or rows // self.count
        return number * size, rows if number == self.count - 1 else (number + 1) * size


@dataclass(frozen=True)
class ChunkedLoss(GraphPass):
    """Leaves a loss whole whose head can't be taken apart, and one whose logits do not weigh against what Inductor's default
    saves; why is in the state."""

    name: str = "chunked_loss"

    def run(self, state: RegionState) -> RegionState:
        if not state.loss_rows:
            return state
        head = find_head(state.joint, state.default_bytes)
        if head is None:
            return state
        copy, mapping = copy_module(state.joint.gm)
        after = state.with_graph(copy)
        try:
            region = find_loss_region(after.joint, mapping[head])
            rows = _rows_of_a_piece(value(region.hidden)) if state.loss_rows is True else state.loss_rows
            pieces = Pieces.of(region.rows, rows)
            build_chunks(GraphEditor(copy), region, pieces)
        except GraphUnsupported as error:
            return replace(state, why_whole=str(error))
        copy.graph.eliminate_dead_code()
        copy.recompile()
        chunked = Chunked(tensor_bytes(head), pieces.count, size_hint(pieces.span(0, region.rows)[1]))
        return replace(state.with_graph(copy), chunked=chunked)


def build_chunks(editor: GraphEditor, region: LossRegion, pieces: Pieces) -> None:
    """Rewrite the graph of ``region``. Raises `GraphUnsupported` where it can't be run in pieces."""
    interpreter = RowInterpreter.of(region)
    inserter = _Inserter(editor, region, _put_below_last(editor.graph, region))
    row_inputs, whole_inputs = interpreter.row_inputs, interpreter.whole_inputs
    unit = _with_unit_tangent(inserter, region, (*row_inputs, *whole_inputs))
    flat = {n: _flatten(inserter, n, unit.get(n, n)) for n in row_inputs}
    products = [n for n in region.leaving if _is_in_place(n, region)]
    sums = [n for n in region.leaving if n in region.sums and n not in products]
    totals: dict[fx.Node, fx.Node] = {n: _zeros(inserter, n) for n in sums}
    parts: dict[fx.Node, list[fx.Node]] = {n: [] for n in region.leaving if n not in region.sums}
    returned = [*region.leaving, *(f for n in products for f in factors(n))]
    results_of = list(dict.fromkeys(n for n in returned if n not in products and n not in flat))
    head = _head(region, interpreter, results_of, sums)
    for number in range(pieces.count):
        begin, end = pieces.span(number, region.rows)
        rows_in = [_slice(inserter, flat[n], pieces, number) for n in row_inputs]
        inputs = [*rows_in, *(unit.get(n, n) for n in whole_inputs), *(totals[n] for n in sums)]
        # as many rows by the same expression are as many in every call: one graph serves both
        results = inserter.call(head, inputs, ("head", str(end - begin)))
        made = dict(zip([*row_inputs, *results_of], [*rows_in, *results], strict=True))
        for node in region.leaving:
            if node in parts:
                parts[node].append(made[node])
            else:
                totals[node] = _add(inserter, node, totals.get(node), made) if node in products else made[node]
    for node in region.leaving:
        for result in (totals[node],) if node in totals else parts[node]:
            _keep(result)
        _leave(inserter, node, totals.get(node), parts.get(node, []))


class _Inserter:
    """Inserts one thing behind another. last: the node behind which the next is put."""

    def __init__(self, editor: GraphEditor, region: LossRegion, last: fx.Node) -> None:
        self.editor, self.region, self.last = editor, region, last

    def insert(self, function: Callable[..., Any], arguments: Sequence[fx.Node], like: fx.Node | None = None) -> fx.Node:
        """like: whose provenance the new nodes take over. Default: the head's."""
        made = self.editor.splice(function, arguments, after=self.last, like=like or self.region.head)
        self.last = max(self.last, self.editor.latest)
        return made

    def call(self, function: Callable[..., Any], arguments: Sequence[fx.Node], key: Any) -> tuple[fx.Node, ...]:
        results = self.editor.call(function, arguments, after=self.last, like=self.region.head, key=key)
        self.last = results[-1]
        return results

    def copy_of(self, node: fx.Node, environment: Mapping[fx.Node, fx.Node]) -> fx.Node:
        self.last = self.editor.copy_of(node, environment, after=self.last)
        return self.last

    def add_product(self, total: fx.Node, left: fx.Node, right: fx.Node) -> fx.Node:
        self.last = self.editor.add_product(total, left, right, self.last)
        return self.last


def _put_below_last(graph: fx.Graph, region: LossRegion) -> fx.Node:
    """Order the graph: first what does not depend on the logits. Returns the last node before all that does."""
    nodes = [n for n in graph.nodes if n.op != "output"]
    anchor = nodes[-1]
    for node in nodes:
        if node in region.below:
            anchor.append(node)
            anchor = node
    return max(n for n in nodes if n not in region.below)


def _with_unit_tangent(inserter: _Inserter, region: LossRegion, inputs: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Those of ``inputs`` that depend on the tangent, again for a tangent of one."""
    needed = [n for n in inputs if n in region.tangible]
    if not needed:
        return {}
    above = ancestors(needed) & region.tangible
    tangent = value(region.tangent)

    def one(_: torch.Tensor) -> torch.Tensor:
        return torch.ones(tangent.shape, dtype=tangent.dtype, device=tangent.device)

    unit = {region.tangent: inserter.insert(one, [region.hidden])}
    for node in [n for n in region.head.graph.nodes if n in above and n is not region.tangent]:
        unit[node] = inserter.copy_of(node, unit)
    return unit


def _head(
    region: LossRegion, interpreter: RowInterpreter, results: Sequence[fx.Node], sums: Sequence[fx.Node]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The function of one piece: of its inputs and the totals so far of ``sums``."""
    nodes = [n for n in region.body if n not in region.sums or n in sums]

    def head(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(arguments) - len(sums)
        values = interpreter.run(nodes, arguments[:count], arguments[0].shape[0])
        totals = dict(zip(sums, arguments[count:], strict=True))
        return tuple(totals[n] + values[n] if n in totals else values[n] for n in results)

    return head


def _is_in_place(node: fx.Node, region: LossRegion) -> bool:
    """Whether ``node`` is a sum over the rows that is added up in place: a matmul's product, of factors in float32 or more, or
    on a GPU, whose matmuls add up in float32."""
    if node not in region.sums or node.target is not aten.mm.default:
        return False
    return value(node).element_size() >= 4 or (value(node).device.type == "cuda" and torch.version.hip is None)


def _add(inserter: _Inserter, product: fx.Node, total: fx.Node | None, made: Mapping[fx.Node, fx.Node]) -> fx.Node:
    left, right = (made[f] for f in factors(product))
    if total is None and value(product).element_size() >= 4:
        return inserter.insert(_product, [left, right])
    return inserter.add_product(total or _zeros(inserter, product), left, right)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.mm(left.t(), right)


def _flatten(inserter: _Inserter, node: fx.Node, argument: fx.Node) -> fx.Node:
    rows, trail = inserter.region.rows, trailing_shape(node, inserter.region.rows)

    def flatten(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(rows if isinstance(rows, int) else -1, *trail)

    return inserter.insert(flatten, [argument], argument)


def _slice(inserter: _Inserter, node: fx.Node, pieces: Pieces, number: int) -> fx.Node:
    def rows_of(x: torch.Tensor) -> torch.Tensor:
        begin, end = pieces.span(number, x.shape[0])  # a traced function knows no symbol but from its arguments
        return x[begin:end]

    return inserter.insert(rows_of, [node], node)


def _zeros(inserter: _Inserter, node: fx.Node) -> fx.Node:
    val, shape = value(node), _total_shape(node, inserter.region.rows)
    if not all(isinstance(size, int) for size in shape):
        raise GraphUnsupported(f"{node.name}, a sum over the rows, has the symbolic shape {shape}")
    dtype = torch.float32 if val.dtype.is_floating_point and val.element_size() < 4 else val.dtype

    def zeros(_: torch.Tensor) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=val.device)

    return inserter.insert(zeros, [inserter.region.hidden])


def _total_shape(node: fx.Node, rows: int | torch.SymInt) -> tuple[Any, ...]:
    if node.target is not aten.sum.dim_IntList:
        return tuple(value(node).shape)
    source = node.all_input_nodes[0]
    kept = set(range(leading_axes(source, rows), value(source).dim())) - summed_axes(node)
    return tuple(value(source).shape[d] for d in sorted(kept))


def _leave(inserter: _Inserter, node: fx.Node, total: fx.Node | None, parts: Sequence[fx.Node]) -> None:
    """Put the whole where the rest of the graph reads ``node``."""
    val, region = value(node), inserter.region
    scaled = node in region.tangible
    shape: tuple[Any, ...] = tuple(val.shape)
    unknown = [size for size in shape if not isinstance(size, int)]
    sizes = [inserter.editor.size_of(size) for size in unknown] if len(unknown) > 1 else []

    def join(*found: Any) -> torch.Tensor:
        made, given = found[: len(found) - len(sizes)], iter(found[len(found) - len(sizes) :] or [-1])
        *pieces, tangent = made if scaled else (*made, None)
        whole = pieces[0] if total is not None else torch.cat(pieces)
        if tangent is not None:
            whole = whole * tangent.to(whole.dtype)
        return whole.reshape([size if isinstance(size, int) else next(given) for size in shape]).to(val.dtype)

    arguments = [total] if total is not None else list(parts)
    new = inserter.insert(join, [*arguments, *([region.tangent] if scaled else []), *sizes], node)
    node.replace_all_uses_with(new, lambda user: user not in region.inside)


def _keep(result: fx.Node) -> None:
    """Let the partitioner save ``result`` and never run its piece again. It reads the mark of a call on the call itself: one of
    the tensors that come out of it is never banned from recomputation, whatever its own mark says."""
    for node in (result, *result.all_input_nodes):
        if node is result or node.target is invoke_subgraph or is_sum_in_place(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _rows_of_a_piece(hidden: torch.Tensor) -> int:
    share = _ROWS_PER_FEATURE.get(hidden.device.type, _ROWS_PER_FEATURE_ELSEWHERE)
    return max(_LEAST_ROWS, int(share * hidden.shape[1]))
