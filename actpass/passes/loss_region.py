"""Where the loss lies in a joint graph: between the matmul that forms the logits and the gradients that leave their size."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from actpass.errors import GraphUnsupported
from actpass.ir.joint_graph import Joint, is_tangent, is_view, rule_of, storage_root, tensor_bytes, value
from actpass.ir.op_queries import is_attention, is_matmul
from actpass.ir.traversal import ancestors, descendants, reach
from actpass.torch_compat import is_data_dependent, is_same_size, size_hint

aten = torch.ops.aten

_TRANSPOSES = (aten.permute.default, aten.t.default)
LEAST_SHARE = 100
"""Logits below this fraction (a hundredth) of what Inductor's default saves are not worth it. They count twice at the peak,
with their gradient, and beside what is stored in fewer bits."""


@dataclass(frozen=True, kw_only=True)
class LossRegion:
    """The nodes between a head and the gradients that leave it.

    head: the matmul of the logits, of ``hidden`` of so many ``rows`` and a weight. inside: tensors as large as the logits that
    hang together, what lies between them, and what reads them. body: of these what is run for each piece of rows, in the
    graph's order. sums: of the body what adds up rows: it is accumulated over the pieces. leaving: of the body what is read
    outside. below: all that depends on the logits. tangent: what the gradients inside are linear in. tangible: what depends on
    it.
    """

    head: fx.Node
    hidden: fx.Node
    rows: int | torch.SymInt
    inside: frozenset[fx.Node]
    body: tuple[fx.Node, ...]
    sums: frozenset[fx.Node]
    leaving: tuple[fx.Node, ...]
    below: frozenset[fx.Node]
    tangent: fx.Node
    tangible: frozenset[fx.Node]


def find_head(joint: Joint, saved_bytes: int) -> fx.Node | None:
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


def find_loss_region(joint: Joint, head: fx.Node) -> LossRegion:
    """What can be formed in pieces of rows around ``head``. Raises `GraphUnsupported`, with why, where the loss must stay
    whole."""
    hidden, rows = head.args[-2], value(head).shape[0]
    if is_data_dependent(rows):
        raise GraphUnsupported("the number of rows depends on data")
    assert isinstance(hidden, fx.Node)
    wide = _wide(joint, head)
    if {storage_root(o) for o in joint.outputs if o is not None} & wide:
        why = joint.inputs.whole
        raise GraphUnsupported(f"the logits are also returned to the caller: {why or 'return only the loss'}")
    below = descendants(wide)
    inside = wide | (below & ancestors(wide)) | {u for n in wide for u in n.users}
    inside |= below & ancestors(inside)  # labels, weights of rows, that are formed of the logits
    inside |= {u for n in inside if rule_of(n).best for u in n.users if u.target is operator.getitem}
    tangent, tangible = _tangent(joint, inside, wide)
    ordered = [n for n in joint.gm.graph.nodes if n in inside]
    sums = frozenset(n for n in ordered if _is_sum(n, wide, rows))
    for node in ordered:
        if node in sums and any(u in inside for u in node.users):
            raise GraphUnsupported(f"{node.name}, a sum over the rows, is read before all rows are known")
    body = tuple(n for n in ordered if n.target not in _TRANSPOSES or any(u not in sums for u in n.users))
    return LossRegion(
        head=head,
        hidden=hidden,
        rows=rows,
        inside=frozenset(inside),
        body=body,
        sums=sums,
        leaving=tuple(n for n in body if any(u not in inside for u in n.users)),
        below=frozenset(below),
        tangent=tangent,
        tangible=frozenset(tangible),
    )


def leading_axes(node: fx.Node, rows: int | torch.SymInt) -> int:
    """How many leading axes of ``node`` make up the rows."""
    size: int | torch.SymInt = 1
    lead = 0
    if not isinstance(node.meta["val"], torch.Tensor):
        raise GraphUnsupported(f"{node.name} has several results ({node.target}), which can't be formed for a part of the rows")
    shape = value(node).shape
    while size_hint(size) < size_hint(rows) and lead < len(shape):
        size, lead = size * shape[lead], lead + 1
    if not is_same_size(size, rows):
        raise GraphUnsupported(f"{node.name} {tuple(shape)} does not keep the {rows} rows")
    return lead


def trailing_shape(node: fx.Node, rows: int | torch.SymInt) -> tuple[int, ...]:
    """The shape of one row of ``node``."""
    shape: tuple[Any, ...] = tuple(value(node).shape[leading_axes(node, rows) :])
    if not all(isinstance(size, int) for size in shape):
        raise GraphUnsupported(f"a row of {node.name} has the symbolic shape {shape}")
    return shape


def summed_axes(node: fx.Node) -> set[int]:
    """The axes that a sum adds up: all of them, if it names none."""
    axes: Any = node.args[1] if len(node.args) > 1 else None
    dims = value(node.all_input_nodes[0]).dim()
    return {d % dims for d in axes or range(dims)}


def factors(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Of a matmul that is a sum over the rows: what is transposed and what it multiplies."""
    left, right = product.args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return left.all_input_nodes[0], right


