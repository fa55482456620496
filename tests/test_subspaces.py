"""Learned subspaces in training: the gradient is the exact one through the basis at hand, which moves when it should."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import actpass
from actpass.codecs import LEARNED
from actpass.codecs.generator import round_keys, step_seed
from actpass.options import options_for
from actpass.runtime.step_counter import STEP_COUNTER
from actpass.runtime.subspaces import STORE, Subspace, _points
from actpass.torch_compat import fake_input

from . import models
from .helpers import EPS, Grads, assert_equal, eager_actcomp, error, grads_of, projected, step
from .test_gradients import Net, width_axis
from .test_gradients import inputs as net_inputs

RANK = 12
ALL: dict[str, Any] = {"rank": RANK, "activation_rank": None, "skip_unprofitable": False}
methods = pytest.mark.parametrize("method", LEARNED)


def compiled(model: nn.Module, method: str, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=eager_actcomp({**ALL, **options_for(method), **options}))


def subspaces(model: nn.Module) -> dict[str, Subspace]:
    return {n: s for n, p in model.named_parameters() for s in STORE.of(p).values()}


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: s.state for n, s in subspaces(model).items()}


def optimizer_step() -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1).step()


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(3)
    scale = torch.linspace(1, 0.05, 24)
    return [{"x": torch.randn(32, 24, generator=draw) * scale} for _ in range(count)]


# ------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.slow
@methods
def test_projected_gradient_is_the_exact_one_times_the_projector(method: str):
    net, batch = Net(), net_inputs()
    loss, exact = step(torch.compile(net, backend=eager_actcomp()), net, batch)
    dx, batch["x"].grad = batch["x"].grad, None
    torch.compiler.reset()
    got_loss, got = step(compiled(net, method, seed=7), net, batch)
    names = {"stem.weight", "q.weight", "k.weight", "conv", "experts"}
    assert projected(actpass.report(net)) == names
    assert torch.equal(loss, got_loss)
    assert torch.equal(dx, batch["x"].grad)
    assert_equal({n: g for n, g in got.items() if n not in names}, {n: g for n, g in exact.items() if n not in names})
    found = states(net)
    assert set(found) == {"stem.weight", "k.weight", "conv", "experts"}  # q and k share theirs
    noise = LEARNED[method].noise(round_keys(step_seed(7, 0)), 48, RANK)
    for name in names:
        p = LEARNED[method].draw(found["k.weight" if name == "q.weight" else name], noise, RANK)
        want = (exact[name].movedim(width_axis(name), -1) @ (p @ p.T)).movedim(-1, width_axis(name))
        assert error(got[name], want) < 64 * EPS, name
        lost = error(got[name], exact[name])
        assert lost < (0.999 if method in ("pca", "oasis") else 3), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@methods
def test_full_rank_gradient_is_exact_to_rounding(method: str, dtype: torch.dtype):
    net = Net().to(dtype)
    batch = {"x": torch.randn(6, 4, 48, dtype=dtype)}
    _, exact = step(torch.compile(net, backend=eager_actcomp()), net, batch)
    torch.compiler.reset()
    _, got = step(compiled(net, method, rank=1.0), net, batch)
    assert projected(actpass.report(net))
    for name in exact:
        assert error(got[name], exact[name]) < 8 * torch.finfo(dtype).eps, name


@pytest.mark.slow
def test_frozen_complement_is_biased_between_refreshes_and_a_fresh_one_is_not():
    model, _ = models.mlp()
    (batch,) = batches(1)
    _, exact = step(torch.compile(model, backend=eager_actcomp(policy="exact")), model, batch)

    def bias(resample: str) -> float:
        torch.compiler.reset()
        STEP_COUNTER.steps = 0
        run = compiled(model, "prac", resample=resample, refresh_interval=10_000, rank=8)
        total, squares = torch.zeros_like(exact["mid.weight"]), 0.0
        for _ in range(256):
            difference = step(run, model, batch)[1]["mid.weight"] - exact["mid.weight"]
            total, squares = total + difference, squares + float(difference.square().sum())
            optimizer_step()
        return float((total / 256).norm()) / (squares / 256) ** 0.5

    assert bias("every_step") < 4 / 16  # of independent errors 1 / sqrt(256) is left
    assert bias("every_refresh") > 0.9


# ------------------------------------------------------------------------------------------------------------- movement


@methods
def test_first_step_has_a_basis_of_its_own_batch(method: str):
    model, _ = models.mlp()
    (batch,) = batches(1)
    step(compiled(model, method), model, batch)
    x = batch["x"].double()
    principal = LEARNED[method].principal(RANK)
    q = states(model)["up.weight"][:-1, :principal].double()
    best = torch.linalg.svdvals(x)[:principal].square().sum()
    assert float((x @ q).square().sum() / best) > 0.98


def test_first_forwards_leave_random_state_and_running_statistics():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(24, 40), nn.BatchNorm1d(40), nn.Linear(40, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.dropout(self.norm(self.up(x)), 0.5, True)).square().mean()

    results = []
    for method in ("exact", "pca"):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Normed()
        run = compiled(model, method, **({"rank": None} if method == "exact" else {}))
        run(**batches(1)[0]).backward()
        results.append((model.norm.running_mean.clone(), model.norm.num_batches_tracked.clone(), torch.rand(1)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@methods
def test_basis_moves_after_a_refresh_step_and_not_within_one(method: str):
    model, _ = models.mlp()
    run = compiled(model, method, refresh_interval=3)
    seen = []
    for batch in batches(7):
        run(**batch).backward()
        before = states(model)
        run(**batch).backward()  # accumulated
        assert_equal(states(model), before)
        seen.append(before)
        optimizer_step()
    moved = [not torch.equal(a["up.weight"], b["up.weight"]) for a, b in pairwise(seen)]
    assert moved == [True, False, False, True, False, False]


def test_a_sketch_samples_the_same_tokens_whatever_the_default_device():
    want = _points(0, 3, 16, torch.device("cpu"))
    with torch.device("meta"):
        assert torch.equal(_points(0, 3, 16, torch.device("cpu")), want)


@pytest.mark.parametrize(("interval", "times"), [(1, 1), (10, 10), (20, 20)])
def test_small_moves_sort_the_directions_every_twenty_optimizer_steps(interval: int, times: int):
    """Whatever the user's interval between two sketches: twenty moves of `oasis`, after those that always sort."""
    model, _ = models.mlp()
    run = compiled(model, "oasis", refresh_interval=interval)
    spectra = []
    for batch in batches(34):
        run(**batch).backward()
        spectra.append(subspaces(model)["up.weight"].spectrum)
        STEP_COUNTER.steps += interval
    assert sum(a is not b for a, b in pairwise(spectra[-21:])) == times


