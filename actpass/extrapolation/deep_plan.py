"""The plan of a deep model, as text and as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from actpass._format import table
from actpass.extrapolation.extrapolate import FoldedPlan, LayerKind
from actpass.extrapolation.outcome import UNLIMITED, Outcome
from actpass.memory.footprint import MARGIN
from actpass.planner.peak_budget import PeakBudget
from actpass.reporting.record import SiteRow


@dataclass(frozen=True)
class DeepPlan:
    """What `plan_deep_model` found. outcomes: for one device, then for each rank, if there are several. parameters: how many
    the deep model has. checks: a line an outcome, if a depth was asked for that is traced whole."""

    parameters: int
    outcomes: tuple[Outcome, ...]
    checks: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the budget is met, on one device and on each rank."""
        return not any(o.failed for o in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data. Bytes; layers count from 0."""
        return {"parameters": self.parameters, "outcomes": [_outcome_dict(o) for o in self.outcomes]}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for i, outcome in enumerate(self.outcomes):
            limit = f", memory_budget={outcome.limit.nbytes}" if outcome.limit.nbytes != UNLIMITED else ""
            yield f"== {outcome.where}{limit}"
            yield from _plan_lines(outcome.plan)
            yield from _peak_lines(outcome)
            yield from self.checks[i : i + 1]
            yield ""


def _plan_lines(plan: FoldedPlan) -> Iterator[str]:
    header = ("tensor", "module", "shape", "dtype", "form", "before", "after")
    yield f"plan {plan.plan.hash}; bytes are those of one layer"
    for kind in (*plan.kinds, plan.rest):
        rows = [_cells(row) for row in kind.rows if row.bytes_before or row.bytes_after]
        before, after = sum(r.bytes_before for r in kind.rows), sum(r.bytes_after for r in kind.rows)
        yield f"{_which(kind.layers)}: {_size(before)} -> {_size(after)}"
        yield from (f"  {line}" for line in table([header, *rows]))
        if kind.recompute:
            yield f"  recomputed in the backward: {', '.join(kind.recompute)}"
    yield from (f"note: {note}" for note in plan.notes)
    now, default = plan.cut.saved_bytes, plan.default.saved_bytes
    yield f"saved for backward: Inductor default {_size(default)}, now {_size(now)} ({now / default:.2f})"


def _which(layers: tuple[int, ...]) -> str:
    if not layers:
        return "outside of layers"
    starts = [i for i in layers if i - 1 not in layers]
    ends = [i for i in layers if i + 1 not in layers]
    runs = (f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
    return f"layers {', '.join(runs)} (x{len(layers)})"


def _cells(row: SiteRow) -> tuple[str, ...]:
    form = row.stored_as
    shape = "x".join(map(str, row.shape))
    return row.kind, row.module or "-", shape, row.dtype, form, _size(row.bytes_before), _size(row.bytes_after)


def _peak_lines(outcome: Outcome) -> Iterator[str]:
    yield "predicted peak of a step:"
    yield from (f"  {line}" for line in table([(name, _size(nbytes)) for name, nbytes in outcome.parts.items()]))
    if isinstance(outcome.limit, PeakBudget):
        largest = ", ".join(f"{what} {_size(nbytes)}" for what, nbytes in outcome.plan.cut.largest_at_peak[:6])
        yield f"  largest while forward and backward run, all layers together: {largest}"
    yield f"  to allow for, with a margin of {MARGIN:.0%} for the prediction: {_size(outcome.needs)}"
    if outcome.failed is not None:
        yield f"CAN'T BE MET: {outcome.failed}"


def _outcome_dict(outcome: Outcome) -> dict[str, Any]:
    plan = outcome.plan
    return {
        "where": outcome.where,
        "memory_budget": None if outcome.limit.nbytes == UNLIMITED else outcome.limit.nbytes,
        "met": outcome.failed is None,
        "why_not": None if outcome.failed is None else str(outcome.failed),
        "needs": outcome.needs,
        "peak": outcome.parts,
        "saved_bytes": plan.cut.saved_bytes,
        "saved_bytes_default": plan.default.saved_bytes,
        "plan_hash": plan.plan.hash,
        "kinds": [_kind_dict(kind) for kind in (*plan.kinds, plan.rest)],
        "plan": plan.plan.to_dict(),
    }


def _kind_dict(kind: LayerKind) -> dict[str, Any]:
    fields = ("kind", "module", "shape", "dtype", "form", "codec", "bytes_before", "bytes_after")
    rows = [{name: getattr(row, name) for name in fields} for row in kind.rows]
    return {"layers": kind.layers, "recompute": kind.recompute, "rows": rows}


def _size(nbytes: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} B"
