"""What must hold of every model, on random ones: see `tests/random_models.py`; tools/check_random_models.py runs thousands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import actpass
from actpass.codecs import LEARNED
from actpass.options import options_for

from .helpers import eager_actcomp, step
from .random_models import FORMS, SMALL, Spec, build, check, random_spec
from .tracing import stock, trace


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    return random_spec(lambda options: draw(st.sampled_from(options)))


def few(examples: int) -> Any:
    """Always the same, and none made smaller: an example takes seconds, and the tool says which one failed."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@few(6)
@given(spec=specs(), forms=st.lists(st.sampled_from(FORMS), min_size=2, max_size=2, unique_by=str))
def test_random_models_keep_what_every_model_must(spec: Spec, forms: list[dict[str, Any]]):
    torch.compiler.reset()
    check(spec, forms)


@pytest.mark.slow
@few(16)
@given(spec=specs(), forms=st.lists(st.sampled_from(FORMS), min_size=3, max_size=3, unique_by=str))
def test_more_random_models_keep_what_every_model_must(spec: Spec, forms: list[dict[str, Any]]):
    torch.compiler.reset()
    check(spec, forms)


@pytest.mark.slow
@pytest.mark.parametrize("method", LEARNED)
@few(2)
@given(spec=specs())
def test_random_models_keep_their_loss_under_learned_subspaces(method: str, spec: Spec):
    torch.compiler.reset()
    model, inputs = build(spec)
    joint = trace(model, inputs)
    options = {**SMALL, **options_for(method), "rank": 0.5, "skip_unprofitable": False}
    loss, grads = step(torch.compile(model, backend=eager_actcomp(options)), model, inputs)
    (want,) = joint.run(*stock(joint)).results
    assert torch.equal(loss, want)
    assert all(g.isfinite().all() for g in grads.values())
    assert actpass.report(model).active
