"""Draw the README's picture: memory over one training step, three curves, from the numbers of ``report.plot_peak``.

    python tools/inspect_graph.py llama-mini --batch 8 --seq 128 --plot-peak peak.png     # also writes peak.csv
    python tools/peak_picture.py peak.csv docs/assets/peak.svg --title "Predicted memory over a step, llama-mini, 8 x 128, fp32"

The same numbers give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLORS = {"eager": "#8a8f98", "Inductor": "#2f6fb0", "actpass": "#c8352b"}
Curve = tuple[list[float], list[float]]


def read(path: Path) -> dict[str, Curve]:
    """Name -> (positions in the step, from 0 to 2; megabytes)."""
    found: dict[str, Curve] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            positions, megabytes = found.setdefault(row["curve"], ([], []))
            positions.append(float(row["position"]))
            megabytes.append(int(row["bytes"]) / 1e6)
    return found


def draw(curves: dict[str, Curve], title: str, path: Path) -> None:
    """Write the picture as SVG."""
    plt.rcParams.update({"svg.hashsalt": "actpass", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(7.2, 3.0), layout="constrained")
    for name, (positions, megabytes) in curves.items():
        axes.step(positions, megabytes, where="mid", color=COLORS[name], label=f"{name}: peak {max(megabytes):.0f} MB")
    axes.fill_between(*curves["actpass"], step="mid", color=COLORS["actpass"], alpha=0.12)
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 2), ylim=(0, None), ylabel="MB", title=title)
    axes.set_xticks([0.5, 1.5], ["forward", "backward"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--title", default="Predicted memory over a training step")
    given = parser.parse_args()
    draw(read(given.numbers), given.title, given.picture)
