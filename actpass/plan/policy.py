"""A policy is one function (candidates, wishes) -> Plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from actpass.plan.types import Candidate, Decision, Plan

KEPT = "kept exact, as asked"


class Wish(Protocol):
    """What the user asked for one tensor (`config.Treatment`)."""

    @property
    def method(self) -> str: ...
    @property
    def scale(self) -> str: ...
    def rank_of(self, width: int) -> int: ...


def choose(
    candidates: Iterable[Candidate], wish_for: Callable[[tuple[str, ...]], Wish], *, profitable_only: bool = True
) -> Plan:
    """Follow the wishes, and leave a tensor exact where its projection would cost FLOPs and free no bytes.

    wish_for: the wish for a tensor that feeds the parameters of the given paths.
    """
    wishes = [(c, wish_for(c.parameters)) for c in candidates]
    by_root: dict[str, list[tuple[Candidate, Wish]]] = {}
    for c, wish in wishes:
        by_root.setdefault(c.root, []).append((c, wish))
    freed = {root: _freed_bytes(members) for root, members in by_root.items()}
    return Plan(tuple(_decide(c, wish, freed[c.root], profitable_only) for c, wish in wishes))


def _freed_bytes(members: list[tuple[Candidate, Wish]]) -> int:
    """Bytes that go if the payloads of all ``members`` are stored in place of the storage that they share; 0 if it stays."""
    if not all(c.frees and wish.method != "exact" for c, wish in members):
        return 0
    payloads = sum(c.payload_bytes(_rank(c, wish)) for c, wish in members)
    return max(0, members[0][0].x_bytes - payloads)


def _rank(c: Candidate, wish: Wish) -> int:
    return min(c.width, -(-wish.rank_of(c.width) // c.rank_multiple) * c.rank_multiple)


def _decide(c: Candidate, wish: Wish, freed: int, profitable_only: bool) -> Decision:
    def exact(reason: str) -> Decision:
        return Decision(c.name, c.matmuls, c.parameters, "exact", reason)

    if wish.method == "exact":
        return exact(KEPT)
    rank = _rank(c, wish)
    extra = c.flops_at(rank) - c.flops
    if profitable_only and extra >= 0 and not freed:
        cost = f"{extra / max(c.flops, 1):+.0%} FLOPs"
        return exact(f"{wish.method} at rank {rank} of {c.width} would cost {cost} and free no bytes")
    return Decision(
        c.name,
        c.matmuls,
        c.parameters,
        wish.method,
        f"z is stored in place of x: {freed} bytes freed" if freed else "projected in the backward, where x is at no cost",
        width=c.width,
        rank=rank,
        scale=wish.scale,
        project_in="forward" if freed else "backward",
        extra_flops=extra,
    )
