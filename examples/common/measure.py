"""Memory of one training step, measured: what is saved for the backward, and the peak.

Both are counted above what was allocated when the step began (parameters, optimizer state), so the
gradients are in the peak and the model is not. A CPU has no allocator statistics: there, one step
runs under torch's profiler, whose `[memory]` events are every allocation and release in order.
On CUDA the caching allocator's own counters are read, which round each tensor up to 512 bytes.

    with meter:                     # one training step
        with meter.forward():       # its forward
            loss = model(*batch)
        loss.backward()
    meter.memory                    # StepMemory(saved_bytes=..., peak_bytes=...)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

UNKNOWN = "\N{EN DASH}"
FORWARD_MARK = "training step: forward"


@dataclass(frozen=True, slots=True)
class StepMemory:
    """`saved_bytes`: what the forward leaves alive, the loss with it. `peak_bytes`: of the step."""

    saved_bytes: int
    peak_bytes: int


class Meter(Protocol):
    """Measures the one step that it is entered around."""

    memory: StepMemory | None

    def __enter__(self) -> Meter: ...

    def __exit__(self, *error: object) -> None: ...

    def forward(self) -> AbstractContextManager[object]:
        """To be entered around each forward of the step; the first one is measured."""
        ...


class ProfilerMeter:
    """For the CPU; the profiled step itself is slower, so its time should not be counted."""

    def __init__(self) -> None:
        self.memory: StepMemory | None = None
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints that it starts and stops
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> ProfilerMeter:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(None, None, None)
        if error[0] is None:
            self.memory = _read_profile(self._profile)

    def forward(self) -> AbstractContextManager[object]:
        return record_function(FORWARD_MARK)


def _read_profile(profiled: profile) -> StepMemory:
    # `prof.events()` folds memory events into the operators that caused them; the raw list, in
    # order of time, is only here (torch 2.11 to 2.13).
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    assert results is not None
    events = sorted(results.events(), key=lambda event: event.start_ns())
    forward = next(event for event in events if event.name() == FORWARD_MARK)
    alive = peak = before = after = 0
    for event in events:
        if event.name() != "[memory]":
            continue
        alive += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]: not in the stub
        peak = max(peak, alive)
        if event.start_ns() < forward.start_ns():
            before = alive
        if event.start_ns() < forward.end_ns():
            after = alive
    return StepMemory(saved_bytes=after - before, peak_bytes=peak)


class CudaMeter:
    """For one CUDA device, from the caching allocator's counters."""

    def __init__(self, device: torch.device) -> None:
        self.memory: StepMemory | None = None
        self._device = device
        self._saved_bytes: int | None = None
        self._resident_bytes = 0

    def __enter__(self) -> CudaMeter:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._resident_bytes = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device) - self._resident_bytes
        if error[0] is None and self._saved_bytes is not None:
            self.memory = StepMemory(self._saved_bytes, peak)

    @contextmanager
    def forward(self) -> Iterator[None]:
        before = torch.cuda.memory_allocated(self._device)
        yield
        if self._saved_bytes is None:
            self._saved_bytes = torch.cuda.memory_allocated(self._device) - before


def make_meter(device: torch.device) -> Meter:
    """The meter for that device."""
    return CudaMeter(device) if device.type == "cuda" else ProfilerMeter()


def resident_bytes(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers and optimizer state, each storage once."""
    state = [value for values in optimizer.state.values() for value in values.values()]
    tensors = [value for value in (*module.parameters(), *module.buffers(), *state) if isinstance(value, Tensor)]
    storages = [inner.untyped_storage() for tensor in tensors for inner in _inner_tensors(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _inner_tensors(tensor: Tensor) -> list[Tensor]:
    """`tensor`, or what it is made of, if it is of a kind of its own (a weight in NF4)."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names: list[str] = tensor.__tensor_flatten__()[0]
    found = [getattr(tensor, name) for name in names]  # a shard (DTensor) names its mesh, too
    return [inner for each in found if isinstance(each, Tensor) for inner in _inner_tensors(each)]


def format_bytes(count: int | None) -> str:
    """For people: `1.25 GB`, `37.0 MB`, or a dash where nothing is known."""
    if count is None:
        return UNKNOWN
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
