"""Tensors that are stored as a projection and decoded, whatever the backward does with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import actpass
from actpass.codecs import LEARNED
from actpass.diagnostics.interpreter import interpret
from actpass.memory.profiler import measure
from actpass.options import options_for
from actpass.plan_file import ModelPlan
from actpass.runtime.step_counter import STEP_COUNTER
from actpass.runtime.subspaces import STORE

from . import helpers, models
from .helpers import Grads, assert_equal, eager_actcomp, error, step

SMALL: dict[str, Any] = {"min_tensor_bytes": 0, "skip_unprofitable": False}
methods = pytest.mark.parametrize("method", LEARNED)


def optimizer_step() -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1).step()


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=eager_actcomp({**SMALL, **options}))


def decoded(model: nn.Module) -> dict[str, str]:
    """Module -> what is stored of it."""
    return {s.module: s.decoded for r in actpass.report(model).regions for s in r.sites if s.decoded is not None}


def exact_step(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Grads]:
    found = step(compiled(model, policy="exact"), model, inputs)
    torch.compiler.reset()
    return found


@pytest.mark.slow
@methods
def test_a_rank_that_holds_the_tensor_gives_the_exact_gradient(method: str):
    """gate and up have 48 features of 32 dimensions. `prac` takes half of its rank for the random part."""
    model, inputs = models.transformer()
    loss, exact = exact_step(model, inputs)
    rank = 47 if method in ("prac", "sampled") else 32
    run = compiled(model, **options_for(method), rank=1.0, activation_rank=None, module_overrides={
        "blocks.*.gate": {"activation_rank": rank}, "blocks.*.up": {"activation_rank": rank}})  # fmt: skip
    got_loss, got = step(run, model, inputs)
    assert sorted(decoded(model)) == ["blocks.0.gate", "blocks.0.up", "blocks.1.gate", "blocks.1.up"]
    assert set(decoded(model).values()) == {f"{method} {rank}/48"}
    assert torch.equal(loss, got_loss)
    worst = max(error(got[n], exact[n]) for n in exact)
    assert worst < (1e-3 if method in ("pca", "oasis") else 0.6), worst


@pytest.mark.slow
def test_all_that_crosses_but_attention_is_decoded_and_the_loss_is_untouched():
    model, inputs = models.transformer()
    loss, exact = exact_step(model, inputs)
    got_loss, got = step(compiled(model, projection="pca", rank=1.0, activation_rank=0.75), model, inputs)
    assert torch.equal(loss, got_loss)
    forms = decoded(model)
    assert {m.rpartition(".")[2] for m in forms} >= {"gate", "up"}
    assert "pca 24/32" in forms.values()  # the residual stream
    assert not any(m.rpartition(".")[2] in ("q", "k", "v") for m in forms)
    errors = [error(got[n], exact[n]) for n in exact]
    assert 1e-3 < max(errors) < 0.7
    text = str(actpass.report(model))
    assert "not decoded from a projection: fused attention reads it" in text
    assert "biased" in text
    assert f"{len(forms)} decoded from one" in text


@pytest.mark.slow
@pytest.mark.parametrize("resample", ["every_step", "every_refresh"])
def test_a_linear_use_stays_unbiased_with_a_fresh_complement_only(resample: str):
    """``up`` enters silu(gate) * up: the backward is linear in it."""
    model, inputs = models.transformer(layers=1)
    _, exact = exact_step(model, inputs)
    run = compiled(
        model, projection="prac", rank=1.0, activation_rank=None, resample=resample, refresh_interval=10_000,
        module_overrides={"blocks.0.up": {"activation_rank": 0.25}},
    )  # fmt: skip
    names = [n for n in exact if n.startswith(("blocks.0.down", "blocks.0.gate"))]
    total = {n: torch.zeros_like(exact[n], dtype=torch.float64) for n in names}
    squares = dict.fromkeys(names, 0.0)
    for _ in range(256):
        _, got = step(run, model, inputs)
        for n in names:
            difference = got[n].double() - exact[n].double()
            total[n] += difference
            squares[n] += float(difference.square().sum())
        optimizer_step()
    assert decoded(model) == {"blocks.0.up": "prac 12/48"}
    (row,) = [s for s in actpass.report(model).regions[0].sites if s.decoded]
    assert row.unbiased == (resample == "every_step")
    for n in names:
        spread = (squares[n] / 256) ** 0.5
        assert spread > 0.02 * float(exact[n].norm()), n  # it is inexact at all
        bias = float((total[n] / 256).norm()) / spread
        assert bias < 4 / 16 if resample == "every_step" else bias > 0.9, n


@pytest.mark.slow
def test_a_nonlinear_use_is_called_biased():
    model, inputs = models.transformer()
    step(compiled(model, projection="prac"), model, inputs)
    rows = {s.module: s for s in actpass.report(model).regions[0].sites if s.decoded}
    assert not rows["blocks.0.gate"].unbiased
    assert rows["blocks.0.up"].unbiased
    assert rows["blocks.0.gate"].decoded == "prac 19/48"  # the paper's 0.2 + 0.2
    assert rows["blocks.0.gate"].bytes_after == rows["blocks.0.gate"].bytes_before * 19 // 48


@pytest.mark.slow
def test_payloads_are_coded_too():
    model, inputs = models.transformer(layers=1)
    _, exact = exact_step(model, inputs)
    step(compiled(model, projection="pca", rank=1.0, activation_rank=0.75), model, inputs)
    full = actpass.report(model).saved_bytes
    torch.compiler.reset()
    _, got = step(compiled(model, projection="pca", rank=1.0, activation_rank=0.75, codec="int8"), model, inputs)
    rows = [s for s in actpass.report(model).regions[0].sites if s.decoded]
    assert rows
    assert {s.codec for s in rows} == {"int8"}
    assert actpass.report(model).saved_bytes < 0.5 * full
    assert max(error(got[n], exact[n]) for n in exact) < 0.7


@pytest.mark.codegen
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_reported_bytes_are_alive_between_forward_and_backward(quantize: str | None):
    """Compiled by Inductor, measured by allocation events."""
    model, inputs = models.transformer(layers=1)
    options = {**SMALL, "projection": "prac", "codec": quantize}
    function = torch.compile(model, backend="actcomp", options=options)
    loss, _ = step(torch.compile(model, backend="actcomp", options={"policy": "exact"}), model, inputs)
    got, grads = step(function, model, inputs)
    assert torch.equal(loss, got)
    assert all(g.isfinite().all() for g in grads.values())
    assert len(decoded(model)) >= 3
    optimizer_step()  # the first one returns a sketch, and the next moves the subspaces: neither is a saved tensor
    step(function, model, inputs)
    alive = measure(lambda: function(**inputs))
    assert alive.kept_bytes - alive.result.untyped_storage().nbytes() == actpass.report(model).saved_bytes


@pytest.mark.codegen
def test_compiled_and_interpreted_gradients_agree():
    model, inputs = models.transformer(layers=1)
    options = {**SMALL, "projection": "prac", "rank": 0.5}
    _, want = step(compiled(model, **options), model, inputs)
    torch.compiler.reset()
    STORE.clear()
    _, got = step(torch.compile(model, backend="actcomp", options=options), model, inputs)
    assert max(error(got[n], want[n]) for n in want) < 1e-3


@pytest.mark.slow
def test_the_plan_is_followed_from_its_file(tmp_path: Path):
    model, inputs = models.transformer(layers=1)
    _, want = step(compiled(model, projection="prac"), model, inputs)
    report = actpass.report(model)
    report.plan.save(tmp_path / "plan.json")
    forms = decoded(model)
    torch.compiler.reset()
    STORE.clear()
    run = torch.compile(model, backend=eager_actcomp(plan=ModelPlan.load(tmp_path / "plan.json")))
    _, got = step(run, model, inputs)
    assert decoded(model) == forms
    assert actpass.report(model).plan.hash == report.plan.hash
    assert_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 4096}, "Allowed: oasis, pca, prac, sampled, and an int in"),
        ({"projection": "haar"}, "Allowed: oasis, pca, prac, sampled, and an int in"),
        ({"site": "nowhere"}, "nowhere"),
    ],
)
def test_an_edited_decision_that_is_not_possible_is_refused(change: dict[str, Any], message: str, tmp_path: Path):
    model, inputs = models.transformer(layers=1)
    step(compiled(model, projection="prac"), model, inputs)
    actpass.report(model).plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    (region,) = data["regions"]
    first = next(d for d in region["decisions"] if d["rank"] and not d["matmuls"])
    first.update(change)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    torch.compiler.reset()
    with pytest.raises(Exception, match=message):
        step(torch.compile(model, backend=eager_actcomp(plan=tmp_path / "plan.json")), model, inputs)


class OneHead(nn.Module):
    """Written-out attention of one head over as many tokens as there are features: its scores have every shape that features
    have."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96, bias=False), nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = F.softmax(q @ k.transpose(-1, -2) / 32**0.5, -1)
        return self.out(weights @ v).square().mean()


