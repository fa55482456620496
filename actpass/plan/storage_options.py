"""What each saved tensor could be stored as, what that takes and what it costs: the menus that a budget is met from.

A cost is the share of a step's progress that is lost, so that time and error can be weighed against each other: time as the
share of the step's FLOPs, error as the noise that it adds to the gradient, at the rate of `NOISE_PER_STEP`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from actpass.plan.codec_set import CodecSet
from actpass.plan.knapsack import Option
from actpass.plan.plan import RECOMPUTE, RECOMPUTED_SCORE, SAVE, SCORE, SavedTensor
from actpass.plan.policies import POLICIES
from actpass.plan.request import AUTO, RequestFor
from actpass.plan.sensitivity import Sensitivity
from actpass.plan.store import StoredBytes, store

UNIT = 10**9
"""Costs are integers: billionths of a step."""
FLOPS_PER_BYTE = 50
"""A byte that is read or written to encode or decode, in FLOPs of a matmul: 30 on two cores of a CPU in fp32 (llama-60m,
1.2 GB more traffic for 5 % of a step of 0.72 TFLOP), 160 by the data sheet of an H100 in bf16."""
NOISE_PER_STEP = 14.0
"""Step's worth of progress that is lost for squared relative noise of one in all gradients at once. Everything in 4 bits cost
0.3 % of llama-mini's loss after 1000 steps, as much as 2 % of the steps; here it counts as 15 %, because a user who gives
time for memory gets it back, and who gives quality does not."""
SHARE_IN_A_CONTRACTION = 0.25
"""What an error weighs that ends in one weight's gradient; any other goes on into all gradients below."""
CANCELLING = 30.0
"""What an error of a value or an output of fused attention weighs beside exact scores: the gradient of a score is a difference
of products with both, small where a query looks at all keys alike. Measured early in training (llama-60m, 20 steps, 8 bits:
gradients of queries and keys wrong by five times their size, 30 times the share of these tensors in Adam's direction)."""


@dataclass(frozen=True)
class Costs:
    """step_flops: of one step. elements: of all tensors that are stored. codecs: all that there are. measured: by tensor, its
    errors and what they do to the gradients; where it was not measured, its errors are those of a Gaussian tensor, and the
    squared relative error of the gradients for that of the tensor is its share of ``elements``, times `SHARE_IN_A_CONTRACTION`
    or `CANCELLING`."""

    step_flops: int
    elements: int
    codecs: CodecSet
    measured: Mapping[str, Sensitivity] = field(default_factory=dict[str, Sensitivity])

    def of_time(self, flops: float) -> int:
        return round(UNIT * flops / max(self.step_flops, 1))

    def of_form(self, t: SavedTensor, codec: str, stored_bytes: int) -> int:
        time = self.of_time(self.flops_of_form(t, codec, stored_bytes))
        return time + round(UNIT * NOISE_PER_STEP * self.error_of_form(t, codec))

    def flops_of_form(self, t: SavedTensor, codec: str, stored_bytes: int) -> int:
        """What is read and written to encode and decode, in FLOPs."""
        return 0 if codec == SAVE else FLOPS_PER_BYTE * t.traffic(stored_bytes)

    def error_of_form(self, t: SavedTensor, codec: str) -> float:
        """The squared relative error that it adds to the gradients."""
        if codec == SAVE:
            return 0.0
        gaussian, known = self.codecs.by_name[codec].error, self.measured.get(t.node)
        if known is not None and RECOMPUTED_SCORE not in t.kinds:  # measured with the statistic of the exact scores
            return dict(known.errors).get(codec, gaussian) * known.factor
        share = SHARE_IN_A_CONTRACTION if t.kinds == ("contraction",) else 1.0
        share *= CANCELLING if t.role in ("value", "output") else 1.0
        return gaussian * share * t.elements / max(self.elements, 1)


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """Tensors whose forms are chosen together. options: what each choice takes and costs. forms: for each option, the form of
    each member: a codec, `SAVE` or `RECOMPUTE`. recompute: for each option, what the backward runs again."""

    members: tuple[SavedTensor, ...]
    options: tuple[Option, ...]
    forms: tuple[tuple[str, ...], ...]
    recompute: tuple[tuple[str, ...], ...]


_Choice = tuple[Option, tuple[str, ...], tuple[str, ...]]


