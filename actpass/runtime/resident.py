"""What is in memory before a training step and stays there."""

from __future__ import annotations

import gc
import inspect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_PROBE = 64
"""The longest axis of the parameter on which an optimizer's state is measured."""


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes. inputs: parameters, buffers and a region's other inputs. optimizer_state: of the optimizers that step the region's
    parameters, what is there and what their first step will add. accumulated: gradients that are there already, to which a
    backward's are added. scratch: what an optimizer's step takes for a moment
    beside all gradients; not part of ``total``."""

    inputs: int
    optimizer_state: int
    accumulated: int
    scratch: int = 0

    @property
    def total(self) -> int:
        return self.inputs + self.optimizer_state + self.accumulated

    def __str__(self) -> str:
        parts = [f"{self.inputs} of parameters and inputs", f"{self.optimizer_state} of optimizer state"]
        return ", ".join(parts + ([f"{self.accumulated} of accumulated gradients"] if self.accumulated else []))


def resident(inputs: Sequence[Any]) -> Resident:
    """What a region that runs with ``inputs`` finds in memory: they, and all that the optimizers of its parameters step.
    Counted by storage, so that what is tied counts once."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    parameters = {id(p): p for p in tensors if isinstance(p, torch.nn.Parameter)}
    state = scratch = 0
    for optimizer in _optimizers():
        own = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(id(p) in parameters for p in own):
            continue
        parameters |= {id(p): p for p in own}
        scratch = max(scratch, _scratch(optimizer))
        tensors += own
        present = [t for p in own for t in optimizer.state.get(p, {}).values() if isinstance(t, torch.Tensor)]
        missing = [p for p in own if p not in optimizer.state]
        state += _storage_bytes(present) + sum(_state_to_come(optimizer, p) for p in missing)
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    return Resident(_storage_bytes(tensors), state, _storage_bytes(gradients), scratch)


def _scratch(optimizer: torch.optim.Optimizer) -> int:
    """What a step takes beside gradients and state, as torch's Adam does: two tensors as large as a parameter at a time; with
    ``foreach``, the default on a GPU, of all parameters at once; nothing if it is fused."""
    found = 0
    for group in optimizer.param_groups:
        sizes = [p.numel() * p.element_size() for p in group["params"]]
        if group.get("fused"):
            continue
        together = group.get("foreach")
        if together is None:
            together = any(p.is_cuda for p in group["params"])
        found = max(found, 2 * (sum(sizes) if together else max(sizes, default=0)))
    return found


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    local: list[Any] = [getattr(t, "to_local", lambda t=t: t)() for t in tensors]  # of a sharded tensor what this rank holds
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in local}.values())


def _optimizers() -> list[torch.optim.Optimizer]:
    """All that this process holds; of a wrapper (accelerate's) and what it wraps the latter."""
    found = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]  # isinstance asks dead proxies
    return [o for o in found if not isinstance(getattr(o, "optimizer", None), torch.optim.Optimizer)]


def _state_to_come(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> int:
    """Bytes that the first step of ``optimizer`` will add for ``parameter``: from one step of a copy on a small parameter of as
    many axes. Two copies of the parameter (Adam's) where that step fails."""
    shape = [min(s, _PROBE) for s in parameter.shape]
    small = torch.nn.Parameter(torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
    small.grad = torch.zeros_like(small)
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    probe = object.__new__(type(optimizer))
    probe.__dict__.update(optimizer.__dict__, state=defaultdict(dict), param_groups=[{**group, "params": [small]}])
    try:
        with torch.no_grad():
            inspect.unwrap(type(optimizer).step)(probe)  # without hooks: nobody's step is counted
    except Exception:
        return 2 * parameter.numel() * parameter.element_size()
    added = [t for t in probe.state[small].values() if isinstance(t, torch.Tensor)]
    grown = [t for t in added if t.numel() > 1]
    scale = parameter.numel() / max(small.numel(), 1)
    return round(_storage_bytes(grown) * scale) + sum(t.element_size() for t in added if t.numel() == 1)
