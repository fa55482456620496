"""Write every flip of a fixed length as a read at indices.

The numbers are the same, and Inductor inlines both, but upstream rebuilds the one and not the other (2.13 and 2.15), and every
table here knows what the one does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from actpass.ir.copying import copy_module
from actpass.ir.editor import GraphEditor
from actpass.ir.joint_graph import value
from actpass.passes.base import GraphPass, RegionState


@dataclass(frozen=True)
class SpellFlips(GraphPass):
    name: str = "spell_flips"

    def run(self, state: RegionState) -> RegionState:
        """On a private copy of what AOTAutograd traced, without dead code."""
        gm, _ = copy_module(state.joint.gm)
        editor = GraphEditor(gm)
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.prims.rev.default):
            x: Any = node.args[0]
            axes: Any = node.args[1]
            lengths: dict[int, Any] = {d: value(x).shape[d] for d in axes}
            if all(isinstance(n, int) for n in lengths.values()):
                new = editor.splice(_reading_backwards(lengths), [x], after=node, like=node)
                if value(new).stride() == value(node).stride():
                    node.replace_all_uses_with(new)
        gm.graph.eliminate_dead_code()
        return state.with_graph(gm)


def _reading_backwards(lengths: Mapping[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that flips the axes whose ``lengths`` are given."""

    def flipped(x: torch.Tensor) -> torch.Tensor:
        for axis, length in lengths.items():
            at = torch.arange(length - 1, -1, -1, device=x.device)
            x = torch.ops.aten.index.Tensor(x, [*[None] * (axis % x.dim()), at])
        return x

    return flipped
