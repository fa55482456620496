"""Every projection: unbiased, with the variance of its closed form, exact at full rank, the same under Inductor."""

from __future__ import annotations

import pytest
import torch

from actpass.codecs import PROJECTIONS, contract, decode, encode
from actpass.codecs.generator import round_keys, step_seed

SEEDS = 256
WIDTHS = [(64, 16), (86, 20)]  # a power of two, and 2 x 43: the Hartley factor of `srht`
methods = pytest.mark.parametrize("method", PROJECTIONS)


def basis(method: str, seed: int, width: int, rank: int, *, unbiased: bool = True) -> torch.Tensor:
    key = round_keys(step_seed(0, seed))
    return PROJECTIONS[method].basis(key, width, rank, unbiased=unbiased, dtype=torch.float32)


@methods
@pytest.mark.parametrize(("width", "rank"), WIDTHS)
def test_projection_is_unbiased_with_the_closed_variance(method: str, width: int, rank: int):
    torch.manual_seed(1)
    x_TN, dy_TM = torch.randn(40, width), torch.randn(40, 24)
    exact = dy_TM.T @ x_TN
    total, squares, error = torch.zeros_like(exact), torch.zeros_like(exact), 0.0
    for seed in range(SEEDS):
        p = basis(method, seed, width, rank)
        estimate = contract(dy_TM.T @ encode(x_TN, p), p, left=False)
        total += estimate - exact
        squares += (estimate - exact) ** 2
        error += float((estimate - exact).square().sum() / exact.square().sum())
    # The statistic is the projection of the bias on the exact gradient: one z-score for the whole matrix.
    z = (total / SEEDS / (squares / SEEDS / SEEDS).sqrt()).abs()
    assert z.mean() < 1.0  # E|z| of a normal is 0.80
    assert z.max() < 4.9  # 1536 to 2064 entries at once: P(max > 4.9) < 0.2 %
    direction = float((total * exact).sum() / exact.square().sum()) / SEEDS
    assert abs(direction) < 4 * (PROJECTIONS[method].relative_variance(width, rank) / SEEDS / 24) ** 0.5
    assert error / SEEDS == pytest.approx(PROJECTIONS[method].relative_variance(width, rank), rel=0.05)


@pytest.mark.parametrize("method", ["haar", "srht"])
@pytest.mark.parametrize("width", [64, 86, 43, 96])
def test_projection_at_full_rank_is_exact(method: str, width: int):
    p = basis(method, 0, width, width)
    error = (p @ p.T - torch.eye(width)).norm() / width**0.5
    assert error < 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("method", ["haar", "srht"])
def test_projection_without_scaling_has_orthonormal_columns(method: str):
    p = basis(method, 3, 86, 20, unbiased=False)
    assert torch.allclose(p.T @ p, torch.eye(20), atol=20 * torch.finfo(torch.float32).eps)


@methods
def test_projection_without_scaling_has_unit_columns_on_average(method: str):
    p = torch.stack([basis(method, s, 64, 16, unbiased=False) for s in range(32)])
    assert p.square().sum(1).mean() == pytest.approx(1.0, rel=0.05)


@methods
def test_projection_draws_another_basis_each_step_and_width(method: str):
    assert not torch.equal(basis(method, 0, 64, 16), basis(method, 1, 64, 16))
    assert not torch.equal(basis(method, 0, 64, 16), basis(method, 0, 65, 16)[:64])


@pytest.mark.codegen
@methods
def test_projection_is_the_same_under_inductor(method: str):
    def draw(key: torch.Tensor) -> torch.Tensor:
        return PROJECTIONS[method].basis(key, 86, 20, unbiased=True, dtype=torch.float32)

    key = round_keys(step_seed(0, 0))
    compiled = torch.compile(draw)(key)
    if method == "srht":  # 86 = 2 x 43: the Hartley factor's cosine may differ in its last bit
        assert torch.allclose(compiled, draw(key), rtol=0, atol=4 * torch.finfo(torch.float32).eps)
        assert torch.equal(compiled.sign(), draw(key).sign())
    else:
        assert torch.equal(compiled, draw(key))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("groups", [None, 3])
def test_contract_through_the_factors_is_the_projected_gradient(left: bool, groups: int | None):
    batch = (groups,) if groups else ()
    x, dy = torch.randn(*batch, 12, 32), torch.randn(*batch, 12, 8)
    p = basis("haar", 0, 32, 4)
    z = encode(x, p)
    factors = (z.transpose(-1, -2), dy) if left else (dy.transpose(-1, -2), z)
    got = contract(torch.matmul(*factors), p, left=left)
    x_hat = decode(z, p)
    want = x_hat.transpose(-1, -2) @ dy if left else dy.transpose(-1, -2) @ x_hat
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