def test_sketches_of_accumulated_batches_add_up():
    model, _ = models.mlp()
    run = compiled(model, "pca")
    first, second = batches(2)
    run(**first).backward()
    one = subspaces(model)["up.weight"].sketched
    run(**second).backward()
    both = subspaces(model)["up.weight"].sketched
    assert one is not None
    assert both is not None
    times = LEARNED["pca"].points / 32  # that each token is sampled
    assert float(both[-1, 0] - one[-1, 0]) == pytest.approx(times * float(second["x"].square().sum()), rel=1e-4)


def test_pending_backward_keeps_the_basis_of_its_own_forward():
    model, _ = models.mlp()
    run = compiled(model, "pca", refresh_interval=1)
    first, second = batches(2)
    step(run, model, first)
    _, want = step(run, model, first)
    model.zero_grad()
    pending = run(**first)
    optimizer_step()
    later = run(**second)  # the basis has moved
    pending.backward()
    assert_equal(grads_of(model), want)
    later.backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "gradients"), [("pca", "low_rank"), ("prac", "low_rank"), ("sampled", "dense"), ("sampled", "low_rank")]
)
def test_bases_are_made_again_and_not_stored(method: str, gradients: str):
    """A subspace stays between steps, as a parameter does: what is made of it need not cross to the backward, and a budget is
    met as without it."""
    model, inputs = models.transformer(layers=1)
    options = {**ALL, **options_for(method), "rank": 0.6, "weight_gradient_format": gradients, "memory_budget": 0.5}
    step(torch.compile(model, backend=eager_actcomp(options)), model, inputs)
    report = actpass.report(model)
    assert projected(report)
    assert report.saved_bytes <= 0.5 * report.totals.saved_bytes_default


