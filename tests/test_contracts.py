"""What everything that is registered keeps to: every codec and projection without and with a budget, as an override, from a
plan file and with a calibration; every optimizer in its saved state, dtypes, groups and steps. One more of each is added here
by the documented recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actpass
from actpass import codecs
from actpass.codecs.quantizers.integer import Integer
from actpass.optim import OPTIMIZERS
from actpass.options import options_for
from actpass.plan.sensitivity import Sensitivities
from actpass.reporting import Report
from actpass.runtime.step_counter import STEP_COUNTER
from actpass.runtime.subspaces import STORE

from .helpers import Grads, assert_equal, eager_actcomp, error, grads_of, step


@dataclass(frozen=True)
class Wide(Integer):
    """8 bits in groups of 128."""

    @property
    def name(self) -> str:
        return "int8_wide"


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.second(F.gelu(self.first(x)))).square().mean()


@pytest.fixture(params=(*codecs.QUANTIZERS, "int8_wide"))
def codec(request: pytest.FixtureRequest) -> Iterator[str]:
    with codecs.QUANTIZERS.temporary():
        if request.param not in codecs.QUANTIZERS:
            codecs.register_codec(Wide(8, 255, 128))
        yield request.param


projections = pytest.mark.parametrize("projection", codecs.ALL_PROJECTIONS)
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


def batch() -> torch.Tensor:
    return torch.randn(256, 64, generator=torch.Generator().manual_seed(0))


def explained(**options: Any) -> Report:
    report = actpass.explain(Layers(), batch(), options={"min_tensor_bytes": 0, **options})
    assert report.active
    return report


def trained(**options: Any) -> tuple[torch.Tensor, Grads]:
    torch.compiler.reset()
    model = Layers()
    return step(torch.compile(model, backend=eager_actcomp(options, min_tensor_bytes=0)), model, {"x": batch()})


@cache
def exact() -> tuple[torch.Tensor, Grads]:
    return trained(policy="exact")


@cache
def calibration() -> Sensitivities:
    return actpass.calibrate(Layers(), batch(), options={"min_tensor_bytes": 0})


def forms_of(report: Report) -> set[str]:
    return {s["codec"] for region in report.regions for s in region.plan["storages"]} - {"save"}


def methods_of(report: Report) -> set[str]:
    return {d["projection"] for region in report.regions for d in region.plan["decisions"]} - {None}


def followed(report: Report, folder: Path) -> Report:
    report.plan.save(folder / "plan.json")
    return actpass.explain(Layers(), batch(), options={"plan": str(folder / "plan.json")})


@pytest.mark.slow
def test_a_codec_works_wherever_codecs_do(codec: str, tmp_path: Path):
    whole = explained(**options_for(codec))
    assert forms_of(whole) == {codec}
    tight = math.ceil(100 * whole.totals.saved_bytes / whole.totals.saved_bytes_default) / 100
    # where something is run again, or rebuilt, the rest may do as it is
    assert forms_of(explained(**options_for(codec), memory_budget=tight, sensitivities=calibration())) <= {codec}
    assert forms_of(explained(policy="exact", module_overrides={"*": codec})) == {codec}
    assert forms_of(explained(memory_budget=0.9, module_overrides={"*": codec})) <= {codec}
    again = followed(whole, tmp_path)
    assert forms_of(again) == {codec}
    assert again.plan.hash == whole.plan.hash


def test_a_codec_changes_gradients_by_its_error_and_the_loss_not_at_all(codec: str):
    loss, grads = trained(**options_for(codec))
    assert torch.equal(loss, exact()[0])
    worst = max(error(grads[n], g) for n, g in exact()[1].items())
    rms = codecs.QUANTIZERS[codec].error ** 0.5
    assert rms / 30 < worst < 10 * rms


@pytest.mark.slow
@projections
def test_a_projection_works_wherever_projections_do(projection: str, tmp_path: Path):
    how: dict[str, Any] = {**options_for(projection), "rank": 0.25, "activation_rank": None, "skip_unprofitable": False}
    if projection not in codecs.LEARNED:
        del how["activation_rank"]
    whole = explained(**how)
    assert methods_of(whole) == {projection}
    assert methods_of(explained(**how, memory_budget=0.9, sensitivities=calibration())) == {projection}
    overridden = explained(
        policy="exact", skip_unprofitable=False, module_overrides={"*": {**options_for(projection), "rank": 0.25}}
    )
    assert methods_of(overridden) == {projection}
    again = followed(whole, tmp_path)
    assert methods_of(again) == {projection}
    assert again.plan.hash == whole.plan.hash
    if codecs.ALL_PROJECTIONS[projection].known_variance:
        ranked = explained(**options_for(projection), rank="budget", memory_budget=0.9)
        assert ranked.totals.saved_bytes <= 0.9 * ranked.totals.saved_bytes_default


@projections
def test_a_projection_leaves_the_loss_and_what_is_exact_alone(projection: str):
    more = {} if projection not in codecs.LEARNED else {"activation_rank": None}
    loss, grads = trained(**options_for(projection), rank=0.5, skip_unprofitable=False, **more)
    assert torch.equal(loss, exact()[0])
    biases = {n: g for n, g in grads.items() if n.endswith("bias")}
    assert_equal(biases, {n: exact()[1][n] for n in biases})
    for n in grads.keys() - biases.keys():
        assert 0.01 < error(grads[n], exact()[1][n]) < 3, n


def made(name: str, model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    return OPTIMIZERS[name](model.named_parameters(), lr=1e-3, **more)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, **options: Any) -> None:
    torch.compiler.reset()
    run = torch.compile(model, backend=eager_actcomp(options, min_tensor_bytes=0))
    for _ in range(steps):
        optimizer.zero_grad()
        run(x=batch()).backward()
        optimizer.step()


LOW_RANK: dict[str, Any] = {"projection": "haar", "rank": 0.5, "weight_gradient_format": "low_rank", "refresh_interval": 3}


@pytest.mark.slow
@optimizers
def test_an_optimizer_resumes_bitwise_in_the_middle_and_across_a_refresh(name: str, tmp_path: Path):
    model = Layers()
    optimizer = made(name, model)
    train(model, optimizer, 4, **LOW_RANK)
    torch.save((model.state_dict(), optimizer.state_dict(), actpass.state_dict(model)), tmp_path / "run.pt")
    train(model, optimizer, 4, **LOW_RANK)
    STEP_COUNTER.steps = 99
    STORE.clear()
    other = Layers()
    resumed = made(name, other)
    weights, state, own = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    torch.compiler.reset()
    actpass.load_state_dict(other, own)
    train(other, resumed, 4, **LOW_RANK)
    for n, t in model.state_dict().items():
        assert torch.equal(t, other.state_dict()[n]), n


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@optimizers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_optimizer_keeps_the_dtype_of_what_it_steps(name: str, dtype: torch.dtype):
    model = Layers().to(dtype)
    optimizer = made(name, model)
    for seed in range(3):
        gradients(model, seed)
        optimizer.step()
    for p in model.parameters():
        assert p.dtype == dtype
        assert bool(p.isfinite().all())
        tensors = {k: t for k, t in optimizer.state[p].items() if isinstance(t, torch.Tensor) and k != "step"}
        assert tensors
        assert all(t.dtype == dtype for t in tensors.values()), {k: t.dtype for k, t in tensors.items()}


@optimizers
def test_groups_of_an_optimizer_have_options_of_their_own(name: str):
    model = Layers()
    first = [(n, p) for n, p in model.named_parameters() if n.startswith("first")]
    second = [(n, p) for n, p in model.named_parameters() if n.startswith("second")]
    optimizer = OPTIMIZERS[name]([{"params": first, "lr": 0.0}, {"params": second, "weight_decay": 0.5}], lr=1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients(model, 0)
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in first)
    assert not any(torch.equal(p, before[n]) for n, p in second)
    assert [g["weight_decay"] == 0.5 for g in optimizer.param_groups] == [False, True]


@optimizers
def test_a_compiled_step_is_the_eager_one(name: str):
    models = [Layers(), Layers()]
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = made(name, model)
        run = torch.compile(lambda o=optimizer: o.step(), backend="eager") if compiled else optimizer.step
        for seed in range(2):
            gradients(model, seed)
            run()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [n for n, o in OPTIMIZERS.items() if n == "adamw" or getattr(o, "for_low_rank", False)])
def test_dense_gradients_get_the_step_of_adamw(name: str):
    ours, theirs = Layers(), Layers()
    optimizer = made(name, ours, weight_decay=0.01)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.01)
    for seed in range(3):
        for model in (ours, theirs):
            gradients(model, seed)
        optimizer.step()
        reference.step()
    assert grads_of(ours).keys() == grads_of(theirs).keys()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3 * 1e-3 * 1e-5)  # three steps of lr, to 1e-5 of a step


def test_a_name_of_any_length_comes_back_from_the_state():
    from actpass.optim.chain import _name_of, _number_of

    for name in ("a", "haar", "a_projection_with_a_name_of_more_than_sixteen_letters", "überlappung", "x" * 200):
        assert _name_of(_number_of(name)) == name
