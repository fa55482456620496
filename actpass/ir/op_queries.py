"""What kind of work an operator does, as far as a fusing compiler cares."""

from __future__ import annotations

import torch
from torch import fx

from actpass.ir.joint_graph import CASTS, builtin_name, is_view

aten = torch.ops.aten

MATMULS: dict[object, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}
"""Operator -> positions of its two factors. A new weight-gradient operator is one row."""
GROUPED = getattr(getattr(aten, "_grouped_mm", None), "default", None)
"""Batched experts in one kernel: rows of x are sorted by expert, the third argument says where each expert ends."""
if GROUPED is not None:
    MATMULS[GROUPED] = (0, 1)

_REDUCTIONS = (
    "sum",
    "mean",
    "amax",
    "amin",
    "var",
    "var_mean",
    "std",
    "logsumexp",
    "linalg_vector_norm",
    "max",
    "min",
    "prod",
    "any",
)


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of ``node`` depends on one element of each input; views, casts and copies among them."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or is_view(node) or node.target in CASTS or node.target is aten.clone.default


def is_reduction(node: fx.Node) -> bool:
    return builtin_name(node) in _REDUCTIONS


def is_reduced_by_row(node: fx.Node) -> bool:
    """Whether ``node`` reduces its input's last axis."""
    if not is_reduction(node):
        return False
    dims = node.args[1] if len(node.args) > 1 else None
    last = node.all_input_nodes[0].meta["val"].dim() - 1
    return not isinstance(dims, list | tuple) or any(d in (-1, last) for d in dims)


WRITES = {
    aten.index_put.default: (0, 2),
    aten._unsafe_index_put.default: (0, 2),
    aten._unsafe_masked_index_put_accumulate.default: (0, 3),
    aten.scatter_add.default: (0, 3),
    aten.scatter.src: (0, 3),
    aten.index_add.default: (0, 3),
}
"""What writes values at places -> positions of what is written to and of the values."""
