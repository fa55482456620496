"""What this process remembers between calls, forgotten in one place.

What lives in weak references alone (low-rank gradients, deferred logits, wrapped modules) goes with what it is about. Two
things stay: the count of compilations under a process group, because the other ranks count on
(`actpass.runtime.plan_agreement`), and the hooks on torch's optimizers.
"""

from __future__ import annotations

from actpass.options import global_budget
from actpass.runtime import low_rank_binding, progress, regions, subspaces
from actpass.runtime.step_counter import STEP_COUNTER


def reset() -> None:
    """Forget all regions and their plans, the optimizers, the learned subspaces and the global budget, and set the clock to 0.
    What is compiled stays: `torch.compiler.reset()` forgets that."""
    regions.clear()
    subspaces.STORE.clear()
    low_rank_binding.clear()
    progress.clear()
    global_budget.set(None)
    STEP_COUNTER.steps, STEP_COUNTER.calls = 0, 0
