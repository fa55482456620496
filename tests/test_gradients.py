"""The identity that only a correct rewrite satisfies: every projected weight gradient is the exact one times P P^T, with
the P of its width, method and step; and everything else is bit-equal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actpass
from actpass.codecs import PROJECTIONS
from actpass.codecs.generator import round_keys, step_seed
from actpass.options import options_for

from .helpers import assert_equal, eager_actcomp, error, projected, step

D = 48


class Net(nn.Module):
    """Shared x (q, k), a narrow and a wide layer, a Conv1D, batched experts, a bias, a norm, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q, self.k = nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, 2 * D)
        self.norm, self.frozen = nn.LayerNorm(D), nn.Linear(D, D)
        self.conv = nn.Parameter(torch.randn(D, 24) * 0.1)
        self.experts = nn.Parameter(torch.randn(3, D, 16) * 0.1)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(F.gelu(self.stem(x)))
        a, (b, c) = self.q(h), self.k(h).chunk(2, -1)
        h = self.frozen(h + a * torch.sigmoid(b) + c)
        e = torch.bmm(h.view(3, -1, D), self.experts)
        return (h @ self.conv).square().mean() + e.square().mean()


def inputs() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(6, 4, D, requires_grad=True)}


def width_axis(name: str) -> int:
    """Which axis of a parameter is the in-features."""
    return {"conv": 0, "experts": 1}.get(name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", PROJECTIONS)
@pytest.mark.parametrize("scale", ["unbiased", "orthonormal"])
def test_projected_gradient_is_the_exact_one_times_the_projector(method: str, scale: str):
    net, batch, rank = Net(), inputs(), 12
    loss, exact = step(torch.compile(net, backend=eager_actcomp()), net, batch)
    dx, batch["x"].grad = batch["x"].grad, None
    torch.compiler.reset()
    options = {**options_for(method), "rank": rank, "projection_scaling": scale, "seed": 7, "skip_unprofitable": False}
    got_loss, got = step(torch.compile(net, backend=eager_actcomp(options)), net, batch)
    names = {"stem.weight", "q.weight", "k.weight", "conv", "experts"}
    assert projected(actpass.report(net)) == names
    assert torch.equal(loss, got_loss)
    assert torch.equal(dx, batch["x"].grad)
    assert_equal({n: g for n, g in got.items() if n not in names}, {n: g for n, g in exact.items() if n not in names})
    p = PROJECTIONS[method].basis(round_keys(step_seed(7, 0)), D, rank, unbiased=scale == "unbiased", dtype=torch.float32)
    for name in names:
        g = exact[name].movedim(width_axis(name), -1)
        want = (g @ (p @ p.T)).movedim(-1, width_axis(name))
        # a few hundred float32 multiply-adds in another order
        assert error(got[name], want) < 64 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize("method", ["haar", "srht"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_rank_gradient_is_exact_to_rounding(method: str, dtype: torch.dtype):
    net = Net().to(dtype)
    batch = {"x": torch.randn(6, 4, D, dtype=dtype)}
    _, exact = step(torch.compile(net, backend=eager_actcomp()), net, batch)
    torch.compiler.reset()
    options = {**options_for(method), "rank": 1.0, "skip_unprofitable": False}
    _, got = step(torch.compile(net, backend=eager_actcomp(options)), net, batch)
    assert projected(actpass.report(net))
    for name in exact:
        # x P, dy^T z and the lift each round once: three roundings of the dtype, times sqrt(N) / sqrt(N) for P's entries
        assert error(got[name], exact[name]) < 8 * torch.finfo(dtype).eps, name


def test_refresh_interval_keeps_the_basis_for_that_many_optimizer_steps():
    net, batch = Net(), inputs()
    function = torch.compile(
        net, backend=eager_actcomp(projection="rademacher", rank=8, refresh_interval=2, skip_unprofitable=False)
    )
    still = torch.optim.SGD(net.parameters(), lr=0.0)
    grads = []
    for _ in range(4):
        grads.append(step(function, net, batch)[1]["q.weight"])
        still.step()
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[1], grads[2])
    assert torch.equal(grads[2], grads[3])


@pytest.mark.slow
def test_memory_budget_one_is_inductors_own_cut_and_less_saves_less():
    net, batch = Net(), inputs()
    saved = {}
    for budget in (1.0, 0.6, 0.3):
        torch.compiler.reset()
        actpass.runtime.regions.clear()
        step(torch.compile(net, backend=eager_actcomp(memory_budget=budget)), net, batch)
        totals = actpass.report(net).totals
        saved[budget] = totals.saved_bytes
        assert totals.saved_bytes <= budget * totals.saved_bytes_default
    assert saved[1.0] == totals.saved_bytes_default
    assert saved[0.3] <= saved[0.6] < saved[1.0]


def test_memory_budget_that_cant_be_met_names_the_least():
    with pytest.raises(Exception, match=r"memory_budget=0.0 asks to save 0 of the \d+ bytes.*The least.*use memory_budget="):
        step(torch.compile(Net(), backend=eager_actcomp(memory_budget=0.0)), Net(), inputs())
