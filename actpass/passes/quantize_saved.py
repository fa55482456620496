"""Store what crosses the cut in few bits: the forward returns the codes, the backward decodes them before their first use.

Works on the two graphs that upstream's partitioner made. Only what is saved is touched: the forward's own outputs read
nothing that is inserted here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from actpass.analysis.linearity import consumers
from actpass.analysis.partitioned import Cut, Saved
from actpass.codecs import QUANTIZERS, Groups
from actpass.codecs.generator import rounding_keys, rounding_noise
from actpass.errors import GraphUnsupported
from actpass.ir.copying import copy_module
from actpass.ir.joint_graph import tensor_bytes, value
from actpass.ir.op_queries import is_pointwise, is_reduced_by_row
from actpass.passes.project_weight_gradients import call, splice
from actpass.plan import Storage
from actpass.torch_compat import size_hint


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor in the order of its memory. order: the permutation that sorts its axes by descending stride. shape: after it.
    groups: how that is coded. nbytes: of codes and scales."""

    order: tuple[int, ...]
    shape: tuple[Any, ...]
    groups: Groups
    nbytes: int

    def seen_from(self, tensor: torch.Tensor) -> Layout:
        """The same with symbolic sizes taken from the shape of ``tensor``: a traced function knows no others."""
        known = {str(s): s for s in tensor.shape}
        groups = replace(self.groups, shape=tuple(known.get(str(s), s) for s in self.groups.shape))
        return replace(self, shape=tuple(known.get(str(s), s) for s in self.shape), groups=groups)

    @property
    def inverse(self) -> tuple[int, ...]:
        return tuple(self.order.index(i) for i in range(len(self.order)))


def layout_of(tensor: torch.Tensor, codec: str, group: int | None) -> Layout | None:
    """How ``codec`` stores ``tensor``; None where sizes are symbolic and no axis can be divided without knowing them."""
    quantizer = QUANTIZERS[codec]
    order = tuple(sorted(range(tensor.dim()), key=lambda i: (-size_hint(tensor.stride(i)), i)))
    shape = tuple(tensor.shape[i] for i in order)
    groups = Groups.of(shape, group or quantizer.group, quantizer.pieces)
    if groups is None:
        return None
    count = math.prod(size_hint(s) for s in groups.shape)
    return Layout(order, shape, groups, quantizer.payload_bytes(count, groups.group))


def swap(cut: Cut, storages: Sequence[Storage], num_fwd_outputs: int) -> tuple[Cut, set[fx.Node]]:
    """``cut`` with every tensor of ``storages`` in its low-bit form, and the nodes that were inserted. The graphs of ``cut``
    stay as they are."""
    forward, to_forward = copy_module(cut.forward)
    backward, to_backward = copy_module(cut.backward)
    before = {old.name: new for old, new in to_forward.items()}
    behind = {old.name: new for old, new in to_backward.items()}
    inserted: set[fx.Node] = set()
    payloads: dict[str, tuple[fx.Node, ...]] = {}
    received: dict[str, str] = {}
    traces: dict[Any, fx.GraphModule] = {}
    keys = _keys(forward.graph, before.get(cut.seeds[0]) if cut.seeds else None, storages, inserted)
    for storage in storages:
        x = before[storage.node]
        layout = layout_of(value(x), storage.codec, storage.group)
        if layout is None:
            raise GraphUnsupported(f"{storage.node} can't be divided into groups at symbolic sizes")
        codes = _encode(forward, x, keys.get(storage), layout, storage, inserted, traces)
        arrived = receive(backward.graph, behind[storage.crossing[0]], codes)
        received |= {new.name: code.name for new, code in zip(arrived, codes, strict=True)}
        shown = [(behind[name], before[name]) for name in storage.crossing]
        _decode(backward, x, shown, arrived, layout, storage, inserted, traces)
        payloads |= {name: codes if name == storage.crossing[0] else () for name in storage.crossing}
    return_payloads(forward.graph, num_fwd_outputs, payloads)
    for module in (forward, backward):
        module.graph.lint()
        module.recompile()
    saved = tuple(new for s in cut.saved for new in (map(saved_code, payloads[s.name]) if s.name in payloads else [s]))
    arrives = {k: v for k, v in cut.arrives.items() if k not in payloads} | received
    return replace(cut, forward=forward, backward=backward, saved=saved, arrives=arrives), inserted


def saved_code(code: fx.Node) -> Saved:
    return Saved(code.name, code.name, code.name, tensor_bytes(code), user_visible=False)


