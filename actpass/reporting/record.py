"""One region's record: plain data that is written when the region is compiled, kept beside Inductor's cache, and read back
on a cache hit, when neither the pass nor the partitioner runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from actpass.analysis.linearity import Use
from actpass.memory.footprint import Footprint
from actpass.memory.memory_curve import Curve, Curves, Held, Lifetime, Lifetimes
from actpass.plan.multi_region import OperatingPoint
from actpass.plan.pareto import Point, Tradeoff
from actpass.torch_compat import Sizes

T = TypeVar("T")

SCHEMA_VERSION = 8


@dataclass(frozen=True, slots=True)
class SiteRow:
    """A tensor that Inductor's default saves, or that is saved now, or that a weight gradient reads.

    form: ``save`` (stored as it is), ``quantize`` (stored in few bits), ``recompute`` (not stored, recomputed from what is),
    ``project`` (its projection is stored), ``chunk`` (never formed whole), ``input`` (an input of the region, never saved),
    ``state`` (a basis or the seed). projection, rank: how the weight gradients that read it are formed; None: exactly. codec:
    the low-bit form in which it (or its projection) is stored. bytes_before: under Inductor's default cut. bytes_after:
    now. unbiased: whether the expected gradient is the exact one. relative_variance: of each weight gradient's estimate, in
    closed form; 0 if exact. extra_flops: in the backward's matmuls against exact weight gradients (negative: saved). decoded:
    the name, rank and width of the projection that is stored and that the backward rebuilds it from, for whatever use. wgrad:
    ``fp8``: the weight gradients that read it are matmuls of codes.
    """

    name: str
    module: str
    source: str
    op: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    uses: tuple[Use, ...]
    form: str
    projection: str | None
    rank: int | None
    codec: str | None
    bytes_before: int
    bytes_after: int
    unbiased: bool
    relative_variance: float
    extra_flops: int
    reason: str
    parameters: tuple[str, ...] = ()
    decoded: str | None = None
    wgrad: str | None = None

    @property
    def stored_as(self) -> str:
        """The form with its details."""
        return " ".join(filter(None, (self.form, self.decoded, self.codec)))


@dataclass(frozen=True, slots=True)
class Totals:
    """saved_bytes, saved_bytes_default, saved_bytes_eager: from forward to backward, parameters and inputs excluded: now, as
    Inductor's default, and in eager mode (None where it was not measured). backward_matmul_flops, .._default: of all matmuls
    of the backward, fused attention not counted. extra_matmuls, extra_attention: that the backward recomputes, which the
    forward has computed. peak_bytes, peak_bytes_default: predicted, of a forward and its backward above parameters and
    optimizer state, now and as Inductor's default; None where it is not known. resident_bytes: of parameters, inputs and
    optimizer state; scratch_bytes: what an optimizer's step takes beside all gradients; counted where a budget of peak bytes
    asks for them. traffic_bytes, traffic_bytes_default: predicted, that loops read and write in a forward and its backward
    (what matmuls and fused attention move is not counted), now and as Inductor's default; kernels, kernels_default: that are
    launched."""

    saved_bytes_eager: int | None
    saved_bytes_default: int
    saved_bytes: int
    backward_matmul_flops_default: int
    backward_matmul_flops: int
    extra_matmuls: int
    extra_attention: int
    peak_bytes_default: int | None = None
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    scratch_bytes: int | None = None
    traffic_bytes_default: int = 0
    traffic_bytes: int = 0
    kernels_default: int = 0
    kernels: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """active: whether the pass decided this region. inactive_because: why not. notes: what the user should know.
    rejected: (matmul, parameter, reason) for every weight gradient that is no site. footprint, footprint_default: what it
    takes in memory, as predicted, now and as Inductor's default; None if it is not known. levels: of a part of a step, what it
    could be instead. curves: live bytes over the step. tradeoff: what other budgets would give, where it was asked for.
    whole: why logits that are returned are not deferred; None: they are, or none are returned. limited: whether more room under
    its budget of peak bytes may give another plan. sizes: that change from call to call, and the most that was planned for."""

    active: bool
    inactive_because: str | None
    options: str
    sites: tuple[SiteRow, ...]
    totals: Totals
    plan: dict[str, Any]
    plan_hash: str
    rejected: tuple[tuple[str, str, str], ...] = ()
    notes: tuple[str, ...] = ()
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()
    footprint: Footprint | None = None
    footprint_default: Footprint | None = None
    levels: tuple[OperatingPoint, ...] = ()
    curves: Curves | None = None
    tradeoff: Tradeoff | None = None
    whole: str | None = None
    limited: bool = False
    sizes: Sizes = ()

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """Read what `to_dict` wrote (through JSON, so lists become tuples again)."""
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"record schema {version!r} is not {SCHEMA_VERSION}")
        fields = {k: v for k, v in data.items() if k != "schema_version"}
        fields["sites"] = tuple(
            _read(
                SiteRow,
                s,
                shape=tuple(s["shape"]),
                parameters=tuple(s["parameters"]),
                uses=tuple(Use(**u) for u in s["uses"]),
            )
            for s in fields["sites"]
        )
        fields["totals"] = Totals(**fields["totals"])
        fields["rejected"] = tuple(tuple(x) for x in fields["rejected"])
        fields["notes"] = tuple(fields["notes"])
        fields["sizes"] = tuple(tuple(x) for x in fields["sizes"])
        fields["levels"] = tuple(_read(OperatingPoint, x, footprint=Footprint(**x["footprint"])) for x in fields["levels"])
        for name in ("footprint", "footprint_default"):
            fields[name] = Footprint(**fields[name]) if fields[name] is not None else None
        fields["parameters"] = tuple((path, tuple(shape)) for path, shape in fields["parameters"])
        fields["curves"] = _curves_from(fields["curves"])
        fields["tradeoff"] = _tradeoff_from(fields["tradeoff"])
        return cls(**fields)


def _read(kind: Callable[..., T], data: Mapping[str, Any], **fields: Any) -> T:
    """``kind`` of ``data``, with ``fields`` in place of what JSON has of them."""
    return kind(**{**data, **fields})


def _curves_from(data: dict[str, Any] | None) -> Curves | None:
    if data is None:
        return None
    found: dict[str, Any] = {}
    for name in ("plan", "default", "eager"):
        d = data[name]
        found[name] = _read(Curve, d, forward=tuple(d["forward"]), backward=tuple(d["backward"])) if d else None
    for name in ("at_forward_peak", "at_backward_peak"):
        found[name] = tuple(Held(**h) for h in data[name])
    lives = data["lifetimes"]
    found["lifetimes"] = _read(Lifetimes, lives, tensors=tuple(Lifetime(**t) for t in lives["tensors"]))
    return Curves(**found)


def _tradeoff_from(data: dict[str, Any] | None) -> Tradeoff | None:
    if data is None:
        return None
    points = {name: tuple(Point(**p) for p in data[name]) for name in ("stock", "ours")}
    return _read(Tradeoff, data, **points, chosen=Point(**data["chosen"]))
