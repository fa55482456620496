"""One option from every menu, at the least cost, within a capacity of bytes: the multiple-choice knapsack, on plain integers.

First Lagrangian: a price of a byte makes every menu's choice its own affair, and the price at which the capacity is used up
gives a lower bound and, rounded down, a choice that fits. Then exactly: an option that the bound rules out is struck, and the
menus that still have several are joined one by one, keeping of all partial choices those that no other beats in bytes and in
cost and that the bound allows (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, ch. 11: the dual bound, reduction
and dominance). Costs and bytes are integers and ties are broken by position: every
process and every rank finds the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

_WORK = 100_000
"""Partial choices that the exact part may look at; beyond that it keeps the most promising `_FEW` of each join."""
_FEW = 8


@dataclass(frozen=True, slots=True)
class Option:
    """nbytes: what it takes. cost: what it costs, in the caller's unit."""

    nbytes: int
    cost: int


@dataclass(frozen=True, slots=True)
class Solution:
    """chosen: index of the option taken from each menu. exact: whether it is proved that nothing within the capacity costs
    less; if not, nothing costs less than ``bound``."""

    chosen: tuple[int, ...]
    nbytes: int
    cost: int
    exact: bool
    bound: int


def least_bytes(menus: Sequence[Sequence[Option]]) -> int:
    """The fewest bytes that any choice takes."""
    return sum(min(o.nbytes for o in menu) for menu in menus)


