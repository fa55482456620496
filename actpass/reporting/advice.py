"""What a step's memory goes to, and what would lower it: the last lines of `actpass.explain`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from actpass._format import megabytes as _mb
from actpass.memory.memory_curve import Held

LINES = 5
LEAST_SHARE = 0.01
"""Of a step's bytes: what is less is not worth a line."""


@dataclass(frozen=True, slots=True)
class Part:
    """What some of a step's bytes at its peak are."""

    what: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that is not in use. step_bytes: the predicted peak of a step with it. planned: whether the pass has planned the
    step so; else all but what is known in closed form is taken to stay."""

    what: str
    step_bytes: int
    planned: bool


@dataclass(frozen=True, slots=True)
class Advice:
    """step_bytes: the predicted peak of a whole step: parameters, inputs, optimizer state and what is above them. during: what
    runs then. parts: of these bytes, the largest first. largest: the largest tensor that the graphs hold then; None while the
    optimizer steps. settings: the one that takes least first; those that gain nothing among them."""

    step_bytes: int
    during: str
    parts: tuple[Part, ...]
    largest: Held | None
    settings: tuple[Setting, ...]

    @property
    def gains(self) -> tuple[Setting, ...]:
        """The settings that would lower the peak of a step by a hundredth or more."""
        return tuple(s for s in self.settings if self.step_bytes - s.step_bytes >= LEAST_SHARE * self.step_bytes)

    def lines(self) -> Iterator[str]:
        """At most `LINES`."""
        parts = ", ".join(f"{p.what} {_mb(p.nbytes)}" for p in self.parts if p.nbytes >= LEAST_SHARE * self.step_bytes)
        largest = f"; the largest tensor: {self.largest}, {_mb(self.largest.nbytes)}" if self.largest is not None else ""
        yield f"a step takes {_mb(self.step_bytes)} at its peak, in {self.during}: {parts}{largest}"
        without = [s for s in self.settings if s.planned and s not in self.gains]
        for s in self.gains[: LINES - 1 - bool(without)]:
            how = "planned" if s.planned else "computed"
            yield f"{s.what}: {_mb(s.step_bytes)}, {_mb(self.step_bytes - s.step_bytes)} less ({how})"
        if without:
            yield f"planned, too, and no gain: {', '.join(f'{s.what} {_mb(s.step_bytes)}' for s in without)}"
