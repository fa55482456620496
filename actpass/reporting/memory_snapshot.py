"""The predicted step as a snapshot of torch's allocator, as ``torch.cuda.memory._snapshot`` documents it: what
https://pytorch.org/memory_viz and ``python -m torch.cuda._memory_viz`` open."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from actpass.memory.footprint import levels_below
from actpass.memory.memory_curve import Curves, Lifetime, Lifetimes, stretches

_BASE = 1 << 32
"""The address of the only segment."""
_REST = "smaller tensors, and what kernels need beside their results"


def snapshot(regions: Sequence[Curves]) -> dict[str, Any]:
    """The allocations and frees of a step that runs ``regions``, above parameters, inputs and optimizer state. The frames of an
    allocation say the tensor, its operator and module, and the pass and region.

    What is too small to be listed is one allocation, sized anew for each point of the curve, so that the total never differs
    from it.
    """
    heap = _Heap()
    calls = [r.plan for r in regions]
    forwards, backwards = levels_below(calls)
    for i, region in enumerate(regions):
        _run(heap, i, region, forwards[i], backward=False)
    for i in reversed(range(len(regions))):
        _run(heap, i, regions[i], backwards[i], backward=True)
    heap.allocate("rest", sum(c.gradients for c in calls) - heap.nbytes, _frames(_REST, "", "after the step"))
    return {"segments": [heap.segment()], "device_traces": [heap.events]}


def _run(heap: _Heap, call: int, region: Curves, below: int, *, backward: bool) -> None:
    """Run one pass of ``region``. below: bytes that were there before."""
    lives = region.lifetimes
    first, count = (lives.forward_steps, lives.backward_steps) if backward else (0, lives.forward_steps)
    starts, ends = _by_step(lives)
    where = f"{'backward' if backward else 'forward'} of region {call}"
    for (a, b), level in zip(stretches(count), (region.plan.backward if backward else region.plan.forward), strict=True):
        steps = range(first + a, first + b)
        listed, now = list[int](), heap.nbytes
        for step in steps:
            now += sum(t.nbytes for t in starts.get(step, {}).values()) - sum(t.nbytes for t in ends.get(step, {}).values())
            listed.append(now)
        for step in steps:
            for number in ends.get(step, {}):
                heap.free((call, number))
            if step == steps[0]:
                heap.allocate("rest", below + level - max(listed), _frames(_REST, "", where))
            for number, t in starts.get(step, {}).items():
                heap.allocate((call, number), t.nbytes, _frames(f"{t.what} ({t.op})" if t.op else t.what, t.module, where))
        heap.free("rest")
    for number in ends.get(first + count, {}):
        heap.free((call, number))


def _by_step(lives: Lifetimes) -> tuple[Mapping[int, dict[int, Lifetime]], Mapping[int, dict[int, Lifetime]]]:
    """What begins, and what ends, at each step: number -> tensor."""
    starts: dict[int, dict[int, Lifetime]] = {}
    ends: dict[int, dict[int, Lifetime]] = {}
    for number, t in enumerate(lives.tensors):
        starts.setdefault(t.start, {})[number] = t
        if t.end is not None:
            ends.setdefault(t.end, {})[number] = t
    return starts, ends


def _frames(name: str, module: str, where: str) -> list[dict[str, Any]]:
    return [{"name": name, "filename": module or "(no module)", "line": 0}, {"name": where, "filename": "step", "line": 0}]


class _Heap:
    """Memory in which each block lies at the first gap that it fits in, and the events that led there."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.nbytes = 0
        self._blocks: dict[Any, dict[str, Any]] = {}
        self._taken: list[tuple[int, int]] = []  # (address, end), in order
        self._end = _BASE

    def allocate(self, key: Any, nbytes: int, frames: list[dict[str, Any]]) -> None:
        """Allocate ``nbytes`` as ``key``; nothing for 0 of them."""
        assert nbytes >= 0, f"the tensors that are listed take {-nbytes} bytes more than the curve says"
        if not nbytes:
            return
        address = _BASE
        for start, end in self._taken:
            if start - address >= nbytes:
                break
            address = end
        bisect.insort(self._taken, (address, address + nbytes))
        self._end = max(self._end, address + nbytes)
        self._blocks[key] = {"address": address, "size": nbytes, "frames": frames}
        self.nbytes += nbytes
        self._note("alloc", self._blocks[key])

    def free(self, key: Any) -> None:
        block = self._blocks.pop(key, None)
        if block is None:  # it was of no bytes
            return
        self._taken.remove((block["address"], block["address"] + block["size"]))
        self.nbytes -= block["size"]
        self._note("free_requested", block)
        self._note("free_completed", block)

    def _note(self, action: str, block: Mapping[str, Any]) -> None:
        event = {"action": action, "addr": block["address"], "size": block["size"], "stream": 0, "frames": block["frames"]}
        self.events.append({**event, "time_us": len(self.events)})

    def segment(self) -> dict[str, Any]:
        """The memory as it is now: as large as it ever was."""
        blocks: list[dict[str, Any]] = []
        at = _BASE
        for block in sorted(self._blocks.values(), key=lambda b: b["address"]):
            blocks += _gap(at, block["address"])
            blocks.append({**block, "requested_size": block["size"], "state": "active_allocated"})
            at = block["address"] + block["size"]
        blocks += _gap(at, self._end)
        return {
            "device": 0,
            "address": _BASE,
            "total_size": self._end - _BASE,
            "allocated_size": self.nbytes,
            "active_size": self.nbytes,
            "requested_size": self.nbytes,
            "stream": 0,
            "segment_type": "large",
            "segment_pool_id": (0, 0),
            "is_expandable": False,
            "frames": [],
            "blocks": blocks,
        }


def _gap(start: int, end: int) -> list[dict[str, Any]]:
    if start == end:
        return []
    return [{"address": start, "size": end - start, "requested_size": 0, "state": "inactive", "frames": []}]
