"""The rank of every projection from one capacity of bytes, on plain numbers.

A projection of rank r estimates a weight gradient with relative variance a / r - b, whatever the gradient is (Haar and
signed Hadamard: a = N, b = 1; Gaussian: a = N + 1, b = 0), and what it stores takes c bytes for each direction of rank. With
w for what the error of site i weighs, and e = w a::

    minimise sum e_i / r_i   subject to   sum c_i r_i <= capacity,   L_i <= r_i <= N_i

The problem is convex, and its solution is `continuous`: r_i = min(N_i, max(L_i, sqrt(e_i / (p c_i)))), where p is the price
of a byte in error at which the capacity is used up (the Karush-Kuhn-Tucker conditions: every site that is at no bound gains
as much by its next byte, e_i / (c_i r_i^2) = p). p is found exactly, not by bisection (water filling): the bytes are
piecewise linear in 1 / sqrt(p), with a corner where a site leaves L_i or reaches N_i; between two corners one equation is
left, which is linear.

Kernels want ranks from a grid. `choose_ranks` gives what a greedy ascent from the smallest ranks gives: of all sites take
the step to the next grid rank that reduces the error most per byte, until no site has a step that fits. The closed form
only says where to begin, a few steps below its own ranks. Along one site the gain per byte, e / (c r r'), falls, so:

- the error is above that of the best choice on the grid by less than the gain of one step, the first that did not fit
  (per byte it gains at least what any other choice could with the bytes that were left, and they are fewer than it takes);
- the best choice on the grid, but for one step, is within (r + r')^2 / (4 r r') of the closed form's error: 9/8 below
  rank 64, where the grid is coarsest, 1.013 above;
- a larger capacity never gives a larger error.

At its largest rank a site takes what x takes, and x is kept, without any error. Haar and signed Hadamard have none there
either; a Gaussian has (N + 1) / N, whose end at that last step is not foreseen: with room for most of x, keeping some
tensors and projecting others the more would err less. With these methods nothing here knows of it; the former two err less
at every rank.

Only sums that `math.fsum` rounds once, products, quotients and roots, which IEEE 754 rounds the same everywhere, enter, and
ties are broken by what the sites are, then by position: every process and every rank finds the same.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

_GRID = ((0, 8), (64, 16), (256, 64))
"""From which rank on which multiple: matmuls are slower beside it, and the fewer ranks there are, the fewer bases are drawn."""
_BELOW = 0.4
"""Steps with r r' <= this times the square of the closed form's rank are among the first of the ascent: they gain more than
twice its price per byte, and as r' <= 2 r, all that do together stay below its ranks, and fit. That holds for a half; less,
so that rounding does not matter."""


@dataclass(frozen=True, slots=True, order=True)
class RankSite:
    """One projection whose rank is to be chosen.

    error: e, so that its squared error is e / r. nbytes: c, of one direction of rank. most: the largest rank, at which it
    takes as much as what it stands for. multiple: of what its kernel takes multiples, a power of two.
    """

    error: float
    nbytes: int
    most: int
    multiple: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.error) and self.error >= 0):
            raise ValueError(f"error={self.error} of a site is not usable. Allowed: a finite number, 0 or more.")
        if self.nbytes < 1 or self.most < 1 or self.multiple < 1 or self.multiple & (self.multiple - 1):
            raise ValueError(f"{self} is not usable. Allowed: nbytes and most of 1 or more, a power of two as multiple.")

    @property
    def least(self) -> int:
        """The smallest rank on the grid."""
        return min(self.most, math.lcm(_GRID[0][1], self.multiple))

    def after(self, rank: int) -> int | None:
        """The next larger rank on the grid; None behind the last. The largest is on the grid, whatever it is."""
        if rank >= self.most:
            return None
        for (start, step), end in zip(_GRID, (*(start for start, _ in _GRID[1:]), self.most), strict=True):
            step = math.lcm(step, self.multiple)
            found = max(-(-start // step), rank // step + 1) * step
            if found < end:
                return min(found, self.most)
        return self.most


def bytes_at(sites: Sequence[RankSite], ranks: Sequence[int]) -> int:
    return sum(s.nbytes * r for s, r in zip(sites, ranks, strict=True))


def least_bytes(sites: Sequence[RankSite]) -> int:
    """What the smallest ranks take."""
    return bytes_at(sites, [s.least for s in sites])


def error_at(sites: Sequence[RankSite], ranks: Sequence[float]) -> float:
    return math.fsum(s.error / r for s, r in zip(sites, ranks, strict=True))


def continuous(sites: Sequence[RankSite], capacity: float) -> tuple[float, ...] | None:
    """The best ranks if any number were one, between the smallest of the grid and the largest; None if nothing fits.

    O(n log n). With t = 1 / sqrt(p) and s = sqrt(e / c) a rank is t s within its bounds.
    """
    if least_bytes(sites) > capacity:
        return None
    if bytes_at(sites, [s.most for s in sites]) <= capacity:
        return tuple(float(s.most) for s in sites)
    t = _root_of_inverse_price(sites, capacity)
    return tuple(_clip(s, t) for s in sites)


def _root_of_inverse_price(sites: Sequence[RankSite], capacity: float) -> float:
    """t, at which the ranks take ``capacity`` bytes, or all that any error is left for."""
    speeds = [math.sqrt(s.error / s.nbytes) for s in sites]
    moving = [(s, speed) for s, speed in zip(sites, speeds, strict=True) if speed > 0]
    corners = sorted({bound / speed for s, speed in moving for bound in (s.least, s.most)})
    place = bisect_right(corners, capacity, key=lambda t: math.fsum(s.nbytes * _clip(s, t) for s in sites))
    if place == 0:  # no site has any error
        return 0.0
    corner = corners[place - 1]
    free = [(s, speed) for s, speed in moving if s.least / speed <= corner < s.most / speed]
    slope = math.fsum(s.nbytes * speed for s, speed in free)
    left = capacity - math.fsum(s.nbytes * _clip(s, corner) for s in sites)
    return corner + left / slope if slope > 0 else corner


def _clip(site: RankSite, t: float) -> float:
    return min(float(site.most), max(float(site.least), t * math.sqrt(site.error / site.nbytes)))


def choose_ranks(sites: Sequence[RankSite], capacity: int) -> tuple[int, ...] | None:
    """Ranks on the grid that take at most ``capacity`` bytes, see above; None if even the smallest take more.

    >>> choose_ranks([RankSite(error=4.0, nbytes=1, most=512), RankSite(error=1.0, nbytes=1, most=512)], 192)
    (128, 64)
    """
    start = continuous(sites, capacity)
    if start is None:
        return None
    order = sorted(range(len(sites)), key=lambda i: (sites[i], i))
    ranks = [_beginning(s, r) for s, r in zip(sites, start, strict=True)]
    left = capacity - bytes_at(sites, ranks)
    ascent = [(-_worth(sites[i], ranks[i]), place) for place, i in enumerate(order) if ranks[i] < sites[i].most]
    heapq.heapify(ascent)
    while ascent:
        _, place = heapq.heappop(ascent)
        i = order[place]
        after = sites[i].after(ranks[i])
        assert after is not None
        needed = sites[i].nbytes * (after - ranks[i])
        if needed > left:  # nor does any larger one of this site
            continue
        ranks[i], left = after, left - needed
        if after < sites[i].most:
            heapq.heappush(ascent, (-_worth(sites[i], after), place))
    return tuple(ranks)


def _beginning(site: RankSite, rank: float) -> int:
    """The last rank on the grid whose step is certain to be among the first; ``rank`` is the closed form's."""
    found = site.least
    while (after := site.after(found)) is not None and found * after <= _BELOW * rank * rank:
        found = after
    return found


def _worth(site: RankSite, rank: int) -> float:
    """Gain of the next step per byte."""
    after = site.after(rank)
    return 0.0 if after is None else site.error / (site.nbytes * rank * after)