def storage_options(
    tensors: Sequence[SavedTensor],
    request_for: RequestFor,
    stored_bytes: StoredBytes,
    costs: Costs,
    *,
    recompute: bool,
    coarsest_codec: str | None = None,
) -> list[StorageOptions]:
    """recompute: whether the backward may recompute anything. coarsest_codec: of the codecs that are offered, where a policy
    decides.

    The tensors of one fused attention are on one menu. With the logsumexp of the exact queries and keys only what is
    `safe_for_scores` is safe for these, and 8 bits for ``v`` and the output, whose products must cancel row by row; if the
    attention is run again from what is stored, all is consistent, and 8 bits and recomputed queries and keys are.
    """
    groups: dict[str, list[SavedTensor]] = {}
    for t in tensors:
        groups.setdefault(t.attention or f"/{t.node}", []).append(t)
    codecs = costs.codecs if coarsest_codec is None else costs.codecs.no_coarser_than(coarsest_codec)

    def options(t: SavedTensor) -> tuple[str, ...]:
        request = request_for(t.paths)
        return POLICIES[request.decided_by].options(t, request, codecs)

    def stored(t: SavedTensor, codec: str) -> _Choice:
        s = store(t, request_for(t.paths), stored_bytes, codec, costs.codecs)
        return Option(s.stored_bytes, costs.of_form(t, s.codec, s.stored_bytes)), (s.codec,), ()

    def forms(t: SavedTensor, *, inexact: bool) -> list[_Choice]:
        allowed = options(t)
        found = [stored(t, codec) for codec in allowed if codec != RECOMPUTE]
        if RECOMPUTE in allowed and recompute and inexact and t.recompute:
            found.append((Option(0, costs.of_time(t.recompute_flops)), (RECOMPUTE,), t.recompute))
        if RECOMPUTE in allowed and recompute and inexact and t.of_factors:
            nbytes = round(t.factors * codecs.bytes_of_a_factor)
            found.append((Option(nbytes, costs.of_time(t.of_factors_flops)), (RECOMPUTE,), t.of_factors))
        return found if found or recompute else [stored(t, SAVE)]

    found: list[StorageOptions] = []
    for members in groups.values():
        choices = _product(forms(t, inexact=t.role not in ("score", "output")) for t in members)
        output = next((t for t in members if t.role == "output"), None)
        if output is not None and recompute and output.recompute and RECOMPUTE in options(output):
            others = [replace(t, kinds=_consistent(t.kinds), role=None) for t in members if t is not output]
            rerun = Option(0, costs.of_time(output.recompute_flops))
            at = members.index(output)
            for option, chosen, run in _product(forms(t, inexact=True) for t in others):
                whole = (*chosen[:at], RECOMPUTE, *chosen[at:])
                choices.append((_plus(option, rerun), whole, (*output.recompute, *run)))
        choices = _undominated(choices) or _product([stored(t, SAVE)] for t in members)
        options_of, chosen_forms, runs = zip(*choices, strict=True)
        found.append(StorageOptions(tuple(members), options_of, chosen_forms, runs))
    return found


def bytes_in(
    codec: str, tensors: Sequence[SavedTensor], request_for: RequestFor, stored_bytes: StoredBytes, codecs: CodecSet
) -> int:
    """Of ``tensors`` if all that a policy decides takes one codec, queries and keys like the rest."""
    total = 0
    for t in tensors:
        request = request_for(t.paths)
        alike = replace(t, kinds=_consistent(t.kinds), role=None)
        total += store(alike, request, stored_bytes, codec if request.format == AUTO else request.format, codecs).stored_bytes
    return total


def _consistent(kinds: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(RECOMPUTED_SCORE if k == SCORE else k for k in kinds)


def _plus(a: Option, b: Option) -> Option:
    return Option(a.nbytes + b.nbytes, a.cost + b.cost)


def _product(each: Iterable[Iterable[_Choice]]) -> list[_Choice]:
    """Every way to choose one of each that no other beats in both bytes and cost."""
    whole: list[_Choice] = [(Option(0, 0), (), ())]
    for choices in each:
        pairs = itertools.product(whole, list(choices))
        whole = _undominated([(_plus(a, b), (*x, *y), (*p, *q)) for (a, x, p), (b, y, q) in pairs])
    return whole


def _undominated(choices: list[_Choice]) -> list[_Choice]:
    kept: list[_Choice] = []
    for choice in sorted(choices, key=lambda c: (c[0].nbytes, c[0].cost)):
        if not kept or choice[0].cost < kept[-1][0].cost:
            kept.append(choice)
    return kept
