"""Gradients in factors under DistributedDataParallel: the ranks average coefficients.

DDP copies every gradient into a bucket, and what is in a bucket is dense. `reduce_low_rank` takes the matrices out of the
buckets and averages their gradients when a backward ends: of one in factors only the coefficients, R / N of the bytes. They may
be averaged because all ranks have the same basis; that they have is checked each time.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from actpass.codecs.generator import round_keys
from actpass.errors import ActpassWarning, PlanError
from actpass.low_rank_gradient import SHARDED, Basis, LowRankGradient, numbers_of
from actpass.runtime.plan_agreement import summed
from actpass.torch_compat import (
    averages_otherwise,
    find_tensors,
    is_bucketed,
    is_joined,
    module_in,
    process_group,
    queue_after_backward,
    take_out_of_buckets,
    uncompiled,
)

_BUCKET_BYTES = 25 * 2**20
"""Of one collective, as DDP's."""
_reduced: WeakSet[DistributedDataParallel] = WeakSet()
_bucketed: WeakSet[DistributedDataParallel] = WeakSet()
"""Those that make low-rank gradients dense."""


def reduce_low_rank(ddp: nn.Module) -> None:
    """Let the ranks average the coefficients of low-rank gradients (``options={"weight_gradient_format": "low_rank"}``) where
    DDP averages dense ones: R / N of the bytes between ranks, no buckets for them, and `LowRankGradient` after the backward.

    ddp: the `torch.nn.parallel.DistributedDataParallel` (or what `torch.compile` made of it), before the backward; call it
    on all of its ranks. From then on DDP leaves the weights with two or three axes alone, except embeddings; a gradient of
    them that is dense after all is averaged densely. It happens when the backward ends, and takes one collective more, of 16
    bytes between the CPUs (gloo), that compares the bases. ``no_sync``, unused parameters, static graphs and views of buckets
    work as before. Communication hooks see what is left to DDP. Raises `TypeError` for what is no DDP, `ValueError` for one
    that averages otherwise (its ``mixed_precision``, optimizers in the backward; at the forward, ``join``, and a copy of
    one); the backward raises `PlanError` where ranks have gradients in different bases.
    """
    ddp = getattr(ddp, "_orig_mod", ddp)
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"actpass.distributed.reduce_low_rank takes a torch.nn.parallel.DistributedDataParallel, not {type(ddp).__name__}. "
            "Wrap the model first: ddp = DistributedDataParallel(model); reduce_low_rank(ddp)."
        )
    if ddp in _reduced:
        return
    if other := averages_otherwise(ddp):
        raise ValueError(f"the coefficients of low-rank gradients can't be averaged under DDP with {other}.")
    module, group = module_in(ddp), process_group(ddp)
    parameters = dict(_matrices(module))
    take_out_of_buckets(ddp, [n for n, p in _named(module) if any(p is q for q in parameters.values())])
    hook: Any = uncompiled(_Reduction(parameters, group).after_forward)
    ddp.register_forward_hook(hook)
    _reduced.add(ddp)
    _bucketed.discard(ddp)


def _named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every name of every parameter."""
    return module.named_parameters(remove_duplicate=False)


def _matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters whose gradients may be in factors. DDP can't be left without any: it keeps the smallest then."""
    trained = {n: p for n, p in module.named_parameters() if is_bucketed(p)}
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    found = {n: p for n, p in trained.items() if p.dim() in (2, 3) and id(p) not in tables}
    if len(found) == len(trained):
        del found[min(found, key=lambda n: found[n].numel())]
    yield from found.items()


def note_buckets(ddp: DistributedDataParallel) -> None:
    """A region with low-rank gradients runs in ``ddp``: say once if they will be dense."""
    if ddp not in _reduced and ddp not in _bucketed:
        _bucketed.add(ddp)
        warnings.warn(IN_BUCKETS, ActpassWarning, stacklevel=2)


def why_dense(model: nn.Module) -> str | None:
    """Why low-rank gradients of ``model`` are dense once the ranks have averaged them, if they are."""
    own = {id(p) for p in model.parameters()}
    if any(id(p) in own for ddp in _bucketed for p in ddp.parameters()):
        return IN_BUCKETS
    return SHARDED if any(type(p.data).__name__ == "DTensor" for p in model.parameters()) else None


IN_BUCKETS = (
    "DistributedDataParallel makes low-rank gradients dense, in its buckets: they are right, but take the memory of dense ones "
    "and as many bytes between ranks. Call actpass.distributed.reduce_low_rank(ddp) before the first step, and they stay in "
    "factors."
)


class _Facts(NamedTuple):
    """What must be the same on all ranks. draw, state: what the basis is made of, where it is made of that."""

    shape: tuple[int, ...]
    left: bool
    projection: str
    width: int
    rank: int
    unbiased: bool
    draw: int | None
    state: int | None


_DENSE = "dense"


