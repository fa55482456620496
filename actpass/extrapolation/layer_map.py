"""Which layer of a few that were traced stands for each of many alike: plain index arithmetic.

Five layers are traced. The first two and the last two of the deep model are the traced ones; every other is a copy of the
traced layer in the middle, both of whose neighbours are layers like itself, so that what it reads and feeds is what a layer
deep inside reads and feeds::

    traced    0  1          2          3    4
    deep      0  1   2  3 ... L-4 L-3  L-2  L-1

What is reckoned with is not an average: every layer of the deep model is there, with its own forms.
"""

from __future__ import annotations

from dataclasses import dataclass

TRACED = 5
"""Layers that are traced; a model with no more is planned as it is."""
MIDDLE = 2


@dataclass(frozen=True, slots=True)
class Fold:
    """layers: how many there are, at least `TRACED`. A layer may be a group of several that repeats."""

    layers: int

    def traced(self, layer: int) -> int:
        """The traced layer that stands for ``layer``."""
        if layer <= MIDDLE:
            return layer
        return max(MIDDLE, layer - self.layers + TRACED)

    def deep(self, traced: int) -> tuple[int, ...]:
        """All layers that ``traced`` stands for."""
        if traced == MIDDLE:
            return tuple(range(MIDDLE, self.layers - MIDDLE))
        return (traced if traced < MIDDLE else traced + self.layers - TRACED,)

    def seen_from(self, layer: int | None, other: int) -> tuple[int, ...]:
        """What the traced layer ``other`` is to whatever reads it in the copy that is ``layer`` (None: outside all layers): its
        neighbour, where the traced two are neighbours; else that end of the model where ``other`` lies."""
        if layer is None:
            return self.deep(other)
        distance = other - self.traced(layer)
        if abs(distance) <= 1:
            return (layer + distance,)
        ends = self.deep(other)
        return (ends[0] if distance < 0 else ends[-1],)
