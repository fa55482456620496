"""What a region would give for more or fewer bytes: the points of two curves, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Point:
    """A choice. budget: what was asked for: of Inductor a level of its own, of ours bytes (0: nothing). saved_bytes: what
    crosses from forward to backward. error: predicted squared relative error of the gradients; 0 is exact. extra_flops:
    predicted time beyond that of a step which runs nothing twice, in FLOPs of a matmul."""

    budget: float
    saved_bytes: int
    error: float
    extra_flops: float


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """step_flops: of one step that runs nothing again. elements: of all tensors that are stored, what an error is weighed by
    when regions are added up. early_bytes: of ``ours``, gradients that the forward forms with the loss: no activations, but
    they cross. stock: Inductor's levels of ``activation_memory_budget``. ours: the choices within some capacities of saved
    bytes. chosen: what was compiled."""

    step_flops: int
    elements: int
    early_bytes: int
    stock: tuple[Point, ...]
    ours: tuple[Point, ...]
    chosen: Point


def add_up(regions: Sequence[Tradeoff]) -> Tradeoff:
    """One step of ``regions``, level by level. Raises `ValueError` if they have not as many levels each."""
    elements = sum(t.elements for t in regions)

    def together(points: Sequence[Point], budget: float) -> Point:
        error = sum(p.error * t.elements for p, t in zip(points, regions, strict=True)) / max(elements, 1)
        return Point(budget, sum(p.saved_bytes for p in points), error, sum(p.extra_flops for p in points))

    stock = zip(*(t.stock for t in regions), strict=True)
    ours = zip(*(t.ours for t in regions), strict=True)

    return Tradeoff(
        sum(t.step_flops for t in regions),
        elements,
        sum(t.early_bytes for t in regions),
        tuple(together(points, points[0].budget) for points in stock),
        tuple(together(points, sum(p.budget for p in points)) for points in ours),
        together([t.chosen for t in regions], 0),
    )
