"""The joint graph with what is known of its nodes: who depends on a tangent, who only on parameters, who is whose view."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from actpass.ir.graph_inputs import GraphInputs, clean_path
from actpass.ir.op_rules import UNKNOWN, OpRule, rule
from actpass.ir.outputs import output_values
from actpass.ir.products import is_sum_in_place
from actpass.torch_compat import OpOverload, is_tangent_input, plain_input_index, size_hint


@dataclass(frozen=True)
class Joint:
    """A joint forward-backward graph module ``f(primals, tangents) -> (outputs, gradients)`` and its reading.

    num_fwd_outputs: how many of the outputs are the forward's. inputs: what Dynamo's inputs are. static: positions of
    primals with a static lifetime, as AOTAutograd reports them.
    """

    gm: fx.GraphModule
    inputs: GraphInputs
    num_fwd_outputs: int
    static: frozenset[int] = frozenset()

    @cached_property
    def outputs(self) -> list[fx.Node | None]:
        return output_values(self.gm.graph)

    @property
    def forward_outputs(self) -> list[fx.Node]:
        return [o for o in self.outputs[: self.num_fwd_outputs] if isinstance(o, fx.Node)]

    @cached_property
    def primals(self) -> list[fx.Node]:
        return [n for n in self.gm.graph.find_nodes(op="placeholder") if not is_tangent(n)]

    @cached_property
    def parameter_path(self) -> dict[fx.Node, str]:
        """Primal -> path of the parameter it is (unnamed static inputs by position)."""
        paths: dict[fx.Node, str] = {}
        for position, node in enumerate(self.primals):
            index = plain_input_index(node.meta.get("desc"))
            index = position if index is None else index
            path = self.inputs.paths[index] if index < len(self.inputs.paths) else None
            if path is not None:
                paths[node] = path
        return paths

    def is_narrow_copy(self, node: fx.Node) -> bool:
        """Whether ``node`` is a parameter, cast to fewer bytes."""
        if not rule_of(node).cast:
            return False
        source = storage_root(node.all_input_nodes[0])
        return source in self.parameter_path and value(node).element_size() < value(source).element_size()

    @cached_property
    def computed_inputs(self) -> list[fx.Node]:
        """Primals that another region computed."""
        computed = self.inputs.computed
        indices = {n: plain_input_index(n.meta.get("desc")) for n in self.primals}
        return [n for n, i in indices.items() if i is not None and i < len(computed) and computed[i]]

    @cached_property
    def seed(self) -> fx.Node | None:
        """The placeholder of the step's seed."""
        return self._primal(self.inputs.seed)

    @cached_property
    def learned_seed(self) -> fx.Node | None:
        """The placeholder of the seed of what is random in learned bases."""
        return self._primal(self.inputs.learned_seed)

    @cached_property
    def points(self) -> fx.Node | None:
        """The placeholder of the points at which tokens are sampled."""
        return self._primal(self.inputs.points)

    @cached_property
    def subspaces(self) -> tuple[fx.Node, ...]:
        """The placeholders of the learned subspaces."""
        return tuple(n for n in map(self._primal, self.inputs.subspaces) if n is not None)

    @cached_property
    def coefficients(self) -> tuple[fx.Node, ...]:
        """The placeholders whose gradients are the coefficients of low-rank ones."""
        return tuple(n for n in map(self._primal, self.inputs.coefficients) if n is not None)

    @cached_property
    def state(self) -> frozenset[fx.Node]:
        """What this package added to the user's graph: seeds, points and subspaces, and the nodes that read nothing else (what
        stands where a sketch will be returned)."""
        own = {n for n in (self.seed, self.learned_seed, self.points, *self.subspaces, *self.coefficients) if n is not None}
        for node in self.gm.graph.nodes:
            if node.op == "call_function" and node.all_input_nodes and own.issuperset(node.all_input_nodes):
                own.add(node)
        return frozenset(own)

    def _primal(self, index: int | None) -> fx.Node | None:
        if index is None:
            return None
        return next((n for n in self.primals if plain_input_index(n.meta.get("desc")) == index), None)

    @cached_property
    def gradients(self) -> list[tuple[fx.Node, fx.Node]]:
        """(primal, its gradient) for every primal that gets one."""
        gradients = self.outputs[self.num_fwd_outputs :]
        return [(p, g) for p, g in zip(self.primals, gradients, strict=False) if isinstance(g, fx.Node)]

    @cached_property
    def backward(self) -> frozenset[fx.Node]:
        """Nodes that depend on a tangent."""
        return self._reach(set(filter(is_tangent, self.gm.graph.nodes)))

    @cached_property
    def activations(self) -> frozenset[fx.Node]:
        """Forward nodes that depend on data: on a primal that is neither a parameter, nor static, nor of this package."""
        data = {
            n
            for i, n in enumerate(self.primals)
            if n not in self.parameter_path and i not in self.static and n not in self.state
        }
        return self._reach(data) - self.backward

    def _reach(self, start: set[fx.Node]) -> frozenset[fx.Node]:
        reached = set(start)
        for node in self.gm.graph.nodes:
            if node.op != "output" and any(a in reached for a in node.all_input_nodes):
                reached.add(node)
        return frozenset(reached)


