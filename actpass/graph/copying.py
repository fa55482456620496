"""Graphs that a pass may take apart without touching the original."""

from __future__ import annotations

from typing import Any

from torch import fx

from actpass._torch import make_graph_module


def copy_module(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A graph module with new nodes, the same fake values and the same submodules, and the map from old nodes to new. Inside
    `compile_fx` it gets Python code when somebody runs or reads it, as Inductor's own: nobody does with most."""
    graph = fx.Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    mapping: dict[fx.Node, fx.Node] = {}
    copied: Any = graph.graph_copy(gm.graph, mapping, return_output_node=True)
    returned, original = copied
    graph.output(returned).meta = dict(original.meta)
    copy = make_graph_module(gm, graph)
    copy.meta = dict(gm.meta)
    return copy, mapping
