"""Live bytes over a training step, as few plain numbers: what a picture of it is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actpass.memory.footprint import levels_below

POINTS = 120
"""The most points that a curve has for one pass of one region."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Bytes of one call of a region above what was there before its forward, at equal steps of each pass. held: what stays when
    the forward is done, until the backward is (kept for it, or returned to the caller); it is contained in ``backward``.
    gradients, passed, tangents: see `actpass.memory.footprint.Call`. The maxima of both passes are those of the region's
    `Footprint`."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    held: int
    gradients: int
    passed: int
    tangents: int


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor that is in memory at a peak. what: the kind of tensor it is, in words. module: path of the module (of a
    parameter's gradient: of the parameter) that it belongs to; empty if the graph has none."""

    what: str
    module: str
    nbytes: int

    def __str__(self) -> str:
        return f"{self.what} {self.module}".strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """A tensor of one call of a region. what, module: see `Held`. op: the operator that makes it. It is in memory from step
    ``start`` until before step ``end`` (the steps of the backward count on from those of the forward); None: when the backward
    is done, too, as gradients are."""

    what: str
    module: str
    op: str
    nbytes: int
    start: int
    end: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """When the tensors of a region are in memory, as planned. forward_steps, backward_steps: kernels of each pass.
    forward_peak, backward_peak: the steps at which each takes most. least_bytes: what is smaller is not in ``tensors``."""

    forward_steps: int
    backward_steps: int
    forward_peak: int
    backward_peak: int
    least_bytes: int
    tensors: tuple[Lifetime, ...]


@dataclass(frozen=True, slots=True)
class Curves:
    """A region's curves: as planned, as Inductor's default, and in eager mode (None: not known). at_forward_peak,
    at_backward_peak: the largest of what is in memory at the peak of each pass of the plan, the largest first. lifetimes: of
    all that is not small, under the plan."""

    plan: Curve
    default: Curve
    lifetimes: Lifetimes
    eager: Curve | None = None
    at_forward_peak: tuple[Held, ...] = ()
    at_backward_peak: tuple[Held, ...] = ()


@dataclass(frozen=True, slots=True)
class Peak:
    """Where a step's curve is highest. call: which of its regions runs then. backward: in which pass."""

    position: float
    nbytes: int
    call: int
    backward: bool


@dataclass(frozen=True)
class StepCurve:
    """positions: the share of the step, forwards in [0, 1] and backwards in [1, 2]; nbytes: in use there."""

    positions: tuple[float, ...]
    nbytes: tuple[int, ...]
    peak: Peak


def stretches(count: int, most: int = POINTS) -> list[tuple[int, int]]:
    """The (start, end) of each stretch that `thin` makes one point of."""
    points = min(count, most)
    return [(count * i // points, count * (i + 1) // points) for i in range(points)]


def thin(levels: Sequence[int], most: int = POINTS) -> tuple[int, ...]:
    """At most ``most`` of ``levels``: the maximum of each of as many equal stretches, so that no peak is lost."""
    return tuple(max(levels[a:b]) for a, b in stretches(len(levels), most))


def step_curve(calls: Sequence[Curve], shares: Sequence[int]) -> StepCurve:
    """The curve of a step that runs the forwards of ``calls`` in order and then their backwards in reverse order. Its maximum
    is `actpass.memory.footprint.step_peak` of their footprints.

    shares: how wide each call is drawn, in proportion; the same for every curve that is to be compared.
    """
    width = max(sum(shares), 1)
    positions: list[float] = []
    nbytes: list[int] = []
    peaks: list[Peak] = []

    def run(i: int, below: int, levels: tuple[int, ...], start: float, backward: bool) -> None:
        at = [start + shares[i] / width * (k + 0.5) / len(levels) for k in range(len(levels))]
        positions.extend(at)
        nbytes.extend(below + level for level in levels)
        peaks.extend(Peak(x, below + level, i, backward) for x, level in zip(at, levels, strict=True))

    forwards, backwards = levels_below(calls)
    start = 0.0
    for i, call in enumerate(calls):
        run(i, forwards[i], call.forward, start, backward=False)
        start += shares[i] / width
    start = 1.0
    for i, call in reversed(list(enumerate(calls))):
        run(i, backwards[i], call.backward, start, backward=True)
        start += shares[i] / width
    highest = max(peaks, key=lambda p: p.nbytes, default=Peak(0.0, 0, 0, backward=False))
    return StepCurve(tuple(positions), tuple(nbytes), highest)
