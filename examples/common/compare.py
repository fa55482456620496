"""Run one example several times, each row in its own process, and put the results side by side.

A row is an ordinary run of the script with other options, so each can be repeated by hand: its
command is printed. Each process has compile caches of its own, empty at the start, and leaves its
measurements in `OUT/<row>.json` (the script's `--metrics`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measure import UNKNOWN, format_bytes
from .train import FINAL_STEPS

Metrics = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table: a label and the options that make it."""

    label: str
    arguments: tuple[str, ...]

    @property
    def file_stem(self) -> str:
        words = "".join(c if c.isalnum() or c == "." else " " for c in self.label.lower())
        return "-".join(words.split())


def to_arguments(settings: Any, defaults: Any) -> tuple[str, ...]:
    """The command line that gives a settings dataclass, options at their default left out."""
    arguments: list[str] = []
    for field in dataclasses.fields(settings):
        value, default = getattr(settings, field.name), getattr(defaults, field.name)
        if value == default:
            continue
        flag = "--" + field.name.replace("_", "-")
        if value is True:
            arguments.append(flag)
        else:
            values = value if isinstance(value, tuple) else (value,)
            arguments += [part for item in values for part in (flag, str(item))]
    return tuple(arguments)


def compare(script: Path, rows: Sequence[Row], baseline: str, title: str, out: Path) -> bool:
    """Run every row, write `table.md`, `table.json` and `curves.png`; False if a row failed."""
    out.mkdir(parents=True, exist_ok=True)
    results = {row.label: _run_row(script, row, number, rows, out) for number, row in enumerate(rows)}
    table = [_summarize(label, result, results[baseline]) for label, result in results.items()]
    text = f"{title}\n\n{format_table(table)}"
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "table.json").write_text(json.dumps({"title": title, "rows": table}, indent=1) + "\n")
    finished = {label: result for label, result in results.items() if result is not None}
    if finished:
        from .picture import draw_comparison  # a single run needs no matplotlib

        draw_comparison(finished, out / "curves.png")
    print(f"\n{text}\nWritten to {out}: table.md, table.json, curves.png, and a JSON file a row.")
    return len(finished) == len(rows)


def _run_row(script: Path, row: Row, number: int, rows: Sequence[Row], out: Path) -> Metrics | None:
    path = out / f"{row.file_stem}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, str(script), *row.arguments, "--metrics", str(path)]
    print(f"\n== {number + 1}/{len(rows)}: {row.label}", flush=True)
    print("   python " + shlex.join(command[1:]), flush=True)
    with tempfile.TemporaryDirectory(prefix="inductor-") as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        status = subprocess.run(command, env=environment, check=False).returncode
    if status != 0:
        print(f"   {row.label} failed with exit status {status}; the other rows go on", flush=True)
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def _summarize(label: str, metrics: Metrics | None, baseline: Metrics | None) -> dict[str, Any]:
    if metrics is None:
        return {"row": label, "failed": True}
    step_s = metrics["median_step_s"]
    base_s = baseline["median_step_s"] if baseline else None
    totals = (metrics["report"] or {}).get("totals", {})
    return {
        "row": label,
        "failed": False,
        "saved_bytes": metrics["saved_bytes"],
        "saved_bytes_reported": totals.get("saved_bytes"),
        "peak_bytes": metrics["peak_bytes"],
        "step_s": step_s,
        "step_ratio": step_s / base_s if step_s and base_s else None,
        "first_step_s": metrics["first_step_s"],
        "train_loss": metrics["final_train_loss"],
        "held_out_loss": metrics["held_out_loss"][-1][1],
        "accuracy": metrics.get("accuracy"),
        "accuracy_spread": metrics.get("accuracy_spread"),
    }


def _as(template: str) -> Callable[[float | None], str]:
    return lambda value: UNKNOWN if value is None else template.format(value)


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "saved_bytes": ("saved for backward", format_bytes),
    "saved_bytes_reported": ("as reported", format_bytes),
    "peak_bytes": ("peak", format_bytes),
    "step_s": ("step", _as("{:.3f} s")),
    "step_ratio": ("to Inductor", _as("{:.2f}")),
    "first_step_s": ("first step", _as("{:.1f} s")),
    "train_loss": ("training loss", _as("{:.3f}")),
    "held_out_loss": ("validation loss", _as("{:.3f}")),
    "accuracy": ("accuracy", _as("{:.2%}")),
    "accuracy_spread": ("spread over seeds", _as("{:.2%}")),
}
NOTES = f"""\
Saved for backward: bytes alive between forward and backward, measured (the 4 of the loss with
them); as reported: by `actpass.report`. Peak: bytes above parameters and optimizer state, gradients
included, measured over one step. Step: median. First step: with compiling, caches empty. Training
loss: mean of the last {FINAL_STEPS} steps.
"""
ACCURACY_NOTE = "Accuracy: of all held-out examples, mean over the seeds; all else is the first seed's.\n"


def format_table(table: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with what the columns mean below it; without columns that no row has."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in table)]
    lines = ["| |" + "".join(f" {COLUMNS[key][0]} |" for key in keys), "|---" + "|---:" * len(keys) + "|"]
    lines += [_format_row(row, keys) for row in table]
    notes = NOTES + (ACCURACY_NOTE if "accuracy" in keys else "")
    return "\n".join([*lines, "", notes])


def _format_row(row: dict[str, Any], keys: Sequence[str]) -> str:
    cells = [row["row"] + (" (failed)" if row["failed"] else "")]
    return "| " + " | ".join(cells + [COLUMNS[key][1](row.get(key)) for key in keys]) + " |"
