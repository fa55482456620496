"""What is in memory before a training step and stays there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from actpass.low_rank_gradient import numbers_of
from actpass.memory import optimizer_state as optimizers
from actpass.torch_compat import FakeTensor, ShardedUnit, active_ddp, is_bucketed, is_wrapper, sharded_units, storage_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """Bytes. inputs: parameters, buffers and other inputs of the call that a region was compiled in. others: parameters that
    this call does not take, of the same optimizers or of regions of the step, and what is frozen in the modules around it.
    optimizer_state: of the optimizers that step these parameters, what is there and what their first step will add. assumed:
    whether it is AdamW's, because no optimizer is known yet. accumulated: gradients that are there already, to which a
    backward's are added. buckets: the copy of all gradients that DistributedDataParallel reduces. gathered: parameters of other
    FSDP2 units that are whole at the same time: those that stay so, and those of the next unit, which arrive. scratch: what an
    optimizer's step takes for a moment beside all gradients; not part of ``total``. elsewhere: whether there are trained
    parameters that the region does not take: it is not the whole of a step. known: whether an optimizer of these parameters
    is."""

    inputs: int
    optimizer_state: int
    accumulated: int
    others: int = 0
    assumed: bool = False
    buckets: int = 0
    gathered: int = 0
    scratch: int = 0
    elsewhere: bool = False
    known: bool = False

    @property
    def total(self) -> int:
        return self.inputs + self.others + self.optimizer_state + self.accumulated + self.buckets + self.gathered

    def with_more(self, nbytes: int) -> Resident:
        """With other inputs that stay: learned subspaces."""
        return replace(self, inputs=self.inputs + nbytes)

    def __str__(self) -> str:
        assumed = f" ({ASSUMED})" if self.assumed else ""
        more = {
            "accumulated gradients": self.accumulated,
            "gradient buckets": self.buckets,
            "gathered parameters": self.gathered,
        }
        parts = [f"{self.inputs + self.others} of parameters and inputs", f"{self.optimizer_state} of optimizer state{assumed}"]
        return ", ".join([*parts, *(f"{nbytes} of {name}" for name, nbytes in more.items() if nbytes)])


ASSUMED = (
    "assumed to be AdamW's, for no optimizer has stepped yet: name the one that will with actpass.set_optimizer(optimizer), or "
    "give what it takes, options={'optimizer_state_bytes': ...}"
)


def resident(inputs: Sequence[Any], others: Iterable[torch.Tensor] = (), optimizer_state_bytes: int | None = None) -> Resident:
    """What a region that runs with ``inputs`` finds in memory: they, and all that the optimizers of its parameters step.
    Counted by storage, so that what is tied counts once, and of a tensor subclass what is inside it.

    others: parameters that were seen in the same step, and what is frozen around the region. optimizer_state_bytes: what the
    user said of an optimizer that is not known. Where DDP's buckets cut the graph in pieces, inputs are fake: parameters are
    then those of the DDP that runs. Under FSDP2 inputs are whole parameters; all shards are there beside them, those of frozen
    parameters, too.
    """
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    parameters = {id(p): p for p in tensors if isinstance(p, torch.nn.Parameter)}
    around = {id(p): p for p in others if id(p) not in parameters}
    ddp = active_ddp()
    if ddp is not None:
        parallel = {id(p): p for p in ddp.parameters()}
        if any(isinstance(x, FakeTensor) for x in tensors):
            parameters, tensors, around = {}, [x for x in tensors if not isinstance(x, torch.nn.Parameter)], parallel
        elif not parameters.keys().isdisjoint(parallel):
            around |= {i: p for i, p in parallel.items() if i not in parameters}
    here = Resident(inputs=storage_bytes(tensors), optimizer_state=0, accumulated=0)
    stepped = _stepped(parameters, around, optimizer_state_bytes)
    everything = stepped.everything
    gradients = [p.grad for p in everything.values() if p.grad is not None]
    return replace(
        stepped.beside(here, tensors),
        accumulated=storage_bytes(map(numbers_of, gradients)),
        buckets=_bucket_bytes(ddp, everything),
    )


def again(
    before: Resident, parameters: Iterable[torch.Tensor], others: Iterable[torch.Tensor], optimizer_state_bytes: int | None
) -> Resident:
    """What a region that was compiled beside ``before``, in a call with ``parameters``, finds now that more is known: other
    optimizers, and ``others``, which include what later calls ran with."""
    own = {id(p): p for p in parameters}
    around = {id(p): p for p in others if id(p) not in own}
    return _stepped(own, around, optimizer_state_bytes).beside(before, own.values())


def frozen_around(inputs: Sequence[Any], modules: Iterable[torch.nn.Module]) -> list[torch.Tensor]:
    """Frozen parameters and buffers of ``modules``, in whose forward a region with ``inputs`` is compiled, that are no inputs
    and on the device of one: those of an embedding and a head no optimizer steps, and maybe no region takes. None where inputs
    are fake, and do not tell which they are."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    if any(isinstance(x, FakeTensor) for x in tensors):
        return []
    own, devices = {id(x) for x in tensors}, {x.device for x in tensors}
    held = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return [t for i, t in held.items() if i not in own and not t.requires_grad and t.device in devices]