def test_one_graph_of_several_modules_has_a_subspace_for_each():
    model, inputs = models.transformer(layers=3)
    inputs["x"].requires_grad_()
    graphs: list[int] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(1)
        return eager_actcomp({**ALL, "projection": "pca"})(gm, example_inputs)

    for block in model.blocks:
        block.compile(backend=backend)
    model(**inputs).backward()
    assert len(graphs) == 1
    found = states(model)
    assert len(found) == 3 * 4
    assert not torch.equal(found["blocks.0.k.weight"], found["blocks.2.k.weight"])


@pytest.mark.codegen
def test_a_refresh_compiles_nothing():
    """By Inductor: the step with a sketch and the one without are one graph."""
    model, inputs = models.transformer(layers=1)
    run = torch.compile(model, backend="actcomp", options={**ALL, "projection": "prac", "refresh_interval": 2})
    with torch._dynamo.config.patch(error_on_recompile=True):
        seen = []
        for _ in range(5):
            run(**inputs).backward()
            seen.append(states(model)["blocks.0.k.weight"])
            optimizer_step()
    moved = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert moved == [True, False, True, False]


# ---------------------------------------------------------------------------------------------------------------- state


@pytest.mark.slow
@methods
@pytest.mark.parametrize("stop", [3, 4])  # after a refresh step, whose sketch is still to be used; and between two
def test_resumed_run_is_bitwise_the_run_that_was_not_stopped(method: str, stop: int, tmp_path: Path):
    def start() -> tuple[nn.Module, Callable[..., Any], torch.optim.Optimizer]:
        torch.compiler.reset()
        STEP_COUNTER.steps, STEP_COUNTER.calls = 0, 0
        model, _ = models.mlp()
        return model, compiled(model, method, refresh_interval=2, seed=7), torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(run: Callable[..., Any], optimizer: torch.optim.Optimizer, data: list[dict[str, torch.Tensor]]) -> None:
        for batch in data:
            optimizer.zero_grad()
            run(**batch).backward()
            optimizer.step()

    model, run, optimizer = start()
    train(run, optimizer, batches(6))
    want: Grads = {n: p.detach().clone() for n, p in model.named_parameters()}
    model, run, optimizer = start()
    train(run, optimizer, batches(6)[:stop])
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "actpass": actpass.state_dict(run)}
    torch.save(saved, tmp_path / "checkpoint.pt")

    def resumed(with_subspaces: bool) -> Grads:
        model, run, optimizer = start()
        loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        if not with_subspaces:
            loaded["actpass"]["subspaces"] = {}
        actpass.load_state_dict(model, loaded["actpass"])
        train(run, optimizer, batches(6)[stop:])
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    assert_equal(resumed(with_subspaces=True), want)
    assert not torch.equal(resumed(with_subspaces=False)["mid.weight"], want["mid.weight"])  # or this test could not fail


def test_a_state_that_does_not_fit_changes_nothing():
    model, _ = models.mlp()
    run = compiled(model, "pca")
    step(run, model, batches(1)[0])
    state, before = actpass.state_dict(model), states(model)
    for bad in ({"nothing.weight": {}}, {"up.weight": {"pca.24.0": {"projection": "pca"}}}):
        with pytest.raises(actpass.StateError, match="weight"):
            actpass.load_state_dict(model, {**state, "steps": 9, "subspaces": bad})
    assert STEP_COUNTER.steps == state["steps"]
    assert_equal(states(model), before)


def test_another_rank_takes_the_subspace_over():
    model, _ = models.mlp()
    (batch,) = batches(1)
    step(compiled(model, "pca", rank=12), model, batch)
    before = states(model)["up.weight"]
    torch.compiler.reset()
    step(compiled(model, "pca", rank=6), model, batch)
    after = states(model)["up.weight"]
    assert after.shape[1] < before.shape[1]
    assert float((after[:-1, :6] - before[:-1, :6]).abs().max()) < 1e-6


def test_audit_sees_the_subspaces_of_the_run_and_leaves_them():
    model, _ = models.mlp()
    first, second = batches(2)
    run = compiled(model, "pca", refresh_interval=1)
    step(run, model, first)
    optimizer_step()
    step(run, model, first)
    before = {n: (s.state.clone(), s.step, s.moves) for n, s in subspaces(model).items()}
    audit = actpass.audit(model, second, options={**ALL, "projection": "pca"}, seeds=2)
    errors = {p.name: p.error for p in audit.parameters}
    assert 0 < errors["up.weight"] < 0.7
    assert errors["up.bias"] == 0
    assert {n: (s.step, s.moves) for n, s in subspaces(model).items()} == {n: v[1:] for n, v in before.items()}
    assert_equal(states(model), {n: v[0] for n, v in before.items()})


