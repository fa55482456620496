"""The gradient of an embedding that is also the head: ``head + scatter(zeros, tokens, values)``.

That takes three tensors as large as the weight. ``scatter(head, tokens, values)`` takes one, in the memory of ``head``, and
adds up the same in another order: in float32, where small terms are not lost on a large sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from actpass.ir.copying import copy_module
from actpass.ir.editor import GraphEditor
from actpass.ir.joint_graph import Joint, storage_root, value
from actpass.passes.base import GraphPass, RegionState

aten = torch.ops.aten

_ADDS_AT_INDICES = aten._unsafe_masked_index_put_accumulate.default
"""The gradient of `nn.Embedding`, as torch decomposes it: (onto, mask, indices, values)."""


@dataclass(frozen=True)
class ScatterOntoSums(GraphPass):
    """Where the loss is in pieces, which leave the head's gradient in a sum."""

    name: str = "scatter_onto_sums"

    def run(self, state: RegionState) -> RegionState:
        if state.chunked is None:
            return state
        gm, _ = copy_module(state.joint.gm, same_names=True)
        scatter_onto_sums(state.with_graph(gm).joint)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return state.with_graph(gm)


def scatter_onto_sums(joint: Joint) -> None:
    """Rewrite each ``add(other, scatter(zeros, ...))`` in the backward of ``joint`` to ``scatter(other, ...)``."""
    editor = GraphEditor(joint.gm)
    for node in list(editor.graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs or node not in joint.backward:
            continue
        for scattered, other in (node.args, reversed(node.args)):
            if _is_scatter_into_zeros(scattered, node) and _can_be_added_to(other, scattered):
                args = (other, *scattered.args[1:])
                onto = editor.insert("call_function", _ADDS_AT_INDICES, args, dict(node.meta), after=node.prev)
                node.replace_all_uses_with(onto)
                editor.graph.erase_node(node)
                editor.graph.erase_node(scattered)
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
