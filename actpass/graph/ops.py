"""What kind of work an operator does, as far as a fusing compiler cares."""

from __future__ import annotations

import torch
from torch import fx

from actpass.graph.joint import CASTS, builtin_name, is_view

aten = torch.ops.aten

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
