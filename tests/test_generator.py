"""The counter-based generator: quality, and the same bits everywhere."""

from __future__ import annotations

import pytest
import torch

from actpass.codecs.generator import bits32, normals, permutation, round_keys, signs, step_seed

from .helpers import in_processes

COUNT = 1 << 16


def key(draw: int = 0) -> torch.Tensor:
    return round_keys(step_seed(0, draw))


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


def test_bits32_consecutive_numbers_differ_without_pattern():
    """Four rounds of the mixer fail this (z of 70), and so does any xor- or add-linear generator."""
    u = bits32(key(5), 2, 1 << 20)
    for lag in (1, 2, 64, 128, 1000, 4096):
        for difference in ((u[lag:] - u[:-lag]) & 0xFFFFFFFF, u[lag:] ^ u[:-lag]):
            for shift in (24, 12, 0):
                counts = torch.bincount((difference >> shift) & 255, minlength=256).double()
                expected = counts.sum() / 256
                z = float(((counts - expected) ** 2 / expected).sum() - 255) / (2 * 255) ** 0.5
                assert abs(z) < 5, (lag, shift, z)


def test_bits32_every_key_bit_changes_half_of_the_output():
    u = bits32(key(), 4, 1 << 12)
    for bit in range(63):
        changed = u ^ bits32(round_keys(step_seed(0, 0) ^ (1 << bit)), 4, 1 << 12)
        share = torch.stack([(changed >> b) & 1 for b in range(32)]).double().mean(1)
        assert (share - 0.5).abs().max() < 5 * 0.5 / (1 << 12) ** 0.5, bit


def test_streams_draws_and_base_seeds_are_independent():
    reference = signs(key(0), 1, COUNT)
    others = [signs(key(0), 2, COUNT), signs(key(1), 1, COUNT), signs(round_keys(step_seed(1, 0)), 1, COUNT)]
    others.append(signs(round_keys(step_seed(0, 0) + (1 << 32)), 1, COUNT))  # 2^32 apart is another stream, too
    for other in others:
        assert (reference * other).mean().abs() < 5 / COUNT**0.5


def test_rows_of_a_sign_basis_are_uncorrelated():
    """A weak mixer fails this: the variance of P P^T grows by per cents and neighbouring rows correlate."""
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


@pytest.mark.codegen
def test_generator_is_bit_identical_under_inductor():
    def draw(k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return bits32(k, 1, 4096), signs(k, 2, 4096), normals(k, 3, 4096)

    for got, want in zip(torch.compile(draw)(key()), draw(key()), strict=True):
        assert torch.equal(got, want)


@pytest.mark.slow
def test_generator_is_the_same_in_another_process():
    code = (
        "import torch; from actpass.codecs.generator import bits32, round_keys, step_seed;"
        "print(int(bits32(round_keys(step_seed(5, 7)), 11, 1000).sum()))"
    )
    want = str(int(bits32(round_keys(step_seed(5, 7)), 11, 1000).sum()))
    assert in_processes(code) == [want, want]
