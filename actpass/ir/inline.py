"""Regions that a user marked with ``torch.compiler.nested_compile_region``: Dynamo's graph calls each as a graph of its own.

Before, with two layers of one region::

    h1, = invoke_subgraph(layer, h0, weights of layer 0); h2, = invoke_subgraph(layer, h1, weights of layer 1)

After::

    h1 = what layer 0 does to h0; h2 = what layer 1 does to h1

Two reasons. Inductor takes the memory of a call's argument for free behind the call, though the called forward may return it
(what it saves for its backward is an output): the gradients are then wrong, in silence (torch 2.13 to 2.15). And AOTAutograd
cuts each region by itself, for all of its calls at once: no seed reaches it, a tensor in it has one form in all layers, and no
budget over the layers could be kept. The price: identical layers are compiled each, as without the mark.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import fx

from actpass.ir.called_graphs import add_module, bodies
from actpass.ir.copying import copy_module
from actpass.ir.graph_inputs import clean_path, parameter_path
from actpass.torch_compat import invoke_subgraph

Paths = Mapping[fx.Node, str | None]


def inline_regions(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, int]:
    """Dynamo's ``gm`` with the body of every called region in place of its call, and how many calls there were. ``gm`` itself
    stays as it is, and is returned where it calls none."""
    calls = _count(gm)
    if not calls:
        return gm, 0
    paths = {n: parameter_path(n, e) for n, e in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)}
    return _inlined(gm, paths, {}), calls


def _count(gm: fx.GraphModule) -> int:
    """Calls of regions in ``gm`` and in all that it calls, each as often as it is called."""
    return sum(_count(body) + (node.target is invoke_subgraph) for node in gm.graph.nodes for body in bodies(gm, node))


def _inlined(gm: fx.GraphModule, paths: Paths, first: dict[int, list[str | None]]) -> fx.GraphModule:
    """A copy of ``gm`` without calls. paths: of the parameters among its placeholders. first: region -> the parameters that its
    first call is given."""
    copy, mapping = copy_module(gm)
    known = {mapping[node]: path for node, path in paths.items()}
    while calls := copy.graph.find_nodes(op="call_function", target=invoke_subgraph):
        _inline(copy, calls[0], known, first)
    for node in copy.graph.nodes:
        for attribute in [a for a in node.all_input_nodes if a.op == "get_attr"]:
            body = getattr(copy, str(attribute.target))
            if isinstance(body, fx.GraphModule) and _count(body):
                inside = body.graph.find_nodes(op="placeholder")
                given = [known.get(a) for a in node.args if isinstance(a, fx.Node)][-len(inside) :]
                attribute.target = add_module(copy, _inlined(body, dict(zip(inside, given, strict=False)), first))
    copy.graph.eliminate_dead_code(is_impure_node=lambda node: node.op != "get_attr")
    copy.delete_all_unused_submodules()
    copy.graph.lint()
    copy.recompile()
    return copy


def _inline(gm: fx.GraphModule, call: fx.Node, paths: Paths, first: dict[int, list[str | None]]) -> None:
    """Put the body of the region that ``call`` calls in its place."""
    attribute, _, *operands = cast(Sequence[Any], call.args)
    region = getattr(gm, str(attribute.target))
    given = [paths.get(o) if isinstance(o, fx.Node) else None for o in operands]
    moved = _moved(first.setdefault(id(region), given), given)
    environment: dict[fx.Node, Any] = dict(zip(region.graph.find_nodes(op="placeholder"), operands, strict=True))
    results: Any = None
    with gm.graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op == "output":
                results = fx.map_arg(node.args[0], lambda n: environment[n])
            elif node.op != "placeholder":
                environment[node] = new = gm.graph.node_copy(node, lambda n: environment[n])
                if node.op == "get_attr":
                    new.target = add_module(gm, getattr(region, str(node.target)))
                if moved and "nn_module_stack" in new.meta:
                    new.meta["nn_module_stack"] = _in_its_own_module(new.meta["nn_module_stack"], *moved)
    for user in list(call.users):
        if user.target is not operator.getitem:
            raise AssertionError(f"{user.format_node()} reads what a region returns otherwise than one by one")
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)


def _moved(first: Sequence[str | None], now: Sequence[str | None]) -> tuple[str, str] | None:
    """The module of the first call, and of this one, by the paths of their parameters: ``layers.0`` and ``layers.3``. A region
    is traced once, and what it holds says the first."""
    for old, new in zip(first, now, strict=True):
        if old is not None and new is not None and old != new:
            a, b = old.split("."), new.split(".")
            while a and b and a[-1] == b[-1]:
                a, b = a[:-1], b[:-1]
            return ".".join(a), ".".join(b)
    return None


def _in_its_own_module(stack: Mapping[str, tuple[str, Any]], old: str, new: str) -> dict[str, tuple[str, Any]]:
    def move(path: str) -> str:
        path = clean_path(path)
        return new + path[len(old) :] if f"{path}.".startswith(f"{old}.") else path

    return {key: (move(path), kind) for key, (path, kind) in stack.items()}
