"""What a policy is: it says in which form each tensor that crosses from forward to backward is stored, or that it is not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from actpass.plan.codec_set import CodecSet
from actpass.plan.plan import RECOMPUTE, SavedTensor, Storage
from actpass.plan.request import KEPT, RequestFor, TensorRequest
from actpass.plan.store import StoredBytes, keep, store
from actpass.registry import Registry, instance_of


@dataclass(frozen=True)
class Facts:
    """What a policy decides from.

    tensors: those that it decides, in graph order. everything: all that crosses, other policies' tensors among them.
    request_for: the user's options for a tensor, by its ``paths``. stored_bytes: see `StoredBytes`. codecs: all that there are.
    may_recompute: whether tensors may be recomputed in the backward; once it is settled which are, the policy is asked a
    second time for what crosses then.
    """

    tensors: tuple[SavedTensor, ...]
    everything: tuple[SavedTensor, ...]
    request_for: RequestFor
    stored_bytes: StoredBytes
    codecs: CodecSet
    may_recompute: bool = False

    def save(self, t: SavedTensor, reason: str = KEPT) -> Storage:
        """``t`` as it is."""
        return keep(t, t.obstacle or reason)

    def quantize(self, t: SavedTensor, codec: str) -> Storage:
        """``t`` in ``codec``, or what is possible and safe in its place; the reason says why."""
        return store(t, self.request_for(t.paths), self.stored_bytes, codec, self.codecs)

    def can_recompute(self, t: SavedTensor) -> bool:
        """Whether the backward may recompute what ``t`` comes from. A query or key only together with its attention."""
        return self.may_recompute and bool(t.recompute or t.of_factors)

    def recompute(self, t: SavedTensor, reason: str = "") -> Storage:
        """``t`` not stored. The report tells the ``reason``. Raises `ValueError` if it `can_recompute` not."""
        if not self.can_recompute(t):
            raise ValueError(f"{t.node} can't be recomputed. Ask `can_recompute` first.")
        return replace(keep(t, reason), codec=RECOMPUTE, stored_bytes=0)


class Policy(ABC):
    """Both methods say the same, without a memory budget and with one.

    name: what ``options={"policy": ...}`` takes. needs_codec: whether the user names a codec beside it. recomputes: whether
    `decide` may ask for recomputation, which takes a cut more.
    """

    name: ClassVar[str]
    needs_codec: ClassVar[bool] = False
    recomputes: ClassVar[bool] = False

    @abstractmethod
    def decide(self, facts: Facts) -> tuple[Storage, ...]:
        """Without a budget: one form for each of ``facts.tensors``, in their order."""

    @abstractmethod
    def options(self, t: SavedTensor, request: TensorRequest, codecs: CodecSet) -> tuple[str, ...]:
        """With a budget: the forms of ``t`` that it may choose from, by what they take and cost: `SAVE`, codecs, and
        `RECOMPUTE`, which counts where ``t`` can be recomputed. codecs: those ``offered`` are no coarser than all need to be.

        An empty tuple: ``t`` is stored as it is, and with it all tensors of its attention. It is asked several times a tensor
        and must depend on its arguments alone: where an attention may be recomputed, its other tensors come once more, with
        ``t.role`` None and the kind `RECOMPUTED_SCORE` in place of `SCORE`."""


POLICIES: Registry[Policy] = Registry("policy", "actpass.policies")
P = TypeVar("P", bound=Policy | type[Policy])


def register_policy(name: str) -> Callable[[P], P]:
    """A decorator that adds a `Policy`, or a class of them that is made without arguments, under ``name``."""

    def add(policy: P) -> P:
        found: Policy = instance_of(policy)
        type(found).name = name
        POLICIES.register(name, found)
        return policy

    return add
