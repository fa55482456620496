"""``memory_budget``: its units, and the global one."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from actpass.errors import BudgetError

_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b\s*", re.IGNORECASE)
_FACTOR = {"": 1, **{f"{u}{i}": (1024 if i else 1000) ** (n + 1) for n, u in enumerate("kmgt") for i in ("", "i")}}
LARGEST_BYTES = 2**60


def parse_memory_budget(name: str, value: Any) -> float | int | None:
    """A budget, checked. Returns a float (a fraction of saved bytes) or an int (bytes of peak). Raises `BudgetError`."""
    allowed = (
        "Allowed: a float in [0, 1], the fraction of the bytes that Inductor's default would save for backward (1.0: "
        "Inductor's own cut); an int > 1 or a string like '20GiB' or '800 MB', the peak of a step in bytes with parameters and "
        "optimizer state counted in; 'auto', what the device has free."
    )
    if value is None:
        return None
    if isinstance(value, str):
        if value.strip().lower() == "auto":
            return _free_memory(name)
        match = _BYTES.fullmatch(value)
        if match is None:
            raise BudgetError(f"{name}={value!r} is not a number of bytes. {allowed}")
        return _checked_bytes(name, value, int(float(match[1]) * _FACTOR[(match[2] or "").lower()]), allowed)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BudgetError(f"{name}={value!r} is not a number. {allowed}")
    if isinstance(value, int) and value > 1:
        return _checked_bytes(name, value, value, allowed)
    if math.isnan(value) or not 0.0 <= value <= 1.0:
        raise BudgetError(f"{name}={value!r} is outside [0, 1]. {allowed}")
    return float(value)


def _checked_bytes(name: str, asked: Any, nbytes: int, allowed: str) -> int:
    """``nbytes``, which ``asked`` says. What is written with a unit is never a fraction: "0GB" and "1 B" are too few bytes."""
    if nbytes <= 1:
        raise BudgetError(f"{name}={asked!r} is {nbytes} bytes, which nothing fits in. {allowed}")
    if nbytes > LARGEST_BYTES:
        raise BudgetError(f"{name}={asked!r} is more than any machine has. {allowed}")
    return nbytes


class GlobalBudget:
    """The budget of every region whose options name none. Read when a region is compiled, and ``"auto"`` then."""

    def __init__(self) -> None:
        self.asked: Any = None

    def set(self, asked: Any) -> Any:
        """Check ``asked`` and put it in force; returns what was before. Raises `BudgetError`, and changes nothing then."""
        parse_memory_budget("memory_budget", asked)
        self.asked, before = asked, self.asked
        return before

    def get(self) -> float | int | None:
        return parse_memory_budget("memory_budget", self.asked)


global_budget = GlobalBudget()

_LEFT_FREE = 0.05
"""Of a device's memory, with ``auto``: for the allocator's own gaps and for libraries."""
_GRID = 32
"""Of a device's memory, with ``auto``: what is free is rounded down to a multiple of this part of it."""


def _free_memory(name: str) -> int:
    """What this process may use of the current CUDA device: what it has allocated and what is free, less a margin, rounded
    down so that a few megabytes more or less give the same plan: on all ranks, and in the next process, which then finds the
    compiled graphs.

    Ranks do not agree on one number. The smallest would take a collective, which hangs where ranks compile different regions,
    and the first rank's does not fit a smaller card. Where equal cards fall on two sides of a step of the grid, or cards
    differ, plans may differ; `actpass.runtime.plan_agreement` says so, and a number of bytes is the cure.
    """
    if not torch.cuda.is_available():
        raise BudgetError(
            f"{name}='auto' takes what the CUDA device has free, and there is none. Give the bytes: {name}='20GiB', say."
        )
    free, total = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    usable = int(free + unused + torch.cuda.memory_allocated() - _LEFT_FREE * total)
    step = total // _GRID
    return usable // step * step
