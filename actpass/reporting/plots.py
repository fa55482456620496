"""A report as a picture: memory over a step, and what other budgets would give. Nothing else knows matplotlib, which is
imported when something is drawn."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from actpass.errors import PictureError
from actpass.memory.memory_curve import Curve, Curves, Held, StepCurve, step_curve
from actpass.plan.pareto import Point, Tradeoff
from actpass.reporting.spectra import SubspaceRow, folded

_SUFFIXES = (".svg", ".png")
_SIZE = (9.0, 6.0)  # inches
_DPI = 150
_TOP, _BOTTOM, _LEFT, _RIGHT = 0.93, 0.31, 0.08, 0.98
"""Where the axes end, as shares of the figure; what explains them stands below."""
_MB = 1e6
_COLORS = {"eager": "#7f7f7f", "Inductor": "#1f77b4", "actpass": "#d62728"}
_NAMES = {"eager": "eager, traced graph", "Inductor": "Inductor's default", "actpass": "actpass"}
_LEAST_ENERGY = 1e-9
"""What is drawn of less, on a logarithmic axis."""
_LONGEST = 56
"""Letters of a tensor's name."""


def check_path(path: str | Path) -> Path:
    """``path``, if it ends as a picture does. Raises `PictureError` if not."""
    found = Path(path)
    if found.suffix.lower() not in _SUFFIXES:
        raise PictureError(f"{str(path)!r}: a picture's file ends in {' or '.join(_SUFFIXES)}, not {found.suffix!r}.")
    return found


def draw_peak(path: Path, regions: Sequence[Curves]) -> None:
    """Live bytes over a step of ``regions`` into ``path``, and its numbers beside it."""
    figure = _figure()
    shares = [len(r.default.forward) + len(r.default.backward) for r in regions]
    curves: dict[str, Sequence[Curve]] = {"Inductor": [r.default for r in regions], "actpass": [r.plan for r in regions]}
    eager = [r.eager for r in regions if r.eager is not None]
    if len(eager) == len(regions):
        curves = {"eager": eager, **curves}
    steps = {name: step_curve(calls, shares) for name, calls in curves.items()}
    axes = figure.add_subplot()
    for name, step in steps.items():
        axes.plot(step.positions, _mb(step.nbytes), color=_COLORS[name], linewidth=1.6, drawstyle="steps-mid")
        label = f"{_NAMES[name]}: peak {step.peak.nbytes / _MB:.1f} MB"
        at = {"marker": "o", "markersize": 7, "clip_on": False, "zorder": 3, "linestyle": "none"}
        axes.plot([step.peak.position], [step.peak.nbytes / _MB], color=_COLORS[name], label=label, **at)
    ours = steps["actpass"]
    axes.fill_between(ours.positions, _mb(ours.nbytes), color=_COLORS["actpass"], alpha=0.12, step="mid")
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 2)
    axes.set_ylim(0, 1.05 * max(s.peak.nbytes for s in steps.values()) / _MB or 1)
    axes.set_xticks([0.0, 0.5, 1.0, 1.5, 2.0], ["", "forward", "", "backward", ""])
    axes.set_xlabel("share of the step")
    axes.set_ylabel("MB above parameters, inputs and optimizer state")
    axes.set_title("Predicted memory over a training step")
    title = None if "eager" in steps else "eager: not known (the report's notes say why)"
    _legend(figure, axes, title)
    _text(figure, _at_peak(ours, regions))
    _save(figure, path)
    rows = [(name, f"{x:.6f}", n) for name, step in steps.items() for x, n in zip(step.positions, step.nbytes, strict=True)]
    _write_numbers(path, ("curve", "position", "bytes"), rows)


def _at_peak(step: StepCurve, regions: Sequence[Curves]) -> list[str]:
    region = regions[step.peak.call]
    held = region.at_backward_peak if step.peak.backward else region.at_forward_peak
    which = f" (region {step.peak.call})" if len(regions) > 1 else ""
    return [f"Largest at actpass's peak, in the {'backward' if step.peak.backward else 'forward'}{which}:", *map(_line, held)]


