"""Graphs that Dynamo's graph calls: marked regions, checkpointed layers, branches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import fx

from actpass.torch_compat import tag_activation_checkpoint


def bodies(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that ``node`` is given to call."""
    given = [getattr(gm, str(a.target)) for a in node.all_input_nodes if a.op == "get_attr"]
    return [body for body in given if isinstance(body, fx.GraphModule)]


def checkpoint_calls(gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[fx.GraphModule, Mapping[fx.Node, fx.Node]]]:
    """The graph of a checkpoint that ``node`` calls, if it does, with what its placeholders are given."""
    if node.target is not tag_activation_checkpoint:
        return
    for body in bodies(gm, node):
        yield body, dict(zip(body.graph.find_nodes(op="placeholder"), cast(Sequence[fx.Node], node.args[1:]), strict=True))


def add_module(gm: fx.GraphModule, value: Any) -> str:
    """The name of ``value`` in ``gm``, which receives it under a new one if it is not there."""
    known = next((name for name, mine in gm.named_children() if mine is value), None)
    if known is None:
        known = next(name for i in itertools.count() if not hasattr(gm, name := f"called_{i}"))
        setattr(gm, known, value)
    return known
