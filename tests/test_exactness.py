"""The guardrail, which runs before all others: what a plan may not change is bit-equal.

tools/check_exactness.py does so with larger models, more dtypes, methods and ranks, and prints by how much anything differs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import models
from .helpers import EPS, Grads, assert_close, assert_equal, step
from .tracing import stock, traced

FORMS: dict[str, dict[str, Any]] = {
    "auto": {},
    "int4": {"codec": "int4"},
    "haar": {"projection": "haar", "rank": 0.25, "skip_unprofitable": False},
    "budget": {"memory_budget": 0.5},
}
INDUCTORS = {"policy": "exact", "memory_budget": 1.0}
"""Whose step is Inductor's own."""
SMALL = {"min_tensor_bytes": 0}
MODELS = ["mlp", "block", pytest.param("llama", marks=pytest.mark.architectures)]


@pytest.mark.parametrize("model", MODELS)
def test_node_by_node_exact_gradients_are_those_of_inductors_cut_and_no_form_changes_the_results(model: str):
    joint = traced(model)
    want = joint.run(*stock(joint))
    for options in (INDUCTORS, {"policy": "exact"}, {"policy": "exact", "memory_budget": 0.5}):
        done = joint.compiled(**SMALL, **options)
        got = joint.run(done.forward, done.backward)
        assert all(map(torch.equal, got.results, want.results))
        assert_equal(got.gradients, want.gradients)
    for options in FORMS.values():
        done = joint.compiled(**SMALL, **options)
        assert all(map(torch.equal, joint.run(done.forward, done.backward).results, want.results)), options


def compiled(name: str, **arguments: Any) -> tuple[torch.Tensor, Grads]:
    """Loss and gradients of one step by the code that Inductor generates."""
    torch.compiler.reset()
    model, inputs = getattr(models, name)()
    return step(torch.compile(model, **arguments), model, inputs)


@pytest.mark.codegen
@pytest.mark.parametrize("model", MODELS)
def test_compiled_exact_gradients_are_inductors_and_no_form_changes_the_loss(model: str):
    want, gradients = compiled(model)
    loss, got = compiled(model, backend="actcomp", options=INDUCTORS)
    assert torch.equal(loss, want)
    assert_equal(got, gradients)
    exact, got = compiled(model, backend="actcomp", options={"policy": "exact"})
    # other loops are fused, and sums have another order
    torch.testing.assert_close(exact, want, rtol=4 * EPS, atol=0)
    assert_close(got, gradients, 100 * EPS)
    for options in FORMS.values() if model == "mlp" else (FORMS["auto"],):
        loss, _ = compiled(model, backend="actcomp", options={**SMALL, **options})
        assert torch.equal(loss, exact), options
