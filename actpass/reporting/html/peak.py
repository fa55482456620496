"""Memory over the step, and what is in memory at its peak."""

from __future__ import annotations

from collections.abc import Sequence

from actpass.ir.joint_graph import fold_indices
from actpass.memory.memory_curve import Curve, Curves, Lifetime, StepCurve, step_curve
from actpass.reporting.html.charts import Axis, Series, byte_axis, legend, plot
from actpass.reporting.html.markup import Markup, element
from actpass.reporting.html.tables import bytes_cell, code_cell, megabytes, number_cell, paragraphs, section, table

_NAMES = {"eager": "eager mode", "inductor": "Inductor's default", "plan": "this plan"}


def peak_section(regions: Sequence[Curves]) -> Markup:
    """regions: of every region, in the order in which they run."""
    steps = _steps(regions)
    most = max(s.peak.nbytes for s in steps.values())
    ends = {name: f"{_NAMES[name]}: peak {megabytes(s.peak.nbytes)}, in the {_pass_of(s)}" for name, s in steps.items()}
    unknown = (
        None if "eager" in steps else element("p", "What eager mode takes is not known; the notes say why.", class_="hint")
    )
    return section(
        "Memory over the step",
        "peak",
        paragraphs(
            "Predicted bytes in use while one training step runs, forward and then backward. Parameters, inputs and optimizer "
            "state are not counted: they are there all the time. A dot marks each peak."
        ),
        plot(
            [_series(name, step) for name, step in steps.items()],
            Axis(2.0, ((0.5, "forward"), (1.5, "backward"))),
            byte_axis(most),
            f"Live bytes over the step. {'; '.join(ends.values())}.",
            split=1.0,
        ),
        legend(ends.items()),
        unknown,
        _at_peak(steps["plan"], regions),
    )


def _steps(regions: Sequence[Curves]) -> dict[str, StepCurve]:
    shares = [len(r.default.forward) + len(r.default.backward) for r in regions]
    eager = [r.eager for r in regions if r.eager is not None]
    curves: dict[str, Sequence[Curve]] = {"eager": eager} if len(eager) == len(regions) else {}
    curves |= {"inductor": [r.default for r in regions], "plan": [r.plan for r in regions]}
    return {name: step_curve(calls, shares) for name, calls in curves.items()}


def _series(name: str, step: StepCurve) -> Series:
    points = list(zip(step.positions, step.nbytes, strict=True))
    peak = (step.peak.position, step.peak.nbytes)
    return Series(name=_NAMES[name], color=name, points=points, marks=[peak], steps=True, filled=name == "plan")


def _pass_of(step: StepCurve) -> str:
    return "backward" if step.peak.backward else "forward"


def _at_peak(step: StepCurve, regions: Sequence[Curves]) -> Markup:
    """The tensors at the plan's peak, with all that is not listed, so that they add up to it."""
    region = regions[step.peak.call]
    lives = region.lifetimes
    at = lives.backward_peak if step.peak.backward else lives.forward_peak
    own = max((region.plan.backward if step.peak.backward else region.plan.forward), default=0)
    groups: dict[tuple[str, str, str], list[Lifetime]] = {}
    for t in lives.tensors:
        if t.start <= at and (t.end is None or t.end > at):
            groups.setdefault((t.what, fold_indices(t.module), t.op), []).append(t)
    found = sorted(((sum(t.nbytes for t in ts), ts) for ts in groups.values()), key=lambda item: -item[0])
    rows = [_row(nbytes, step.peak.nbytes, tensors) for nbytes, tensors in found]
    rest, below = own - sum(nbytes for nbytes, _ in found), step.peak.nbytes - own
    for nbytes, what in (
        (rest, f"smaller than {megabytes(lives.least_bytes)}, and scratch of kernels"),
        (below, "other regions"),
    ):
        if nbytes:
            rows.append((what, "-", "-", "-", bytes_cell(nbytes), _share(nbytes, step.peak.nbytes)))
    where = f"the {_pass_of(step)}{f' of region {step.peak.call}' if len(regions) > 1 else ''}"
    return table(
        f"In memory at the peak of this plan, in {where}",
        ("tensor", "module", "made by", "how many", "bytes", "share"),
        rows,
        ("all together", "", "", "", bytes_cell(step.peak.nbytes), ""),
    )


def _row(nbytes: int, peak: int, tensors: Sequence[Lifetime]) -> tuple[Markup | str, ...]:
    first, count = tensors[0], len(tensors)
    module = fold_indices(first.module) if count > 1 else first.module
    cells = code_cell(module), code_cell(first.op), number_cell(f"{count}", count), bytes_cell(nbytes)
    return (first.what, *cells, _share(nbytes, peak))


def _share(nbytes: int, of: int) -> Markup:
    return number_cell(f"{100 * nbytes / max(of, 1):.1f} %", nbytes)