def _wide(joint: Joint, head: fx.Node) -> set[fx.Node]:
    """Tensors as large as the logits that hang together with them."""
    computed = {n for n in joint.gm.graph.nodes if n.op == "call_function"}
    learned = descendants(joint.parameter_path)
    weights = learned - joint.activations - joint.backward
    size = value(head).numel()

    def is_wide(node: fx.Node) -> bool:
        if node not in computed or node in weights or (is_matmul(node) and node is not head):
            return False
        return tensor_bytes(node) > 0 and is_same_size(value(node).numel(), size)

    return reach({head}, lambda node: [n for n in (*node.users, *node.all_input_nodes) if is_wide(n)])


def _tangent(joint: Joint, inside: set[fx.Node], wide: set[fx.Node]) -> tuple[fx.Node, set[fx.Node]]:
    """The tangent that the gradients inside are linear in, and all nodes that depend on it."""
    above = ancestors(inside)
    tangents = [n for n in joint.gm.graph.nodes if is_tangent(n) and n in above]
    if not tangents:
        raise GraphUnsupported("nothing that is formed from its logits is differentiated")
    if len(tangents) > 1:
        raise GraphUnsupported(
            f"{len(tangents)} of the results that are differentiated are formed from its logits: return one loss, their sum"
        )
    if value(tangents[0]).numel() != 1:
        raise GraphUnsupported(f"the loss is a tensor of shape {tuple(value(tangents[0]).shape)}: return its mean or sum")
    if any(value(n).dtype == torch.float16 for n in wide):
        raise GraphUnsupported("its logits are float16, whose gradients need the loss scale")
    tangible = descendants({tangents[0]}) & above
    for node in joint.gm.graph.nodes:
        if node in tangible and node is not tangents[0] and not _is_homogeneous(node, tangible):
            raise GraphUnsupported(f"{node.target} is not linear in the loss's tangent")
    return tangents[0], tangible


def _is_sum(node: fx.Node, wide: set[fx.Node], rows: int | torch.SymInt) -> bool:
    """Whether ``node`` adds up rows."""
    if node.target is aten.mm.default:
        left: Any = node.args[0]
        return is_same_size(value(left).shape[1], rows) and left.target in _TRANSPOSES and value(left).dim() == 2
    if node.target is aten.sum.default and node.all_input_nodes[0] in wide:
        return True
    if node.target is aten.sum.dim_IntList and node.all_input_nodes[0] in wide:
        return summed_axes(node).issuperset(range(leading_axes(node.all_input_nodes[0], rows)))
    return False


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


def _is_zero(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return bool(node == 0)
    number = rule_of(node).fill
    return number is not None and bool(node.args[number] == 0)
