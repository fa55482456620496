"""rank="budget": ranks layer by layer from the memory budget, through the whole pass."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

import actpass
from actpass.memory.profiler import measure
from actpass.options import options_for
from actpass.reporting import Report, SiteRow

from . import models
from .helpers import assert_equal, eager_actcomp, in_processes, step

TOKENS = 256
FLOAT = 4
WIDTHS = (48, 128, 320, 96)
OUT = 8


class Factored(nn.Module):
    """Linear layers without a function between them: what is between is stored for weight gradients alone. Widths and
    out-features differ. The last layer reads a tanh's output, which its backward reads as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.chain = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS)))
        self.narrow, self.head = nn.Linear(WIDTHS[-1], OUT), nn.Linear(OUT, OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.narrow(self.chain(x)))).square().mean()


BETWEEN = {"chain.1.weight": 128, "chain.2.weight": 320, "narrow.weight": 96}
"""Weights whose x is stored for them alone, and its width."""
OUTS = {"chain.1.weight": 320, "chain.2.weight": 96, "narrow.weight": OUT}


def factored() -> models.Made:
    return Factored(), {"x": torch.randn(TOKENS, WIDTHS[0], generator=torch.Generator().manual_seed(1))}


def ranked(budget: Any, method: str = "haar", **more: Any) -> dict[str, Any]:
    return {**options_for(method), "rank": "budget", "memory_budget": budget, **more}


def explain(options: dict[str, Any], build: Any = factored) -> Report:
    model, inputs = build()
    return actpass.explain(model, options=options, advise=False, **inputs)


def rows(report: Report) -> dict[str, SiteRow]:
    return {p: s for r in report.regions for s in r.sites for p in s.parameters}


def ranks(report: Report) -> dict[str, int]:
    """Of what a budget may give ranks; the width where it is exact."""
    return {p: rows(report)[p].rank or n for p, n in BETWEEN.items()}


def error_of(raised: Any) -> actpass.BudgetError:
    return getattr(raised.value, "inner_exception", raised.value)


def least_of(options: dict[str, Any], build: Any = factored) -> float | int:
    with pytest.raises(Exception, match=r"can't be met|asks to save") as raised:
        explain(options, build)
    least = error_of(raised).least
    assert least is not None
    return least


@pytest.mark.slow
@pytest.mark.parametrize("method", ["haar", "gaussian", "srht"])
def test_ranks_differ_by_layer_and_meet_a_fraction_of_the_saved_bytes(method: str):
    before: dict[str, int] = {}
    for budget in (0.1, 0.35, 0.9):
        report = explain(ranked(budget, method))
        allowed = budget * report.totals.saved_bytes_default
        found = ranks(report)
        # less than the largest step of a rank is left: 64 of the widest
        assert allowed - 64 * TOKENS * FLOAT < report.saved_bytes <= allowed
        assert report.totals.extra_matmuls == 0
        assert all(found[p] >= before.get(p, 0) for p in found)
        before = found
        if budget == 0.35:
            assert len(set(found.values())) == 3


@pytest.mark.codegen
def test_what_is_saved_is_what_the_report_says_and_within_the_budget():
    """Compiled by Inductor, measured by allocation events."""
    model, inputs = factored()
    compiled = torch.compile(model, backend="actcomp", options=ranked(0.35, "rademacher"))
    step(compiled, model, inputs)
    alive = measure(lambda: compiled(**inputs))
    report = actpass.report(model)
    assert alive.kept_bytes - alive.result.untyped_storage().nbytes() == report.saved_bytes
    assert report.saved_bytes <= 0.35 * report.totals.saved_bytes_default
    assert all(row.form == "project" for p, row in rows(report).items() if p in BETWEEN)


def share_of_noise(audit: Any) -> float:
    """Squared relative error of the gradients of `BETWEEN`, by their elements, of all weights."""
    weights = {p.name: p for p in audit.parameters if p.name.endswith("weight")}
    total = sum(p.numel for p in weights.values())
    return sum(weights[name].numel * weights[name].error ** 2 for name in BETWEEN) / total


def predicted(found: dict[str, int]) -> tuple[float, float]:
    """(expectation, standard deviation at most) of that for one draw of Haar's bases.

    With s the share of a row that lies in the subspace its error is 1 + s (c^2 - 2 c), c = N / R; s is Beta distributed with
    mean R / N and variance 2 R (N - R) / (N^2 (N + 2)). Rows share their basis; at most their errors move together.
    """
    total = WIDTHS[0] * WIDTHS[1] + sum(BETWEEN[p] * OUTS[p] for p in BETWEEN) + OUT * OUT
    mean = deviation = 0.0
    for p, n in BETWEEN.items():
        c, weight = n / found[p], n * OUTS[p] / total
        mean += weight * (c - 1)
        deviation += weight * abs(c * c - 2 * c) * math.sqrt(2 * found[p] * (n - found[p]) / (n * n * (n + 2)))
    return mean, deviation


