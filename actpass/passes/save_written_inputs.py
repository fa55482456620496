"""Inputs that the forward writes to: the backward must see what the forward read.

A model may read a buffer (a router's bias, a queue, a running maximum) and update it in the same forward. In the joint graph
the update stands at the end, as a ``copy_`` into the input, or it is returned and the caller copies it. An input costs nothing
to save, so upstream's cut saves the input itself, or rebuilds from it, and the backward then reads the *updated* value: the
gradient of another function, silently (torch 2.13 and 2.15, run; 2.15 excludes inputs that want a gradient, and no others).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from actpass.errors import GraphUnsupported
from actpass.ir.copying import copy_module
from actpass.ir.editor import GraphEditor
from actpass.ir.joint_graph import Joint, is_view, value
from actpass.ir.outputs import output_descriptions
from actpass.ir.traversal import ancestors
from actpass.passes.base import GraphPass, RegionState
from actpass.torch_compat import plain_input_index, written_input

aten = torch.ops.aten


@dataclass(frozen=True)
class SaveWrittenInputs(GraphPass):
    name: str = "save_written_inputs"

    def run(self, state: RegionState) -> RegionState:
        if not _written(state.joint, _updates(state.joint)):
            return state
        state = state.with_graph(copy_module(state.joint.gm, same_names=True)[0])
        save_what_is_read(state.joint)
        return state.with_graph(state.joint.gm)


def save_what_is_read(joint: Joint) -> frozenset[fx.Node]:
    """Let all that reads an input which the forward writes to and of which the backward needs something read a copy, which the
    forward makes and the backward never does. In place; returns the copies.

        before: y = f(input); input.copy_(new); backward: g(f(input))
        after:  c = clone(input); y = f(c); input.copy_(new); backward: g(f(c)), from c or from f(c), whichever is smaller

    Costs the bytes of the copy where upstream's cut takes it, and nothing else. Raises `GraphUnsupported` for an input that is
    read through a view which a copy does not have.
    """
    updates = _updates(joint)
    needed = ancestors([*joint.backward, *(g for _, g in joint.gradients)])
    made: dict[fx.Node, fx.Node] = {}
    for primal in _written(joint, updates):
        readers = {u for shown in _shown(primal) for u in shown.users if u.op == "call_function" and not is_view(u)}
        if needed & readers.difference(updates):
            made[primal] = _copy(GraphEditor(joint.gm), primal, updates)
    required = ancestors([*joint.forward_outputs, *updates])
    for primal, copy in made.items():
        if copy not in required:
            _require(joint, primal, copy, updates)
    if made:
        joint.gm.recompile()
    return frozenset(made.values())


def _updates(joint: Joint) -> list[fx.Node]:
    """What copies into an input in the forward."""
    copies = joint.gm.graph.find_nodes(op="call_function", target=aten.copy_.default)
    return [n for n in copies if n.meta.get("partitioner_tag") != "must_be_in_backward"]


def _written(joint: Joint, updates: list[fx.Node]) -> list[fx.Node]:
    """The primals whose memory holds another value when the backward runs."""
    in_graph: set[Any] = {n.args[0] for n in updates}  # pyright: ignore[reportUnhashable]
    by_caller = {written_input(desc) for desc in output_descriptions(joint.gm.graph)} - {None}
    return [p for p in joint.primals if p in in_graph or plain_input_index(p.meta.get("desc")) in by_caller]


def _shown(primal: fx.Node) -> list[fx.Node]:
    """``primal`` and its views."""
    found = [primal]
    for node in found:
        found.extend(u for u in node.users if is_view(u))
    return found


def _copy(editor: GraphEditor, primal: fx.Node, updates: list[fx.Node]) -> fx.Node:
    """The copy of ``primal``, in the place of all that reads it but what writes into it, and the output."""
    val = value(primal)
    with torch.no_grad():
        copied = val.clone()
    strided = any(n.target is aten.as_strided.default for n in _shown(primal))
    if strided and (val.stride() != copied.stride() or val.storage_offset() != 0):
        raise GraphUnsupported(
            f"the forward writes to {primal.name}, which shows a part of a larger memory, and the backward needs what was there"
        )
    readers = [u for u in primal.users if u.op == "call_function" and u not in updates]
    kept = {k: v for k, v in min(readers).meta.items() if k not in ("val", "tensor_meta", "desc")}
    meta = {**kept, "val": copied, "partitioner_tag": "must_be_in_forward", "recompute": CheckpointPolicy.MUST_SAVE}
    last = editor.graph.find_nodes(op="placeholder")[-1]
    copy = editor.insert("call_function", aten.clone.default, (primal,), meta, after=last)
    for reader in readers:
        reader.replace_input_with(primal, copy)
    return copy


def _require(joint: Joint, primal: fx.Node, copy: fx.Node, updates: list[fx.Node]) -> None:
    """Make the forward need ``copy``, which the backward alone reads: upstream would move it there, behind the update. The new
    value is written over the old one on its way into the input."""
    reader = next((u for u in updates if u.args[0] is primal), None)
    if reader is not None:
        new = reader.args[1]
    else:
        reader = joint.gm.graph.output_node()
        index = plain_input_index(primal.meta.get("desc"))
        described = zip(joint.outputs, output_descriptions(joint.gm.graph), strict=True)
        new = next(o for o, desc in described if desc is not None and written_input(desc) == index)
    assert isinstance(new, fx.Node)
    meta = {**{k: v for k, v in new.meta.items() if k != "recompute"}, "val": value(new).clone()}
    over = GraphEditor(joint.gm).insert("call_function", aten.copy.default, (copy, new), meta, after=reader.prev)
    reader.replace_input_with(new, over)
