"""Results as Markdown: what was run, on what, when, and a table."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import actpass

UNKNOWN = "\N{EN DASH}"
Result = Mapping[str, Any]
Column = tuple[str, Callable[[Result], str]]


def header(workload: str, device: str) -> dict[str, Any]:
    """Enough to run it again: command, machine, versions, date."""
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "workload": workload,
        "machine": machine(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "actpass": actpass.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def machine(device: str) -> str:
    """The processor that runs the steps, and what it shares."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{cpu_model()}, {cores} cores, {torch.get_num_threads()} threads"
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        return f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}), host {cpu}"
    return f"{cpu}, load at start {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else cpu


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def add_ratios(results: Sequence[dict[str, Any]]) -> None:
    """What follows from other rows: ratios to plain Inductor, saved bytes without logits."""
    for result in results:
        if result["failed"] is None:
            saved, logits = result["saved_bytes_measured"], result.get("logits_bytes")
            result["saved_bytes_without_logits"] = None if logits is None else saved - logits
            result["step_s"] = statistics.median(result["round_step_s"])
    base = next((r for r in results if r["row"] == "inductor" and r["failed"] is None), None)
    for result in results:
        if result["failed"] is not None:
            continue
        result["total_bytes"] = result["resident_bytes"] + result["peak_bytes"]
        result["predicted_ratio"] = _ratio(result.get("predicted_peak_bytes"), result["peak_bytes"])
        result["step_ratio"] = None
        if base is not None:
            pairs = zip(result["round_step_s"], base["round_step_s"], strict=True)
            result["step_ratio"] = statistics.median(ours / theirs for ours, theirs in pairs)
        for name, of in (
            ("saved_ratio", "saved_bytes_measured"),
            ("saved_without_logits_ratio", "saved_bytes_without_logits"),
            ("peak_ratio", "peak_bytes"),
            ("backward_matmul_flops_ratio", "backward_matmul_flops"),
        ):
            result[name] = _ratio(result.get(of), base.get(of) if base else None)


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def number(name: str, template: str = "{:.2f}", scale: float = 1.0) -> Callable[[Result], str]:
    def cell(result: Result) -> str:
        value = result.get(name)
        return UNKNOWN if value is None else template.format(value / scale if scale != 1.0 else value)

    return cell


def megabytes(name: str) -> Callable[[Result], str]:
    def cell(result: Result) -> str:
        value = result.get(name)
        return UNKNOWN if value is None else f"{value / 1e6:.{1 if value >= 1e7 else 3}f}"

    return cell


def with_ratio(value: Callable[[Result], str], ratio: str) -> Callable[[Result], str]:
    relative = number(ratio, " ({:.2f})")

    def cell(result: Result) -> str:
        return value(result) + (relative(result) if result.get(ratio) is not None else "")

    return cell


