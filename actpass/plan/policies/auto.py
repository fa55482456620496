"""As few bits as cost nothing: 8, or 4 where an error ends in one weight's gradient."""

from __future__ import annotations

from actpass.plan.codec_set import CodecSet
from actpass.plan.plan import RECOMPUTE, RECOMPUTED_SCORE, SAVE, SavedTensor, Storage
from actpass.plan.policies.policy import Facts, Policy, register_policy
from actpass.plan.request import TensorRequest

SAVES_LITTLE = "exact: beside the others it would save next to nothing"
OWN_KERNELS = "exact: only library kernels make and read it, and codes would take two kernels more"
SMALL, FEW = 1 / 32, 0.04
"""What is left exact without a budget: tensors no larger than the first share of the largest that has a form, as long as all of
them together are no more than the second share of what is stored; beyond it they take 8 bits and never 4. An error does not
shrink with its tensor: 4 bits in the 8-wide products of adapters, 3.6 % of what is stored, put gradients of their second
factors wrong by 0.15."""


@register_policy("auto")
class Auto(Policy):
    """A budget chooses for each tensor by what it takes and what it costs; without one the coarsest form that costs nothing.

    A tensor all of whose uses are weight gradients takes the coarsest of the project's own forms that a budget may choose
    (4 bits) unless it is small, any other the coarsest of them that is safe for recomputed scores (8 bits). Where the error
    goes on into all gradients below, 4 bits cost up to 0.7 % of the loss, even unbiased, and 8 nothing
    (tools/results/loss-*.json). On a GPU values and outputs of attention stay exact: library kernels make and read them, so
    that codes take two kernels more, each 1 % of a step of a Llama.
    """

    def decide(self, facts: Facts) -> tuple[Storage, ...]:
        small, few = _small(facts)
        finer = facts.codecs.coarsest_safe_for(RECOMPUTED_SCORE)

        def form(t: SavedTensor) -> Storage:
            if t.node in few:
                return facts.save(t, SAVES_LITTLE)
            if t.joins == (False, False) and t.role in ("value", "output"):
                return facts.save(t, OWN_KERNELS)
            is_coarse = set(t.kinds) <= {"contraction"} and t.node not in small
            return facts.quantize(t, facts.codecs.own[-1] if is_coarse else finer)

        return tuple(map(form, facts.tensors))

    def options(self, t: SavedTensor, request: TensorRequest, codecs: CodecSet) -> tuple[str, ...]:
        return SAVE, *codecs.offered_for(t), RECOMPUTE


def _small(facts: Facts) -> tuple[frozenset[str], frozenset[str]]:
    """The tensors that are small beside the largest, and those of them that would save next to nothing in any form: the
    smallest first, those of one size together."""
    asked = [t for t in facts.tensors if t.obstacle is None]
    most = SMALL * max((t.nbytes for t in asked), default=0)
    small = frozenset(t.node for t in asked if t.nbytes <= most)
    left = FEW * sum(t.nbytes for t in facts.everything)
    found: set[str] = set()
    for nbytes in sorted({t.nbytes for t in asked if t.nbytes <= most}):
        alike = [t.node for t in asked if t.nbytes == nbytes]
        left -= nbytes * len(alike)
        if left < 0:
            break
        found.update(alike)
    return small, frozenset(found)
