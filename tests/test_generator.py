"""The counter-based generator: quality, and the same bits everywhere."""

from __future__ import annotations

import pytest
import torch

from actpass.codecs.generator import bits32, normals, permutation, round_keys, rounding_noise, signs, step_seed, uniforms

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


WIDTHS = pytest.mark.parametrize(("width", "bits", "piece"), [(16, 16, 0), (16, 8, 0), (14, 14, 0), (14, 14, 1), (7, 7, 3)])


def drawn(draw: int, rows: int, columns: int, width: int, bits: int, piece: int, *, tensors: int = 1) -> list[torch.Tensor]:
    """Numbers for rounding ``tensors`` that share the rows' of one draw."""
    noise = rounding_noise(key(draw), [rows, *[columns] * tensors])
    return [uniforms((noise[0], n), (rows, columns // 32, 32), bits, piece, width).view(rows, columns) for n in noise[1:]]


@WIDTHS
def test_numbers_for_rounding_are_uniform(width: int, bits: int, piece: int):
    u = torch.stack([drawn(d, 64, 64, width, bits, piece)[0] for d in range(64)]).double()
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, 128, 0.0, 1.0)
    expected = u.numel() / 128
    # numbers of one draw are independent by two, which is all that the mean of chi-squared needs; its spread is that of draws
    assert float(((counts - expected) ** 2 / expected).sum() / 127) == pytest.approx(1.0, abs=0.5)
    assert abs(float(u.mean()) - 0.5) < 5 * (12 * u.numel()) ** -0.5


@WIDTHS
def test_any_two_numbers_for_rounding_are_independent(width: int, bits: int, piece: int):
    """Of one row, of one column, of neither, and of two tensors that share the numbers of the rows: over draws, by chi-squared
    on 8 x 8 cells."""
    pairs: list[torch.Tensor] = []
    for d in range(1024):
        a, b = drawn(d, 2, 32, width, bits, piece, tensors=2)
        first, second = [a[0, 0], a[0, 3], a[0, 4], a[1, 6]], [a[0, 1], a[1, 3], a[1, 5], b[1, 6]]
        pairs.append(torch.stack([torch.stack(first), torch.stack(second)]))
    cells = (torch.stack(pairs) * 8).long()
    for kind in range(4):
        counts = torch.bincount(cells[:, 0, kind] * 8 + cells[:, 1, kind], minlength=64).double()
        chi2 = float(((counts - 16) ** 2 / 16).sum())
        assert abs(chi2 - 63) < 5 * (2 * 63) ** 0.5, kind


@WIDTHS
def test_two_columns_are_not_rounded_alike_within_one_draw(width: int, bits: int, piece: int):
    """An exclusive or alone fails this: two columns then differ by one pattern in all rows, and where half of the numbers round
    up the same rows do, or the others, for every pair of columns."""
    u = drawn(0, 4096, 64, width, bits, piece)[0].double()
    up = (u < 0.5).double() - 0.5
    correlation = torch.corrcoef(up.T).fill_diagonal_(0)
    patterns = 8 * 2.0**-width  # in which two numbers can differ: of few bits there are few
    assert correlation.square().sum() / (64 * 63) < 0.01 + patterns
    whole = up.sum(1) / (64 * 0.25) ** 0.5
    assert float(whole.pow(4).mean() / whole.square().mean() ** 2) == pytest.approx(3.0, abs=0.5)


@pytest.mark.codegen
def test_generator_is_bit_identical_under_inductor():
    def draw(k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        noise = rounding_noise(k, [64, 96])
        numbers = [uniforms((noise[0], noise[1]), (64, 3, 32), bits, 1, width) for width, bits in ((14, 14), (14, 8))]
        return bits32(k, 1, 4096), signs(k, 2, 4096), normals(k, 3, 4096), *noise, *numbers

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