ROW_COLUMNS: tuple[Column, ...] = (
    ("row", lambda r: f"`{r['row']}`"),
    ("compile s", number("compile_s", "{:.1f}")),
    ("step s", number("step_s", "{:.4g}")),
    ("step / Inductor", number("step_ratio", "{:.3f}")),
    ("peak MB", with_ratio(megabytes("peak_bytes"), "peak_ratio")),
    ("predicted / measured", number("predicted_ratio", "{:.3f}")),
    ("in all MB", megabytes("total_bytes")),
    ("saved MB", with_ratio(megabytes("saved_bytes_measured"), "saved_ratio")),
    ("reported MB", megabytes("saved_bytes_reported")),
    ("saved without logits MB", with_ratio(megabytes("saved_bytes_without_logits"), "saved_without_logits_ratio")),
    ("matmuls again", number("extra_matmuls", "{}")),
    ("attention again", number("extra_attention", "{}")),
    ("backward GFLOP", with_ratio(number("backward_matmul_flops", "{:.2f}", 1e9), "backward_matmul_flops_ratio")),
    ("first loss", number("first_loss", "{:.6f}")),
    ("gradient cosine", number("gradient_cosine", "{:.6f}")),
    ("equal signs", number("sign_agreement", "{:.4f}")),
)
COMPILE_COLUMNS: tuple[Column, ...] = (
    ("row", lambda r: f"`{r['row']}`"),
    ("cold s", with_ratio(number("cold_first_step_s", "{:.1f}"), "cold_first_step_ratio")),
    ("cold without a step s", with_ratio(number("cold_compile_s", "{:.1f}"), "cold_compile_ratio")),
    ("warm s", with_ratio(number("warm_first_step_s", "{:.1f}"), "warm_first_step_ratio")),
    ("warm without a step s", with_ratio(number("warm_compile_s", "{:.1f}"), "warm_compile_ratio")),
    ("step s", number("step_s", "{:.4g}")),
    ("warm cache hits", lambda r: ", ".join(f"{k} {v}" for k, v in r["warm_cache_hits"].items())),
)
ROW_NOTES = """\
In brackets: ratio to `inductor`. Step: forward and backward{optimizer}, gradients cleared; the ratio is the median over
interleaved rounds of the rounds' own ratios. Compile: first forward and backward, empty cache. Peak and saved: measured,
above the level at the start of a step (resident: {resident:.1f} MB); saved is what a forward leaves alive, the loss with it.
Predicted: the peak. In all: with what is resident, what a budget in bytes is held against.
Reported: from the graph, without the loss. Logits: also the gradients that a loss in pieces forms early in their place.
Gradient cosine and equal signs: of all gradients of the first step, against eager.
"""
COMPILE_NOTES = """\
In brackets: ratio to `inductor`, median over the repeats. Until the first backward is done, in a fresh process; cold: empty
cache directory, warm: the one that the cold process filled. Without a step: less the time of one later step.
"""


def markdown(head: Result, columns: Sequence[Column], results: Sequence[Result], notes: str) -> str:
    lines = [f"{head['workload']}", "", f"`{head['command']}`", ""]
    lines += [f"{head['machine']}; torch {head['torch']}, actpass {head['actpass']}; {head['date']}.", ""]
    lines += ["| " + " | ".join(name for name, _ in columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for result in results:
        if result.get("failed"):
            lines.append(f"| `{result['row']}` | failed: {result['failed']} |" + " |" * (len(columns) - 2))
        else:
            lines.append("| " + " | ".join(cell(result) for _, cell in columns) + " |")
    return "\n".join([*lines, "", notes])


def row_notes(results: Sequence[Result], optimizer: bool, comparable: bool) -> str:
    done = [r for r in results if r["failed"] is None]
    resident = max((r["resident_bytes"] for r in done), default=0) / 1e6
    notes = ROW_NOTES.format(optimizer=" and AdamW" if optimizer else "", resident=resident)
    if not comparable:
        notes += "The config has dropout, so losses and gradients of two rows can't be compared (--dropout 0).\n"
    return notes + "".join(f"{line}\n" for line in _nearest_in_peak(done))


def _nearest_in_peak(done: Sequence[Result]) -> list[str]:
    """For each actpass row, the stock budget with the nearest measured peak: the one to compare it with."""
    stock = [r for r in done if r["row"].startswith("inductor-")]
    ours = [r for r in done if r["row"].startswith("actcomp")]
    pairs = [(r, min(stock, key=lambda s: abs(s["peak_bytes"] - r["peak_bytes"]))) for r in ours if stock]
    return [f"Nearest stock budget in peak to `{r['row']}`: `{s['row']}`." for r, s in pairs]


def finish(given: argparse.Namespace, data: Result, table: str) -> None:
    """Print ``table``, and write the files that ``--json`` and ``--markdown`` name."""
    print(f"\n{table}")
    for path, text in ((given.json, json.dumps(data, indent=1) + "\n"), (given.markdown, table)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
