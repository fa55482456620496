"""What the backward runs again is what the plan names: of all that is not free, that and nothing else."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import actpass
from actpass.diagnostics.explain import explain_model
from actpass.ir.joint_graph import Joint
from actpass.passes import partition
from actpass.plan import POLICIES, SAVE, CodecSet, Facts, Policy, SavedTensor, Storage, TensorRequest, register_policy
from actpass.plan_file import ModelPlan
from actpass.reporting import Report

from . import models
from .helpers import EPS, assert_close, eager_actcomp, error, step

SMALL: dict[str, Any] = {"min_tensor_bytes": 0}
BUDGETS = (0.8, 0.7, 0.6, 0.5, 0.45, 0.35)


class Sorted(nn.Module):
    """Between two linear layers: a sort, a sum over all elements before, and a softmax of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(24, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.up(x).sort(-1).values.cumsum(-1))
        return self.down(torch.nn.functional.gelu(self.mid(h))).square().mean()


def sorted_layers() -> models.Made:
    torch.manual_seed(0)
    return Sorted(), {"x": torch.randn(32, 24)}


def explained(made: models.Made, **options: Any) -> Report:
    model, inputs = made
    return actpass.explain(model, **inputs, options=options if "plan" in options else {**SMALL, **options})


def named(report: Report) -> tuple[int, int]:
    """(matmuls, fused attentions) that the plan names."""
    names = [name for region in report.regions for name in region.plan["recompute"]]
    attentions = sum("attention" in name for name in names)
    return len(names) - attentions, attentions


def run_again(report: Report) -> tuple[int, int]:
    return report.totals.extra_matmuls, report.totals.extra_attention