class _Reduction:
    """Averages the gradients of ``parameters`` over ``group`` at the end of each backward that DDP synchronizes."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup) -> None:
        self.parameters, self.group = parameters, group
        members = dist.get_process_group_ranks(group)
        self.cpus: Any = dist.new_group(members, backend="gloo", use_local_synchronization=True)
        self.awaited = False

    def after_forward(self, ddp: Any, _: Any, output: Any) -> None:
        """Like DDP, by what holds at the forward: of several before one backward, any. The hook is on the output, because the
        engine runs what is queued at the end of the backward that queued it, and inside a checkpoint that is another."""
        if torch.is_grad_enabled() and ddp.require_backward_grad_sync:
            if ddp not in _reduced:
                raise ValueError(
                    "this DistributedDataParallel is a copy of one that actpass.distributed.reduce_low_rank was called for, "
                    "and would average the gradients of that one. Copy ddp.module, wrap the copy and call it for that."
                )
            if is_joined(ddp):
                raise ValueError(
                    "actpass.distributed.reduce_low_rank does not go with ddp.join(): a rank that has no more inputs would not "
                    "take part, and the others would wait for it. Give all ranks as many batches."
                )
            self.awaited = True
            for tensor in find_tensors(output):
                if tensor.requires_grad:
                    cast(Any, tensor).register_hook(self._begin)

    def _begin(self, _: torch.Tensor) -> None:
        if self.awaited:
            self.awaited = False
            queue_after_backward(self._reduce)

    @torch.no_grad()
    def _reduce(self) -> None:
        mine = {name: _facts(p.grad) for name, p in self.parameters.items()}
        if not self._all_have(mine):
            self._settle(mine)
        world = dist.get_world_size(self.group)
        held = [p.grad for p in self.parameters.values() if p.grad is not None and _facts(p.grad) is not None]
        for bucket in _buckets(map(numbers_of, held)):
            for tensor in bucket:
                tensor.div_(world)  # first, as DDP does: a sum may overflow
            for tensor, total in zip(bucket, summed(bucket, self.group), strict=True):
                tensor.copy_(total)

    def _all_have(self, mine: Mapping[str, _Facts | str | None]) -> bool:
        """Whether all ranks have the same gradients to average."""
        number = int.from_bytes(hashlib.sha256(repr(mine).encode()).digest()[:7], "big")
        ends = torch.tensor([number, -number], device="cpu")
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.cpus)
        return int(ends.sum()) == 0

    def _settle(self, mine: Mapping[str, _Facts | str | None]) -> None:
        """Give each parameter on all ranks the gradient of one kind: zeros where it was not used, and a dense one where it is
        dense on any of them. Raises `PlanError` for different bases."""
        everyone: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, mine, group=self.cpus)
        for name, parameter in self.parameters.items():
            kinds = [facts[name] for facts in everyone]
            found = sorted({k for k in kinds if isinstance(k, _Facts)}, key=repr)
            if len(found) > 1:
                first, second = (f"{_said(k)} on rank {kinds.index(k)}" for k in found[:2])
                raise PlanError(
                    f"the gradients of {name!r} can't be averaged: they lie in different bases, {first}, {second}. Allowed: "
                    "the same on all ranks. Give all the same options (seed among them), step their optimizers alike, and on "
                    "resume load the same state (actpass.load_state_dict)."
                )
            learned = any(k.state is not None for k in found)  # a subspace that a rank may not have
            if _DENSE in kinds or (learned and None in kinds):
                _make_dense(parameter)
            elif found and mine[name] is None:
                _take_part(parameter, found[0])


def _facts(gradient: torch.Tensor | None) -> _Facts | str | None:
    if not isinstance(gradient, LowRankGradient):
        return None if gradient is None else _DENSE
    if not gradient.is_factored:
        return _DENSE
    if gradient.held.is_zero:
        return None
    b = gradient.basis
    draw, state = (b.draw if b.draws else None), (None if b.state is None else _fingerprint(b.state))
    return _Facts(tuple(gradient.coefficients.shape), gradient.left, b.projection, b.width, b.rank, b.unbiased, draw, state)


def _said(facts: _Facts) -> str:
    made = [f"drawn from {facts.draw}"] if facts.draw is not None else []
    made += [f"a subspace with the sum {facts.state}"] if facts.state is not None else []
    return f"{facts.projection} of rank {facts.rank}, {' and '.join(made)}"


def _make_dense(parameter: nn.Parameter) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif isinstance(parameter.grad, LowRankGradient):
        parameter.grad.densify()


def _take_part(parameter: nn.Parameter, facts: _Facts) -> None:
    """Zeros in the subspace of the other ranks, for a gradient that there is none of here."""
    draw = facts.draw or 0
    basis = Basis(facts.projection, facts.width, facts.rank, round_keys(draw, parameter.device), draw, facts.unbiased)
    zeros = LowRankGradient(parameter.new_zeros(facts.shape), basis, left=facts.left)
    parameter.grad = zeros if parameter.grad is None else parameter.grad.add_(zeros)


_fingerprints: MutableMapping[torch.Tensor, int] = WeakIdKeyDictionary()


def _fingerprint(state: torch.Tensor) -> int:
    """Of a subspace, whose tensor never changes: every bit counts, at its place."""
    if state not in _fingerprints:
        bits = state.detach().contiguous().view(torch.int32).flatten().long()
        _fingerprints[state] = int((bits * torch.arange(1, 2 * bits.numel(), 2, device=bits.device)).sum())
    return _fingerprints[state]


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Of one dtype and device each, as many as go into one collective."""
    open_: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        bucket = open_.setdefault((tensor.dtype, tensor.device), [])
        bucket.append(tensor)
        if sum(t.nbytes for t in bucket) >= _BUCKET_BYTES:
            yield open_.pop((tensor.dtype, tensor.device))
    yield from open_.values()