class Doubles(nn.Module):
    """Writes into its input, as a layer behind a graph break may."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24)

    def forward(self, h: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        h.mul_(2.0)
        return self.layer(h * scale).square().mean()


@pytest.mark.parametrize("scale", [torch.linspace(1, 2, 24), torch.ones(1, 24).expand(32, 24), torch.ones(32, 48)[:, ::2]])
def test_first_forwards_write_into_no_input(scale: torch.Tensor):
    model, x = Doubles(), torch.randn(32, 24, requires_grad=True)
    before = scale._version
    want, got = (function(x * 1, scale) for function in (model, compiled(model, "pca")))
    assert float((got - want).abs()) < 64 * EPS * float(want)
    assert scale._version == before


@pytest.mark.parametrize("write", ["in place", "through a view", "by index", "of a list"])
def test_first_forwards_write_into_no_parameter(write: str):
    """A moving average that is a parameter without a gradient."""

    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.mean = nn.Linear(24, 24), nn.Parameter(torch.ones(24), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                if write == "in place":
                    self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                elif write == "through a view":
                    self.mean.data.view(2, 12).mul_(0.5)
                elif write == "by index":
                    self.mean[:12] += x.mean(0)[:12]
                else:
                    torch._foreach_mul_([self.mean], 0.5)
            return (self.layer(x) * self.mean).square().mean()

    want, got = Average(), Average()
    got.load_state_dict(want.state_dict())
    x = torch.randn(32, 24)
    assert want(x).item() == pytest.approx(compiled(got, "pca")(x).item(), rel=64 * EPS)
    assert torch.equal(got.mean, want.mean)


def test_first_forwards_leave_what_another_backward_reads():
    first, second = models.mlp()[0], models.mlp()[0]
    x = torch.randn(32, 24)
    (compiled(first, "pca")(x) + compiled(second, "pca")(x)).backward()


class Tied(nn.Module):
    """One weight, read from both sides: its two subspaces have two widths."""

    def __init__(self, full: bool = True) -> None:
        super().__init__()
        self.w, self.full = nn.Parameter(torch.randn(40, 24) * 0.2), full

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x @ self.w.t())
        return (h @ self.w if self.full else h).square().mean()


def test_a_weight_that_is_read_from_both_sides_has_a_subspace_for_each():
    model, x = Tied(), torch.randn(64, 24)
    run = compiled(model, "pca")
    run(x).backward()
    assert {s.state.shape[0] - 1 for s in STORE.of(model.w).values()} == {24, 40}
    model.full = False
    run(x).backward()


def test_two_models_in_one_graph_have_their_own():
    a, b = models.mlp()[0], models.mlp()[0]
    both = torch.compile(lambda x: a(x) + b(2 * x), backend=eager_actcomp({**ALL, "projection": "pca"}))
    both(torch.randn(32, 24)).backward()
    assert set(states(a)) == set(states(b)) == {"up.weight", "mid.weight", "down.weight"}
    assert not torch.equal(states(a)["mid.weight"], states(b)["mid.weight"])


def test_a_model_with_an_attribute_named_module_is_not_unwrapped():
    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = models.MLP(), nn.Linear(24, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(torch.tanh(self.head(x)))

    model = Wraps()
    compiled(model, "pca")(torch.randn(32, 24)).backward()
    assert "head.weight" in actpass.state_dict(model)["subspaces"]


def test_loading_puts_back_what_was_there_and_nothing_else():
    model, _ = models.mlp()
    empty = actpass.state_dict(model)
    step(compiled(model, "pca"), model, batches(1)[0])
    good = actpass.state_dict(model)
    entry = good["subspaces"]["up.weight"]["pca.24.0"]
    for bad in ({"state": torch.zeros(7, 3)}, {"projection": "nonsense"}, {"rank": 99}, {"state": entry["state"] * torch.nan}):
        with pytest.raises(actpass.StateError, match="can't be read"):
            actpass.load_state_dict(model, {**good, "subspaces": {"up.weight": {"pca.24.0": {**entry, **bad}}}})
    actpass.load_state_dict(model, empty)
    assert not states(model)


def test_a_first_batch_of_nonsense_is_made_good_at_the_next_step():
    model, _ = models.mlp()
    first, second, third = batches(3)
    first["x"][3, 5] = torch.nan
    run = compiled(model, "pca")
    step(run, model, first)
    assert all(s.moves == 0 for s in subspaces(model).values())
    for batch in (second, third):
        optimizer_step()
        step(run, model, batch)
    assert all(s.moves > 0 for s in subspaces(model).values())


def test_a_batch_of_nonsense_does_not_spoil_the_one_that_takes_its_place():
    """A scaler skips the optimizer's step, so that both are of one step of the clock."""
    model, _ = models.mlp()
    first, second, third = batches(3)
    second["x"][3, 5] = torch.nan
    run = compiled(model, "pca", refresh_interval=1)
    step(run, model, first)
    optimizer_step()
    before = {n: s.moves for n, s in subspaces(model).items()}
    for batch in (second, third):
        step(run, model, batch)
    optimizer_step()
    step(run, model, first)
    assert all(s.moves > before[n] + 1 for n, s in subspaces(model).items())


