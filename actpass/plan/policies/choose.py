"""Ask the policies: each for the tensors whose options name it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from actpass.errors import PluginError
from actpass.plan.codec_set import CodecSet
from actpass.plan.plan import RECOMPUTE, SavedTensor, Storage
from actpass.plan.policies.policy import POLICIES, Facts
from actpass.plan.request import AUTO, RequestFor
from actpass.plan.store import StoredBytes, store


def choose_storage(
    tensors: Iterable[SavedTensor],
    request_for: RequestFor,
    stored_bytes: StoredBytes,
    codecs: CodecSet,
    chosen: Mapping[str, str | None] | None = None,
) -> tuple[Storage, ...]:
    """The form in which everything that crosses is stored: as the policies say, where that is possible and smaller.

    chosen: by node, what a budget chose for the tensors that a policy decides; None: there is no budget.
    """
    tensors = tuple(tensors)
    if chosen is None:
        return _decided(Facts(tensors, tensors, request_for, stored_bytes, codecs))

    def form(t: SavedTensor) -> Storage:
        request = request_for(t.paths)
        return store(t, request, stored_bytes, chosen.get(t.node) if request.format == AUTO else request.format, codecs)

    return tuple(map(form, tensors))


def wanted_again(
    tensors: Iterable[SavedTensor], request_for: RequestFor, stored_bytes: StoredBytes, codecs: CodecSet
) -> dict[SavedTensor, str]:
    """Of ``tensors``, without a budget, what the policies want the backward to recompute, and why. Raises `PluginError` for a
    query or key without its attention."""
    tensors = tuple(tensors)
    if not any(POLICIES[request_for(t.paths).decided_by].recomputes for t in tensors):
        return {}
    decided = _decided(Facts(tensors, tensors, request_for, stored_bytes, codecs, may_recompute=True))
    recompute = {t: s.reason for t, s in zip(tensors, decided, strict=True) if s.codec == RECOMPUTE}
    attentions = {t.attention for t in recompute if t.role == "output"}
    for t in recompute:
        if t.role == "score" and t.attention not in attentions:
            raise PluginError(
                f"the policy {request_for(t.paths).decided_by!r} recomputes the query or key {t.node} without its attention "
                f"{t.attention}, whose logsumexp is that of the exact ones. It must recompute its output as well, or neither."
            )
    return recompute


def _decided(facts: Facts) -> tuple[Storage, ...]:
    by_policy: dict[str, list[SavedTensor]] = {}
    for t in facts.tensors:
        by_policy.setdefault(facts.request_for(t.paths).decided_by, []).append(t)
    found: dict[str, Storage] = {}
    for name, own in by_policy.items():
        storages = POLICIES[name].decide(
            Facts(tuple(own), facts.everything, facts.request_for, facts.stored_bytes, facts.codecs, facts.may_recompute)
        )
        if [s.node for s in storages] != [t.node for t in own]:
            raise PluginError(f"the policy {name!r} must give one form for each tensor, in their order.")
        found.update({s.node: s for s in storages})
    return tuple(found[t.node] for t in facts.tensors)
