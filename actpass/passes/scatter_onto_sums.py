"""The gradient of an embedding that is also the head: ``head + scatter(zeros, tokens, values)``.

That takes three tensors as large as the weight. ``scatter(head, tokens, values)`` takes one, in the memory of ``head``, and
adds up the same in another order: in float32, where small terms are not lost on a large sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from actpass.ir.joint_graph import Joint, storage_root, value

aten = torch.ops.aten

_ADDS_AT_INDICES = aten._unsafe_masked_index_put_accumulate.default
"""The gradient of `nn.Embedding`, as torch decomposes it: (onto, mask, indices, values)."""


def scatter_onto_sums(joint: Joint) -> None:
    """Rewrite each ``add(other, scatter(zeros, ...))`` in the backward of ``joint`` to ``scatter(other, ...)``."""
    graph = joint.gm.graph
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs or node not in joint.backward:
            continue
        for scattered, other in (node.args, reversed(node.args)):
            if _is_scatter_into_zeros(scattered, node) and _can_be_added_to(other, scattered):
                with graph.inserting_before(node):
                    onto = graph.call_function(_ADDS_AT_INDICES, (other, *scattered.args[1:]))
                onto.meta = dict(node.meta)
                node.replace_all_uses_with(onto)
                graph.erase_node(node)
                graph.erase_node(scattered)
                break


def _is_scatter_into_zeros(node: Any, reader: fx.Node) -> bool:
    if not isinstance(node, fx.Node) or node.target is not _ADDS_AT_INDICES or list(node.users) != [reader]:
        return False
    base = node.args[0]
    return isinstance(base, fx.Node) and base.target is aten.full.default and bool(base.args[1] == 0)


def _can_be_added_to(other: Any, scattered: fx.Node) -> bool:
    """Whether ``other`` is another tensor, of the same shape and dtype, that ``scattered`` does not read."""
    if not isinstance(other, fx.Node) or not isinstance(other.meta.get("val"), torch.Tensor) or other is scattered:
        return False
    if storage_root(other) in map(storage_root, scattered.all_input_nodes):
        return False
    a, b = value(other), value(scattered)
    return a.shape == b.shape and a.dtype == b.dtype and a.element_size() >= 4