def _line(held: Held) -> str:
    name = str(held)
    name = name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2 - 1]}…{name[-_LONGEST // 2 :]}"
    return f"{held.nbytes / _MB:8.2f} MB  {name}"


def draw_pareto(path: Path, step: Tradeoff) -> None:
    """Saved bytes against error and against time into ``path``, and its numbers beside it."""
    figure = _figure()
    by_error, by_time = figure.subplots(1, 2, sharey=True)

    def time_percent(p: Point) -> float:
        return _time_percent(p, step)

    for axes, of, label in (
        (by_error, _error_percent, "predicted relative error of the gradients, %"),
        (by_time, time_percent, "predicted extra time, % of a step's FLOPs"),
    ):
        _points(
            axes, step.stock, of, "o-", color=_COLORS["Inductor"], label="Inductor, activation_memory_budget 1.0, 0.9 … 0.0"
        )
        _points(axes, step.ours, of, "s-", color=_COLORS["actpass"], label="actpass, within ten capacities of saved bytes")
        chosen = f"this plan: {step.chosen.saved_bytes / _MB:.1f} MB"
        _points(axes, [step.chosen], of, "*", color="black", label=chosen, markersize=15)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    by_error.set_ylabel("MB saved for backward")
    figure.suptitle("What other budgets would give (predicted)", y=0.98)
    _legend(figure, by_error, None)
    words = ["Time: matmuls and attention recomputed, and", "what is read and written to encode and decode."]
    if step.early_bytes:
        words += [f"Of actpass's bytes {step.early_bytes / _MB:.1f} MB are gradients", "that are formed early with the loss."]
    _text(figure, words, 0.58)
    _save(figure, path)
    _write_numbers(path, ("curve", "budget", "saved_bytes", "error", "extra_time"), _rows(step))


def draw_spectra(path: Path, rows: Sequence[SubspaceRow]) -> None:
    """Energy along the directions of learned subspaces into ``path``, and its numbers beside it."""
    figure = _figure()
    axes = figure.add_subplot()
    numbers: list[tuple[Any, ...]] = []
    for name, members in folded(rows):
        count = min(len(r.captured) for r in members)
        mean = [math.fsum(r.captured[i] for r in members) / len(members) for i in range(count)]
        tail = math.fsum(r.tail or 0.0 for r in members) / len(members)
        shown = [max(v, _LEAST_ENERGY) for v in mean]
        (line,) = axes.plot(range(1, count + 1), shown, linewidth=1.4, label=f"{name} (x{len(members)}), beyond: {tail:.3f}")
        end = min(members[0].principal, count)
        if end:
            axes.plot([end], [shown[end - 1]], "o", color=line.get_color(), markersize=6)
        numbers += [(name, i + 1, f"{v:.6g}", int(i < end)) for i, v in enumerate(mean)]
    axes.set_yscale("log")
    axes.set_xlabel("direction; the mark is the last principal one")
    axes.set_ylabel("share of the energy")
    axes.set_title("Spectra of what is projected onto learned subspaces")
    axes.grid(alpha=0.3)
    _legend(figure, axes, None)
    _save(figure, path)
    _write_numbers(path, ("subspace_of", "direction", "share_of_energy", "principal"), numbers)


def _points(axes: Any, points: Sequence[Point], of: Any, style: str, **how: Any) -> None:
    how = {"markersize": 5, "linewidth": 1.4, "clip_on": False, "zorder": 3, **how}
    axes.plot([of(p) for p in points], _mb(p.saved_bytes for p in points), style, **how)


def _error_percent(p: Point) -> float:
    return 100 * math.sqrt(p.error)


def _time_percent(p: Point, step: Tradeoff) -> float:
    return 100 * p.extra_flops / max(step.step_flops, 1)


def _rows(step: Tradeoff) -> Iterable[tuple[Any, ...]]:
    """error: relative, not squared. extra_time: as a share of a step's FLOPs."""
    curves: Mapping[str, Sequence[Point]] = {"Inductor": step.stock, "actpass": step.ours, "chosen": [step.chosen]}
    for name, points in curves.items():
        for p in points:
            yield name, p.budget, p.saved_bytes, f"{math.sqrt(p.error):.6g}", f"{p.extra_flops / max(step.step_flops, 1):.6g}"


def _mb(nbytes: Iterable[int]) -> list[float]:
    return [n / _MB for n in nbytes]


def _figure() -> Any:
    """An empty figure that belongs to nobody else: pyplot and its global state are not used."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PictureError(f'a picture needs matplotlib ({error}): pip install "actpass[plot]"') from error
    figure = Figure(figsize=_SIZE, dpi=_DPI)
    figure.subplots_adjust(top=_TOP, bottom=_BOTTOM, left=_LEFT, right=_RIGHT, wspace=0.08)
    return figure


def _legend(figure: Any, axes: Any, title: str | None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    where = {"loc": "upper left", "bbox_to_anchor": (_LEFT - 0.02, 0.19)}
    figure.legend(handles, labels, title=title, frameon=False, fontsize=9, **where)


def _text(figure: Any, lines: Sequence[str], left: float = 0.42) -> None:
    """Beside the legend, from ``left`` on."""
    figure.text(left, 0.175, "\n".join(lines), fontsize=8, family="monospace", va="top", linespacing=1.5)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _write_numbers(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
