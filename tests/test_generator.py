"""The counter-based generator: quality, and the same bits everywhere."""

from __future__ import annotations

import subprocess
import sys

import torch

from actpass.codecs.generator import bits32, mix32, normals, permutation, signs, step_seed

COUNT = 1 << 16


def key(draw: int = 0) -> torch.Tensor:
    return torch.tensor(step_seed(0, draw))


def test_mix32_is_a_bijection_on_a_range():
    x = torch.arange(1 << 20)
    assert mix32(x).unique().numel() == x.numel()


def test_bits32_fill_the_range_evenly():
    u = bits32(key(), 1, COUNT)
    assert int(u.min()) >= 0
    assert int(u.max()) < 2**32
    counts = torch.bincount(u >> 24, minlength=256).double()
    chi2 = float(((counts - COUNT / 256) ** 2 / (COUNT / 256)).sum())
    assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5  # chi-squared with 255 degrees of freedom


def test_bits32_every_bit_is_fair_and_uncorrelated_with_its_neighbour():
    u = bits32(key(3), 7, COUNT)
    bits = torch.stack([(u >> b) & 1 for b in range(32)]).double() * 2 - 1
    bound = 5 / COUNT**0.5  # five standard deviations of a mean of signs
    assert bits.mean(1).abs().max() < bound
    for lag in (1, 2, 64, 256):
        assert (bits[:, lag:] * bits[:, :-lag]).mean(1).abs().max() < bound


def test_streams_draws_and_base_seeds_are_independent():
    reference = signs(key(0), 1, COUNT)
    others = [signs(key(0), 2, COUNT), signs(key(1), 1, COUNT), signs(torch.tensor(step_seed(1, 0)), 1, COUNT)]
    others.append(signs(key(0) + (1 << 32), 1, COUNT))  # 2^32 apart is another stream, too
    for other in others:
        assert (reference * other).mean().abs() < 5 / COUNT**0.5


def test_rows_of_a_sign_basis_are_uncorrelated():
    """One keyed round of the mixer fails this (FACTS: variance of P^T P 1.05 and neighbouring rows correlated)."""
    n, r = 512, 128
    total = torch.zeros(n, n, dtype=torch.float64)
    draws = 64
    for draw in range(draws):
        p = signs(key(draw), 5, n * r).view(n, r).double() / r**0.5
        total += p @ p.T
    off = total / draws - torch.eye(n, dtype=torch.float64)
    std = 1 / (r * draws) ** 0.5  # of an off-diagonal entry of the mean of P P^T
    assert abs(float(off.square().mean()) / std**2 - (n - 1) / n) < 0.02  # the diagonal of P P^T is exactly one
    assert off.diagonal(1).mean().abs() < 5 * std / n**0.5


def test_normals_have_the_moments_of_a_normal():
    x = normals(key(), 9, 1 << 18).double()
    n = x.numel()
    assert x.mean().abs() < 5 / n**0.5
    assert (x.var() - 1).abs() < 5 * (2 / n) ** 0.5
    assert (x.pow(4).mean() - 2.9).abs() < 5 * (96 / n) ** 0.5  # Irwin-Hall of twelve: kurtosis 3 - 1.2 / 12


def test_permutation_is_one_and_moves():
    p = permutation(key(), 3, 1000)
    assert torch.equal(p.sort().values, torch.arange(1000))
    assert (p == torch.arange(1000)).sum() < 12
    assert not torch.equal(p, permutation(key(1), 3, 1000))


def test_generator_is_bit_identical_under_inductor():
    def draw(k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return bits32(k, 1, 4096), signs(k, 2, 4096), normals(k, 3, 4096)

    for got, want in zip(torch.compile(draw)(key()), draw(key()), strict=True):
        assert torch.equal(got, want)


def test_generator_is_the_same_in_another_process():
    code = (
        "import torch; from actpass.codecs.generator import bits32, step_seed;"
        "print(int(bits32(torch.tensor(step_seed(5, 7)), 11, 1000).sum()))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert runs == {f"{int(bits32(torch.tensor(step_seed(5, 7)), 11, 1000).sum())}\n"}
