"""Charts as SVG that keeps the size of its text at every width: positions are percentages, and only lines are stretched."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from actpass.reporting.html.markup import Markup, element

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_STRETCH = 1000
"""The side of the square that lines are drawn in before they are stretched."""
_LEAST_PERCENT = 0.4
"""How wide a part of a bar is drawn at least."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axis:
    """From 0 to ``top``. ticks: (value, label)."""

    top: float
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        return value / self.top if self.top else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """color: name of a style. marks: points that get a dot. steps: whether the line stays at each point's height halfway to its
    neighbours. filled: whether the area below it is shaded."""

    name: str
    color: str
    points: Sequence[Point]
    marks: Sequence[Point] = ()
    steps: bool = False
    filled: bool = False


def byte_axis(most: float) -> Axis:
    """From 0 to ``most`` bytes or a little more."""
    unit, name = next(((size, name) for size, name in _UNITS if most >= size), _UNITS[-1])
    return _axis(most / unit, unit, name)


def percent_axis(most: float) -> Axis:
    """From 0 to ``most`` percent or a little more."""
    return _axis(most, 1.0, "%")


def _axis(most: float, unit: float, name: str) -> Axis:
    size = 10 ** math.floor(math.log10(most / 4)) if most > 0 else 1.0
    step = next((size * k for k in (1, 2, 5, 10) if size * k * 5 >= most), size)
    count = max(math.ceil(most / step - 1e-9), 1)
    return Axis(count * step * unit, tuple((i * step * unit, f"{i * step:g} {name}") for i in range(count + 1)))


def plot(series: Sequence[Series], x: Axis, y: Axis, label: str, split: float | None = None) -> Markup:
    """Lines over ``x``, with a legend. label: what a reader who does not see it is told. split: an x at which a line stands."""
    lines = [_line(s, x, y) for s in series]
    grid = [element("line", x1="0%", x2="100%", y1=_percent(1 - y.share(v)), y2=_percent(1 - y.share(v))) for v, _ in y.ticks]
    if split is not None:
        grid.append(
            element("line", x1=_percent(x.share(split)), x2=_percent(x.share(split)), y1="0%", y2="100%", class_="split")
        )
    dots = [
        element("circle", cx=_percent(x.share(a)), cy=_percent(1 - y.share(b)), r=5 if len(s.marks) == 1 else 3, class_=s.color)
        for s in series
        for a, b in s.marks
    ]
    stretched = element(
        "svg", *lines, viewBox=f"0 0 {_STRETCH} {_STRETCH}", preserveAspectRatio="none", width="100%", height="100%"
    )
    picture = element("svg", element("g", *grid, class_="grid"), stretched, *dots, role="img", aria_label=label, class_="lines")
    ups = [element("span", text, style=f"bottom:{_percent(y.share(v))}") for v, text in y.ticks]
    along = [element("span", text, style=f"left:{_percent(x.share(v))}") for v, text in x.ticks]
    return element(
        "div",
        element("div", *ups, class_="y-axis", aria_hidden="true"),
        picture,
        element("div", *along, class_="x-axis", aria_hidden="true"),
        class_="plot",
    )


def _line(series: Series, x: Axis, y: Axis) -> Markup | None:
    if not series.points:
        return None
    points = [(_STRETCH * x.share(a), _STRETCH * (1 - y.share(b))) for a, b in series.points]
    path = _stepped(points) if series.steps else " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    edge = element("path", d=f"M{path}", class_=series.color, vector_effect="non-scaling-stroke")
    if not series.filled:
        return edge
    area = f"M{points[0][0]:.1f},{_STRETCH} L{path} L{points[-1][0]:.1f},{_STRETCH} Z"
    return Markup(element("path", d=area, class_=f"{series.color} area") + edge)


def _stepped(points: Sequence[Point]) -> str:
    parts = [f"{points[0][0]:.1f},{points[0][1]:.1f}"]
    for (a, _), (b, height) in itertools.pairwise(points):
        parts.append(f"H{(a + b) / 2:.1f} V{height:.1f}")
    return " ".join([*parts, f"H{points[-1][0]:.1f}"])


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """entries: (color, text)."""
    return element(
        "ul", *(element("li", element("i", class_=f"key {color}"), text) for color, text in entries), class_="legend"
    )


def bar(before: float, parts: Mapping[str, float], label: str) -> Markup:
    """Two bars, one above the other: ``before``, and ``parts``, color -> share. All are shares of the width."""
    rects = [element("rect", x="0", y="0", width=_percent(before), height="6", class_="before")] if before else []
    at = 0.0
    for color, share in parts.items():
        width = max(share, _LEAST_PERCENT / 100)
        rects.append(element("rect", x=_percent(at), y="8", width=_percent(width), height="14", class_=color))
        at += share
    return element("svg", *rects, role="img", aria_label=label, class_="bar")


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"
