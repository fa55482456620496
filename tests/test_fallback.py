"""What becomes of a region that the pass fails on: a bug of its own is an error, and nothing falls back in silence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import actpass
from actpass.errors import GraphUnsupported
from actpass.options import options_for
from actpass.pipeline import PASSES, Pass
from actpass.runtime import regions
from actpass.torch_compat import compile_fx

from . import models
from .helpers import EPS, assert_close, assert_equal, eager_actcomp, step

STAGES = {
    "actpass.backend.backend.GraphInputs.of": "auto",
    "actpass.backend.backend.peak_budget": "auto",
    "actpass.backend.backend.records.region_key": "auto",
    "actpass.backend.partitioner.probe_state_inputs": "pca",
    "actpass.backend.backend.with_eager_curve": "auto",
    "actpass.pipeline.cut": "auto",
    "actpass.pipeline.find_weight_gradient_matmuls": "auto",
    "actpass.planner.plan_source.choose_cut": "auto",
    "actpass.planner.plan_source.choose": "haar",
    "actpass.analysis.partitioned.timeline": "auto",
    "actpass.pipeline.describe": "auto",
}
"""Where a bug may be beside the passes, and a method that goes there."""
GOES_THROUGH = {
    "project_weight_gradients": "haar",
    "contract_from_codes": "exact",
    "low_rank_gradients": "low_rank",
    "batch_weight_gradients": "haar",
    "partition": "haar",
    "project_saved": "prac",
}
"""Passes that change nothing with int8."""
for _pass in PASSES:
    for _part in ("run", "check"):
        _type = type(_pass)
        STAGES[f"{_type.__module__}.{_type.__name__}.{_part}"] = GOES_THROUGH.get(_pass.name, "int8")


def options_of(method: str, **more: Any) -> dict[str, Any]:
    if method == "low_rank":
        return {"projection": "haar", "rank": 4, "weight_gradient_format": "low_rank", **more}
    projects = {"rank": 4, "skip_unprofitable": False} if method in ("haar", "prac", "pca") else {}
    return {**options_for(method), "min_tensor_bytes": 0, **projects, **more}


def broken(*_: Any, **__: Any) -> Any:
    raise TypeError("boom")


def train(model: nn.Module, inputs: dict[str, Any], options: dict[str, Any]) -> Any:
    return step(torch.compile(model, backend=eager_actcomp(options)), model, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_bug_in_any_stage_raises_and_says_what_to_do(stage: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage, broken)
    model, inputs = models.mlp()
    says = r"TypeError: boom at actpass/\w+.*bug of actpass.*Please report it.*torch \d.*options=\{'fallback': 'warn'\}"
    with pytest.raises(Exception, match=says) as raised:
        train(model, inputs, options_of(STAGES[stage]))
    error = raised.value.inner_exception  # type: ignore[attr-defined]  # Dynamo wraps what a backend raises
    assert isinstance(error, actpass.InternalError)
    assert isinstance(error.__cause__, TypeError)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_under_warn_a_bug_leaves_the_region_to_inductor_and_training_goes_on(stage: str, monkeypatch: pytest.MonkeyPatch):
    model, inputs = models.mlp()
    loss, exact = step(model, model, inputs)
    monkeypatch.setattr(stage, broken)
    with pytest.warns(actpass.ActpassWarning, match="left a region to Inductor alone, because TypeError: boom") as warned:
        got, gradients = train(model, inputs, options_of(STAGES[stage], fallback="warn"))
    assert len({str(w.message) for w in warned}) == 1
    assert torch.allclose(got, loss, rtol=8 * EPS)
    assert_close(gradients, exact, 64 * EPS)
    report = actpass.report(model)
    assert not report.active
    assert str(report).startswith("actpass: inactive, because TypeError: boom")
    assert report.saved_bytes == report.totals.saved_bytes_default


def test_under_warn_a_graph_that_inductor_fails_on_is_compiled_without_the_pass(monkeypatch: pytest.MonkeyPatch):
    def picky(gm: Any, inputs: Any, config_patches: Any, **how: Any) -> Any:
        if "custom_partitioner_fn" in config_patches:
            raise RuntimeError("no code")
        return compile_fx(gm, inputs, config_patches=config_patches, **how)

    monkeypatch.setattr("actpass.backend.backend.compile_fx", picky)
    model, inputs = models.mlp()
    _, exact = step(model, model, inputs)
    with pytest.warns(actpass.ActpassWarning, match="left a region to Inductor alone, because RuntimeError: no code"):
        _, gradients = train(model, inputs, {"fallback": "warn"})
    assert_close(gradients, exact, 64 * EPS)


def unreadable(*_: Any) -> Any:
    raise GraphUnsupported("it is odd")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["run", "check"])
@pytest.mark.parametrize("broken_pass", [p for p in PASSES if p.serves is not None], ids=lambda p: p.name)
def test_what_a_graph_does_not_allow_is_given_up_and_the_rest_is_done(
    broken_pass: Pass, part: str, monkeypatch: pytest.MonkeyPatch
):
    model, inputs = models.mlp()
    _, exact = train(model, inputs, {"policy": "exact"})
    monkeypatch.setattr(type(broken_pass), part, unreadable)
    says = f"the {broken_pass.serves} of this region are off: it is odd"
    torch.compiler.reset()
    regions.clear()
    with pytest.warns(actpass.ActpassWarning, match=f"actpass: {says}$"):
        _, gradients = train(model, inputs, options_of(GOES_THROUGH.get(broken_pass.name, "int8")))
    assert_close(gradients, exact, 64 * EPS)
    assert f"inactive, because {says}" in str(actpass.report(model))


def test_a_graph_that_cant_be_read_is_left_to_inductor_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    model, inputs = models.mlp()
    _, exact = train(model, inputs, {"policy": "exact", "memory_budget": 1.0})
    torch.compiler.reset()
    regions.clear()
    monkeypatch.setattr("actpass.pipeline.find_weight_gradient_matmuls", unreadable)
    with pytest.warns(actpass.ActpassWarning, match="left a region to Inductor alone, because it is odd"):
        _, gradients = train(model, inputs, options_of("haar"))
    assert_equal(gradients, exact)
    report = actpass.report(model)
    assert "inactive, because it is odd" in str(report)
    assert report.saved_bytes == report.totals.saved_bytes_default > 0


# ------------------------------------------------------------------------------------------------------- budgets of peak bytes


def test_a_budget_of_bytes_that_inductors_cut_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch):
    """The least that the error names is then met, with a warning; one byte less is not."""
    monkeypatch.setattr("actpass.pipeline.find_weight_gradient_matmuls", unreadable)
    model, inputs = models.mlp()
    with pytest.raises(
        Exception, match=r"memory_budget=20000 bytes of peak can't be met: .* because it is odd.*'fallback'"
    ) as raised:
        train(model, inputs, {"memory_budget": 20000})
    least = raised.value.inner_exception.least  # type: ignore[attr-defined]
    torch.compiler.reset()
    with pytest.warns(actpass.ActpassWarning, match="because it is odd$"):
        train(model, inputs, {"memory_budget": least})
    report = actpass.report(model)
    assert report.step_bytes is not None
    assert report.step_bytes <= least
    torch.compiler.reset()
    with pytest.raises(Exception, match="can't be met"):
        train(model, inputs, {"memory_budget": least - 1})


def test_under_warn_a_budget_of_bytes_that_is_not_held_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("actpass.pipeline.find_weight_gradient_matmuls", unreadable)
    model, inputs = models.mlp()
    with pytest.warns(actpass.ActpassWarning, match="because it is odd; its memory_budget is not held"):
        train(model, inputs, {"memory_budget": 20000, "fallback": "warn"})
    assert "its memory_budget is not held" in str(actpass.report(model))


@pytest.mark.codegen
def test_a_region_that_was_left_to_inductor_says_so_when_the_cache_has_it_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("actpass.pipeline.find_weight_gradient_matmuls", unreadable)
    for says in ("left a region to Inductor alone, because it is odd", "a region is not as asked, because it is odd"):
        torch.compiler.reset()
        model, inputs = models.mlp()
        with pytest.warns(actpass.ActpassWarning, match=says):
            step(torch.compile(model, backend="actcomp", options={"seed": 77}), model, inputs)


class InParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).tanh()
        torch._dynamo.graph_break()
        return self.second(h).square().mean()


def test_parts_that_are_left_to_inductor_count_in_the_budget_of_the_step(monkeypatch: pytest.MonkeyPatch):
    """Each fits by itself; together they don't."""
    monkeypatch.setattr("actpass.pipeline.find_weight_gradient_matmuls", unreadable)

    def train_parts(budget: int) -> actpass.Report:
        torch.compiler.reset()
        regions.clear()
        model = InParts()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.warns(actpass.ActpassWarning, match="because it is odd$"):
            torch.compile(model, backend=eager_actcomp(memory_budget=budget))(torch.randn(512, 64)).backward()
        optimizer.step()
        return actpass.report(model)

    report = train_parts(2**30)
    alone = [replace(report, regions=(region,), modules=()).step_bytes for region in report.regions]
    assert len(alone) == 2
    together = report.step_bytes
    assert together is not None
    assert all(n is not None and 1.05 * n < 0.99 * together for n in alone)
    with pytest.raises(actpass.BudgetError, match="can't be met by the 2 regions of this step together"):
        train_parts(int(0.99 * together))
