"""What the layers of a deep model and their nodes are called, by those of a traced one."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import fx

from actpass.errors import GraphUnsupported
from actpass.extrapolation.fsdp import Unit
from actpass.extrapolation.layer_map import MIDDLE, TRACED, Fold
from actpass.ir.joint_graph import module_path


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers that repeat. path: of the module list that holds them, in the traced model. group: how many of its members
    make up one layer here (of a model whose layers take turns, as many as take turns). layers: how many of these the deep
    model has."""

    path: str
    layers: int
    group: int = 1

    def place(self, path: str) -> tuple[int | None, str]:
        """(traced layer, path inside of it) of what the module at ``path`` makes; None and the path itself outside of all."""
        found = re.match(rf"{re.escape(self.path)}\.(\d+)(?=\.|$)", path)
        if found is None:
            return None, path
        layer, member = divmod(int(found[1]), self.group)
        return layer, f"{self.path}.{member if self.group > 1 else '*'}{path[found.end() :]}"

    def places(self, graph: fx.Graph) -> dict[fx.Node, tuple[int | None, str]]:
        """`place` of every node. A sum of gradients, which no module makes, lies where the last of its terms does."""
        places: dict[fx.Node, tuple[int | None, str]] = {}
        order = {node: i for i, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            path = module_path(node)
            terms = sorted(node.all_input_nodes, key=order.__getitem__) if node.op == "call_function" and not path else ()
            places[node] = places[terms[-1]] if terms else self.place(path)
        return places

    @property
    def depth(self) -> int:
        """Members of the list in the model to trace."""
        return TRACED * self.group

    def units(self, model: torch.nn.Module) -> tuple[Unit, list[Unit]]:
        """The parameters of the deep model, read from the traced one: those outside of all layers, and those of each layer."""
        shapes: dict[int | None, list[tuple[int, ...]]] = {None: [], **{i: [] for i in range(TRACED)}}
        sizes = {p.element_size() for p in model.parameters()}
        if len(sizes) != 1:
            raise GraphUnsupported(f"the parameters have elements of {sorted(sizes)} bytes. Give all of them one dtype.")
        for name, parameter in model.named_parameters():
            shapes[self.place(name)[0]].append(tuple(parameter.shape))
        units = {layer: Unit(tuple(own), min(sizes)) for layer, own in shapes.items()}
        fold = Fold(self.layers)
        return units[None], [units[fold.traced(layer)] for layer in range(self.layers)]

    def moved(self, path: str, layer: int) -> str:
        """``path`` in another ``layer``."""
        found = re.match(rf"{re.escape(self.path)}\.(\d+)(?=\.|$)", path)
        if found is None:
            return path
        return f"{self.path}.{layer * self.group + int(found[1]) % self.group}{path[found.end() :]}"


class Names:
    """What the nodes of a traced joint graph are called in the deep model.

    place: by node (its layer, the node of the middle layer that it is like; its own name if it is like none). middle: for every
    traced layer its nodes by those of the middle one.
    """

    def __init__(self, graph: fx.Graph, stack: Stack) -> None:
        members: dict[int | None, list[tuple[str, tuple[str, str]]]] = {layer: [] for layer in (None, *range(TRACED))}
        for node, (layer, path) in stack.places(graph).items():
            members[layer].append((node.name, (path, str(node.target))))
        self.place: dict[str, tuple[int | None, str]] = {name: (None, name) for name, _ in members[None]}
        self.middle: dict[int, dict[str, str]] = {}
        for layer in range(TRACED):
            own, middle = members[layer], members[MIDDLE]
            is_near = abs(layer - MIDDLE) <= 1
            if not middle or (is_near and Counter(kind for _, kind in own) != Counter(kind for _, kind in middle)):
                raise GraphUnsupported(
                    f"the layers of {stack.path!r} are not alike: number {layer} of {TRACED} traced has {len(own)} operators, "
                    f"number {MIDDLE} has {len(middle)}. A model whose layers differ can't be planned from a few of them."
                )
            pairs = _by_occurrence(own, middle) if is_near else _by_sequence(own, middle)
            self.middle[layer] = {like: name for name, like in pairs}
            self.place |= {name: (layer, name) for name, _ in own} | {name: (layer, like) for name, like in pairs}


_Members = list[tuple[str, tuple[str, str]]]
"""(node, what it is): equal for nodes of two layers that are alike."""


def _by_occurrence(own: _Members, middle: _Members) -> list[tuple[str, str]]:
    """(node, the middle layer's node) of two layers that have as many nodes of each kind."""
    queues: dict[Any, list[str]] = {}
    for name, kind in reversed(middle):
        queues.setdefault(kind, []).append(name)
    return [(name, queues[kind].pop()) for name, kind in own]


def _by_sequence(own: _Members, middle: _Members) -> list[tuple[str, str]]:
    """The same for layers of which one may have nodes that the other has not."""
    matcher = SequenceMatcher(None, [kind for _, kind in own], [kind for _, kind in middle], autojunk=False)
    blocks = [(own[a : a + n], middle[b : b + n]) for a, b, n in matcher.get_matching_blocks()]
    return [(name, like) for a, b in blocks for (name, _), (like, _) in zip(a, b, strict=True)]
