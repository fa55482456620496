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

from actpass._torch import size_hint
from actpass.codecs import QUANTIZERS, Groups
from actpass.codecs.generator import rounding_noise
from actpass.errors import GraphUnsupported
from actpass.graph.copying import copy_module
from actpass.graph.joint import tensor_bytes, value
from actpass.partition import Cut, Saved
from actpass.plan import Storage
from actpass.rewrite import splice


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
    traces: dict[Any, fx.GraphModule] = {}
    noises: dict[Any, tuple[fx.Node, fx.Node]] = {}
    ordinals: dict[int, int] = {}
    seed = before.get(cut.seed or "")
    for storage in storages:
        x = before[storage.node]
        layout = layout_of(value(x), storage.codec, storage.group)
        if layout is None:
            raise GraphUnsupported(f"{storage.node} can't be divided into groups at symbolic sizes")
        ordinal = ordinals[storage.stream] = ordinals.get(storage.stream, -1) + 1
        noise = None
        if storage.rounding == "stochastic":
            noise = _noise(forward.graph, seed, x, layout, ordinal, noises, inserted)
        codes = _encode(forward.graph, x, noise, layout, storage, inserted, traces)
        arrived = _receive(backward.graph, behind[storage.crossing[0]], codes)
        shown = [(behind[name], before[name]) for name in storage.crossing]
        _decode(backward.graph, x, shown, arrived, layout, storage, inserted, traces)
        payloads |= {name: codes if name == storage.crossing[0] else () for name in storage.crossing}
    _return_payloads(forward.graph, num_fwd_outputs, payloads)
    for module in (forward, backward):
        module.graph.lint()
        module.recompile()
    saved = tuple(new for s in cut.saved for new in (map(_saved, payloads[s.name]) if s.name in payloads else [s]))
    return replace(cut, forward=forward, backward=backward, saved=saved), inserted


def _saved(code: fx.Node) -> Saved:
    return Saved(code.name, code.name, code.name, tensor_bytes(code), user_visible=False)


def _noise(
    graph: fx.Graph,
    seed: fx.Node | None,
    x: fx.Node,
    layout: Layout,
    ordinal: int,
    noises: dict[Any, tuple[fx.Node, fx.Node]],
    inserted: set[fx.Node],
) -> tuple[fx.Node, fx.Node]:
    """The random numbers for rounding, shared by the tensors of a shape in a layer. ordinal: of the layer among those that
    repeat; another one has other numbers, in a buffer of its own, so that its kernels are the same code."""
    if seed is None:
        raise GraphUnsupported("the step's seed did not arrive in the forward graph")
    key = (str(layout.groups.rows), layout.groups.columns, ordinal)
    static = isinstance(layout.groups.rows, int)

    def draw(seed: torch.Tensor, *x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = layout.seen_from(x[0]).groups if x else layout.groups
        return rounding_noise(seed, groups.rows, groups.columns, ordinal)

    if key not in noises:
        arguments = [seed] if static else [seed, x]
        noises[key] = splice(graph, draw, arguments, after=seed if static else x, like=seed, inserted=inserted)
    return noises[key]


def _encode(
    graph: fx.Graph,
    x: fx.Node,
    noise: tuple[fx.Node, fx.Node] | None,
    layout: Layout,
    storage: Storage,
    inserted: set[fx.Node],
    traces: dict[Any, fx.GraphModule],
) -> tuple[fx.Node, fx.Node]:
    codec = QUANTIZERS[storage.codec]

    def encode(x: torch.Tensor, *noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = (noise[0], noise[1]) if noise else None
        groups = layout.seen_from(x).groups
        return codec.encode(x.permute(layout.order), groups, numbers, storage.stream, rotate=storage.rotate)

    key = ("encode", *_signature(x, storage))
    return splice(graph, encode, [x, *(noise or ())], after=x, like=x, inserted=inserted, traces=traces, key=key)


def _signature(x: fx.Node, storage: Storage) -> tuple[Any, ...]:
    """All that the traced codec of a tensor depends on."""
    val = value(x)
    how = (storage.codec, storage.group, storage.rounding, storage.rotate, storage.stream)
    return (*how, val.dtype, val.device, str(tuple(val.shape)), str(tuple(val.stride())))


def _receive(graph: fx.Graph, first: fx.Node, codes: Sequence[fx.Node]) -> list[fx.Node]:
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
    graph: fx.Graph,
    x: fx.Node,
    shown: Sequence[tuple[fx.Node, fx.Node]],
    codes: Sequence[fx.Node],
    layout: Layout,
    storage: Storage,
    inserted: set[fx.Node],
    traces: dict[Any, fx.GraphModule],
) -> None:
    """Decode in front of the first use. shown: (input of the backward to replace, the view of ``x`` that it is)."""
    codec, dtype = QUANTIZERS[storage.codec], value(x).dtype

    def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        seen = layout.seen_from(codes)
        stored = codec.decode(codes, scale, seen.groups, seen.shape, dtype, rotate=storage.rotate)
        return stored.permute(layout.inverse)

    first = min(user for placeholder, _ in shown for user in placeholder.users)
    key = ("decode", *_signature(x, storage))
    decoded = splice(graph, decode, codes, after=first.prev, like=first, inserted=inserted, traces=traces, key=key)
    for placeholder, view in shown:
        placeholder.replace_all_uses_with(_views(graph, view, x, decoded, inserted))
        graph.erase_node(placeholder)


def _views(graph: fx.Graph, view: fx.Node, x: fx.Node, new: fx.Node, inserted: set[fx.Node]) -> fx.Node:
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


def _return_payloads(graph: fx.Graph, num_fwd_outputs: int, payloads: dict[str, tuple[fx.Node, ...]]) -> None:
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
