"""The clock that seeds follow: it advances when an optimizer steps, not when a forward runs, so that the gradients that
are accumulated between two steps lie in one subspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from actpass.errors import StateError
from actpass.torch_compat import after_backward

SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True)
class Moment:
    """step: how many optimizer steps there were before. call: how many calls of training regions since the last of them."""

    step: int
    call: int


@dataclass
class StepCounter:
    """steps: optimizer steps seen since training began. calls: of training regions since then, each of which draws; a step
    without one (a second optimizer in the same training step, an unrelated one) does not advance the clock. Optimizers that
    step within the backward, one for each parameter, are one step, which ends with that backward: between two of them a
    checkpoint may run regions again."""

    steps: int = 0
    calls: int = 0

    def read(self) -> Moment:
        """When the training forward that asks runs. No two of a step are told the same."""
        self.calls += 1
        return Moment(self.steps, self.calls - 1)

    def advance(self) -> None:
        if self.calls:
            self.steps += 1
            self.calls = 0

    def state_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "steps": self.steps, "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version = state.get("schema_version")
        if version != SCHEMA_VERSION:
            raise StateError(
                f"state has schema_version={version!r}; this version of actpass reads {SCHEMA_VERSION}. Pass what "
                "actpass.state_dict(model) returned."
            )
        counts = state.get("steps"), state.get("calls")
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in counts):
            raise StateError(f"state has steps={counts[0]!r}, calls={counts[1]!r}. Allowed: two ints >= 0.")
        self.steps, self.calls = state["steps"], state["calls"]


STEP_COUNTER = StepCounter()
"""The process's clock. One, because every region of a training step must see the same step."""

_hook: Any = None


def _after_step(*_: Any) -> None:
    after_backward(STEP_COUNTER.advance)


def start() -> None:
    """Let every torch optimizer's step advance the clock (once a process; a region that draws asks for it)."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)
