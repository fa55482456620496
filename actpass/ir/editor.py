"""The one way in which passes insert nodes: functions are traced and copied in, single operators are inserted.

Codecs are plain tensor functions. `GraphEditor.splice` traces one with ``make_fx`` under the graph's own fake mode and
Inductor's decompositions and copies the nodes in, so every inserted node carries a real fake value and no one writes FX.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from actpass.errors import GraphUnsupported
from actpass.ir.joint_graph import value
from actpass.ir.outputs import output_values
from actpass.torch_compat import (
    FakeTensorMode,
    auto_functionalized,
    detect_fake_mode,
    invoke_subgraph,
    rename,
    select_decomp_table,
    storage_key,
)


class GraphEditor:
    """Edits the graph of one module in place.

    inserted: every node that was inserted. latest: the last of them. Functions that were traced before are found again by
    their ``key``, which says all that the traced graph depends on: layers that repeat are traced once.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.inserted: set[fx.Node] = set()
        self.latest: fx.Node
        self._traces: dict[Hashable, fx.GraphModule] = {}

    def insert(self, op: str, target: Any, args: tuple[Any, ...], meta: dict[str, Any], *, after: fx.Node | None) -> fx.Node:
        """Insert one node behind ``after``; None: where the graph begins."""
        with self.graph.inserting_after(after) if after is not None else self.graph.inserting_before():
            node = self.graph.create_node(op, target, args)
        return self._note(node, meta)

    def splice(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        *,
        after: fx.Node,
        like: fx.Node,
        key: Hashable = None,
        marks: Mapping[str, Any] | None = None,
    ) -> Any:
        """Insert ``function(*arguments)`` behind ``after`` and every argument. Returns the node of its result, or the nodes of
        its results if it returns a tuple.

        like: the node whose provenance (module, line, stream annotations) and forward/backward tag the new nodes take over.
        marks: what their ``meta`` gets besides.
        """
        tensors = [a for a in arguments if isinstance(a, fx.Node)]
        with _mode(tensors), torch.no_grad():
            traced = self._trace(function, arguments, None if key is None else ("splice", key))
            return self._copy(traced, arguments, max((after, *tensors)), {**provenance(like), **(marks or {})})

    def call(
        self, function: Callable[..., Any], arguments: Sequence[fx.Node], *, after: fx.Node, like: fx.Node, key: Hashable
    ) -> tuple[fx.Node, ...]:
        """As `splice`, for a ``function`` that returns a tuple, but it stays a graph of its own that is called: Inductor makes
        its code once for all calls of a ``key``, and fuses it with nothing around it.

        What it returns lies in memory of its own: behind its last reader Inductor takes the memory of an argument, or of a
        result, for something else, though another result may be a view of it (torch 2.13 to 2.15)."""
        position = max((after, *arguments))
        meta = provenance(like)
        sizes = self._sizes(arguments)
        with _mode(arguments), torch.no_grad():
            traced = self._trace(_called(function, len(arguments)), [*arguments, *sizes], ("call", key))
            values = [_fresh(value(n)) for n in output_values(traced.graph)]
        name = self._submodule(traced)
        graph = self.insert("get_attr", name, (), dict(meta), after=position)
        called = (graph, name, *arguments, *sizes)
        whole = self.insert("call_function", invoke_subgraph, called, {**meta, "val": tuple(values)}, after=graph)
        results: list[fx.Node] = []
        for i, val in enumerate(values):
            results.append(self.insert("call_function", operator.getitem, (whole, i), {**meta, "val": val}, after=self.latest))
        return tuple(results)

    def add_product(self, total: fx.Node, left: fx.Node, right: fx.Node, after: fx.Node) -> fx.Node:
        """Insert ``total + left.T @ right`` behind ``after`` and its operands, as an operator that changes nothing and that
        Inductor makes the one that writes in place of (`actpass.ir.products`). Returns the node of the sum."""
        meta, val = {k: v for k, v in left.meta.items() if k != "val"}, value(total)
        factors: dict[str, Any] = {"total": total, "left": left, "right": right}
        with _mode([total]):
            added = _fresh(val)
        with self.graph.inserting_after(max(after, total, left, right)):
            made = self.graph.call_function(auto_functionalized, (torch.ops.actpass.add_product_.default,), factors)
        self._note(made, {**meta, "val": (None, added)})
        return self.insert("call_function", operator.getitem, (made, 1), {**meta, "val": added}, after=made)

    def copy_of(self, node: fx.Node, environment: Mapping[fx.Node, fx.Node], *, after: fx.Node) -> fx.Node:
        """Insert ``node`` again behind ``after``, reading what ``environment`` has in place of its inputs."""
        with self.graph.inserting_after(after):
            copy = self.graph.node_copy(node, lambda n: environment.get(n, n))
        return self._note(copy, copy.meta)

    def views(self, view: fx.Node, x: fx.Node, new: fx.Node) -> fx.Node:
        """Insert the chain of views that leads from ``x`` to ``view``, again from ``new``."""
        chain: list[fx.Node] = []
        while view is not x:
            chain.append(view)
            view = view.all_input_nodes[0]
        environment = {x: new}
        for node in reversed(chain):
            environment[node] = new = self.copy_of(node, environment, after=new)
        return new

    def name_inserted(self, prefix: str) -> None:
        """Let the name of every inserted node begin with ``prefix``."""
        for node in self.inserted:
            if not node.name.startswith(prefix):
                rename(node, f"{prefix}{node.name}")

    def clean(self) -> None:
        """Remove what nothing reads."""
        self.graph.eliminate_dead_code()
        self.inserted = {n for n in self.inserted if not n._erased}

    def _note(self, node: fx.Node, meta: dict[str, Any]) -> fx.Node:
        node.meta = meta
        self.inserted.add(node)
        self.latest = node
        return node

    def _trace(self, function: Callable[..., Any], arguments: Sequence[Any], key: Hashable) -> fx.GraphModule:
        known = self._traces.get(key) if key is not None else None
        if known is not None:
            return known
        values = [value(a) if isinstance(a, fx.Node) else a for a in arguments]
        traced = make_fx(function, decomposition_table=select_decomp_table())(*values)
        for node in traced.graph.nodes:  # annotations are text here, which Inductor's cache can't take into a key
            node.type = None
        traced.recompile()
        self._traces[key] = traced
        return traced

    def _copy(self, traced: fx.GraphModule, arguments: Sequence[Any], position: fx.Node, meta: Mapping[str, Any]) -> Any:
        """Copy ``traced`` behind ``position``. Every new node gets a fake value of its own, from running it: values that are
        shared would pass for one memory."""
        environment: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), arguments, strict=True))
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return fx.map_arg(node.args[0], lambda n: environment[n])
            if node.op == "get_attr":
                raise GraphUnsupported(f"the codec holds a constant tensor ({node.target}); build it from the seed instead")
            with self.graph.inserting_after(position):
                position = self.graph.node_copy(node, lambda n: environment[n])
            environment[node] = self._note(position, {**meta, "val": run(position)})
        raise AssertionError("a traced graph ends in an output")

    def _submodule(self, part: fx.GraphModule) -> str:
        """The name of ``part`` inside the module; adds it under a new one."""
        children = dict(self.module.named_children())
        known = next((name for name, child in children.items() if child is part), None)
        if known is not None:
            return known
        name = next(n for n in (f"actpass_{i}" for i in itertools.count()) if n not in children)
        self.module.add_submodule(name, part)
        return name

    def _sizes(self, arguments: Sequence[fx.Node]) -> list[fx.Node]:
        """Nodes of the symbols in the sizes of ``arguments`` (4 * s) of which none is a size by itself: a graph that is called
        knows no symbol but from its arguments."""
        sizes = [s for a in arguments for s in (*value(a).shape, *value(a).stride()) if isinstance(s, torch.SymInt)]
        known = {s.node.expr for s in sizes}
        missing = {symbol for expression in known for symbol in expression.free_symbols} - known
        return [self._size(symbol) for symbol in sorted(missing, key=str)]

    def size_of(self, size: torch.SymInt) -> fx.Node:
        """The node of a symbolic ``size``. Raises `GraphUnsupported` where it is no size of an input."""
        return self._size(size.node.expr)

    def _size(self, symbol: object) -> fx.Node:
        """The node of ``symbol``: an input of the graph, or a size of one."""
        inputs = self.graph.find_nodes(op="placeholder")
        for node in inputs:
            if isinstance(node.meta.get("val"), torch.SymInt) and node.meta["val"].node.expr == symbol:
                return node
        for node in inputs:
            val = node.meta.get("val")
            for axis, size in enumerate(val.shape if isinstance(val, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                    where, asked = inputs[-1], torch.ops.aten.sym_size.int
                    return self.insert("call_function", asked, (node, axis), {"val": size}, after=where)
        raise GraphUnsupported(f"no input of the graph has the size {symbol}")


def provenance(like: fx.Node) -> dict[str, Any]:
    """What a node that is inserted for ``like`` takes over: module, line, stream annotations, forward/backward tag."""
    return {k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta", "desc", "recompute")}


def run(node: fx.Node) -> Any:
    """What ``node`` computes of the fake values of its inputs, under their fake mode."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    target: Any = node.target
    return target(*args, **kwargs)


def run_in_mode(node: fx.Node) -> Any:
    """As `run`, for who is not in that mode yet."""
    with _mode(node.all_input_nodes):
        return run(node)


def _mode(tensors: Sequence[fx.Node]) -> FakeTensorMode:
    mode = detect_fake_mode([value(a) for a in tensors])
    if mode is None:
        raise GraphUnsupported("the joint graph carries no fake values")
    return mode


def _called(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """``function`` of the first ``count`` of what is given, its results in memory of their own."""
    return lambda *given: _apart(function(*given[:count]), given)


def _apart(results: Sequence[torch.Tensor], given: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """``results``, those copied that share memory with ``given`` or with each other."""
    taken = {_memory(g) for g in given if isinstance(g, torch.Tensor)}
    apart: list[torch.Tensor] = []
    for result in results:
        apart.append(result.clone() if _memory(result) in taken else result)
        taken.add(_memory(result))
    return tuple(apart)


def _memory(tensor: torch.Tensor) -> int:
    return storage_key(tensor.untyped_storage())


def _fresh(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
