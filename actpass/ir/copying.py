"""Graphs that a pass may take apart without touching the original."""

from __future__ import annotations

from typing import Any, cast

from torch import fx

from actpass.torch_compat import keep_names, make_graph_module

_OF_DYNAMO = ("compile_subgraph_reason", "_param_name_to_source", "_source_to_user_stacks")
"""What Dynamo notes on its graph module, beside ``meta``. Without the second AOTAutograd takes no parameter for static, and
upstream's cut counts the bytes of a parameter that it saves (2.13 and 2.15)."""


def copy_module(gm: fx.GraphModule, *, same_names: bool = False) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A graph module with new nodes, the same fake values and the same submodules, and the map from old nodes to new. Inside
    `compile_fx` it gets Python code when somebody runs or reads it, as Inductor's own: nobody does with most. A copy
    of Dynamo's graph stays one: its inputs keep their sources. same_names: whether what is inserted is named as in ``gm``."""
    graph = fx.Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    mapping: dict[fx.Node, fx.Node] = {}
    copied: Any = graph.graph_copy(gm.graph, mapping, return_output_node=True)
    returned, original = copied
    graph.output(returned).meta = dict(original.meta)
    if same_names:
        keep_names(graph, gm.graph)
    copy = make_graph_module(gm, graph)
    copy.meta = dict(gm.meta)
    for name in _OF_DYNAMO:
        if hasattr(gm, name):
            setattr(copy, name, getattr(gm, name))
    for old, new in cast(dict[Any, Any], mapping).items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return copy, mapping