def test_attention_weights_are_no_features():
    model, inputs = OneHead(), {"x": torch.randn(2, 32, 32)}
    step(compiled(model, projection="pca", activation_rank=0.5), model, inputs)
    rows = [s for s in actpass.report(model).regions[0].sites if "softmax" in s.source or "exp" in s.op or "div" in s.op]
    assert rows
    assert not any(s.decoded for s in rows)


@pytest.mark.codegen
def test_dynamic_batches_share_one_graph():
    model, inputs = models.transformer(layers=1)
    x = inputs["x"]
    run = torch.compile(
        model, backend=eager_actcomp({**SMALL, "projection": "pca", "rank": 1.0, "activation_rank": 0.75}), dynamic=True
    )
    for count in (2, 3):
        batch = {"x": x[:1].repeat(count, 1, 1)}
        loss, got = step(run, model, batch)
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in got.values())
    assert decoded(model)


@pytest.mark.slow
def test_half_precision_and_autocast():
    model, inputs = models.transformer(layers=1)
    _, exact = exact_step(model, inputs)

    def run(**batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch)

    function = torch.compile(run, backend=eager_actcomp({**SMALL, "projection": "pca", "rank": 1.0, "activation_rank": 0.75}))
    _, got = step(function, model, inputs)
    assert max(error(got[n], exact[n]) for n in exact) < 0.7
    assert decoded(model)


