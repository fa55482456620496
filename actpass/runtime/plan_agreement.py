"""One plan on all ranks: those that compile the same region compare what came out.

Ranks that decide differently would still train, each at its own speed and peak, with gradients that were rounded or projected
in different ways: nothing would fail. So it is checked when a region is compiled, through the process group's key-value store
and not by a collective: ranks of a pipeline compile different regions, and a rank that waits for one that never comes is worse
than the mistake. The first rank to arrive writes its plan's hash; any other compares with it. The first does not wait: it
trains until its first collective, which the rank that raised never joins.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist

from actpass.errors import ActpassWarning, PlanError
from actpass.reporting import Record
from actpass.torch_compat import get_default_store, split

_compiled: Counter[str] = Counter()
"""How often each graph was compiled under a process group; the n-th time is compared with the others' n-th time. Never reset: a
second group may have the first one's store."""


def check(record: Record) -> None:
    """Compare the plan of a region that was just compiled (or found in the cache) with that of the rank that compiled the same
    graph first. Raises `PlanError` if they differ. Does nothing without a process group of several ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1 or dist.get_backend() == "fake":
        return
    graph = record.plan["graph"]
    _compiled[graph] += 1
    key = f"actpass/{graph}/{_compiled[graph]}"
    mine = f"{record.plan_hash} of rank {dist.get_rank()}"
    try:
        first = get_default_store().compare_set(key, "", mine).decode()
    except dist.DistError as error:  # the rank that holds the store is gone, and the run with it
        warnings.warn(f"actpass could not compare the plans of the ranks: {error}", ActpassWarning, stacklevel=2)
        return
    if first.partition(" ")[0] != record.plan_hash:
        raise PlanError(_difference(record, first, mine))


def summed(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup | None = None) -> list[torch.Tensor]:
    """``tensors``, of one dtype, over the ranks of ``group``, in one collective: bit for bit the same on all of them."""
    if not tensors or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return list(tensors)
    together = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(together, group=group)
    return [part.view_as(t) for part, t in zip(split(together, [t.numel() for t in tensors]), tensors, strict=True)]


def _difference(record: Record, first: str, mine: str) -> str:
    inputs = ", ".join(record.plan["inputs"].values()) or "none"
    names = [path for path, _ in record.parameters]
    about = f"{names[0]} to {names[-1]}" if names else "no parameter"
    state = f"; {record.inactive_because}" if not record.active else ""
    return (
        f"ranks have different plans for the region with the inputs ({inputs}) and the parameters {about}: {mine}{state}, "
        f"against {first}. Give all ranks the same options, and the same versions of actpass and torch. Under a memory_budget "
        "in bytes they differ where what is resident differs (FSDP2's last shard is smaller, optimizers that hold other "
        "parameters), and under 'auto' where free memory does: give a number of bytes, or one plan to all: "
        "actpass.report(model).plan.save(path) on one rank, options={'plan': path} on every."
    )
