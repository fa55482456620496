"""`actpass.audit`: the gradient of one batch against the exact one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import actpass

from . import models
from .helpers import eager_actcomp


@pytest.mark.slow
def test_audit_of_exact_finds_nothing():
    model, inputs = models.transformer()
    found = actpass.audit(model, inputs, options={"policy": "exact"}, seeds=2)
    assert all(p.error == 0.0 and p.cosine > 1 - 1e-9 and p.bias_z is None for p in found.parameters)
    assert len(found.parameters) == len(list(model.parameters()))


def test_audit_leaves_gradients_buffers_and_random_state_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.BatchNorm1d(48), nn.Dropout(0.5), nn.Linear(48, 8))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    state = torch.get_rng_state()
    found = actpass.audit(model, torch.randn(16, 24, generator=torch.Generator().manual_seed(1)),
        options={"codec": "int8", "min_tensor_bytes": 0}, seeds=2, loss=lambda y: y.square().mean())  # fmt: skip
    assert max(p.error for p in found.parameters if p.name.endswith("weight")) < 0.05  # the same dropout masks in both
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())


def test_audit_sees_bias_where_there_is_one_and_none_where_there_is_not():
    model, inputs = models.mlp()
    unbiased = actpass.audit(
        model, inputs, options={"projection": "rademacher", "rank": 0.25, "skip_unprofitable": False}, seeds=24
    )
    weights = [p for p in unbiased.parameters if p.name.endswith("weight")]
    assert all(p.bias_z is not None and p.bias_z < 4 for p in weights)
    shrunk = {"projection": "rademacher", "rank": 0.25, "projection_scaling": "orthonormal", "skip_unprofitable": False}
    biased = actpass.audit(model, inputs, options=shrunk, seeds=24)
    assert all(p.bias_z is not None and p.bias_z > 4 for p in biased.parameters if p.name.endswith("weight"))
    assert "BIASED" in str(biased)


@pytest.mark.slow
def test_audit_ranks_the_worst_first_and_folds_layers():
    model, inputs = models.transformer()
    found = actpass.audit(model, inputs, options={"codec": "int2", "min_tensor_bytes": 0}, seeds=2)
    cosines = [p.preconditioned_cosine for p in found.parameters]
    assert cosines == sorted(cosines)
    text = str(found)
    assert "blocks.*.q.weight" in text
    assert "plain cosine is blind" in text
    assert text.splitlines()[1].startswith("parameter")


@pytest.mark.slow
def test_audit_takes_adams_state():
    model, inputs = models.mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    assert actpass.audit(model, inputs, seeds=2, optimizer=optimizer).direction == "sign"  # no state yet
    model(**inputs).backward()
    optimizer.step()
    options = {"codec": "int4", "min_tensor_bytes": 0}
    by_sign = actpass.audit(model, inputs, options=options, seeds=2)
    by_adam = actpass.audit(model, inputs, options=options, seeds=2, optimizer=optimizer)
    assert by_adam.direction == "Adam"
    # half of Adam's moment is the same in both
    assert min(p.preconditioned_cosine for p in by_adam.parameters) > min(p.preconditioned_cosine for p in by_sign.parameters)


def test_audit_refuses_what_has_no_loss_and_says_what_to_do():
    with pytest.raises(actpass.OptionError, match=r"no loss is found.*loss=lambda"):
        actpass.audit(nn.Linear(4, 4), torch.randn(2, 4), seeds=1)
    with pytest.raises(actpass.OptionError, match="seeds=0"):
        actpass.audit(nn.Linear(4, 4), torch.randn(2, 4), seeds=0)


@pytest.mark.slow
def test_explain_and_audit_may_be_called_often_and_leave_no_compiled_code_behind():
    """Dynamo compiles one code 8 times, and then no more."""
    model, inputs = models.mlp()
    compiled = torch.compile(model, backend=eager_actcomp(codec="int4", min_tensor_bytes=0))
    for _ in range(10):
        assert actpass.explain(model, options={"codec": "int8", "min_tensor_bytes": 0}, **inputs).active
    for seed in range(6):
        found = actpass.audit(model, inputs, options={"codec": "int4", "min_tensor_bytes": 0, "seed": seed}, seeds=1)
        assert max(p.error for p in found.parameters) > 1e-3
    compiled(**inputs).backward()
    assert actpass.report(model).active
