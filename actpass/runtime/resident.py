"""What is in memory before a training step and stays there."""

from __future__ import annotations

import gc
import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch.nn.parallel import DistributedDataParallel

from actpass._torch import FakeTensor, is_bucketed
from actpass.gradients import numbers_of

T = TypeVar("T")

_PROBE = 64
"""The longest axis of the parameter on which an optimizer's state is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """Bytes. inputs: parameters, buffers and a region's other inputs. optimizer_state: of the optimizers that step the region's
    parameters, what is there and what their first step will add. accumulated: gradients that are there already, to which a
    backward's are added. buckets: the copy of all gradients that DistributedDataParallel reduces. scratch: what an optimizer's
    step takes for a moment beside all gradients; not part of ``total``. elsewhere: whether the optimizers step parameters that
    the region does not take: it is not the whole of a step."""

    inputs: int
    optimizer_state: int
    accumulated: int
    buckets: int = 0
    scratch: int = 0
    elsewhere: bool = False

    @property
    def total(self) -> int:
        return self.inputs + self.optimizer_state + self.accumulated + self.buckets

    def with_more(self, nbytes: int) -> Resident:
        """With other inputs that stay: learned subspaces."""
        return replace(self, inputs=self.inputs + nbytes)

    def __str__(self) -> str:
        more = {"accumulated gradients": self.accumulated, "gradient buckets": self.buckets}
        parts = [f"{self.inputs} of parameters and inputs", f"{self.optimizer_state} of optimizer state"]
        return ", ".join([*parts, *(f"{nbytes} of {name}" for name, nbytes in more.items() if nbytes)])


def resident(inputs: Sequence[Any]) -> Resident:
    """What a region that runs with ``inputs`` finds in memory: they, and all that the optimizers of its parameters step.
    Counted by storage, so that what is tied counts once.

    Where DDP's buckets cut the graph in pieces, inputs are fake: parameters are then those of all optimizers.
    """
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    fake = any(isinstance(x, FakeTensor) for x in tensors)
    parameters = {id(p): p for p in tensors if isinstance(p, torch.nn.Parameter)}
    living = _living(torch.optim.Optimizer)
    optimizers = [o for o in living if not isinstance(getattr(o, "optimizer", None), torch.optim.Optimizer)]  # accelerate wraps
    stepped = [(o, own) for o in optimizers for own in (_stepped(o),) if fake or any(id(p) in parameters for p in own)]
    if fake and stepped:
        parameters, tensors = {}, [x for x in tensors if not isinstance(x, torch.nn.Parameter)]
    everything = parameters | {id(p): p for _, own in stepped for p in own}
    state = sum(_state(optimizer, own) for optimizer, own in stepped)
    gradients = [p.grad for p in everything.values() if p.grad is not None]
    return Resident(
        inputs=_storage_bytes([*tensors, *everything.values()]),
        optimizer_state=state,
        accumulated=_storage_bytes(map(numbers_of, gradients)),
        buckets=_bucket_bytes(everything),
        scratch=max((_scratch(optimizer) for optimizer, _ in stepped), default=0),
        elsewhere=any(id(p) not in parameters for p in everything.values() if p.requires_grad),
    )


def _stepped(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _state(optimizer: torch.optim.Optimizer, own: Sequence[torch.Tensor]) -> int:
    """Bytes of an optimizer's state: what is there, and what its first step adds."""
    present = [t for p in own for t in optimizer.state.get(p, {}).values() if isinstance(t, torch.Tensor)]
    return _storage_bytes(present) + sum(_state_to_come(optimizer, p) for p in own if p not in optimizer.state)


def _bucket_bytes(parameters: Mapping[int, torch.Tensor]) -> int:
    """Bytes of the buckets into which DDP copies gradients: as many as gradients of its parameters, less those that it was told
    to ignore."""
    wrapped = [w for w in _living(DistributedDataParallel) if any(id(p) in parameters for p in w.parameters())]
    own = {id(p): p for w in wrapped for p in w.parameters() if is_bucketed(p)}
    return sum(p.numel() * p.element_size() for p in own.values())


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


def _living(kind: type[T]) -> list[T]:
    """All objects of a kind that this process holds."""
    return [o for o in gc.get_objects() if issubclass(type(o), kind)]  # isinstance would ask dead proxies


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
