"""The clock that seeds follow: it advances when an optimizer steps, not when a forward runs, so that the gradients that
are accumulated between two steps lie in one subspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from actpass.errors import StateError

SCHEMA_VERSION = 1


@dataclass
class StepCounter:
    """steps: optimizer steps seen since training began. drawn: whether a training forward has read the clock since then; a
    step without one (a second optimizer in the same training step, an unrelated one) does not advance it."""

    steps: int = 0
    drawn: bool = False

    def read(self) -> int:
        """The step that a training forward belongs to."""
        self.drawn = True
        return self.steps

    def advance(self) -> None:
        if self.drawn:
            self.steps += 1
            self.drawn = False

    def state_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "steps": self.steps, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version = state.get("schema_version")
        if version != SCHEMA_VERSION:
            raise StateError(
                f"state has schema_version={version!r}; this version of actpass reads {SCHEMA_VERSION}. Pass what "
                "actpass.state_dict(model) returned."
            )
        steps, drawn = state.get("steps"), state.get("drawn")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0 or not isinstance(drawn, bool):
            raise StateError(f"state has steps={steps!r}, drawn={drawn!r}. Allowed: an int >= 0 and a bool.")
        self.steps, self.drawn = steps, drawn


STEP_COUNTER = StepCounter()
"""The process's clock. One, because every region of a training step must see the same step."""

_hook: Any = None


def _after_step(*_: Any) -> None:
    STEP_COUNTER.advance()


def start() -> None:
    """Let every torch optimizer's step advance the clock (once a process; a region that draws asks for it)."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)
