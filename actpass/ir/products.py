"""A matmul whose product is added up in place.

``addmm`` writes to memory of its own, and first copies there what it adds to: as many bytes again as a gradient of a head
has, for each piece of its rows. Inductor runs this one in the memory of ``total`` if nothing else reads that.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from actpass.torch_compat import auto_functionalized, fake_of


@torch.library.custom_op("actpass::add_product_", mutates_args=("total",))
def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left.T @ right``: (M, N), (T, M), (T, N). All of one dtype, or ``total`` in float32 on a GPU, where the matmul
    adds the products of narrower factors up in it."""
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right)
    else:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)


@fake_of(add_product_)
def _(total: Tensor, left: Tensor, right: Tensor) -> None:
    return None


@torch.library.custom_op("actpass::behind", mutates_args=())
def behind(result: Tensor, sums: list[Tensor]) -> Tensor:
    """``result``, known when ``sums`` are. It stands in a graph while that is cut, and is never run."""
    return result.clone()


@fake_of(behind)
def _(result: Tensor, sums: list[Tensor]) -> Tensor:
    return torch.empty_like(result)


def products_of(node: fx.Node) -> list[fx.Node]:
    """What is multiplied from the left in the sum of ``node`` and of all that it adds to, the first product among them."""
    lefts: list[fx.Node] = []
    current: Any = node
    while is_sum_in_place(current):
        lefts.append(current.kwargs["left"])
        current = current.kwargs["total"]
        current = current.args[0] if current.target is operator.getitem else current
    return [*lefts, *current.all_input_nodes[:1]]


def is_sum_in_place(node: fx.Node) -> bool:
    """Whether ``node`` is what `actpass.ir.editor` inserts for a sum. The sum lies in the memory of its first input."""
    return node.target is auto_functionalized and node.args[0] is torch.ops.actpass.add_product_.default
