"""How long compiling takes, cold and warm, each in a fresh process with a cache directory of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_rows import Row, RowSpec, Setup
from torch._dynamo.utils import counters

STEADY_STEPS = 3
PHASES = ("cold", "warm")


def work(spec: RowSpec, setup: Setup) -> dict[str, Any]:
    """In the fresh process: time from the first call to the end of the first backward, and of a step after it."""
    (torch.ones(8, 8, device=setup.device) @ torch.ones(8, 8, device=setup.device)).sum().item()
    row = Row.prepare(spec, setup)
    setup.wait()
    began = time.perf_counter()
    row.forward(0).backward()
    setup.wait()
    first_step_s = time.perf_counter() - began
    row.model.zero_grad(set_to_none=True)
    times = []
    for index in range(STEADY_STEPS):
        began = time.perf_counter()
        row.step(index)
        setup.wait()
        times.append(time.perf_counter() - began)
    hits = {"aot": counters["aot_autograd"]["autograd_cache_hit"], "fx": counters["inductor"]["fxgraph_cache_hit"]}
    return {"first_step_s": first_step_s, "step_s": statistics.median(times), "cache_hits": hits}


def measure_compile_times(specs: Sequence[RowSpec], repeat: int) -> list[dict[str, Any]]:
    """Run every row ``repeat`` times, cold and then warm, rows in turn. Each measurement is one process."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {s.label: {phase: [] for phase in PHASES} for s in specs}
    for number in range(repeat):
        turn = number % len(specs)
        for spec in [*specs[turn:], *specs[:turn]]:
            with tempfile.TemporaryDirectory(prefix="inductor-") as cache:
                for phase in PHASES:
                    result = _run_worker(spec, cache)
                    print(json.dumps({"row": spec.label, "repeat": number, "phase": phase, **result}), flush=True)
                    found[spec.label][phase].append(result)
    baseline = found.get("inductor")
    return [_summary(label, phases, baseline) for label, phases in found.items()]


def _run_worker(spec: RowSpec, cache: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), *sys.argv[1:], "--compile-worker", spec.label]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": str(Path(cache) / "triton")}
    done = subprocess.run(command, env=environment, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"compiling {spec.label} failed with exit status {done.returncode} (its output is above)")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _summary(label: str, phases: dict[str, list[dict[str, Any]]], baseline: Any) -> dict[str, Any]:
    """Medians over the repeats; ratios are medians of the repeats' own ratios to plain Inductor.

    ``first_step``: until the first backward is done. ``compile``: that without the time of one steady step.
    """
    row: dict[str, Any] = {"row": label}
    for phase in PHASES:
        results = phases[phase]
        row[f"{phase}_first_step_s"] = statistics.median(r["first_step_s"] for r in results)
        row[f"{phase}_compile_s"] = statistics.median(_compile_s(r) for r in results)
        if baseline is not None:
            pairs = list(zip(results, baseline[phase], strict=True))
            row[f"{phase}_first_step_ratio"] = statistics.median(r["first_step_s"] / b["first_step_s"] for r, b in pairs)
            row[f"{phase}_compile_ratio"] = statistics.median(_compile_s(r) / _compile_s(b) for r, b in pairs)
    row["step_s"] = statistics.median(r["step_s"] for phase in PHASES for r in phases[phase])
    row["warm_cache_hits"] = phases["warm"][-1]["cache_hits"]
    return row


def _compile_s(result: dict[str, Any]) -> float:
    return max(result["first_step_s"] - result["step_s"], 1e-9)