def _keys(graph: fx.Graph, seed: fx.Node | None, storages: Sequence[Storage], inserted: set[fx.Node]) -> dict[Storage, fx.Node]:
    """The key of the random numbers for each tensor that is rounded stochastically."""
    drawn = [s for s in storages if s.rounding == "stochastic"]
    if not drawn:
        return {}
    if seed is None:
        raise GraphUnsupported("the step's seed did not arrive in the forward graph")

    def draw(seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rounding_keys(seed, len(drawn)).unbind()

    keys = splice(graph, draw, [seed], after=seed, like=seed, inserted=inserted)
    return dict(zip(drawn, keys, strict=True))


def _encode(
    module: fx.GraphModule,
    x: fx.Node,
    key: fx.Node | None,
    layout: Layout,
    storage: Storage,
    inserted: set[fx.Node],
    traces: dict[Any, fx.GraphModule],
) -> tuple[fx.Node, ...]:
    """Encode where ``x`` is made, by a function that all tensors of one size share: not fused with what comes later, which
    would keep ``x`` alive until then."""
    codec = QUANTIZERS[storage.codec]

    def flatten(x: torch.Tensor) -> torch.Tensor:
        groups = layout.seen_from(x).groups
        return x.permute(layout.order).reshape(-1 if groups.padding else groups.shape)

    def encode(x: torch.Tensor, *key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = layout.seen_from(x).groups
        noise = rounding_noise(key[0], groups.rows, groups.columns) if key else None
        return codec.encode(x if is_flat else flatten(x), groups, noise, rotate=storage.rotate)

    # A view of a tensor in any other order would make Inductor copy what it has not yet decided to keep in that order.
    # Strides are of the key: a part of a wider tensor has gaps between its rows, and is copied where another is viewed.
    is_flat, arrangement = layout.order == tuple(range(len(layout.order))), f"{layout} {tuple(value(x).stride())}"
    if is_flat:
        key_ = ("flatten", arrangement)
        x = splice(module.graph, flatten, [x], after=x, like=x, inserted=inserted, traces=traces, key=key_)
    arguments = [x] if key is None else [x, key]
    signature = ("encode", is_flat or arrangement, *_signature(x, layout, storage))
    return call(module, encode, arguments, after=x, like=x, inserted=inserted, traces=traces, key=signature)


def _signature(x: fx.Node, layout: Layout, storage: Storage) -> tuple[Any, ...]:
    """All that the traced codec of a tensor depends on."""
    val = value(x)
    return (storage.codec, storage.rounding, storage.rotate, str(layout.groups), val.dtype, val.device)


def receive(graph: fx.Graph, first: fx.Node, codes: Sequence[fx.Node]) -> list[fx.Node]:
    """Inputs of the backward for ``codes``, where the tensor ``first`` arrived."""
    arrived = []
    for code in codes:
        with graph.inserting_before(first):
            node = graph.placeholder(code.name)
        node.meta = {k: v for k, v in first.meta.items() if k not in ("val", "tensor_meta")}
        node.meta["val"] = value(code)
        arrived.append(node)
    return arrived


def _decode(
    module: fx.GraphModule,
    x: fx.Node,
    shown: Sequence[tuple[fx.Node, fx.Node]],
    codes: Sequence[fx.Node],
    layout: Layout,
    storage: Storage,
    inserted: set[fx.Node],
    traces: dict[Any, fx.GraphModule],
) -> None:
    """Decode in front of the first use: inside the kernel that uses it, or where several kernels or a library's read it, once.
    shown: (input of the backward to replace, the view of ``x`` that it is)."""
    codec, dtype = QUANTIZERS[storage.codec], value(x).dtype

    def decode(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor]:
        seen = layout.seen_from(codes)
        shape = seen.shape if seen.groups.padding else seen.groups.shape
        return (codec.decode(codes, scale, seen.groups, shape, dtype, rotate=storage.rotate),)

    def unflatten(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(layout.seen_from(x).shape).permute(layout.inverse)

    first = min(user for placeholder, _ in shown for user in placeholder.users)
    where: dict[str, Any] = {"after": first.prev, "like": first, "inserted": inserted, "traces": traces}
    key = ("decode", *_signature(x, layout, storage), layout.groups.padding and layout.shape)
    if all(_is_read_by_one_kernel(placeholder) for placeholder, _ in shown):
        (flat,) = splice(module.graph, decode, codes, key=key, **where)
    else:
        (flat,) = call(module, decode, codes, key=key, **where)
    decoded = splice(module.graph, unflatten, [flat], key=("unflatten", str(layout)), **where)
    for placeholder, view in shown:
        placeholder.replace_all_uses_with(views(module.graph, view, x, decoded, inserted))
        module.graph.erase_node(placeholder)


def _is_read_by_one_kernel(tensor: fx.Node) -> bool:
    """Whether all that reads ``tensor`` is pointwise, and no row of what comes of it is reduced: a norm's backward reads its
    input in several loops, and a library's kernel reads it from memory."""
    todo = [user for user, _ in consumers(tensor)]
    if not all(map(is_pointwise, todo)):
        return False
    seen = set(todo)
    while todo:
        for user in todo.pop().users:
            if is_reduced_by_row(user):
                return False
            if is_pointwise(user) and user not in seen:
                seen.add(user)
                todo.append(user)
    return True


def views(graph: fx.Graph, view: fx.Node, x: fx.Node, new: fx.Node, inserted: set[fx.Node]) -> fx.Node:
    """The chain of views that leads from ``x`` to ``view``, again from ``new``."""
    chain = []
    while view is not x:
        chain.append(view)
        view = view.all_input_nodes[0]
    environment = {x: new}
    for node in reversed(chain):
        with graph.inserting_after(new):
            new = graph.node_copy(node, lambda n: environment[n])
        environment[node] = new
        inserted.add(new)
    return new


def return_payloads(graph: fx.Graph, num_fwd_outputs: int, payloads: dict[str, tuple[fx.Node, ...]]) -> None:
    """Let the forward return codes where it returned the tensors."""
    (out,) = graph.find_nodes(op="output")
    outputs = list(out.args[0])
    descriptions = list(out.meta.get("desc") or [None] * len(outputs))
    new, described = outputs[:num_fwd_outputs], descriptions[:num_fwd_outputs]
    for node, description in zip(outputs[num_fwd_outputs:], descriptions[num_fwd_outputs:], strict=True):
        mine = payloads.get(node.name, (node,)) if isinstance(node, fx.Node) else (node,)
        new.extend(mine)
        described.extend(description for _ in mine)
    out.args = (type(out.args[0])(new),)
    if "desc" in out.meta:
        out.meta["desc"] = described
