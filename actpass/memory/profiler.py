"""Measure the memory of a piece of a training step: what it leaves allocated, and its peak. Used by the tests and tools."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function


@dataclass(frozen=True, slots=True)
class Memory:
    """peak_bytes: the highest level during the call, above the level at its start. kept_bytes: the level at its end above
    the level at its start. result: what the call returned."""

    peak_bytes: int
    kept_bytes: int
    result: Any


def measure(call: Callable[[], Any], device: torch.device | str = "cpu", *, before: Callable[[], Any] | None = None) -> Memory:
    """Run ``call`` once and measure its memory on ``device``.

    CUDA: the caching allocator's counters (blocks are rounded up to 512 bytes). CPU: the profiler's allocation events
    (to the byte; agree with the process's high-water mark within 1 %). Warm up first: compiling allocates, too.
    before: run first, not measured. What ``call`` frees counts on a CPU only if it was allocated by ``before`` or by itself
    (the profiler knows the size of no other block): pass a step whose state the next one replaces.
    """
    where = torch.device(device)
    if where.type == "cuda":
        if before is not None:
            before()
        return _measure_cuda(call, where)
    return _measure_cpu(call, before)


def _measure_cuda(call: Callable[[], Any], device: torch.device) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    return Memory(torch.cuda.max_memory_allocated(device) - start, torch.cuda.memory_allocated(device) - start, result)


_MEASURED = "actpass.memory.profiler"


def _measure_cpu(call: Callable[[], Any], before: Callable[[], Any] | None) -> Memory:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        if before is not None:
            before()
        with record_function(_MEASURED):
            result = call()
    level = peak = 0
    for nbytes in _cpu_allocations(prof):
        level += nbytes
        peak = max(peak, level)
    return Memory(peak, level, result)


def _cpu_allocations(prof: profile) -> list[int]:
    """Sizes of allocations (positive) and frees (negative) of the measured call in time order."""
    profiler: Any = prof.profiler
    events = profiler.kineto_results.events()
    start = next(e.start_ns() for e in events if e.name() == _MEASURED)
    found = [e for e in events if e.name() == "[memory]" and e.device_type().name == "CPU" and e.start_ns() >= start]
    return [e.nbytes() for e in sorted(found, key=lambda e: e.start_ns())]
