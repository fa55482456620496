"""What one model leaves behind in the process, the next one does not find after a reset."""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch

import actpass
from actpass.optim import AdamW
from actpass.options import global_budget
from actpass.runtime import state
from actpass.runtime.step_counter import STEP_COUNTER
from actpass.runtime.subspaces import STORE

from . import models
from .helpers import eager_actcomp, step

CONTAINERS = (dict, list, set, deque, WeakSet, WeakKeyDictionary, WeakValueDictionary)
STAYS = {"actpass.runtime.regions._hooks"}
"""Made once in a process."""


def remembered() -> Iterator[tuple[str, Any]]:
    """How much is in each container of each module of the package, and what each private number or pair there is."""
    for module_name, module in sorted(sys.modules.items()):
        for name, value in sorted(vars(module).items()) if module_name.startswith("actpass.") else ():
            where = f"{module_name}.{name}"
            if name.startswith("__") or where in STAYS:
                continue
            if isinstance(value, CONTAINERS):
                yield where, len(value)
            elif name.startswith("_") and name.islower() and isinstance(value, int | float | tuple | None):
                yield where, value
    yield "clock", STEP_COUNTER.state_dict()
    yield "subspaces", len(STORE._of)
    yield "global budget", global_budget.get()


def train() -> None:
    """Two models in turn: one in learned subspaces under a budget of peak bytes, one with low-rank gradients."""
    actpass.set_memory_budget("1GiB")
    for options in (
        {"projection": "pca", "rank": 8},
        {"projection": "haar", "rank": 8, "weight_gradient_format": "low_rank", "memory_budget": None},
    ):
        model, inputs = models.mlp()
        options = {**options, "skip_unprofitable": False}
        optimizer = AdamW(model.parameters())
        function = torch.compile(model, backend=eager_actcomp(options))
        for _ in range(2):
            step(function, model, inputs)
            optimizer.step()


def test_after_a_reset_the_process_remembers_nothing():
    train()  # what is made once in a process is there
    state.reset()
    torch.compiler.reset()
    gc.collect()
    before = dict(remembered())
    train()
    assert STEP_COUNTER.steps == 4
    during = dict(remembered())
    assert {k for k in during if during[k] != before.get(k)} >= {"actpass.runtime.regions._regions", "clock", "global budget"}
    state.reset()
    torch.compiler.reset()
    gc.collect()
    after = dict(remembered())
    assert {k: (v, after.get(k)) for k, v in before.items() if after.get(k) != v} == {}
