"""What a graph returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree


def output_values(graph: fx.Graph) -> list[Any]:
    """The nodes and constants that ``graph`` returns, in order."""
    return pytree.tree_leaves(graph.output_node().args[0])


def set_output_values(graph: fx.Graph, values: Sequence[Any], descriptions: Sequence[Any] | None = None) -> None:
    """Let ``graph``, which returns a flat list or tuple, return ``values``. descriptions: what AOTAutograd says of each."""
    output = graph.output_node()
    kind: Any = type(output.args[0])
    output.args = (kind(values),)
    if descriptions is not None and "desc" in output.meta:
        output.meta["desc"] = list(descriptions)


def output_descriptions(graph: fx.Graph) -> list[Any]:
    """What AOTAutograd says of each value that ``graph`` returns; empty if it says nothing."""
    return list(graph.output_node().meta.get("desc") or ())
