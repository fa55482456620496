"""What the user sees: `actpass.report(model)`."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from actpass._format import megabytes as _mb
from actpass._format import table
from actpass.errors import ReportError
from actpass.ir.joint_graph import fold_indices
from actpass.memory.footprint import Footprint, step_peak
from actpass.memory.memory_curve import Curves
from actpass.plan import Predicted
from actpass.plan.pareto import add_up
from actpass.plan_file import ModelPlan
from actpass.reporting.advice import Advice
from actpass.reporting.html.page import View, render
from actpass.reporting.memory_snapshot import snapshot
from actpass.reporting.plots import check_path, draw_pareto, draw_peak, draw_spectra
from actpass.reporting.record import SCHEMA_VERSION, Record, SiteRow, Totals
from actpass.reporting.rows import folded, folded_left_alone, subtotals, times
from actpass.reporting.spectra import SubspaceRow, lines


@dataclass(frozen=True)
class Report:
    """What is saved for backward, in which form, and why. ``str(report)`` is a table, `to_dict` plain data.

    regions: one `Record` for each compiled graph (a model with graph breaks has several). why_empty: the reason if there
    is none. subspaces: the learned ones, as they stand. notes: on the whole model. modules: how many of the model's modules
    each region serves (equal layers that are compiled one by one share a graph); empty: one each. advice: what a step's memory
    goes to, and what would lower it, where `actpass.explain` made the report.
    """

    regions: tuple[Record, ...]
    why_empty: str | None = None
    subspaces: tuple[SubspaceRow, ...] = ()
    notes: tuple[str, ...] = ()
    modules: tuple[int, ...] = ()
    advice: Advice | None = None

    @property
    def saved_bytes(self) -> int:
        """Bytes that cross from forward to backward now, parameters and inputs excluded, all regions."""
        return self.totals.saved_bytes

    @property
    def active(self) -> bool:
        """Whether the pass decided any region. False: all was left to Inductor, and each region's ``inactive_because`` or
        ``why_empty`` says why."""
        return any(r.active for r in self.regions)

    @property
    def totals(self) -> Totals:
        """Sums over the regions, and the peak of a step that runs each once for every module that it serves, in this order.
        ``saved_bytes_eager`` and peaks are there only if they are known for all."""
        calls = self._calls()
        rows = [r.totals for r in calls]
        sums: dict[str, Any] = {f.name: sum(getattr(t, f.name) or 0 for t in rows) for f in fields(Totals)}
        if not rows or any(t.saved_bytes_eager is None for t in rows):
            sums["saved_bytes_eager"] = None
        sums["peak_bytes"] = _peak([r.footprint for r in calls])
        sums["peak_bytes_default"] = _peak([r.footprint_default for r in calls])
        for name in ("resident_bytes", "scratch_bytes"):
            known = [getattr(t, name) for t in rows]
            sums[name] = max((n for n in known if n is not None), default=None)
        return Totals(**sums)

    @property
    def step_bytes(self) -> int | None:
        """The predicted peak of a whole step: what is resident, and the more of what forward and backward and what the
        optimizer's step take above it. Known under a budget of peak bytes."""
        totals, footprints = self.totals, [r.footprint for r in self._calls()]
        if totals.peak_bytes is None or totals.resident_bytes is None:
            return None
        gradients = sum(f.gradients for f in footprints if f is not None)
        return totals.resident_bytes + max(totals.peak_bytes, gradients + (totals.scratch_bytes or 0))

    def _calls(self) -> list[Record]:
        """The regions of a step, each as often as it runs."""
        times = self.modules or (1,) * len(self.regions)
        return [r for r, n in zip(self.regions, times, strict=True) for _ in range(n)]

    @property
    def plan_hash(self) -> str:
        """Equal on all ranks that decided alike."""
        return "-".join(r.plan_hash for r in self.regions)

    @property
    def plan(self) -> ModelPlan:
        """All that was decided, as a value to save, edit and compile with (``options={"plan": ...}``). Raises `ReportError` if
        nothing was compiled."""
        if not self.regions:
            raise ReportError(f"there is no plan, because {self.why_empty}")
        plan = ModelPlan.of(r.plan for r in self.regions)
        regions = zip(plan.regions, self.regions, strict=True)
        return ModelPlan(tuple(replace(p, predicted=_predicted(r)) for p, r in regions))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ``schema_version``, ``active``, ``reason``, ``totals``, ``regions`` (see `Record`),
        ``subspaces`` (see `SubspaceRow`), ``notes``, ``advice`` (see `Advice`, or None)."""
        totals = self.totals
        return {
            "schema_version": SCHEMA_VERSION,
            "active": self.active,
            "reason": self._status(),
            "totals": {f.name: getattr(totals, f.name) for f in fields(totals)},
            "regions": [r.to_dict() for r in self.regions],
            "subspaces": [asdict(s) for s in self.subspaces],
            "notes": list(self.notes),
            "advice": asdict(self.advice) if self.advice is not None else None,
        }

    def to_html(self, path: str | Path) -> None:
        """Write the report to ``path`` as one HTML file that needs no other and no network: memory over the step with the
        tensors at its peak, saved bytes by form, kind and layer, every tensor against Inductor's default, notes; and what other
        budgets would give, if the report is one of `actpass.explore`. A report that is inactive says why."""
        import actpass

        view = View(
            status=self._status(),
            active=self.active,
            regions=self.regions,
            totals=self.totals,
            step_bytes=self.step_bytes,
            plan_hash=self.plan_hash,
            subspaces=self.subspaces,
            notes=self.notes,
            versions=(("actpass", actpass.__version__), ("torch", torch.__version__)),
        )
        _new(path).write_text(render(view), encoding="utf-8")

    def save_memory_snapshot(self, path: str | Path) -> None:
        """Write the predicted step to ``path`` as a memory snapshot of torch: a pickle that https://pytorch.org/memory_viz
        opens, or ``python -m torch.cuda._memory_viz trace_plot PATH -o step.html``.

        Every tensor is an allocation whose frames say what it is, its operator and module, and its pass. Tensors of less than
        1/4096 of a region's peak are one allocation together. Bytes are above parameters, inputs and optimizer state; the
        highest total is the report's ``peak_bytes``. Raises `ReportError` as `plot_peak` does.
        """
        data = pickle.dumps(snapshot(self._curves("save_memory_snapshot")))
        _new(path).write_bytes(data)

    def plot_peak(self, path: str | Path) -> None:
        """Draw the predicted live bytes over a step, forward and then backward, in eager mode, under Inductor's default and
        under this plan, with the peak of each and the three largest tensors at the plan's.

        path: a file that ends in ``.svg`` or ``.png``; the numbers go beside it as ``.csv`` (curve, position in [0, 2], bytes).
        Bytes are above parameters, inputs and optimizer state. The regions of a model with graph breaks run one behind the
        other. Raises `PictureError` without matplotlib (``pip install "actpass[plot]"``) and for any other ending,
        `ReportError` if there is no region or one without a prediction.
        """
        draw_peak(check_path(path), self._curves("plot_peak"))

    def plot_pareto(self, path: str | Path) -> None:
        """Draw saved bytes against the predicted error of the gradients and against the predicted time: stock PyTorch's levels
        of ``activation_memory_budget``, what `auto` chooses within ten capacities, and this plan.

        path: a file that ends in ``.svg`` or ``.png``; the numbers go beside it as ``.csv``. The report must be one of
        `actpass.explore`. Raises `ReportError` if it is not, and `PictureError` as `plot_peak` does.
        """
        steps = [r.tradeoff for r in self.regions if r.tradeoff is not None]
        if not steps or len(steps) < len(self.regions):
            raise ReportError(
                "plot_pareto: this report does not say what other budgets would give. Make one with "
                "report = actpass.explore(model, *inputs, options=...), under policy='auto' or another that has a choice."
            )
        draw_pareto(check_path(path), add_up(steps))

    def plot_spectra(self, path: str | Path) -> None:
        """Draw how the energy of the tensors that are projected onto learned subspaces falls along their directions: of each
        kind of layer the mean over its layers, as a fraction of the whole, and where the principal directions end.

        path: a file that ends in ``.svg`` or ``.png``; the numbers go beside it as ``.csv``. Raises `ReportError` if there is
        no learned subspace that a sketch was taken of, and `PictureError` as `plot_peak` does.
        """
        known = [s for s in self.subspaces if s.captured]
        if not known:
            raise ReportError(
                "plot_spectra: no sketch has been taken yet. Train a step with a learned projection (pca, prac, oasis, "
                "sampled) and make the report then."
            )
        draw_spectra(check_path(path), known)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"actpass: {self._status()}"
        for number, region in enumerate(self.regions):
            if len(self.regions) > 1:
                served = self.modules[number] if self.modules else 1
                yield f"-- graph {number}/{len(self.regions)}{f', of {served} modules' if served > 1 else ''}"
            yield from _region_lines(region)
        if self.regions:
            yield from lines(self.subspaces)
            yield from _total_lines(self.totals, self.step_bytes)
        yield from (f"note: {note}" for note in self.notes)
        if self.advice is not None:
            yield from (f"advice: {line}" for line in self.advice.lines())

    def _curves(self, asking: str) -> list[Curves]:
        curves = [r.curves for r in self.regions if r.curves is not None]
        if not curves or len(curves) < len(self.regions):
            why = "there is no region" if not self.regions else "the peak of a region is not predicted: see its notes"
            raise ReportError(f"{asking}: nothing to draw, because {self.why_empty or why}.")
        return curves

    def _status(self) -> str:
        if not self.regions:
            return f"inactive, because {self.why_empty}"
        off = [r.inactive_because for r in self.regions if not r.active]
        if len(off) == len(self.regions):
            return f"inactive, because {off[0]}"
        projected = sum(s.projection is not None for r in self.regions for s in r.sites)
        decoded = sum(s.decoded is not None for r in self.regions for s in r.sites)
        coded = sum(s.codec is not None for r in self.regions for s in r.sites)
        recomputed = sum(s.form == "recompute" and s.bytes_before > 0 for r in self.regions for s in r.sites)
        in_fp8 = sum(s.wgrad is not None for r in self.regions for s in r.sites)
        more = f", {in_fp8} contracted in fp8" if in_fp8 else ""
        partly = f"; {len(off)} of {len(self.regions)} regions inactive, because {off[0]}" if off else ""
        return (
            f"active, {self.regions[0].options}: {recomputed} saved tensors recomputed instead, {coded} stored in few bits, "
            f"{projected} contracted through a projection{f', {decoded} decoded from one' if decoded else ''}{more}{partly}"
        )


def _new(path: str | Path) -> Path:
    """``path``, in a folder that is there."""
    found = Path(path)
    found.parent.mkdir(parents=True, exist_ok=True)
    return found


def _predicted(region: Record) -> Predicted:
    t = region.totals
    peak = _peak([region.footprint])
    return Predicted(t.saved_bytes, peak, t.extra_matmuls, t.extra_attention, t.backward_matmul_flops)


def _peak(footprints: Sequence[Footprint | None]) -> int | None:
    known = [f for f in footprints if f is not None]
    return step_peak(known) if known and len(known) == len(footprints) else None


def _region_lines(region: Record) -> Iterator[str]:
    header = ("tensor", "module", "shape", "dtype", "form", "weight grad", "inductor bytes", "stored bytes", "biased", "reason")
    rows = [header, *(_cells(row, count) for row, count in folded(region.sites))]
    yield from table(rows)
    for kind, before, after in subtotals(region.sites):
        yield f"  {kind:<16} {_mb(before):>10} -> {_mb(after):>10}"
    for (_, parameter, reason), count in folded_left_alone(region.rejected):
        yield f"  not projected: {parameter}{times(count)}: {reason}"
    for note in region.notes:
        yield f"  note: {note}"


def _total_lines(t: Totals, step_bytes: int | None) -> Iterator[str]:
    eager = f"eager {_mb(t.saved_bytes_eager)}, " if t.saved_bytes_eager is not None else ""
    yield (
        f"saved for backward: {eager}Inductor default {_mb(t.saved_bytes_default)}, now {_mb(t.saved_bytes)} "
        f"({t.saved_bytes / max(t.saved_bytes_default, 1):.2f})"
    )
    if t.peak_bytes is not None and t.peak_bytes_default is not None:
        yield (
            f"predicted peak above parameters and optimizer state: Inductor default {_mb(t.peak_bytes_default)}, now "
            f"{_mb(t.peak_bytes)} ({t.peak_bytes / max(t.peak_bytes_default, 1):.2f})"
        )
    if t.traffic_bytes_default:
        yield (
            f"predicted traffic of loops: Inductor default {_mb(t.traffic_bytes_default)}, now {_mb(t.traffic_bytes)} "
            f"({t.traffic_bytes / t.traffic_bytes_default:.2f}), in {t.kernels_default} -> {t.kernels} kernels"
        )
    if step_bytes is not None:
        yield (
            f"predicted peak of a step: {_mb(step_bytes)}, of which {_mb(t.resident_bytes or 0)} are parameters, inputs and "
            "optimizer state"
        )
    yield (
        f"backward matmuls: {t.backward_matmul_flops_default / 1e9:.2f} -> {t.backward_matmul_flops / 1e9:.2f} GFLOP "
        f"({t.backward_matmul_flops / max(t.backward_matmul_flops_default, 1):.2f}); recomputed: {t.extra_matmuls} matmuls, "
        f"{t.extra_attention} attention"
    )


def _cells(row: SiteRow, count: int) -> tuple[str, ...]:
    module = fold_indices(row.module) if count > 1 else row.module
    how = row.wgrad or ("exact" if row.projection is None else f"{row.projection} {row.rank}")
    return (
        f"{row.kind}{times(count)}",
        module or "-",
        "x".join(map(str, row.shape)),
        row.dtype,
        row.stored_as,
        how if row.parameters else "-",
        _mb(row.bytes_before * count),
        _mb(row.bytes_after * count),
        "no" if row.unbiased else "yes",
        row.reason,
    )