@dataclass(frozen=True)
class _Stepped:
    """everything: the region's parameters, and those that are stepped with them, by id; under FSDP2 the shards."""

    own: Mapping[int, torch.Tensor]
    everything: Mapping[int, torch.Tensor]
    state: int
    assumed: bool
    scratch: int
    known: bool
    gathered: int

    def beside(self, there: Resident, tensors: Iterable[torch.Tensor]) -> Resident:
        """``there``, whose inputs are ``tensors`` among others."""
        known = {key for t in tensors for key, _ in storages(t)}
        rest = {key: nbytes for p in self.everything.values() for key, nbytes in storages(p) if key not in known}
        elsewhere = any(i not in self.own and not optimizers.is_shard(p) for i, p in self.everything.items() if p.requires_grad)
        return replace(
            there,
            others=sum(rest.values()),
            optimizer_state=self.state,
            assumed=self.assumed,
            scratch=self.scratch,
            gathered=self.gathered,
            elsewhere=elsewhere,
            known=self.known,
        )


def _stepped(
    own: Mapping[int, torch.Tensor], others: Mapping[int, torch.Tensor], optimizer_state_bytes: int | None
) -> _Stepped:
    """What the optimizers of ``own`` and ``others`` hold: of those that are known, or as the user or AdamW has it."""
    units = sharded_units(own.keys())
    gathered = _gathered_bytes(units, own.keys())
    whole = frozenset[int]().union(*(u.whole for u in units))
    shards = {id(p): p for u in units for p in u.shards}
    seen = {**{i: p for i, p in {**own, **others}.items() if i not in whole}, **shards}
    known = optimizers.stepping(seen.values())
    if not known:
        state = optimizers.assumed_state(seen.values()) if optimizer_state_bytes is None else optimizer_state_bytes
        scratch = optimizers.scratch_of(seen.values())
        return _Stepped(own, seen, state, optimizer_state_bytes is None, scratch, known=False, gathered=gathered)
    state = sum(storage_bytes(optimizers.state_tensors(o)) + optimizers.state_to_come(o) for o in known)
    everything = {**seen, **{id(p): p for o in known for p in optimizers.stepped_by(o)}}
    return _Stepped(own, everything, state, False, max(map(optimizers.scratch, known)), known=True, gathered=gathered)


def _gathered_bytes(units: Sequence[ShardedUnit], own: Collection[int]) -> int:
    """Of units that ``own`` are not parameters of: the buffer in which the next one arrives is as large as that is whole."""
    stay = sum(u.nbytes for u in units if u.stays and u.whole.isdisjoint(own))
    arriving = [u.nbytes for u in units if not u.stays]
    return stay + (max(arriving) if len(arriving) > 1 else 0)


def _bucket_bytes(ddp: DistributedDataParallel | None, parameters: Mapping[int, torch.Tensor]) -> int:
    """Bytes of the buckets into which ``ddp``, which runs the region, copies gradients: as many as gradients of its parameters,
    less those that it was told to ignore."""
    if ddp is None or not any(id(p) in parameters for p in ddp.parameters()):
        return 0
    return sum(p.numel() * p.element_size() for p in ddp.parameters() if is_bucketed(p))


def storages(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """(key, bytes) of the memory of ``tensor``: of a subclass that wraps others (a shard, codes and their scales) of what it
    wraps; its own storage is as large as the tensor that it stands for, and empty. A shard (DTensor) names its mesh, too."""
    if is_wrapper(tensor):
        names, _ = tensor.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        for inner in (getattr(tensor, name) for name in names):
            if isinstance(inner, torch.Tensor):
                yield from storages(inner)
    else:
        storage = tensor.untyped_storage()
        yield storage_key(storage), storage.nbytes()


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({key: nbytes for t in tensors for key, nbytes in storages(t)}.values())
