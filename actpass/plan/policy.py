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
    return Plan(tuple(_decide(c, wish_for(c.parameters), profitable_only) for c in candidates))


def _decide(c: Candidate, wish: Wish, profitable_only: bool) -> Decision:
    if wish.method == "exact":
        return Decision(c.name, c.parameters, "exact", KEPT)
    rank = min(c.width, -(-wish.rank_of(c.width) // c.rank_multiple) * c.rank_multiple)
    extra = c.flops_at(rank) - c.flops
    freed = c.x_bytes - c.payload_bytes(rank) if c.frees else 0
    if profitable_only and extra >= 0 and freed <= 0:
        return Decision(
            c.name,
            c.parameters,
            "exact",
            f"{wish.method} at rank {rank} of {c.width} would cost {extra / max(c.flops, 1):+.0%} FLOPs and free no bytes",
        )
    in_forward = freed > 0
    reason = (
        f"z is saved in place of x: {freed} bytes freed"
        if in_forward
        else "projected in the backward, where x is at no cost: saves FLOPs"
    )
    return Decision(
        c.name,
        c.parameters,
        wish.method,
        reason,
        width=c.width,
        rank=rank,
        scale=wish.scale,
        project_in="forward" if in_forward else "backward",
        extra_flops=extra,
    )