def solve(menus: Sequence[Sequence[Option]], capacity: int) -> Solution | None:
    """The cheapest choice of one option from each menu that takes at most ``capacity`` bytes; None if there is none.

    O(n log n) for the bound; the exact part is bounded by `_WORK`. Raises `ValueError` for a menu without options.
    """
    if any(not menu for menu in menus):
        raise ValueError("a menu has no options: nothing can be chosen from it")
    if least_bytes(menus) > capacity:
        return None
    fronts = [_front(menu) for menu in menus]
    relaxed = _Relaxed.of(menus, fronts, capacity)
    chosen, exact = relaxed.rounded, True
    cost = sum(menus[i][k].cost for i, k in enumerate(chosen))
    gap = cost * relaxed.unit - relaxed.bound
    if gap > 0:
        better, exact = _join(menus, fronts, relaxed, capacity, gap)
        chosen = better or chosen
    options = [menu[k] for menu, k in zip(menus, chosen, strict=True)]
    cost = sum(o.cost for o in options)
    bound = cost if exact else min(cost, -(-relaxed.bound // relaxed.unit))
    return Solution(tuple(chosen), sum(o.nbytes for o in options), cost, exact, bound)


def _front(menu: Sequence[Option]) -> list[int]:
    """The options that no other beats in both, the fewest bytes first."""
    front: list[int] = []
    for k in sorted(range(len(menu)), key=lambda k: (menu[k].nbytes, menu[k].cost, k)):
        if not front or menu[k].cost < menu[front[-1]].cost:
            front.append(k)
    return front


def _hull(menu: Sequence[Option], front: Sequence[int]) -> list[int]:
    """The options of ``front`` that are best at some price of a byte."""
    hull: list[int] = []
    for k in front:
        while len(hull) > 1:
            a, b, c = menu[hull[-2]], menu[hull[-1]], menu[k]
            if (a.cost - b.cost) * (c.nbytes - b.nbytes) > (b.cost - c.cost) * (b.nbytes - a.nbytes):
                break
            hull.pop()
        hull.append(k)
    return hull


@dataclass(frozen=True, slots=True)
class _Relaxed:
    """price / unit: the price of a byte. reduced: for each menu, by how much each option is dearer than its best one at that
    price, times ``unit``. bound: no choice costs less, times ``unit``. rounded: a choice that fits."""

    price: int
    unit: int
    reduced: list[list[int]]
    bound: int
    rounded: list[int]

    @classmethod
    def of(cls, menus: Sequence[Sequence[Option]], fronts: Sequence[Sequence[int]], capacity: int) -> _Relaxed:
        steps: list[tuple[float, int, int, int, int]] = []  # (- gain of a byte, menu, place on its hull, bytes, gain)
        hulls = [_hull(menu, front) for menu, front in zip(menus, fronts, strict=True)]
        for i, (menu, hull) in enumerate(zip(menus, hulls, strict=True)):
            for place, (a, b) in enumerate(itertools.pairwise(hull)):
                more, gain = menu[b].nbytes - menu[a].nbytes, menu[a].cost - menu[b].cost
                steps.append((-gain / more, i, place, more, gain))
        steps.sort()
        at = [0] * len(menus)
        left = capacity - sum(menu[front[0]].nbytes for menu, front in zip(menus, fronts, strict=True))
        price, unit = 0, 1
        for _, i, place, more, gain in steps:
            if at[i] == place and more <= left:
                at[i] += 1
                left -= more
            elif price == 0:
                price, unit = gain, more
        rounded = [hull[place] for hull, place in zip(hulls, at, strict=True)]
        prices = [[o.cost * unit + o.nbytes * price for o in menu] for menu in menus]
        best = [min(p) for p in prices]
        reduced = [[x - b for x in p] for p, b in zip(prices, best, strict=True)]
        return cls(price, unit, reduced, sum(best) - price * capacity, rounded)


def _join(
    menus: Sequence[Sequence[Option]], fronts: Sequence[Sequence[int]], relaxed: _Relaxed, capacity: int, gap: int
) -> tuple[list[int] | None, bool]:
    """A choice that is cheaper than the rounded one, by ``gap`` at most, or None; and whether the search was complete."""
    open_: list[tuple[int, list[int]]] = []
    chosen = [0] * len(menus)
    for i, front in enumerate(fronts):
        kept = [k for k in front if relaxed.reduced[i][k] < gap]
        chosen[i] = kept[0]
        if len(kept) > 1:
            open_.append((i, kept))
    fixed = {i for i, _ in open_}
    room = capacity - sum(menus[i][k].nbytes for i, k in enumerate(chosen) if i not in fixed)
    open_.sort(key=lambda item: (-max(relaxed.reduced[item[0]][k] for k in item[1]), item[0]))
    rest = [0] * (len(open_) + 1)  # the fewest bytes that the menus from here on take
    for j in range(len(open_) - 1, -1, -1):
        i, kept = open_[j]
        rest[j] = rest[j + 1] + min(menus[i][k].nbytes for k in kept)
    states: list[tuple[int, int, int]] = [(0, 0, 0)]  # (bytes, cost, dearer than the bound so far)
    trail: list[list[tuple[int, int]]] = []  # for each join and state: (state before, option)
    work, complete = 0, True
    for j, (i, kept) in enumerate(open_):
        joined: list[tuple[int, int, int, int, int]] = []
        for s, (nbytes, cost, dearer) in enumerate(states):
            for k in kept:
                option, more = menus[i][k], dearer + relaxed.reduced[i][k]
                if more < gap and nbytes + option.nbytes + rest[j + 1] <= room:
                    joined.append((nbytes + option.nbytes, cost + option.cost, more, s, k))
        work += len(joined)
        joined.sort()
        kept_states: list[tuple[int, int, int, int, int]] = []
        for state in joined:
            if not kept_states or state[1] < kept_states[-1][1]:
                kept_states.append(state)
        if work > _WORK and len(kept_states) > _FEW:
            kept_states = sorted(sorted(kept_states, key=lambda s: (s[2], s))[:_FEW])
            complete = False
        states = [(s[0], s[1], s[2]) for s in kept_states]
        trail.append([(s[3], s[4]) for s in kept_states])
        if not states:
            return None, complete
    at = min(range(len(states)), key=lambda s: (states[s][1], states[s][0]))
    for j in range(len(open_) - 1, -1, -1):
        at, k = trail[j][at]
        chosen[open_[j][0]] = k
    if sum(menus[i][k].cost for i, k in enumerate(chosen)) * relaxed.unit - relaxed.bound >= gap:
        return None, complete
    return chosen, complete