@pytest.mark.parametrize("method", ["pca", "prac", "oasis"])
def test_under_autocast_subspaces_move_and_stay_orthonormal(method: str):
    """With a direction that outweighs all others: in bfloat16 their Gram matrix has no factor."""
    model, _ = models.mlp()
    run = compiled(model, method, refresh_interval=1)
    outlier = torch.linspace(0.05, 0.02, 24).index_fill(0, torch.tensor([3]), 30.0)
    before: list[torch.Tensor] = []
    for i, batch in enumerate(batches(20)):
        with torch.autocast("cpu", torch.bfloat16):
            run(batch["x"] * outlier).backward()
        state = states(model)["up.weight"]
        if i > 12:
            assert not torch.equal(state, before[-1])
            q = state[:-1].double()
            assert error(q.t() @ q, torch.eye(q.shape[1], dtype=torch.float64)) < 1e-5
        before.append(state)
        optimizer_step()


@methods
def test_a_batch_without_tokens_has_no_gradient_and_moves_nothing(method: str):
    model, _ = models.mlp()
    run = compiled(model, method)
    step(run, model, batches(1)[0])
    optimizer_step()
    run(torch.randn(0, 24)).nan_to_num().backward()
    before = states(model)
    optimizer_step()
    run(torch.randn(0, 24))
    assert_equal(states(model), before)


def test_the_default_dtype_is_nothing_to_a_subspace():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model, _ = models.mlp()
        run = compiled(model, "pca", refresh_interval=1)
        for batch in batches(3):
            run(batch["x"].bfloat16()).backward()
            optimizer_step()
        assert {s.dtype for s in states(model).values()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_subspaces_that_are_new_begin_and_others_stay():
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v, self.deep = nn.Linear(24, 24), nn.Linear(24, 24), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.u(x))
            return (self.v(h) if self.deep else h).square().mean()

    model, (batch,) = Grows(), batches(1)
    run = compiled(model, "pca")
    run(**batch).backward()
    before = states(model)["u.weight"]
    model.deep = True
    run(**batch).backward()
    assert torch.equal(states(model)["u.weight"], before)
    assert subspaces(model)["v.weight"].moves == 3


@pytest.mark.architectures
@pytest.mark.parametrize("method", ["prac", "sampled"])
def test_the_plan_of_a_run_can_be_followed(method: str):
    model, inputs = models.llama(1)
    _, want = step(compiled(model, method), model, inputs)
    report = actpass.report(model)
    assert projected(report)
    torch.compiler.reset()
    _, got = step(torch.compile(model, backend=eager_actcomp({"plan": report.plan})), model, inputs)
    assert actpass.report(model).plan_hash == report.plan_hash
    assert_equal(got, want)