@pytest.mark.slow
def test_gradients_err_as_predicted_and_less_than_with_one_rank_of_as_many_bytes():
    seeds = 64
    model, inputs = factored()
    options = ranked(0.35)
    found = ranks(actpass.explain(model, options=options, advise=False, **inputs))
    assert all(found[p] < n for p, n in BETWEEN.items())
    audit = actpass.audit(model, inputs, options=options, seeds=seeds)
    assert all(p.bias_z is None or p.bias_z <= 4 for p in audit.parameters)
    mean, deviation = predicted(found)
    assert abs(share_of_noise(audit) - mean) <= 4 * deviation / math.sqrt(seeds)

    together = sum(found.values())
    alike = -(-together // len(found))  # no fewer bytes: all payloads have as many rows
    fraction = together / sum(BETWEEN.values())
    for rank in (alike, fraction):
        others = {p: rank if isinstance(rank, int) else max(1, math.ceil(rank * n)) for p, n in BETWEEN.items()}
        overrides = {p.removesuffix(".weight"): {"projection": "haar", "rank": r} for p, r in others.items()}
        other = actpass.audit(model, inputs, options={"policy": "exact", "module_overrides": overrides}, seeds=seeds)
        want, spread = predicted(others)
        assert want > 1.1 * mean
        assert abs(share_of_noise(other) - want) <= 4 * spread / math.sqrt(seeds)
        assert share_of_noise(other) > share_of_noise(audit)


@pytest.mark.slow
def test_forward_and_input_gradients_stay_as_they_are():
    """And so do the gradients of all weights but those whose x is stored for them alone."""
    model, inputs = factored()
    inputs["x"].requires_grad_()
    loss, want = step(torch.compile(model, backend=eager_actcomp(policy="exact")), model, inputs)
    dx, inputs["x"].grad = inputs["x"].grad, None
    torch.compiler.reset()
    got_loss, got = step(torch.compile(model, backend=eager_actcomp(ranked(0.3))), model, inputs)
    assert torch.equal(loss, got_loss)
    assert torch.equal(dx, inputs["x"].grad)
    assert not any(torch.equal(got[p], want[p]) for p in BETWEEN)
    assert_equal({p: g for p, g in got.items() if p not in BETWEEN}, {p: g for p, g in want.items() if p not in BETWEEN})


def test_layers_that_free_no_bytes_stay_exact_and_the_report_says_why():
    report = explain(ranked(0.3))
    found = rows(report)
    assert found["chain.0.weight"].projection is None
    assert "no bytes to gain: x is not stored, but rebuilt or an input" in found["chain.0.weight"].reason
    assert found["head.weight"].projection is None
    assert "no bytes to gain: x is stored for other uses as well" in found["head.weight"].reason
    assert "ranks from the budget for 3 tensors" in str(report)


@pytest.mark.parametrize("budget", [1.0, 10**12])
def test_with_room_for_all_nothing_is_projected(budget: float | int):
    report = explain(ranked(budget))
    assert all(row.projection is None for row in rows(report).values())
    assert "within the budget as it is" in rows(report)["narrow.weight"].reason
    assert report.saved_bytes <= report.totals.saved_bytes_default


@pytest.mark.slow
def test_a_fraction_below_what_the_smallest_ranks_leave_is_an_error_with_the_least_that_is_met():
    with pytest.raises(Exception, match=r"Only 3 of the tensors .* the largest of these are .*addmm") as raised:
        explain(ranked(0.01))
    least = error_of(raised).least
    assert least is not None
    assert 0.01 < least < 0.2
    report = explain(ranked(least))
    assert report.saved_bytes <= least * report.totals.saved_bytes_default
    assert set(ranks(report).values()) == {8}
    with pytest.raises(Exception, match="asks to save"):
        explain(ranked(least - 0.01))


@pytest.mark.slow
def test_a_budget_of_peak_bytes_takes_the_largest_ranks_whose_predicted_peak_is_within_it():
    least = least_of(ranked(2, "srht"))
    assert isinstance(least, int)
    sums = []
    for budget in (least, int(1.15 * least)):
        report = explain(ranked(budget, "srht"))
        totals = report.totals
        assert totals.resident_bytes is not None
        assert totals.peak_bytes is not None
        assert totals.resident_bytes + totals.peak_bytes <= budget
        assert totals.extra_matmuls == 0
        sums.append(sum(ranks(report).values()))
    assert sums[0] < sums[1]
    with pytest.raises(Exception, match="can't be met"):
        explain(ranked(least - 1, "srht"))


class Broken(nn.Module):
    """Two parts with a graph break between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(*map(nn.Linear, (48, *[n] * 5), (*[n] * 5, 8))) for n in (96, 160))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = self.first(x).square().mean()
        torch._dynamo.graph_break()
        return loss + self.second(x).square().mean()


@pytest.mark.slow
def test_one_budget_of_peak_bytes_over_the_parts_of_a_step():
    """At first each part has its least peak; when a step has shown both, ranks as large as fit."""
    model, (_, inputs) = Broken(), factored()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    compiled = torch.compile(model, backend=eager_actcomp(ranked(10**9, "srht")))
    found = []
    for _ in range(2):
        step(compiled, model, inputs)
        found.append([d["rank"] or 10**6 for r in actpass.report(model).regions for d in r.plan["decisions"]])
        still.step()
    assert len(actpass.report(model).regions) == 2
    assert sum(found[0]) < sum(found[1])


def test_overrides_take_ranks_from_the_budget_beside_fixed_ones():
    overrides = {"chain.1": {"projection": "srht", "rank": 16}, "narrow": {"projection": "haar", "rank": "budget"}}
    report = explain({"policy": "exact", "module_overrides": overrides, "memory_budget": 0.7})
    found = rows(report)
    assert (found["chain.1.weight"].projection, found["chain.1.weight"].rank) == ("srht", 16)
    assert found["chain.2.weight"].projection is None
    assert found["narrow.weight"].rank in range(8, 96, 8)
    assert report.saved_bytes <= 0.7 * report.totals.saved_bytes_default


@pytest.mark.slow
@pytest.mark.parametrize("base", ["auto", "int8"])
def test_overrides_in_the_midst_of_low_bit_forms(base: str):
    """What is stored in few bits stays so; the ranks take what it leaves."""
    override = {"projection": "rademacher", "rank": "budget"}
    options = {**options_for(base), "module_overrides": {"chain.2": override}, "memory_budget": 0.3, "min_tensor_bytes": 0}
    report = explain(options)
    assert report.saved_bytes <= 0.3 * report.totals.saved_bytes_default
    assert (rows(report)["chain.2.weight"].rank or 0) >= 8
    assert rows(report)["chain.1.weight"].codec is not None
    assert report.totals.extra_matmuls == 0


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_payloads_in_few_bits_have_larger_ranks(quantize: str):
    plain, coded = (explain(ranked(0.15, **more)) for more in ({}, {"codec": quantize, "min_tensor_bytes": 0}))
    allowed = 0.15 * coded.totals.saved_bytes_default
    assert allowed - 64 * TOKENS * FLOAT < coded.saved_bytes <= allowed
    assert sum(ranks(coded).values()) > 2 * sum(ranks(plain).values())
    assert rows(coded)["chain.2.weight"].codec == quantize


def llama() -> models.Made:
    """Attention that is not fused: its output is stored for the weight gradient of `o_proj` alone."""
    model, inputs = models.llama()
    model.set_attn_implementation("eager")
    return model, inputs


@pytest.mark.architectures
def test_the_output_of_attention_that_is_not_fused():
    options = ranked(0.0)
    least = least_of(options, llama)
    report = explain({**options, "memory_budget": least}, llama)
    found = {p: row.rank for p, row in rows(report).items() if row.projection}
    assert found == {f"model.layers.{i}.self_attn.o_proj.weight": 8 for i in range(2)}
    assert "no bytes to gain" in rows(report)["model.layers.0.mlp.down_proj.weight"].reason


@pytest.mark.slow
def test_the_same_plan_in_processes_with_other_hash_seeds():
    code = (
        "from tests.test_rank_budget import explain, llama, ranked;"
        "print([explain(ranked(b, 'srht')).plan_hash for b in (0.4, 0.2)])"
    )
    first, second = in_processes(code)
    assert first == second
    assert len(set(eval(first))) == 2


@pytest.mark.slow
def test_the_energy_that_learned_subspaces_miss_weighs_their_ranks():
    """Compiled anew after some steps, `prac` gives more ranks to whose principal directions hold less."""
    model, inputs = factored()
    with torch.no_grad():  # chain.2 reads what lies in 2 of 320 dimensions, chain.1 what lies in 48 of 128
        model.chain[1].weight[2:].zero_()
        model.chain[1].bias[2:].zero_()
    options = ranked(0.35, "prac", activation_rank=None, skip_unprofitable=False)

    def found() -> dict[str, int]:
        torch.compiler.reset()
        step(torch.compile(model, backend=eager_actcomp(options)), model, inputs)
        return ranks(actpass.report(model))

    first, again = found(), found()
    tails = {s.parameter: s.tail for s in actpass.report(model).subspaces}
    assert tails["chain.2.weight"] < 0.01 < 0.1 < tails["chain.1.weight"]
    assert again["chain.2.weight"] < first["chain.2.weight"]
    assert again["chain.1.weight"] > first["chain.1.weight"]
    assert actpass.report(model).saved_bytes <= 0.35 * actpass.report(model).totals.saved_bytes_default
