"""A policy is one function (facts, wishes) -> part of a Plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from actpass.plan.types import EXPONENTIAL, KEEP, SCORE, SCORE_AGAIN, Candidate, Decision, Plan, SavedTensor, Storage

KEPT = "kept exact, as asked"
AUTO = "auto"

AUTO_CODECS = {"contraction": "int4"}
"""Without a budget: the form of a tensor all of whose uses are here; any other takes 8 bits. 4 bits where the error ends in
one weight's gradient; where it goes on into all gradients below, 4 bits cost up to 0.7 % of the loss, even unbiased, and 8
nothing (tools/results/loss-*.json)."""
SCORE_CODECS = {SCORE: "int16", SCORE_AGAIN: "int8"}
"""The form of a query or key, whatever is asked for, unless an override names the module. The backward forms exp(q k -
logsumexp) with the logsumexp of the exact ones: where scores are large (200 on a small pretrained Llama) an error of 8 bits
makes rows sum to 8 in place of 1 and a gradient wrong by its own size, 4 bits by 10^30 times. Where attention is run again
from what was stored, rows sum to one, and 8 bits are as good as anywhere."""


StoredBytes = Callable[[SavedTensor, str, int | None], int | None]
"""(tensor, codec, group size) -> bytes; None if it can't be divided into groups."""


class Wish(Protocol):
    """What the user asked for one tensor (`config.Treatment`)."""

    @property
    def projection(self) -> str | None: ...
    @property
    def codec(self) -> str | None: ...
    @property
    def scale(self) -> str: ...
    @property
    def group(self) -> int | None: ...
    @property
    def rounding(self) -> str: ...
    @property
    def rotate(self) -> bool: ...
    @property
    def named(self) -> bool: ...
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
    if not all(c.frees and wish.projection is not None for c, wish in members):
        return 0
    payloads = sum(c.payload_bytes(_rank(c, wish)) for c, wish in members)
    return max(0, members[0][0].x_bytes - payloads)


def _rank(c: Candidate, wish: Wish) -> int:
    return min(c.width, -(-wish.rank_of(c.width) // c.rank_multiple) * c.rank_multiple)


def _decide(c: Candidate, wish: Wish, freed: int, profitable_only: bool) -> Decision:
    def exact(reason: str) -> Decision:
        return Decision(c.name, c.matmuls, c.parameters, "exact", reason)

    if wish.projection is None:
        return exact(KEPT)
    rank = _rank(c, wish)
    extra = c.flops_at(rank) - c.flops
    if profitable_only and extra >= 0 and not freed:
        cost = f"{extra / max(c.flops, 1):+.0%} FLOPs"
        return exact(f"{wish.projection} at rank {rank} of {c.width} would cost {cost} and free no bytes")
    return Decision(
        c.name,
        c.matmuls,
        c.parameters,
        wish.projection,
        f"z is stored in place of x: {freed} bytes freed" if freed else "projected in the backward, where x is at no cost",
        width=c.width,
        rank=rank,
        scale=wish.scale,
        project_in="forward" if freed else "backward",
        extra_flops=extra,
    )


def choose_storage(
    tensors: Iterable[SavedTensor],
    wish_for: Callable[[tuple[str, ...]], Wish],
    stored_bytes: StoredBytes,
    codecs: Mapping[str, str | None] | None = None,
) -> tuple[Storage, ...]:
    """The form in which everything that crosses is stored: as wished, where that is possible and smaller.

    codecs: by node, what a budget chose for the tensors that ``auto`` decides; None: there is no budget.
    """

    def chosen(t: SavedTensor, wish: Wish) -> str | None:
        if wish.codec != AUTO:
            return wish.codec
        return _auto_codec(t) if codecs is None else codecs.get(t.node)

    return tuple(store(t, wish, stored_bytes, chosen(t, wish)) for t in tensors for wish in (wish_for(t.paths),))


def store(t: SavedTensor, wish: Wish, stored_bytes: StoredBytes, codec: str | None) -> Storage:
    """``t`` in ``codec`` (None: as it is), or what is possible and safe in its place."""

    def keep(reason: str) -> Storage:
        return Storage(t.node, t.crossing, t.root, KEEP, reason, t.nbytes, t.nbytes)

    if t.obstacle is not None:
        return keep(t.obstacle)
    if EXPONENTIAL in t.kinds and wish.codec is not None and not wish.named:
        return keep("exponentiated in the backward, where its error becomes a factor; an override may ask for a form")
    if codec in (None, KEEP):
        return keep("exact, and within the budget" if wish.codec == AUTO else KEPT)
    if not wish.named:
        codec = next((form for kind, form in SCORE_CODECS.items() if kind in t.kinds), codec)
    rounding = wish.rounding if wish.rounding != AUTO else "stochastic" if t.linear else "nearest"
    size = stored_bytes(t, codec, wish.group)
    if size is None:
        return keep("can't be divided into groups at symbolic sizes")
    if size >= t.nbytes:
        return keep(f"would take {size} bytes in {codec}")
    return Storage(
        t.node,
        t.crossing,
        t.root,
        codec,
        f"uses: {', '.join(t.kinds)}",
        t.nbytes,
        size,
        unbiased=t.linear and rounding == "stochastic",
        group=wish.group,
        rounding=rounding,
        rotate=wish.rotate,
    )


def _auto_codec(t: SavedTensor) -> str:
    return "int4" if all(AUTO_CODECS.get(k) == "int4" for k in t.kinds) else "int8"
