"""Measure the memory of a piece of a training step: what it leaves allocated, and its peak. Used by the tests and tools."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, slots=True)
class Memory:
    """peak_bytes: the highest level during the call, above the level at its start. kept_bytes: the level at its end above
    the level at its start. result: what the call returned."""

    peak_bytes: int
    kept_bytes: int
    result: Any


def measure(call: Callable[[], Any], device: torch.device | str = "cpu") -> Memory:
    """Run ``call`` once and measure its memory on ``device``.

    CUDA: the caching allocator's counters (blocks are rounded up to 512 bytes). CPU: the profiler's allocation events
    (to the byte; agree with the process's high-water mark within 1 %). Warm up first: compiling allocates, too.
    """
    where = torch.device(device)
    return _measure_cuda(call, where) if where.type == "cuda" else _measure_cpu(call)


def _measure_cuda(call: Callable[[], Any], device: torch.device) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    return Memory(torch.cuda.max_memory_allocated(device) - start, torch.cuda.memory_allocated(device) - start, result)


def _measure_cpu(call: Callable[[], Any]) -> Memory:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = call()
    level = peak = 0
    for nbytes in _cpu_allocations(prof):
        level += nbytes
        peak = max(peak, level)
    return Memory(peak, level, result)


def _cpu_allocations(prof: profile) -> list[int]:
    """Sizes of allocations (positive) and frees (negative) in time order."""
    profiler: Any = prof.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]" and e.device_type().name == "CPU"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
