"""What kind of work a node does, as far as a fusing compiler cares: by the row of its operator (`actpass.ir.op_rules`)."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.utils import _pytree as pytree

from actpass.ir.joint_graph import is_view, rule_of

FOR_CODES = "actpass_for_codes"
"""In a node's meta, of one that casts a factor of weight gradients to codes: the parameters whose gradients those are. What it
reads is the factor, as far as an analysis goes, and what it makes is linear in it: rounding is unbiased."""
OF_A_SCALE = "actpass_of_a_scale"
"""In the meta of those of them that make a scale: whatever it is, codes times scale are the factor."""


def is_cast(node: fx.Node) -> bool:
    return rule_of(node).cast


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of ``node`` depends on one element of each input; views, casts and copies among them."""
    return rule_of(node).pointwise or is_view(node)


def is_reduction(node: fx.Node) -> bool:
    return rule_of(node).reduction


def is_matmul(node: fx.Node) -> bool:
    return rule_of(node).matmul is not None


def is_attention(node: fx.Node) -> bool:
    """Whether ``node`` is a fused attention operator (not one of the tensors that come out of it)."""
    return rule_of(node).attention is not None


def is_free_to_repeat(node: fx.Node) -> bool:
    """Whether a second run costs a loop at most: views, pointwise operators, reductions, and what moves or reads values. Not:
    matmuls, fused attention of any kind, sorts, scans, scatters, and what nothing is known of."""
    if node.op != "call_function" or node.target is operator.getitem or not _makes_tensors(node):
        return True
    row = rule_of(node)
    if row.matmul is not None or row.attention is not None:
        return False
    return is_pointwise(node) or row.reduction or row.reruns or row.recomputable or row.realised in ("loop", "heavy")


def _makes_tensors(node: fx.Node) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))


def factors_of(matmul: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two that ``matmul`` multiplies."""
    row = rule_of(matmul).matmul
    assert row is not None
    a, b = (matmul.args[i] for i in row.factors)
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    return a, b


def is_reduced_by_row(node: fx.Node) -> bool:
    """Whether ``node`` reduces its input's last axis."""
    if not is_reduction(node):
        return False
    dims = node.args[1] if len(node.args) > 1 else None
    last = node.all_input_nodes[0].meta["val"].dim() - 1
    return not isinstance(dims, list | tuple) or any(d in (-1, last) for d in dims)
