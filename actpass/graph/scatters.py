"""Values that are scattered into zeros and then added to something are scattered onto that.

The gradient of an embedding that is also the head is such a sum, ``head + scatter(zeros, tokens, values)``: three tensors as
large as the weight, where ``scatter(head, tokens, values)`` needs one, in the memory of ``head``. The same is added up, in
another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from actpass.graph.joint import value

aten = torch.ops.aten

_ACCUMULATE_AT: dict[Any, int | None] = {
    aten.index_put.default: 3,
    aten._unsafe_index_put.default: 3,
    aten._unsafe_masked_index_put_accumulate.default: None,
}
"""What adds values at indices -> position of the argument that asks for it; None: it always does."""


def scatter_onto_sums(graph: fx.Graph) -> None:
    """Rewrite each ``add(other, scatter(zeros, ...))`` of ``graph`` to ``scatter(other, ...)``."""
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        for scattered, other in (node.args, reversed(node.args)):
            if _is_scatter_into_zeros(scattered, node) and isinstance(other, fx.Node) and _are_alike(other, scattered):
                with graph.inserting_before(node):
                    target: Any = scattered.target
                    onto = graph.call_function(target, (other, *scattered.args[1:]), scattered.kwargs)
                onto.meta = dict(node.meta)
                node.replace_all_uses_with(onto)
                graph.erase_node(node)
                graph.erase_node(scattered)
                break


def _is_scatter_into_zeros(node: Any, reader: fx.Node) -> bool:
    if not isinstance(node, fx.Node) or node.target not in _ACCUMULATE_AT or list(node.users) != [reader]:
        return False
    at = _ACCUMULATE_AT[node.target]
    accumulates = at is None or (len(node.args) > at and node.args[at] is True)
    base = node.args[0]
    return bool(accumulates and isinstance(base, fx.Node) and base.target is aten.full.default and base.args[1] == 0)


def _are_alike(a: fx.Node, b: fx.Node) -> bool:
    return value(a).shape == value(b).shape and value(a).dtype == value(b).dtype
