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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measure import UNKNOWN, format_bytes
from .picture import draw_comparison
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
    }


HEADER = "| | saved for backward | as reported | peak | step | to Inductor | first step | training loss | validation loss |"
NOTES = f"""\
Saved for backward: bytes alive between forward and backward, measured (the 4 of the loss with
them); as reported: by `actpass.report`. Peak: bytes above parameters and optimizer state, gradients
included, measured over one step. Step: median. First step: with compiling, caches empty. Training
loss: mean of the last {FINAL_STEPS} steps.
"""


def format_table(table: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with what the columns mean below it."""
    lines = [HEADER, "|---" + "|---:" * 8 + "|"]
    return "\n".join([*lines, *map(_format_row, table), "", NOTES])


def _format_row(row: dict[str, Any]) -> str:
    if row["failed"]:
        return f"| {row['row']} | failed |" + f" {UNKNOWN} |" * 7
    cells = [
        row["row"],
        format_bytes(row["saved_bytes"]),
        format_bytes(row["saved_bytes_reported"]),
        format_bytes(row["peak_bytes"]),
        _number(row["step_s"], "{:.3f} s"),
        _number(row["step_ratio"], "{:.2f}"),
        _number(row["first_step_s"], "{:.1f} s"),
        _number(row["train_loss"], "{:.3f}"),
        _number(row["held_out_loss"], "{:.3f}"),
    ]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, template: str) -> str:
    return UNKNOWN if value is None else template.format(value)