def test_seeded_bases_keep_their_interval_beside_learned_ones():
    model, _ = models.mlp()
    (batch,) = batches(1)
    options = {"refresh_interval": 5, "module_overrides": {"up": {"projection": "prac"}}}
    run = compiled(model, "haar", **options)
    seen = []
    for _ in range(6):
        seen.append(step(run, model, batch)[1])
        optimizer_step()
    kept = [torch.equal(a["mid.weight"], b["mid.weight"]) for a, b in pairwise(seen)]
    assert kept == [True, True, True, True, False]
    assert not torch.equal(seen[1]["up.weight"], seen[2]["up.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"projection": "pca", "rank": "budget", "memory_budget": 0.5},
            "goes with projections whose error is a known function",
        ),
        ({"projection_scaling": "orthonormal"}, "has no meaning for prac"),
        ({"resample": "other"}, "unknown resample 'other'"),
        ({"rank": 0}, "rank=0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(actpass.OptionError, match=message):
        eager_actcomp({"projection": "prac", **options})


@pytest.mark.slow
def test_report_says_what_the_subspaces_captured_and_draws_it(tmp_path: Path):
    model, inputs = models.transformer()
    run = compiled(model, "prac", refresh_interval=1)
    with pytest.raises(actpass.ReportError, match="no sketch has been taken"):
        actpass.explain(model, **inputs, options={**ALL, "projection": "prac"}).plot_spectra(tmp_path / "none.svg")
    for _ in range(3):
        step(run, model, inputs)
        optimizer_step()
    report = actpass.report(model)
    rows = {s.parameter: s for s in report.subspaces}
    assert rows["blocks.0.k.weight"].principal == RANK // 2
    for name, row in rows.items():
        state = subspaces(model)[name].state
        assert row.nbytes == 4 * state.numel()
        assert row.tail is not None
        assert 0 < row.tail < 0.9
        assert list(row.captured) == sorted(row.captured, reverse=True)
    assert "blocks.*.k.weight (x2)" in str(report)
    assert "6+6" in str(report)
    assert report.to_dict()["subspaces"][0]["projection"] == "prac"
    assert actpass.report(run).subspaces == report.subspaces
    report.plot_spectra(tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").stat().st_size > 10_000
    lines = (tmp_path / "spectra.csv").read_text().splitlines()
    assert lines[0] == "subspace_of,direction,share_of_energy,principal"
    assert sum(line.startswith("blocks.*.k.weight") for line in lines) == states(model)["blocks.0.k.weight"].shape[1]


def test_the_number_of_sampled_tokens_is_bounded_for_inductor():
    """Its kernels ask on CUDA whether an index fits into 32 bits. Without a bound that would become a guard on a length that
    Dynamo knows no source of."""
    shapes = ShapeEnv()
    points = fake_input(FakeTensorMode(shape_env=shapes), torch.zeros(64), ConstantSource("points"), most=512)
    (count,) = points.shape
    assert isinstance(count, torch.SymInt)
    assert bool(count * 4096 <= 2**31 - 1)
    assert not shapes.guards
    assert not bool(count == 512)  # while another question is one
    assert shapes.guards


class Uneven(nn.Module):
    """Beside subspaces the cut decodes one tensor fewer than when it is asked which there will be."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(32, 64, bias=False) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(64, 32, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(2):
            x = x + self.pairs[2 * i](x.tanh()).relu() + self.pairs[2 * i + 1](x.sigmoid()).tanh()
            x = x + self.down[i](self.up[i](nn.functional.layer_norm(x, (32,))).relu())
        return x.square().mean()


@pytest.mark.slow
def test_a_region_is_asked_again_for_the_subspaces_of_its_final_cut():
    """What it was asked first is another number of them. It trains with projections, and so does its second compilation; no
    basis of zeros is ever trained with, which gives gradients of zero."""
    found: list[Grads] = []
    batch = {"x": torch.randn(64, 32, generator=torch.Generator().manual_seed(1))}
    for _ in range(2):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Uneven()
        options = {"projection": "prac", "rank": 0.5, "skip_unprofitable": False, "min_tensor_bytes": 0}
        with warnings.catch_warnings():
            warnings.simplefilter("error", actpass.ActpassWarning)
            found.append(step(torch.compile(model, backend=eager_actcomp(options)), model, batch)[1])
        assert sum(d["projection"] == "prac" for d in actpass.report(model).regions[0].plan["decisions"]) == 15
    assert all(bool(g.any()) for grads in found for g in grads.values())
    assert_equal(*found)
    torch.compiler.reset()
    exact = step(torch.compile(model, backend=eager_actcomp(policy="exact")), model, batch)[1]
    assert all(0.01 < error(found[0][n], exact[n]) < 1.5 for n in exact)  # of random data half the directions
