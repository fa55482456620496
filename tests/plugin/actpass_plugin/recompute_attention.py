"""A policy: recompute attention first."""

from __future__ import annotations

from actpass.plan import RECOMPUTE, SAVE, CodecSet, Facts, Policy, SavedTensor, Storage, TensorRequest, register_policy


@register_policy("recompute_attention")
class RecomputeAttention(Policy):
    """The backward runs every fused attention again. All else stays as it is; a budget gives it fewer bits or
    runs it again."""

    recomputes = True

    def decide(self, facts: Facts) -> tuple[Storage, ...]:
        return tuple(
            facts.recompute(t) if t.role == "output" and facts.can_recompute(t) else facts.save(t) for t in facts.tensors
        )

    def options(self, t: SavedTensor, request: TensorRequest, codecs: CodecSet) -> tuple[str, ...]:
        return (RECOMPUTE,) if t.role == "output" and t.recompute else (SAVE, *codecs.offered_for(t), RECOMPUTE)
