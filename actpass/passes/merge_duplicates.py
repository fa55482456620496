"""Merge nodes that compute the same: under autocast q, k and v each carry a cast of one tensor.

As in upstream's partitioner, what only the forward needs is merged with nothing that gradients need: it would be saved for
them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from actpass.ir.outputs import output_values
from actpass.ir.traversal import ancestors
from actpass.passes.base import GraphPass, RegionState
from actpass.torch_compat import make_graph_module, merge_duplicates


@dataclass(frozen=True)
class MergeDuplicates(GraphPass):
    name: str = "merge_duplicates"

    def run(self, state: RegionState) -> RegionState:
        gm = state.joint.gm
        needed = ancestors(o for o in output_values(gm.graph)[state.count :] if isinstance(o, fx.Node))
        merged = make_graph_module(gm, merge_duplicates(gm.graph, needed.__contains__))
        merged.meta = dict(gm.meta)
        return state.with_graph(merged)
