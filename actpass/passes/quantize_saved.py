"""Store what crosses the cut in few bits: the forward returns the codes, the backward decodes them before their first use.

Works on the two graphs that upstream's partitioner made. Only what is saved is touched: the forward's own outputs read
nothing that is inserted here.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from actpass.analysis.linearity import consumers
from actpass.analysis.saved_tensors import is_on_gpu, is_read_by_loops
from actpass.codecs import QUANTIZERS, Groups
from actpass.codecs.generator import rounding_keys, rounding_noise, rounding_part
from actpass.errors import GraphUnsupported
from actpass.ir.joint_graph import value
from actpass.ir.op_queries import is_pointwise, is_reduced_by_row
from actpass.passes.base import RegionState
from actpass.passes.boundary import Boundary, check_outputs
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


@dataclass(frozen=True)
class QuantizeSaved:
    name: str = "quantize_saved"
    serves: str | None = "low-bit forms"

    def run(self, state: RegionState) -> RegionState:
        cut = state.partitioned
        storages, notes = state.decides.decide_storages(state)
        state = replace(state, plan=replace(state.plan, storages=storages), notes=(*state.notes, *notes), uncoded=cut)
        if not state.plan.coded:
            return state
        coding = _Coding(Boundary(cut, state.count))
        noise = coding.noise(cut.seeds[0] if cut.seeds else None, state.plan.coded)
        for storage in state.plan.coded:
            coding.store(storage, noise.get(storage, ()))
        inserted = state.inserted | coding.boundary.forward.inserted
        return replace(state, cut=coding.boundary.close(), inserted=inserted)

    def check(self, before: RegionState, after: RegionState) -> None:
        """The forward's own outputs read no inserted node and are the same nodes; no coded memory crosses as it was; and what
        crosses has the bytes that the plan says."""
        if not after.plan.coded:
            return
        cut, coded_cut, storages = before.partitioned, after.partitioned, after.plan.storages
        check_outputs(cut, coded_cut, after.inserted, frozenset(), after.count)
        coded = {s.base for s in storages if s.coded}
        left = {s.base for s in storages if not s.coded}
        both = {s.base for s in coded_cut.saved} & (coded - left)
        if both:
            raise AssertionError(f"{min(both)} still crosses, beside its codes")
        planned = sum(s.stored_bytes for s in storages) + sum(s.nbytes for s in cut.saved if s.base in cut.seeds)
        if coded_cut.saved_bytes != planned:
            raise AssertionError(f"{coded_cut.saved_bytes} bytes cross, not the {planned} that the plan says")


@dataclass(frozen=True)
class _Coding:
    boundary: Boundary

    def noise(self, seed: str | None, storages: tuple[Storage, ...]) -> dict[Storage, tuple[fx.Node, ...]]:
        """For each tensor that is rounded stochastically what its random numbers come from. On a CPU a key, from which the
        function that is called draws them. On a GPU those of its rows and of its columns, drawn in one kernel for all tensors
        of as many rows; each has its own of both: what reads one table is fused, and would keep the tensors of one layer
        until another's are coded. seed: the node of the step's."""
        drawn = [s for s in storages if s.rounding == "stochastic"]
        if not drawn:
            return {}
        node = self.boundary.before.get(seed) if seed is not None else None
        if node is None:
            raise GraphUnsupported("the step's seed did not arrive in the forward graph")
        called: list[Storage] = []
        by_rows: dict[str, list[Storage]] = defaultdict(list)
        for s in drawn:
            in_line = is_on_gpu(self.boundary.before[s.node])
            (by_rows[str(self._layout(s).groups.rows)] if in_line else called).append(s)
        found: dict[Storage, tuple[fx.Node, ...]] = {}
        if called:
            found |= {s: (key,) for s, key in zip(called, self._keys(node, len(called), _draw_of(storages)), strict=True)}
        for i, members in enumerate(by_rows.values()):
            found |= dict(zip(members, self._numbers(node, members, (i << 32) + _draw_of(storages)), strict=True))
        return found

    def _keys(self, seed: fx.Node, count: int, draw: int) -> tuple[fx.Node, ...]:
        def keys(seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return rounding_keys(rounding_part(seed), count, draw).unbind()

        return self.boundary.forward.splice(keys, [seed], after=seed, like=seed)

    def _numbers(self, seed: fx.Node, storages: Sequence[Storage], draw: int) -> list[tuple[fx.Node, ...]]:
        """Of the rows and of the columns of each of ``storages``, which have as many rows."""
        first = min(storages, key=lambda s: self.boundary.before[s.node])
        x, layout = self.boundary.before[first.node], self._layout(first)
        widths = [self._layout(s).groups.columns for s in storages]

        def numbers(seed: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            lengths = [*widths, *[layout.seen_from(x).groups.rows] * len(widths)]
            return rounding_noise(rounding_part(seed), lengths, draw)

        drawn = self.boundary.forward.splice(numbers, [seed, x], after=x, like=seed)
        return list(zip(drawn[len(widths) :], drawn[: len(widths)], strict=True))

    def _layout(self, storage: Storage) -> Layout:
        layout = layout_of(value(self.boundary.before[storage.node]), storage.codec, storage.group_size)
        if layout is None:
            raise GraphUnsupported(f"{storage.node} can't be divided into groups at symbolic sizes")
        return layout

    def store(self, storage: Storage, noise: tuple[fx.Node, ...]) -> None:
        x, layout = self.boundary.before[storage.node], self._layout(storage)
        codes = self._encode(x, noise, layout, storage)
        arrived = self.boundary.send(storage.saved_for_backward, codes)
        self.boundary.show(storage.saved_for_backward, x, self._decode(x, arrived, layout, storage))

    def _encode(self, x: fx.Node, noise: tuple[fx.Node, ...], layout: Layout, storage: Storage) -> tuple[fx.Node, ...]:
        """Encode where ``x`` is made. On a CPU by a function that all tensors of one size share: not fused with what comes
        later, which would keep ``x`` alive until then. On a GPU inside the kernel that makes or reads ``x``, if that is a loop
        over its elements, which saves a read, and a copy where rows are padded."""
        codec, editor = QUANTIZERS[storage.codec], self.boundary.forward

        def flatten(x: torch.Tensor) -> torch.Tensor:
            groups = layout.seen_from(x).groups
            return x.permute(layout.order).reshape(-1 if groups.padding else groups.shape)

        def encode(x: torch.Tensor, *noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            groups = layout.seen_from(x).groups
            drawn = rounding_noise(noise[0], [groups.rows, groups.columns]) if len(noise) == 1 else noise
            return codec.encode(x if is_flat else flatten(x), groups, tuple(drawn) or None, rotate=storage.hadamard_rotation)

        # A view of a tensor in any other order would make Inductor copy what it has not yet decided to keep in that order.
        # Strides are of the key: a part of a wider tensor has gaps between its rows, and is copied where another is viewed.
        is_flat, arrangement = layout.order == tuple(range(len(layout.order))), f"{layout} {tuple(value(x).stride())}"
        insert = editor.splice if is_on_gpu(x) else editor.call
        if is_flat:
            x = editor.splice(flatten, [x], after=x, like=x, key=("flatten", arrangement))
        signature = ("encode", is_flat or arrangement, *_signature(x, layout, storage))
        return insert(encode, [x, *noise], after=x, like=x, key=signature)

    def _decode(self, x: fx.Node, codes: list[fx.Node], layout: Layout, storage: Storage) -> fx.Node:
        """Decode in front of the first use: inside the kernel that uses it, or where several kernels or a library's read it,
        once."""
        codec, dtype, editor = QUANTIZERS[storage.codec], value(x).dtype, self.boundary.backward

        def decode(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor]:
            seen = layout.seen_from(codes)
            shape = seen.shape if seen.groups.padding else seen.groups.shape
            return (codec.decode(codes, scale, seen.groups, shape, dtype, rotate=storage.hadamard_rotation),)

        def unflatten(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(layout.seen_from(x).shape).permute(layout.inverse)

        first = self.boundary.first_reader(storage.saved_for_backward)
        where: dict[str, Any] = {"after": first.prev, "like": first}
        key = ("decode", *_signature(x, layout, storage), layout.groups.padding and layout.shape)
        joins = is_read_by_loops if is_on_gpu(x) else _is_read_by_one_kernel
        inline = all(joins(self.boundary.behind[name]) for name in storage.saved_for_backward)
        (flat,) = (editor.splice if inline else editor.call)(decode, codes, key=key, **where)
        return editor.splice(unflatten, [flat], key=("unflatten", str(layout)), **where)


def _draw_of(storages: Sequence[Storage]) -> int:
    """A number of the region, 32 bits, by what it stores: two regions that are given one seed are rounded apart all the
    same."""
    return zlib.crc32(repr([(s.node, s.module, s.shape, s.codec) for s in storages]).encode())


def _signature(x: fx.Node, layout: Layout, storage: Storage) -> tuple[Any, ...]:
    """All that the traced codec of a tensor depends on."""
    val = value(x)
    return (storage.codec, storage.rounding, storage.hadamard_rotation, str(layout.groups), val.dtype, val.device)


def _is_read_by_one_kernel(tensor: fx.Node) -> bool:
    """Whether all that reads ``tensor`` is pointwise, and no row of what comes of it is reduced: on a CPU a norm's backward
    reads its input in several loops, and a library's kernel reads it from memory."""
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
