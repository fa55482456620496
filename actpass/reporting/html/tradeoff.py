"""What other budgets would give."""

from __future__ import annotations

import math
from collections.abc import Sequence

from actpass._format import megabytes
from actpass.plan.pareto import Point, Tradeoff
from actpass.reporting.html.charts import Series, byte_axis, legend, percent_axis, plot
from actpass.reporting.html.markup import Markup, element
from actpass.reporting.html.tables import bytes_cell, number_cell, paragraphs, section, table


def tradeoff_section(step: Tradeoff) -> Markup:
    curves = {"inductor": step.stock, "plan": step.ours, "chosen": (step.chosen,)}
    entries = [
        ("inductor", "Inductor: its levels of activation_memory_budget"),
        ("plan", "actpass: what it chooses within ten capacities of saved bytes"),
        ("chosen", f"this plan: {megabytes(step.chosen.saved_bytes)}"),
    ]
    early = f"Of actpass's bytes {megabytes(step.early_bytes)} are gradients that are formed early with the loss."
    rows = [_row(name, p, step) for name, points in curves.items() for p in points]
    return section(
        "What other budgets would give",
        "budgets",
        paragraphs(
            "Predicted bytes saved for backward, against what they cost: the relative error of the gradients, and the time "
            "that is added to a step. Lower and further to the left is better.",
            *([early] if step.early_bytes else []),
        ),
        element(
            "div",
            _chart("error of the gradients", {n: [(_error(p), p.saved_bytes) for p in ps] for n, ps in curves.items()}),
            _chart("extra time", {n: [(_time(p, step), p.saved_bytes) for p in ps] for n, ps in curves.items()}),
            class_="pair",
        ),
        legend(entries),
        table("The points of both curves", ("curve", "saved bytes", "error of the gradients", "extra time"), rows),
    )


def _chart(what: str, curves: dict[str, list[tuple[float, float]]]) -> Markup:
    points = [p for found in curves.values() for p in found]
    x, y = percent_axis(max(a for a, _ in points)), byte_axis(max(b for _, b in points))
    lines = [
        Series(name=name, color=name, points=found if len(found) > 1 else (), marks=found) for name, found in curves.items()
    ]
    return element("figure", plot(lines, x, y, f"Saved bytes against the {what}"), element("figcaption", what))


def _row(curve: str, p: Point, step: Tradeoff) -> Sequence[Markup | str]:
    name = {"inductor": f"Inductor, {p.budget:.1f}", "plan": "actpass", "chosen": "this plan"}[curve]
    error, time = _error(p), _time(p, step)
    return name, bytes_cell(p.saved_bytes), number_cell(f"{error:.2f} %", error), number_cell(f"{time:.2f} %", time)


def _error(p: Point) -> float:
    """In percent."""
    return 100 * math.sqrt(p.error)


def _time(p: Point, step: Tradeoff) -> float:
    """In percent of a step."""
    return 100 * p.extra_flops / max(step.step_flops, 1)
