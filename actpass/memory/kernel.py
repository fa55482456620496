"""A kernel of Inductor's, as the model of live bytes knows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Kernel:
    """node: its first. loops: what it runs over, None for what is no loop. scratch: bytes that it needs while
    it runs, its results among them, if more than they. writes, reads: what it leaves in memory and reads from there;
    size: bytes of the former. members: its results in order, with those that only the kernel itself reads. unwritten: bytes
    of the latter, which never get to memory, but Inductor counts them. nested: whether it is one outer loop around several.
    flat: whether a CPU runs it as one loop over all elements, in the order in which they lie, not as one over rows.
    zeroed: results that a loop of its own, which needs nothing, fills with zeros before. allocates: whether the operator makes
    memory for its results itself, which then is no other's that is free again. traffic: bytes that its loops, or those of the
    graph that it calls, read and write; kernels: how many it is, if it calls a graph."""

    node: Any
    position: int
    loops: tuple[int, int] | None
    scratch: int = 0
    writes: list[Any] = field(default_factory=list[Any])
    reads: list[Any] = field(default_factory=list[Any])
    members: list[Any] = field(default_factory=list[Any])
    size: int = 0
    unwritten: int = 0
    nested: bool = False
    flat: bool = False
    zeroed: list[Any] = field(default_factory=list[Any])
    allocates: bool = False
    traffic: int = 0
    kernels: int = 1

    @property
    def needs(self) -> int:
        return max(self.size, self.scratch)

    @property
    def believed(self) -> int:
        return self.size + self.unwritten
