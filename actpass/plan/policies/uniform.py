"""One codec for everything."""

from __future__ import annotations

from actpass.plan.codec_set import CodecSet
from actpass.plan.plan import RECOMPUTE, SAVE, SavedTensor, Storage
from actpass.plan.policies.policy import Facts, Policy, register_policy
from actpass.plan.request import TensorRequest


@register_policy("uniform")
class Uniform(Policy):
    """Everything that can take the codec that the user names does. A budget is met by running again beside it."""

    needs_codec = True

    def decide(self, facts: Facts) -> tuple[Storage, ...]:
        return tuple(facts.quantize(t, facts.request_for(t.paths).format or SAVE) for t in facts.tensors)

    def options(self, t: SavedTensor, request: TensorRequest, codecs: CodecSet) -> tuple[str, ...]:
        return request.format or SAVE, RECOMPUTE
