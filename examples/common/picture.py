"""The picture of a comparison: loss curves on the left, bytes on the right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

SMOOTHING = 0.9


def draw_comparison(results: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Draw `{label: metrics}` as a PNG."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    _draw_losses(curves, results)
    _draw_memory(bars, results)
    figure.savefig(path, dpi=120)


def _draw_losses(axes: Axes, results: Mapping[str, dict[str, Any]]) -> None:
    tops = []
    for number, (label, metrics) in enumerate(results.items()):
        color, losses = f"C{number}", smooth(metrics["train_loss"])
        width = 1.0 + 1.2 * (len(results) - 1 - number)  # curves that coincide stay visible
        axes.plot(range(1, len(losses) + 1), losses, color=color, label=label, linewidth=width)
        tops.append(max(losses[len(losses) // 20 :]))
        held_out_steps, held_out = zip(*metrics["held_out_loss"], strict=True)
        axes.plot(held_out_steps, held_out, "o", color=color, markersize=4)
    axes.set(xlabel="step", ylabel="loss", title="Loss (line: training, smoothed; dots: validation)")
    axes.set_ylim(top=1.02 * max(tops))  # the first steps, far above, would flatten all others
    axes.grid(alpha=0.3)
    axes.legend()


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, smoothed = 0.0, []
    for count, value in enumerate(values, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        smoothed.append(average / (1 - SMOOTHING**count))
    return smoothed


def _label(megabytes: float) -> str:
    return f"{megabytes:.3g}" if megabytes >= 0.01 else "0"


def _draw_memory(axes: Axes, results: Mapping[str, dict[str, Any]]) -> None:
    kinds = {"saved_bytes": "saved for backward", "peak_bytes": "peak of a step"}
    for offset, (key, name) in zip((-0.2, 0.2), kinds.items(), strict=True):
        places = [index + offset for index in range(len(results))]
        megabytes = [(metrics[key] or 0) / 1e6 for metrics in results.values()]
        container = axes.barh(places, megabytes, height=0.38, label=name)
        axes.bar_label(container, fmt=_label, padding=3)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="MB above parameters and optimizer state", title="Memory")
    axes.legend()
