"""Everything as it is: what is not stored is rebuilt exactly."""

from __future__ import annotations

from actpass.plan.codec_set import CodecSet
from actpass.plan.plan import RECOMPUTE, SAVE, SavedTensor, Storage
from actpass.plan.policies.policy import Facts, Policy, register_policy
from actpass.plan.request import TensorRequest
from actpass.plan.store import store


@register_policy("exact")
class Exact(Policy):
    """A budget is met by running again."""

    def decide(self, facts: Facts) -> tuple[Storage, ...]:
        return tuple(store(t, facts.request_for(t.paths), facts.stored_bytes, None, facts.codecs) for t in facts.tensors)

    def options(self, t: SavedTensor, request: TensorRequest, codecs: CodecSet) -> tuple[str, ...]:
        return SAVE, RECOMPUTE