def of_plan(report: Report, recompute: tuple[str, ...]) -> ModelPlan:
    """The plan of ``report`` that stores everything as it is and runs ``recompute`` again."""
    (region,) = report.plan.regions
    return replace(report.plan, regions=(replace(region, recompute=recompute, storages=(), must_save=()),))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["auto", "exact"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_runs_again_what_its_plan_names(policy: str, budget: float):
    report = explained(models.transformer(), policy=policy, memory_budget=budget)
    assert run_again(report) == named(report)


@pytest.mark.slow
def test_a_matmul_is_run_again_without_any_attention():
    exact = explained(models.transformer(), policy="exact")
    report = explained(models.transformer(), plan=of_plan(exact, ("mm_3",)))
    assert run_again(report) == (1, 0)
    assert report.totals.saved_bytes < exact.totals.saved_bytes


@pytest.mark.slow
def test_one_attention_is_run_again_without_the_other_and_gradients_are_exact():
    exact = explained(models.transformer(), policy="exact")
    attention = "_scaled_dot_product_flash_attention_for_cpu_1"
    plan = of_plan(exact, (attention,))
    report = explained(models.transformer(), plan=plan)
    assert run_again(report) == (0, 1)
    model, inputs = models.transformer()
    loss, want = step(model, model, inputs)
    again, got = step(torch.compile(model, backend=eager_actcomp({"plan": plan})), model, inputs)
    assert float(again) == pytest.approx(float(loss), rel=EPS)
    assert_close(got, want, 300 * EPS)


@pytest.mark.parametrize("budget", [0.7, 0.6])
def test_a_sort_and_a_scan_are_never_run_again(budget: float):
    model, inputs = sorted_layers()
    (region,) = explain_model(model, (), inputs, {**SMALL, "policy": "exact", "memory_budget": budget}).regions
    forward, backward = ({n.name for n in gm.graph.nodes} for gm in (region.forward, region.backward))
    assert region.record.plan["recompute"]
    assert {"sort", "cumsum"} <= forward
    assert not {"sort", "cumsum"} & backward


def test_the_partition_is_checked(monkeypatch: pytest.MonkeyPatch):
    """With upstream's own list of expensive operators alone, all attentions on a CPU would run again."""

    def nothing(joint: Joint, named: frozenset[str]) -> frozenset[str]:
        return frozenset()

    monkeypatch.setattr(partition, "_run_once", nothing)
    with pytest.raises(Exception, match="which the plan does not name"):
        explained(models.transformer(), policy="exact", memory_budget=0.6)


def test_the_report_tells_what_takes_a_matmul_or_an_attention_and_the_policys_reason():
    class Attention(Policy):
        recomputes = True

        def decide(self, facts: Facts) -> tuple[Storage, ...]:
            return tuple(
                facts.recompute(t, "attention is cheap") if t.role == "output" and facts.can_recompute(t) else facts.save(t)
                for t in facts.tensors
            )

        def options(self, t: SavedTensor, request: TensorRequest, codecs: CodecSet) -> tuple[str, ...]:
            return (SAVE,)

    with POLICIES.temporary():
        register_policy("attention")(Attention)
        report = explained(models.transformer(), policy="attention")
    reasons = {s.reason for region in report.regions for s in region.sites if s.form == "recompute"}
    free, attention = "recomputed exactly from what is saved, with no matmul or attention", "with 0 matmuls and 1 attention"
    assert free in reasons
    assert f"attention is cheap; recomputed exactly from what is saved, {attention}" in reasons
    assert run_again(report) == (0, 2)


def test_the_report_of_a_budget_tells_what_takes_a_matmul():
    report = explained(models.transformer(), policy="exact", memory_budget=0.5)
    reasons = {s.reason for region in report.regions for s in region.sites if s.form == "recompute"}
    assert any("with 1 matmuls and 0 attention" in r for r in reasons)


class Checkpointed(nn.Module):
    """Layers of attention, each inside activation checkpointing, in which each makes the same mask of positions."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.q, self.v = (nn.ModuleList(nn.Linear(64, 64) for _ in range(layers)) for _ in range(2))

    def layer(self, x: torch.Tensor, q: nn.Module, v: nn.Module) -> torch.Tensor:
        position = torch.arange(x.shape[1], device=x.device)
        mask = torch.where(position[:, None] >= position, 0.0, -torch.inf)
        return x + torch.softmax(q(x) @ x.mT / 8 + mask, -1) @ v(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for q, v in zip(self.q, self.v, strict=True):
            x = torch.utils.checkpoint.checkpoint(self.layer, x, q, v, use_reentrant=False)
        return x.square().mean()


@pytest.mark.slow
def test_of_a_users_checkpoints_only_what_enters_a_layer_is_stored_and_in_few_bits():
    """16384 bytes a layer; the mask of as many, alike in all, is made again. What runs again is what the user asked for."""
    x = torch.randn(1, 64, 64)
    exact, auto = (actpass.explain(Checkpointed(), x, options={"policy": p, "min_tensor_bytes": 0}) for p in ("exact", "auto"))
    assert exact.totals.saved_bytes <= 3 * 16384  # what enters a layer; the last one's result is made again for the loss
    assert exact.totals.saved_bytes_default >= exact.totals.saved_bytes + 16384
    assert auto.totals.saved_bytes <= 0.3 * exact.totals.saved_bytes
    assert auto.totals.extra_matmuls == exact.totals.extra_matmuls


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["exact", "auto"])
def test_gradients_through_a_users_checkpoints(policy: str):
    torch.manual_seed(0)
    expected, x = Checkpointed(), torch.randn(2, 64, 64)
    model = copy.deepcopy(expected)
    expected(x).backward()
    torch.compile(model, backend=eager_actcomp({"policy": policy, "min_tensor_bytes": 0}))(x).backward()
    for name, p in model.named_parameters():
        want = expected.get_parameter(name).grad
        assert error(p.grad, want) < (1e-5 if policy == "exact" else 0.02), name


class WideStem(nn.Module):
    """A checkpoint that concatenates data, which upstream never makes again by itself, and layers behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(640, 64), nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(torch.cat([(x * k).sin() for k in range(2, 12)], -1)).relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.utils.checkpoint.checkpoint(self.embed, x, use_reentrant=False)
        for layer in self.layers:
            h = h + layer(nn.functional.gelu(nn.functional.rms_norm(h, (64,))))
        return h.square().mean()


@pytest.mark.slow
def test_what_a_users_checkpoint_makes_of_data_is_not_stored():
    """A concatenation of 640 features of 64 rows, in float32."""
    totals = actpass.explain(WideStem(), torch.randn(64, 64), options={"policy": "exact", "min_tensor_bytes": 0}).totals
    assert totals.saved_bytes < 0.6 * totals.saved_bytes_default
    assert totals.saved_bytes < 9 * 64 * 64 * 4 + 64 * 640 * 4
