"""Which tensors are projected, and at which rank, and which are cast to 8 bits for their weight gradients: (facts, wishes) ->
decisions of a Plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from actpass.plan.plan import EXPONENTIAL, RECOMPUTED_SCORE, SCORE, Candidate, Decision, Plan, SavedTensor
from actpass.plan.rank_allocation import RankSite
from actpass.plan.request import KEPT, RequestFor, TensorRequest

CAST_IN_BACKWARD = "cast to fp8 in the backward, where x is at no cost: it is rebuilt, an input, or stored for other uses"
Ranks = Mapping[str, int]
"""Ranks that a budget gave, by `Candidate.key`."""


def choose(
    candidates: Iterable[Candidate], request_for: RequestFor, *, skip_unprofitable: bool = True, ranks: Ranks | None = None
) -> Plan:
    """Follow the wishes, and leave a tensor exact where its projection would cost FLOPs and free no bytes.

    ranks: for those of `rank_sites`. None: there is no limit, and what takes its rank from a budget stays exact.
    """
    requests = [(c, request_for(c.parameters)) for c in candidates]
    by_root: dict[str, list[tuple[Candidate, TensorRequest]]] = {}
    for c, request in requests:
        by_root.setdefault(c.base, []).append((c, request))
    freed = {base: _freed_bytes(members, ranks) for base, members in by_root.items()}
    return Plan(tuple(_decide(c, request, freed[c.base], skip_unprofitable, ranks) for c, request in requests))


def rank_sites(
    candidates: Sequence[Candidate],
    request_for: RequestFor,
    weights: Mapping[str, float] | None = None,
    residual_energies: Mapping[str, float] | None = None,
) -> dict[str, RankSite]:
    """The candidates whose rank a budget decides, by their key: those whose projection is stored in place of x.

    weights: by path of a parameter, how much the squared relative error of its gradient weighs; for all, where measured.
    Without: its number of elements. An optimizer like Adam gives every coordinate the same step whatever its gradient's size,
    so a relative error of a gradient is a relative error of the step of all its coordinates, and the sum over the layers is
    the share of the whole step that is noise. Of the size of a gradient, which a plan can't know, it asks nothing. (Ranks as
    a share of the width then go with the square root of the out-features that read x, where layers have equally many tokens.)
    residual_energies: by path, the energy of x beyond the principal directions of a learned subspace, as far as one was
    measured; 1 for all others, which says the same of all.
    """
    requests = {c.key: request_for(c.parameters) for c in candidates}
    exact = {c.base for c in candidates if not c.frees or not _is_projected(c, requests[c.key])}
    found = [c for c in candidates if c.base not in exact and requests[c.key].ranks_from_budget]
    return {c.key: _rank_site(c, requests[c.key], _weight(c, weights) * _tail(c, residual_energies)) for c in found}


def noise(
    candidates: Sequence[Candidate],
    request_for: RequestFor,
    sites: Mapping[str, RankSite],
    ranks: Ranks,
    weights: Mapping[str, float] | None = None,
    residual_energies: Mapping[str, float] | None = None,
) -> float:
    """Expected squared relative error of the gradients of ``candidates`` when ``sites`` of them have ``ranks``: the mean of
    all, each by its weight (see `rank_sites`). A site at its largest rank has none: x is kept."""
    projected = [c for c in candidates if c.key in sites and ranks[c.key] < sites[c.key].most]
    error = math.fsum(
        _weight(c, weights) * _tail(c, residual_energies) * request_for(c.parameters).relative_variance(c.width, ranks[c.key])
        for c in projected
    )
    return error / max(math.fsum(_weight(c, weights) for c in candidates), 1.0)


def _weight(c: Candidate, weights: Mapping[str, float] | None) -> float:
    return float(c.weight_elements) if weights is None else math.fsum(weights[p] for p in c.parameters)


def _tail(c: Candidate, residual_energies: Mapping[str, float] | None) -> float:
    return (residual_energies or {}).get(min(c.parameters), 1.0)


def _rank_site(c: Candidate, request: TensorRequest, weight: float) -> RankSite:
    numerator = 4 * (request.relative_variance(c.width, 2) - request.relative_variance(c.width, 4))  # a of a / r - b
    most = max(1, min(c.width, c.x_bytes // c.payload_bytes(1)))  # there x takes no more
    direction = request.bytes_of_direction(c.groups * c.tokens, c.element_size)
    return RankSite(weight * numerator, direction, most, c.rank_multiple)


def _freed_bytes(members: list[tuple[Candidate, TensorRequest]], ranks: Ranks | None) -> int:
    """Bytes that go if the payloads of all ``members`` are stored in place of the storage that they share, less what their
    learned subspaces take; 0 if it stays, or if nothing is gained."""
    if not all(c.frees and (_is_projected(c, request) or why_not_fp8(c, request) is None) for c, request in members):
        return 0
    if ranks is None and any(request.ranks_from_budget for _, request in members):
        return 0
    return max(0, members[0][0].x_bytes - sum(_payload_bytes(c, request, ranks) for c, request in members))


def _payload_bytes(c: Candidate, request: TensorRequest, ranks: Ranks | None) -> int:
    if request.wgrad is not None:
        return c.fp8_bytes
    rank = _rank(c, request, ranks)
    return c.payload_bytes(rank) + request.state_bytes(c.width, rank)


def why_not_fp8(c: Candidate, request: TensorRequest) -> str | None:
    """Why the weight gradients of ``c`` are not formed of codes in 8 bits; None: they are."""
    if request.wgrad is None:
        return KEPT
    if c.narrow and not request.forced:
        return f"not in fp8: a weight of {c.width} x {max(c.outs)} is narrow beside the others, and casting costs more"
    return f"not in fp8: {c.fp8_obstacle}" if c.fp8_obstacle is not None else None


def _is_projected(c: Candidate, request: TensorRequest) -> bool:
    return request.projection is not None and (request.forced or request.ranks_from_budget or not c.narrow)


def _rank(c: Candidate, request: TensorRequest, ranks: Ranks | None) -> int:
    if request.ranks_from_budget:
        return (ranks or {}).get(c.key, c.width)
    return min(c.width, -(-request.rank_of(c.width) // c.rank_multiple) * c.rank_multiple)


def _decide(c: Candidate, request: TensorRequest, freed: int, skip_unprofitable: bool, ranks: Ranks | None) -> Decision:
    def exact(reason: str) -> Decision:
        return Decision(c.name, c.matmuls, c.parameters, None, reason)

    if request.wgrad is not None:
        why_not = why_not_fp8(c, request)
        return exact(why_not) if why_not is not None else _from_codes(c, request, freed)
    if request.projection is None:
        return exact(KEPT)
    if not _is_projected(c, request):
        return exact(f"a weight of {c.width} x {max(c.outs)}, whose gradient has no more directions: narrow beside the others")
    if request.ranks_from_budget and not freed:
        return exact(_why_no_rank(c, ranks))
    rank = _rank(c, request, ranks)
    extra = c.flops_at(rank) - c.flops
    if skip_unprofitable and extra >= 0 and not freed:
        state = request.state_bytes(c.width, rank)
        cost = f"{extra / max(c.flops, 1):+.0%} FLOPs" + (f" and {state} bytes of its subspace" if state else "")
        return exact(f"{request.projection} at rank {rank} of {c.width} would cost {cost} and free no bytes")
    return Decision(
        c.name,
        c.matmuls,
        c.parameters,
        request.projection,
        f"z is stored in place of x: {freed} bytes freed" if freed else "projected in the backward, where x is at no cost",
        width=c.width,
        rank=rank,
        projection_scaling=request.projection_scaling,
        project_in="forward" if freed else "backward",
        extra_flops=extra,
    )


def _from_codes(c: Candidate, request: TensorRequest, freed: int) -> Decision:
    return Decision(
        c.name,
        c.matmuls,
        c.parameters,
        None,
        f"its codes in fp8 are stored in place of x: {freed} bytes freed" if freed else CAST_IN_BACKWARD,
        width=c.width,
        project_in="forward" if freed else "backward",
        wgrad=request.wgrad,
        rounding="nearest" if request.rounding == "nearest" else "stochastic",
    )


def _why_no_rank(c: Candidate, ranks: Ranks | None) -> str:
    if ranks is None or c.key in ranks:
        return "within the budget as it is"
    if not c.x_bytes:
        return "no bytes to gain: x is not stored, but rebuilt or an input"
    if not c.frees:
        return "no bytes to gain: x is stored for other uses as well"
    return "no bytes to gain: another weight gradient that reads x is formed exactly"


def choose_decoded(
    tensors: Iterable[SavedTensor], owners: Mapping[str, str], request_for: RequestFor, *, skip_unprofitable: bool = True
) -> tuple[Decision, ...]:
    """Which of ``tensors`` are stored as a projection that the backward decodes, whatever it does with them. owners: by node,
    the parameter that its subspace belongs to, where its last axis is one of features.

    What is in the way of fewer bits is in the way here; queries, keys, values and outputs of fused attention stay (the paper's
    choice, see `CodecSet`), and what only weight gradients read is contracted or nothing.
    """
    requests = [(t, request_for(t.paths)) for t in tensors if t.obstacle is None and t.kinds and t.kinds != ("contraction",)]
    asked = [(t, request) for t, request in requests if request.projects_activations]
    return tuple(_decoded(t, owners.get(t.node), request, skip_unprofitable) for t, request in asked)


def _decoded(t: SavedTensor, owner: str | None, request: TensorRequest, skip_unprofitable: bool) -> Decision:
    def exact(reason: str) -> Decision:
        return Decision(t.node, (), (owner,) if owner is not None else (), None, reason)

    if t.role is not None or {SCORE, RECOMPUTED_SCORE} & set(t.kinds):
        return exact("not decoded from a projection: fused attention reads it")
    if EXPONENTIAL in t.kinds:
        return exact("not decoded from a projection: exponentiated in the backward, where its error becomes a factor")
    if owner is None:
        return exact("not decoded from a projection: its last axis is none that a weight of its module has")
    width = t.shape[-1]
    rank, projection = request.activation_rank_of(width), request.projection
    payload, state = t.nbytes * rank // width, request.state_bytes(width, rank)
    if projection is None or payload >= t.nbytes or (skip_unprofitable and payload + state >= t.nbytes):
        return exact(f"its projection at rank {rank} of {width} would take {payload} bytes and its subspace {state}")
    return Decision(
        t.node,
        (),
        (owner,),
        projection,
        f"decoded from its projection: {t.nbytes - payload} bytes freed; uses: {', '.join(t.kinds)}",
        width=width,
        rank=rank,
        project_in="forward",
        extra_flops=4 * t.elements * rank,
        linear=t.linear,
    )
