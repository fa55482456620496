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

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from actpass.errors import GraphUnsupported
from actpass.ir.copying import copy_module
from actpass.ir.editor import GraphEditor
from actpass.ir.joint_graph import Joint, builtin_name, is_tangent, is_view, rule_of, storage_root, tensor_bytes, value
from actpass.ir.op_queries import is_attention, is_matmul, is_pointwise, is_reduction
from actpass.ir.products import is_sum_in_place
from actpass.ir.traversal import ancestors, descendants, reach
from actpass.passes.base import Chunked, GraphPass, RegionState
from actpass.torch_compat import invoke_subgraph

aten = torch.ops.aten

_LEAST_ROWS = 128
_ROWS_PER_FEATURE = {"cpu": 0.5}
_ROWS_PER_FEATURE_ELSEWHERE = 4
"""Rows of a piece to features N. Each piece reads and writes dW, some 10 N V bytes, beside some 12 bytes of each of its logits:
with 4 N rows that is a fifth. A CPU is faster with pieces that its cache holds."""
LEAST_SHARE = 8
"""Logits below this fraction (one in eight) of what Inductor's default saves are not worth it."""


@dataclass(frozen=True)
class ChunkedLoss(GraphPass):
    """Leaves a loss whole whose head can't be taken apart, and one whose logits do not weigh against what Inductor's default
    saves; why is in the state."""

    name: str = "chunked_loss"

    def run(self, state: RegionState) -> RegionState:
        if not state.loss_rows:
            return state
        head = _find_head(state.joint, state.default_bytes)
        if head is None:
            return state
        copy, mapping = copy_module(state.joint.gm)
        after = state.with_graph(copy)
        try:
            region = _Region(after.joint, mapping[head])
            rows = _rows_of_a_piece(value(region.hidden)) if state.loss_rows is True else state.loss_rows
            sizes = _pieces(region.rows, rows)
            region.split(sizes)
        except GraphUnsupported as error:
            return replace(state, why_whole=str(error))
        copy.graph.eliminate_dead_code()
        copy.recompile()
        chunked = Chunked(tensor_bytes(head), len(sizes), sizes[0])
        return replace(state.with_graph(copy), chunked=chunked)


def _find_head(joint: Joint, saved_bytes: int) -> fx.Node | None:
    """The matmul of an activation and a weight with the largest output, if no other matmul follows in the forward, it is wider
    than its input, and it weighs."""
    found: fx.Node | None = None
    forward = [n for n in joint.gm.graph.nodes if n not in joint.backward]
    multiplied = {n for n in forward if is_matmul(n) or is_attention(n)}
    hidden = ancestors({a for n in multiplied for a in n.all_input_nodes})
    for node in joint.gm.graph.nodes:
        if node.target not in (aten.mm.default, aten.addmm.default) or node not in joint.activations:
            continue
        x, weight = node.args[-2:]
        if weight in joint.activations or x not in joint.activations or value(node).shape[1] <= 2 * value(x).shape[1]:
            continue
        if node in hidden:
            continue
        if found is None or tensor_bytes(node) > tensor_bytes(found):
            found = node
    return found if found is not None and LEAST_SHARE * tensor_bytes(found) >= saved_bytes else None