@pytest.mark.slow
def test_pending_backward_keeps_the_basis_of_its_own_forward():
    model, inputs = models.transformer(layers=1)
    run = compiled(model, projection="prac", refresh_interval=1)
    _, want = step(run, model, inputs)
    torch.compiler.reset()
    STORE.clear()
    STEP_COUNTER.steps = 0
    run = compiled(model, projection="prac", refresh_interval=1)
    model.zero_grad(set_to_none=True)
    first = run(**inputs)
    optimizer_step()
    run(x=inputs["x"] + 1)  # moves the subspaces, and stays pending
    first.backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal(got, want)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "half", float("nan")])
def test_ranks_that_mean_nothing_are_refused(rank: Any):
    with pytest.raises(actpass.OptionError, match="activation_rank"):
        eager_actcomp(projection="pca", activation_rank=rank)


def test_a_rank_for_a_method_without_a_basis_that_follows_the_data_is_refused():
    with pytest.raises(actpass.OptionError, match="oasis, pca, prac, sampled"):
        eager_actcomp(projection="haar", activation_rank=0.5)


@pytest.mark.parametrize("loss", [lambda y: y.square().mean(), lambda y: y.sin().mean(), lambda y: y.sum()])
def test_a_derivative_that_is_computed_early_is_no_tensor_to_decode(loss: Callable[[torch.Tensor], torch.Tensor]):
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + F.silu(self.a(x))
            return loss(x + F.silu(self.b(x)))

    torch.manual_seed(0)
    model = Residual()
    step(compiled(model, projection="prac"), model, {"x": torch.randn(64, 24)})
    assert actpass.report(model).regions[0].active
    assert decoded(model)


@pytest.mark.slow
def test_random_numbers_are_drawn_where_their_tensor_is_stored_and_needed(monkeypatch: pytest.MonkeyPatch):
    """All at the beginning, Inductor would make them in one go on a CPU, and hold what they are summed from at once."""
    graphs: list[fx.GraphModule] = []

    def seen(gm: fx.GraphModule, example_inputs: Any, **more: Any) -> Any:
        graphs.append(gm)
        return interpret(gm, example_inputs, **more)

    monkeypatch.setattr(helpers, "interpret", seen)
    model, inputs = models.transformer(layers=3)
    step(compiled(model, projection="prac"), model, inputs)
    sites = len(decoded(model))
    assert sites >= 6
    for gm in graphs[-2:]:
        nodes = list(gm.graph.nodes)
        body = nodes[len(gm.graph.find_nodes(op="placeholder")) :]
        draws = [i / len(body) for i, n in enumerate(body) if n.target is torch.ops.prims.iota.default and n.args[0] > 96]
        assert len(draws) >= sites
        assert max(draws) - min(draws) > 0.5


@pytest.mark.slow
def test_two_decoded_tensors_that_are_multiplied_are_random_apart():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.c(self.a(x) * self.b(x)) * torch.linspace(-1, 1, 16)).mean()

    torch.manual_seed(0)
    model, inputs = Product(), {"x": torch.randn(32, 16)}
    _, exact = exact_step(model, inputs)
    run = compiled(model, projection="prac", rank=1.0, activation_rank=8, refresh_interval=10_000)
    want, slopes = exact["c.weight"].double(), []
    for _ in range(256):
        _, got = step(run, model, inputs)
        slopes.append(float((got["c.weight"].double() * want).sum() / want.square().sum()))
        optimizer_step()
    assert len(decoded(model)) == 2
    found = torch.tensor(slopes)
    assert float(found.std()) > 0.01
    assert abs(float(found.mean()) - 1) < 4 * float(found.std()) / 16
