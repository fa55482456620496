"""Graphs that Dynamo's graph calls: marked regions, checkpointed layers, branches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx


def bodies(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that ``node`` is given to call."""
    given = [getattr(gm, str(a.target)) for a in node.all_input_nodes if a.op == "get_attr"]
    return [body for body in given if isinstance(body, fx.GraphModule)]


def body_calls(gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[fx.GraphModule, Mapping[fx.Node, fx.Node]]]:
    """Each graph that ``node`` calls, with what its placeholders are given: the last positional arguments."""
    for body in bodies(gm, node):
        inside = body.graph.find_nodes(op="placeholder")
        given = node.args[len(node.args) - len(inside) :]
        yield body, {p: g for p, g in zip(inside, given, strict=True) if isinstance(g, fx.Node)}


def add_module(gm: fx.GraphModule, value: Any) -> str:
    """The name of ``value`` in ``gm``, which receives it under a new one if it is not there."""
    known = next((name for name, mine in gm.named_children() if mine is value), None)
    if known is None:
        known = next(name for i in itertools.count() if not hasattr(gm, name := f"called_{i}"))
        setattr(gm, known, value)
    return known
