"""What FSDP2 (``fully_shard`` on every layer and on the root) makes of a training step's memory, on the rank that holds most.

Parameters, gradients and optimizer state are sharded along axis 0: rank 0 holds ceil(rows / ranks) rows of each parameter.
While a layer runs, its parameters are there whole, and those of the next one arrive; its gradients are whole until the last is
made, then copied into the buffer of the reduce-scatter, which stays until the next layer's is filled. The root's own parameters
(embedding, head) stay whole from the forward to the end of the backward, and so do their gradients from when they are made
(torch 2.13, torch/distributed/fsdp/_fully_shard: `reshard_after_forward` is False for the root).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Unit:
    """The parameters of one ``fully_shard`` call: their shapes, and bytes of an element."""

    shapes: tuple[tuple[int, ...], ...]
    element_size: int

    @property
    def nbytes(self) -> int:
        return self.element_size * sum(map(math.prod, self.shapes))

    @property
    def largest(self) -> int:
        """Bytes of the largest parameter."""
        return self.element_size * max(map(math.prod, self.shapes), default=0)

    def shard(self, ranks: int) -> Unit:
        """What rank 0 holds; with `fully_shard`'s padding the others hold as much."""
        return Unit(tuple((-(-s[0] // ranks), *s[1:]) if s else s for s in self.shapes), self.element_size)

    def padded_bytes(self, ranks: int) -> int:
        """Of what all ranks exchange."""
        return ranks * self.shard(ranks).nbytes


@dataclass(frozen=True, slots=True)
class KernelEvent:
    """While one kernel runs. layer: its layer, None outside of all. level: live bytes above parameters, gradients that were
    made before counted whole. gradients: what it leaves behind for good, by the layer whose it is."""

    layer: int | None
    level: int
    gradients: tuple[tuple[int | None, int], ...] = ()


@dataclass(frozen=True, slots=True)
class RankPeak:
    """Bytes of one rank at its peak. activations: what is saved and what runs. parameters: that are there whole. gradients:
    whole and sharded ones. buffer: of the reduce-scatter."""

    activations: int
    parameters: int
    gradients: int
    buffer: int

    @property
    def total(self) -> int:
        return self.activations + self.parameters + self.gradients + self.buffer


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What an optimizer takes. copies: of every parameter, as its state. scratch: what its step takes for a moment beside all
    gradients: two copies of ``all`` parameters, of the ``largest``, or ``none`` (see `actpass.memory.resident`)."""

    copies: int
    scratch: Literal["all", "largest", "none"]

    def state_bytes(self, parameters: int, count: int) -> int:
        """count: of parameters, each of which has a number of its steps in float32."""
        return self.copies * parameters + (4 * count if self.copies else 0)

    def scratch_bytes(self, parameters: int, largest: int) -> int:
        return 2 * {"all": parameters, "largest": largest, "none": 0}[self.scratch]


@dataclass(frozen=True)
class Sharded:
    """root: parameters outside of all layers. layers: of each layer. ranks: over which they are sharded."""

    root: Unit
    layers: Sequence[Unit]
    ranks: int

    @property
    def units(self) -> list[Unit]:
        return [self.root, *self.layers]

    @property
    def parameters(self) -> int:
        """Bytes of sharded parameters, and of sharded gradients."""
        return sum(u.shard(self.ranks).nbytes for u in self.units)

    @property
    def largest(self) -> int:
        """Bytes of the largest shard of a parameter."""
        return max(u.shard(self.ranks).largest for u in self.units)

    @property
    def count(self) -> int:
        """How many parameters."""
        return sum(len(u.shapes) for u in self.units)

    def whole_parameters(self, layer: int | None, following: int | None) -> int:
        """Unsharded parameters while ``layer`` runs and those of ``following`` arrive."""
        return self.root.nbytes + sum(self.layers[i].nbytes for i in (layer, following) if i is not None)

    def forward_peak(self, moments: Sequence[KernelEvent]) -> RankPeak:
        """Above sharded parameters and optimizer state."""
        last = len(self.layers) - 1
        peaks = (RankPeak(m.level, self.whole_parameters(m.layer, _next(m.layer, 1, last)), 0, 0) for m in moments)
        return max(peaks, key=lambda peak: peak.total)

    def backward_peak(self, moments: Sequence[KernelEvent]) -> RankPeak:
        """Above sharded parameters and optimizer state."""
        last = len(self.layers) - 1
        ends = self._ends(moments)
        peaks: list[RankPeak] = []
        made = sharded = buffer = 0  # gradients as the graph has them; by how much those that were exchanged are smaller
        for i, moment in enumerate(moments):
            made += sum(nbytes for _, nbytes in moment.gradients)
            following = _next(moment.layer, -1, last)
            activations = moment.level - made
            whole = self.whole_parameters(moment.layer, following)
            peaks.append(RankPeak(activations, whole, made - sharded, buffer))
            for unit, gradients in ends.get(i, ()):
                buffer, kept = unit.padded_bytes(self.ranks), unit.shard(self.ranks).nbytes
                whole = 0 if unit is self.root else self.whole_parameters(None, following)  # its own are sharded again
                peaks.append(RankPeak(activations, whole, made - sharded + kept, buffer))
                sharded += gradients - kept
        return max(peaks, key=lambda peak: peak.total)

    def _ends(self, moments: Sequence[KernelEvent]) -> Mapping[int, Sequence[tuple[Unit, int]]]:
        """By moment: the units whose last gradient is made then, and the bytes of all their gradients."""
        totals: dict[int | None, int] = {}
        last: dict[int | None, int] = {}
        for i, moment in enumerate(moments):
            for layer, nbytes in moment.gradients:
                totals[layer] = totals.get(layer, 0) + nbytes
                last[layer] = len(moments) - 1 if layer is None else i  # the root's are exchanged when all is done
        ends: dict[int, list[tuple[Unit, int]]] = {}
        for layer, i in sorted(last.items(), key=lambda item: item[0] is None):
            ends.setdefault(i, []).append((self.root if layer is None else self.layers[layer], totals[layer]))
        return ends


def _next(layer: int | None, step: int, last: int) -> int | None:
    """The layer whose parameters arrive while ``layer`` runs; outside of all layers the first that will run, or the last that
    did."""
    if layer is None:
        return last
    following = layer + step
    return following if 0 <= following <= last else None