def is_tangent(node: fx.Node) -> bool:
    """Whether ``node`` is an input that holds the gradient of an output: by what AOTAutograd says of it, or else by the name
    that it gives such inputs."""
    if node.op != "placeholder":
        return False
    described = is_tangent_input(node.meta.get("desc"))
    return str(node.target).startswith("tangents") if described is None else described


def builtin_name(node: fx.Node) -> str:
    """The name of one of torch's own operators, without its overload; empty for what anyone else registered, whatever its
    name."""
    target: Any = node.target
    own = isinstance(target, OpOverload) and target.namespace in ("aten", "prims")
    return target._opname if own else ""  # pyright: ignore[reportPrivateUsage]


def rule_of(node: fx.Node) -> OpRule:
    """What is known of the operator that ``node`` calls."""
    return rule(node.target) if node.op == "call_function" else UNKNOWN


def is_view(node: fx.Node) -> bool:
    """Whether ``node`` only re-labels the storage of its first input: upstream's own table, pieces of a split, and a total to
    which something was added in place."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        source = node.all_input_nodes[0]
        return rule_of(source).pieces or is_sum_in_place(source)
    return rule_of(node).view


def storage_root(node: fx.Node) -> fx.Node:
    """The node that allocated the storage which ``node`` shows."""
    while is_view(node) and node.all_input_nodes:
        source = node.all_input_nodes[0]
        node = source.all_input_nodes[0] if is_sum_in_place(source) else source
    return node


def value(node: fx.Node) -> torch.Tensor:
    """The fake tensor of a node (`KeyError` for a node without one: graphs from AOTAutograd carry one everywhere)."""
    return node.meta["val"]


def tensor_bytes(node: fx.Node) -> int:
    """Bytes of a tensor node at the traced shape; 0 for anything else."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return 0
    return size_hint(val.numel()) * val.element_size()


def module_path(node: fx.Node) -> str:
    """The deepest module whose forward made ``node`` (or, for a backward node, whose backward it belongs to)."""
    stack: Mapping[Any, Any] = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    entries = list(stack.values())
    return clean_path(entries[-1][0]) if entries else ""


_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def fold_indices(path: str) -> str:
    """``layers.3.mlp`` -> ``layers.*.mlp``: the same for layers that repeat."""
    return _INDEX.sub("*", path)


def source_line(node: fx.Node) -> str:
    """``file.py:12, code`` of the user's line that made ``node``; empty if the trace has none."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    for i in range(len(lines) - 1, -1, -1):
        if lines[i].startswith("File "):
            parts = lines[i].split(", ")
            file = parts[0].removeprefix("File ").strip('"').rsplit("/", 1)[-1]
            number = parts[1].removeprefix("line ") if len(parts) > 1 else "?"
            code = lines[i + 1] if i + 1 < len(lines) else ""
            return f"{file}:{number} {code}".strip()
    return ""