class _Region:
    """The nodes between a head and the gradients that leave it.

    wide: tensors of T rows and V columns that hang together. inside: they, what lies between them, and what reads them.
    """

    def __init__(self, joint: Joint, head: fx.Node) -> None:
        self.joint, self.head, self.gm = joint, head, joint.gm
        self.editor = GraphEditor(joint.gm)
        if not all(isinstance(s, int) for s in value(head).shape):
            raise GraphUnsupported("the number of rows is symbolic")
        self.rows, self.columns = value(head).shape
        self.hidden: Any = head.args[-2]
        self.wide = self._wide()
        whole = {storage_root(o) for o in joint.outputs if o is not None} & self.wide
        if whole:
            why = joint.inputs.whole
            raise GraphUnsupported(f"the logits are also returned to the caller: {why or 'return only the loss'}")
        below = descendants(self.wide)
        above = ancestors(self.wide)
        inside = self.wide | (below & above) | {u for n in self.wide for u in n.users}
        inside |= {u for n in inside if rule_of(n).best for u in n.users if u.target is operator.getitem}
        self.below = below
        self.inside = [n for n in self.gm.graph.nodes if n in inside]
        self.tangent, self.tangible = self._tangent()
        self.constants = _constants(self.gm.graph)
        self.row_inputs: list[fx.Node] = []
        self.whole_inputs: list[fx.Node] = []
        self.sums = [n for n in self.inside if self._is_sum(n)]
        for node in self.sums:
            if any(u in inside for u in node.users):
                raise GraphUnsupported(f"{node.name}, a sum over the rows, is read before all rows are known")

    def _wide(self) -> set[fx.Node]:
        computed = {n for n in self.gm.graph.nodes if n.op == "call_function"}
        learned = descendants(self.joint.parameter_path)
        weights = learned - self.joint.activations - self.joint.backward

        def is_wide(node: fx.Node) -> bool:
            if node not in computed or node in weights or (is_matmul(node) and node is not self.head):
                return False
            return tensor_bytes(node) > 0 and value(node).numel() == self.rows * self.columns

        def neighbours(node: fx.Node) -> list[fx.Node]:
            return [n for n in (*node.users, *node.all_input_nodes) if is_wide(n)]

        return reach({self.head}, neighbours)

    def _tangent(self) -> tuple[fx.Node, set[fx.Node]]:
        """The tangent that the gradients inside are linear in, and all nodes that depend on it."""
        above = ancestors(self.inside)
        tangents = [n for n in self.gm.graph.nodes if is_tangent(n) and n in above]
        if not tangents:
            raise GraphUnsupported("nothing that is formed from its logits is differentiated")
        if len(tangents) > 1:
            raise GraphUnsupported(
                f"{len(tangents)} of the results that are differentiated are formed from its logits: return one loss, their sum"
            )
        if value(tangents[0]).numel() != 1:
            raise GraphUnsupported(f"the loss is a tensor of shape {tuple(value(tangents[0]).shape)}: return its mean or sum")
        if any(value(n).dtype == torch.float16 for n in self.wide):
            raise GraphUnsupported("its logits are float16, whose gradients need the loss scale")
        tangible = descendants({tangents[0]}) & above
        for node in self.gm.graph.nodes:
            if node in tangible and node is not tangents[0] and not _is_homogeneous(node, tangible):
                raise GraphUnsupported(f"{node.target} is not linear in the loss's tangent")
        return tangents[0], tangible

    # ------------------------------------------------------------------------------------------------ rows, one by one

    def _lead(self, node: fx.Node) -> int:
        """How many leading axes of ``node`` make up the rows."""
        size, lead = 1, 0
        shape = value(node).shape
        while size < self.rows and lead < len(shape):
            size, lead = size * shape[lead], lead + 1
        if size != self.rows:
            raise GraphUnsupported(f"{node.name} {tuple(shape)} does not keep the {self.rows} rows")
        return lead

    def _trail(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(value(node).shape[self._lead(node) :])

    def _is_sum(self, node: fx.Node) -> bool:
        """Whether ``node`` adds up rows: it is accumulated over the pieces."""
        args: Any = node.args
        if node.target is aten.mm.default:
            return value(args[0]).shape[1] == self.rows and _transposed(args[0]) is not None
        if node.target is aten.sum.default and node.all_input_nodes[0] in self.wide:
            return True
        if node.target is aten.sum.dim_IntList and node.all_input_nodes[0] in self.wide:
            return self._summed(node).issuperset(range(self._lead(node.all_input_nodes[0])))
        return False

    def _summed(self, node: fx.Node) -> set[int]:
        """The axes that a sum adds up."""
        axes: Any = node.args[1]
        return {d % value(node.all_input_nodes[0]).dim() for d in axes}

    def _rows_of(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """An operand that has the rows: from inside, or a piece of an input."""
        if node in env:
            return env[node]
        self._lead(node)
        self.row_inputs.append(node)
        env[node] = None
        return None

    def _operand(self, node: Any, like: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """An operand of a pointwise operator: with rows if it has the axes of ``like``, else whole."""
        if not isinstance(node, fx.Node) or node in env:
            return env.get(node, node) if isinstance(node, fx.Node) else node
        shape, wanted, lead = tuple(value(node).shape), tuple(value(like).shape), self._lead(like)
        if len(shape) == len(wanted) and shape[:lead] == wanted[:lead]:
            return self._rows_of(node, env)
        leading = shape[: max(0, len(shape) - (len(wanted) - lead))]
        if any(s != 1 for s in leading):
            raise GraphUnsupported(f"{node.name} {shape} is spread over a part of the rows")
        return self._whole(node, env)

    def _whole(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """An operand that every piece reads whole. A constant is made by each of them, in the loop that reads it: a table of
        the words that comes from outside makes Inductor write what the labels select to memory, as large as the logits."""
        if node in self.constants:
            return _evaluated(node, {}) if _is_known(env) else None
        if node not in env:
            self.whole_inputs.append(node)
            env[node] = None
        return env[node]

    def _run(self, node: fx.Node, env: dict[fx.Node, Any], rows: int) -> Any:
        """``node`` on ``rows`` rows. env: what is known; an operand that is missing is noted as an input (and is None)."""
        target: Any = node.target
        given: Any = node.args
        kwargs: dict[str, Any] = dict(node.kwargs)
        known = _is_known(env)
        if node in self.sums:
            return self._run_sum(node, env, known)
        row = rule_of(node)
        if row.best:
            return self._run_best(node, env, known)
        if target is operator.getitem:
            return env[given[0]][given[1]] if known else None
        lead, trail = self._lead(node), self._trail(node)
        if target in (aten.mm.default, aten.addmm.default):
            *bias, left, right = given
            args = [*(self._operand(b, node, env) for b in bias), self._rows_of(left, env), self._whole(right, env)]
        elif row.moves == "reshape":
            x = self._rows_of(given[0], env)
            return x.reshape(rows, *trail) if known else None
        elif target is aten.full.default:
            return torch.full((rows, *trail), given[1], **kwargs) if known else None
        elif target is aten.expand.default:
            x = self._operand(given[0], node, env)
            return x.expand(rows, *trail) if known else None
        elif is_reduction(node):
            source = given[0]
            x, axes = self._rows_of(source, env), given[1] if len(given) > 1 else None
            within = value(source).dim()
            if not isinstance(axes, list | tuple) or any(d % within < self._lead(source) for d in axes):
                raise GraphUnsupported(f"{node.name} reduces over the rows before the gradients are formed")
            args = [x, [d % within - self._lead(source) + 1 for d in axes], *given[2:]]
        elif row.axis is not None:
            x, axis, *rest = given
            if axis % value(node).dim() < lead:
                raise GraphUnsupported(f"{node.name} picks from other rows")
            args = [self._rows_of(x, env), axis % value(node).dim() - lead + 1, *(self._operand(r, node, env) for r in rest)]
        elif is_pointwise(node) and not is_view(node):
            if target is aten.clone.default:
                kwargs = {}
            args = [self._operand(a, node, env) for a in given]
        else:
            raise GraphUnsupported(f"{target} can't be run on a part of the rows")
        if not known or not _is_known(env):
            return None
        try:
            return target(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            raise GraphUnsupported(f"{target} does not run on a part of the rows: {error}") from error

    def _run_sum(self, node: fx.Node, env: dict[fx.Node, Any], known: bool) -> Any:
        given: Any = node.args
        if node.target is not aten.mm.default:
            x = self._rows_of(given[0], env)
            if not known:
                return None
            lead = self._lead(given[0])
            return (
                x.sum()
                if node.target is aten.sum.default
                else x.sum([0, *(d - lead + 1 for d in self._summed(node) if d >= lead)])
            )
        a, b = (self._rows_of(factor, env) for factor in self._factors(node))
        return torch.mm(a.t(), b) if a is not None and b is not None else None

    def _run_best(self, node: fx.Node, env: dict[fx.Node, Any], known: bool) -> Any:
        target: Any = node.target
        source, at = node.args[0], rule_of(node).axis
        assert isinstance(source, fx.Node)
        assert at is not None
        axis: Any = node.args[at] if len(node.args) > at else None if at == 1 else -1
        if axis is None or axis % value(source).dim() < self._lead(source):
            raise GraphUnsupported(f"{node.name} looks for the best among other rows")
        x = self._rows_of(source, env)
        axis = axis % value(source).dim() - self._lead(source) + 1
        return target(x, *node.args[1:at], axis, *node.args[at + 1 :]) if known and x is not None else None

    # ---------------------------------------------------------------------------------------------------------- pieces

    def split(self, sizes: Sequence[int]) -> None:
        """Rewrite the graph. sizes: rows of each piece."""
        body = [n for n in self.inside if not self._is_only_transposed(n)]
        self._note_inputs(body)
        inside = set(self.inside)
        leaving = [n for n in body if any(u not in inside for u in n.users)]
        self._put_below_last()
        unit = self._with_unit_tangent()
        arguments = {n: unit.get(n, n) for n in (*self.row_inputs, *self.whole_inputs)}
        flat = {n: self._flatten(n, arguments[n]) for n in self.row_inputs}
        sums = [n for n in leaving if n in self.sums and not self._is_in_place(n)]
        products = [n for n in leaving if self._is_in_place(n)]
        factors = list(dict.fromkeys(f for n in products for f in self._factors(n)))
        totals: dict[fx.Node, fx.Node] = {n: self._zeros(n) for n in sums}
        parts: dict[fx.Node, list[fx.Node]] = {n: [] for n in leaving if n not in self.sums}
        results_of = list(dict.fromkeys(n for n in (*leaving, *factors) if n not in products and n not in flat))
        start = 0
        for size in sizes:
            pieces = [self._slice(flat[n], start, start + size) for n in self.row_inputs]
            inputs = [*pieces, *(arguments[n] for n in self.whole_inputs), *(totals[n] for n in sums)]
            function = self._function(body, results_of, sums, size)
            results = self.editor.call(function, inputs, after=self.last, like=self.head, key=("head", size))
            self.last = results[-1]
            made = dict(zip([*self.row_inputs, *results_of], [*pieces, *results], strict=True))
            for node in leaving:
                if node in parts:
                    parts[node].append(made[node])
                else:
                    totals[node] = self._add(node, totals.get(node), made) if node in products else made[node]
            start += size
        for node in leaving:
            for result in (totals[node],) if node in totals else parts[node]:
                _keep(result)
            self._leave(node, totals.get(node), parts.get(node, []))

    def _is_only_transposed(self, node: fx.Node) -> bool:
        return node.target in (aten.permute.default, aten.t.default) and all(u in self.sums for u in node.users)

    def _note_inputs(self, body: Sequence[fx.Node]) -> None:
        env: dict[fx.Node, Any] = {self.head: None}  # not known: nothing is computed here
        for node in body:
            self._run(node, env, self.rows)
            env[node] = None

    def _put_below_last(self) -> None:
        """Order the graph: first what does not depend on the logits. `last` is then the last node before all that does."""
        nodes = [n for n in self.gm.graph.nodes if n.op != "output"]
        anchor = nodes[-1]
        for node in nodes:
            if node in self.below:
                anchor.append(node)
                anchor = node
        self.last = max(n for n in self.gm.graph.nodes if n not in self.below and n.op != "output")

    def _with_unit_tangent(self) -> dict[fx.Node, fx.Node]:
        """Inputs that depend on the tangent, again for a tangent of one."""
        needed = [n for n in (*self.row_inputs, *self.whole_inputs) if n in self.tangible]
        if not needed:
            return {}
        above = ancestors(needed) & self.tangible
        tangent = value(self.tangent)

        def one(_: torch.Tensor) -> torch.Tensor:
            return torch.ones(tangent.shape, dtype=tangent.dtype, device=tangent.device)

        unit = {self.tangent: self._insert(one, [self.hidden], self.head)}
        for node in [n for n in self.gm.graph.nodes if n in above and n is not self.tangent]:
            unit[node] = self.last = self.editor.copy_of(node, unit, after=self.last)
        return unit

    def _function(
        self, body: Sequence[fx.Node], results: Sequence[fx.Node], sums: Sequence[fx.Node], size: int
    ) -> Callable[..., tuple[torch.Tensor, ...]]:
        names = [*self.row_inputs, *self.whole_inputs]

        def head(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            env: dict[fx.Node, Any] = dict(zip(names, arguments, strict=False))
            totals = dict(zip(sums, arguments[len(names) :], strict=True))
            for node in body:
                if node not in self.sums or node in totals:
                    env[node] = self._run(node, env, size)
            return tuple(totals[n] + env[n] if n in totals else env[n] for n in results)

        return head

    def _is_in_place(self, node: fx.Node) -> bool:
        """Whether ``node`` is a sum over the rows that is added up in place: a matmul's product, in its own dtype."""
        return node in self.sums and node.target is aten.mm.default and value(node).element_size() >= 4

    def _factors(self, product: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Of a sum over the rows: what is transposed and what it multiplies."""
        args: Any = product.args
        left = _transposed(args[0])
        assert left is not None
        return left, args[1]

    def _add(self, product: fx.Node, total: fx.Node | None, made: Mapping[fx.Node, fx.Node]) -> fx.Node:
        left, right = (made[f] for f in self._factors(product))
        if total is None:
            return self._insert(lambda a, b: torch.mm(a.t(), b), [left, right], self.head)
        self.last = self.editor.add_product(total, left, right, self.last)
        return self.last

    def _insert(self, function: Callable[..., Any], arguments: Sequence[fx.Node], like: fx.Node) -> fx.Node:
        made = self.editor.splice(function, arguments, after=self.last, like=like)
        self.last = max(self.last, self.editor.latest)
        return made

    def _flatten(self, node: fx.Node, argument: fx.Node) -> fx.Node:
        return self._insert(lambda x: x.reshape(self.rows, *self._trail(node)), [argument], argument)

    def _slice(self, node: fx.Node, start: int, stop: int) -> fx.Node:
        return self._insert(lambda x: x[start:stop], [node], node)

    def _zeros(self, node: fx.Node) -> fx.Node:
        val, shape = value(node), self._total_shape(node)
        dtype = torch.float32 if val.dtype.is_floating_point and val.element_size() < 4 else val.dtype
        return self._insert(lambda _: torch.zeros(shape, dtype=dtype, device=val.device), [self.hidden], self.head)

    def _total_shape(self, node: fx.Node) -> tuple[int, ...]:
        if node.target is not aten.sum.dim_IntList:
            return tuple(value(node).shape)
        source = node.all_input_nodes[0]
        kept = set(range(self._lead(source), value(source).dim())) - self._summed(node)
        return tuple(value(source).shape[d] for d in sorted(kept))

    def _leave(self, node: fx.Node, total: fx.Node | None, parts: Sequence[fx.Node]) -> None:
        """Put the whole where the rest of the graph reads ``node``."""
        val = value(node)

        def join(*found: torch.Tensor) -> torch.Tensor:
            *pieces, tangent = found if node in self.tangible else (*found, None)
            whole = pieces[0] if total is not None else torch.cat(pieces)
            if tangent is not None:
                whole = whole * tangent.to(whole.dtype)
            return whole.reshape(val.shape).to(val.dtype)

        arguments = [total] if total is not None else list(parts)
        new = self._insert(join, [*arguments, self.tangent] if node in self.tangible else arguments, node)
        inside = set(self.inside)
        node.replace_all_uses_with(new, lambda user: user not in inside)


def _keep(result: fx.Node) -> None:
    """Let the partitioner save ``result`` and never run its piece again. It reads the mark of a call on the call itself: one of
    the tensors that come out of it is never banned from recomputation, whatever its own mark says."""
    for node in (result, *result.all_input_nodes):
        if node is result or node.target is invoke_subgraph or is_sum_in_place(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _rows_of_a_piece(hidden: torch.Tensor) -> int:
    share = _ROWS_PER_FEATURE.get(hidden.device.type, _ROWS_PER_FEATURE_ELSEWHERE)
    return max(_LEAST_ROWS, int(share * hidden.shape[1]))


def _pieces(rows: int, size: int) -> list[int]:
    """Rows of each piece: nearly ``size``, multiples of 16, two pieces or more."""
    count = max(2, -(-rows // size))
    size = -(-rows // (count * 16)) * 16
    full, rest = divmod(rows, size)
    return [size] * full + ([rest] if rest else [])


def _transposed(node: Any) -> fx.Node | None:
    """What ``node`` is the transpose of."""
    if not isinstance(node, fx.Node) or node.target not in (aten.permute.default, aten.t.default) or value(node).dim() != 2:
        return None
    return node.all_input_nodes[0]


def _is_homogeneous(node: fx.Node, tangible: set[fx.Node]) -> bool:
    """Whether ``node``, whose operands in ``tangible`` are multiples of the tangent and whose others do not depend on it, is a
    multiple of it as well."""
    row = rule_of(node)
    if row.cast or is_view(node):
        return True

    def depends(argument: Any) -> bool:
        return isinstance(argument, fx.Node) and argument in tangible

    args = node.args
    if node.target is torch.ops.prims.fma.default:
        return depends(args[2]) and depends(args[0]) + depends(args[1]) == 1
    groups = [[args[i] for i in group if i < len(args)] for group in row.linear]
    if (
        row.moves == "join"
        or row.attention
        or any(depends(a) for i, a in enumerate(args) if not any(i in group for group in row.linear))
    ):
        return False
    reached = [group for group in groups if any(map(depends, group))]
    return len(reached) == 1 and all(depends(a) or _is_zero(a) for a in reached[0])


def _is_known(env: Mapping[fx.Node, Any]) -> bool:
    return not any(v is None for v in env.values())


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


def _is_zero(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return bool(node == 0)
    number = rule_of(node).fill
    return number is not None and bool(node.args[number] == 0)
