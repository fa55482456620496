"""The maths of learned subspaces: unbiased where it says so, with the variance of the closed form, near the best subspace."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actpass.codecs import LEARNED
from actpass.codecs.generator import round_keys, step_seed
from actpass.codecs.projections.learned import approximate_step, first_state, power_iteration_step, resized, sketch, state_shape
from actpass.codecs.projections.orthonormal import orthonormal
from actpass.codecs.projections.sampled import inclusion_probabilities

N, R, TOKENS, SEEDS = 96, 24, 1536, 256
ENERGIES = torch.arange(1, N + 1, dtype=torch.float64) ** -2.0
methods = pytest.mark.parametrize("name", LEARNED)


def directions() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(5)).double())[0]


def tokens(seed: int = 0) -> torch.Tensor:
    z = torch.randn(TOKENS, N, generator=torch.Generator().manual_seed(seed)).double()
    return (z * ENERGIES.sqrt() @ directions().t()).float()


def key(seed: int) -> torch.Tensor:
    return round_keys(step_seed(3, seed))


def points(count: int = 768, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def trained(name: str, rank: int = R, steps: int = 6) -> torch.Tensor:
    method = LEARNED[name]
    state = first_state(method, key(0), N, rank)
    for i in range(steps):
        state, _ = power_iteration_step(
            method, state, sketch(tokens(i), state, points(seed=i)), rank, 1.0 if i < 3 else method.step_size
        )
    return state


def basis(name: str, state: torch.Tensor, seed: int, rank: int = R) -> torch.Tensor:
    method = LEARNED[name]
    return method.draw(state, method.noise(key(seed), N, rank), rank)


@pytest.mark.parametrize(("rows", "columns"), [(96, 24), (96, 47), (96, 70), (96, 96), (7, 1)])
def test_orthonormal_is_qr_with_a_positive_diagonal(rows: int, columns: int):
    x = torch.randn(rows, columns)
    q, r = torch.linalg.qr(x.double())
    want = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    got = orthonormal(x)
    assert float((got.t() @ got - torch.eye(columns)).abs().max()) < 2e-6
    assert float((got.double() - want).abs().max()) < 1e-6 * float(torch.linalg.cond(x.double()))


@methods
def test_captured_energy_is_near_that_of_the_best_subspace(name: str):
    state = trained(name)
    assert tuple(state.shape) == state_shape(LEARNED[name], N, R)
    principal = LEARNED[name].principal(R)
    q = state[:-1, :principal].double()
    assert float((q.t() @ q - torch.eye(principal)).abs().max()) < 1e-6
    covariance = directions() @ torch.diag(ENERGIES) @ directions().t()
    assert float((q.t() @ covariance @ q).trace() / ENERGIES[:principal].sum()) > 0.995


@methods
def test_a_sketch_reads_what_the_projection_has_computed(name: str):
    method, state, x = LEARNED[name], trained(name), tokens(3).view(2, TOKENS // 2, N)
    basis = method.draw(state, method.noise(key(1), N, R), R)
    known = method.leading(R)
    torch.testing.assert_close(basis[:, :known], state[:-1, :known])
    z = x @ basis
    z[..., known:] = float("nan")  # not read
    torch.testing.assert_close(sketch(x, state, points(64), z=z, known=known), sketch(x, state, points(64)))
    turned = sketch(x.transpose(1, 2), state, points(64), left=True, z=z, known=known)
    torch.testing.assert_close(turned, sketch(x, state, points(64)))


@methods
def test_a_sketch_of_a_batch_samples_rows_of_all_of_it(name: str):
    """As many as there are points, whatever the batch: what is decoded is no batch of experts."""
    method, state, x = LEARNED[name], trained(name), tokens(3)
    z = x @ method.draw(state, method.noise(key(1), N, R), R)
    known, p = method.leading(R), points(64)
    whole = sketch(x, state, p, z=z, known=known)
    batch, z_of_it = x.view(3, 4, TOKENS // 12, N), z.view(3, 4, TOKENS // 12, R)
    assert torch.equal(sketch(batch, state, p, flat=True, z=z_of_it, known=known), whole)
    assert float(whole[-1, 0]) == pytest.approx(float(x[(p * TOKENS).long()].square().sum()))


@methods
def test_spectrum_is_the_energy_along_each_direction(name: str):
    state, x = trained(name), tokens(9)
    _, spectrum = power_iteration_step(LEARNED[name], state, sketch(x, state, (torch.arange(TOKENS) + 0.5) / TOKENS), R, 1.0)
    assert spectrum is not None
    principal = LEARNED[name].principal(R)
    best = torch.linalg.svdvals(x.double())[: state.shape[1]].square() / float(x.double().square().sum())
    assert (spectrum.captured[:principal] <= best[:principal] * (1 + 1e-4)).all()
    assert spectrum.tail(principal) == pytest.approx(1 - float(best[:principal].sum()), abs=0.01)


@pytest.mark.parametrize("name", ["prac", "sampled"])
def test_unbiased_with_the_variance_of_the_closed_form(name: str):
    state, x = trained(name), tokens(7)
    total, squares, errors = torch.zeros(N, N), torch.zeros(N, N), 0.0
    for seed in range(SEEDS):
        p = basis(name, state, seed)
        difference = p @ p.t() - torch.eye(N)
        total, squares = total + difference, squares + difference**2
        errors += float((x @ difference).square().sum() / x.square().sum()) / SEEDS
    along = torch.randn(N, generator=torch.Generator().manual_seed(1))
    spread = [float(along @ (p @ p.t() - torch.eye(N)) @ along) for p in (basis(name, state, s) for s in range(SEEDS))]
    assert abs(math.fsum(spread) / SEEDS) <= 4 * torch.tensor(spread).std().item() / SEEDS**0.5
    scores = (total / squares.sqrt().clamp_min(1e-9))[squares > 1e-8]
    assert float(scores.abs().max()) < 5.5  # of some thousand entries at once
    energies = (x.double() @ state[:-1].double()).square().sum(0) / float(x.double().square().sum())
    if name == "prac":
        want = LEARNED[name].relative_variance(N, R, 1 - float(energies[: LEARNED[name].principal(R)].sum()))
    else:
        want = float(((1 / state[-1].double() - 1) * energies).sum())
    assert errors == pytest.approx(want, rel=0.05)


def test_sampling_a_known_spectrum_beats_the_uniform_law_and_the_principal_one():
    """On energies that fall with the square: the law of the paper against `haar` and against `pca`, in lost energy."""
    state, x = trained("sampled"), tokens(7).double()
    energies = (x @ state[:-1].double()).square().sum(0) / float(x.square().sum())
    sampled = float(((1 / state[-1].double() - 1) * energies).sum())
    assert sampled < 0.2 * (N / R - 1)


@pytest.mark.parametrize("name", ["pca", "oasis"])
def test_what_is_biased_says_so_and_draws_nothing(name: str):
    assert not LEARNED[name].unbiased
    assert LEARNED[name].noise(key(0), N, R) is None
    assert torch.equal(basis(name, trained(name), 0), basis(name, trained(name), 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.data())
def test_probabilities_add_up_to_the_rank_and_fall_with_the_energy(energies: list[float], data: st.DataObject):
    rank = data.draw(st.integers(1, len(energies)))
    falling = torch.tensor(sorted(energies, reverse=True), dtype=torch.float64)
    found = inclusion_probabilities(falling, rank)
    assert float(found.sum()) == pytest.approx(rank, rel=1e-9)
    assert (found <= 1 + 1e-12).all()
    assert (found > 0).all()
    assert (found[:-1] >= found[1:] * (1 - 1e-12)).all()


@methods
@pytest.mark.parametrize("other", [8, 48])
def test_another_rank_keeps_the_leading_directions(name: str, other: int):
    method, state = LEARNED[name], trained(name)
    got = resized(method, state, key(1), other)
    assert tuple(got.shape) == state_shape(method, N, other)
    kept = min(method.principal(R), method.principal(other))
    assert float((got[:-1, :kept] - state[:-1, :kept]).abs().max()) < 1e-6
    q = got[:-1]
    assert float((q.t() @ q - torch.eye(q.shape[1])).abs().max()) < 1e-5
    if name == "sampled":
        assert float(got[-1].sum()) == pytest.approx(other, rel=1e-5)


@methods
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_sketch_of_nothing_or_of_nonsense_moves_nothing(name: str, bad: float):
    state = trained(name)
    got, spectrum = power_iteration_step(LEARNED[name], state, torch.full_like(state, bad), R, 1.0)
    assert torch.equal(got, state)
    assert spectrum is None


@methods
def test_tokens_of_less_rank_than_asked_for_give_a_whole_subspace(name: str):
    x = tokens()[:, :] * 0
    x[:, :3] = torch.randn(TOKENS, 3)
    method = LEARNED[name]
    state = first_state(method, key(0), N, R)
    for i in range(4):
        state, _ = power_iteration_step(method, state, sketch(x, state, points(seed=i)), R, 1.0)
    q = state[:-1]
    assert float((q.t() @ q - torch.eye(q.shape[1])).abs().max()) < 1e-5
    p = basis(name, state, 0)
    assert torch.isfinite(p).all()
    leading = q[:, : min(3, method.principal(R))]
    assert float((x @ leading @ leading.t() - x).norm() / x.norm()) < 1e-3


def test_a_small_move_without_eigenvectors_spans_what_the_sorted_one_spans():
    method = LEARNED["oasis"]
    state = first_state(method, round_keys(3), N, R)
    for i in range(4):
        taken = sketch(tokens(i), state, points(seed=i))
        (quick, _), (sorted_, _) = approximate_step(state, taken, 0.2), power_iteration_step(method, state, taken, R, 0.2)
        a, b = quick[:-1].double(), sorted_[:-1].double()
        assert float((a.T @ a - torch.eye(a.shape[1])).abs().max()) < 1e-5
        assert float((a @ a.T - b @ b.T).norm() / b.shape[1] ** 0.5) < 1e-3
        assert float((a @ a.T - state[:-1].double() @ state[:-1].double().T).norm()) > 1e-2  # it moves
        state = sorted_


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_small_move_by_nonsense_moves_nothing(bad: float):
    state = first_state(LEARNED["oasis"], round_keys(3), N, R)
    for sort in (False, True):
        still, energies = approximate_step(state, torch.full_like(state, bad), 0.2, sort=sort)
        assert torch.equal(still, state)
        assert energies is None or bool(energies.isnan().all())


def test_small_moves_sort_the_directions_and_say_what_they_hold():
    """As `moved` does, of many at once, whatever order they begin in."""
    method, x = LEARNED["pca"], tokens()
    states = torch.stack([first_state(method, round_keys(seed), N, R) for seed in (3, 4)])
    for i in range(12):
        taken = torch.stack([sketch(x, state, points(seed=i)) for state in states])
        before, (states, energies) = states, approximate_step(states, taken, 0.5, sort=True)
    assert energies is not None
    exact = torch.linalg.eigvalsh(x.double().T @ x.double()).flip(0) / x.double().square().sum()
    for state, present, found in zip(states, before, energies, strict=True):
        q = state[:-1].double()
        assert float((q.T @ q - torch.eye(q.shape[1])).abs().max()) < 1e-5
        _, spectrum = power_iteration_step(method, present, sketch(x, present, points(seed=11)), R, 0.5)
        assert spectrum is not None
        assert float((found[:R] - spectrum.captured[:R]).abs().max()) < 0.02
        assert float(found[:R].sum()) > 0.97 * float(exact[:R].sum())
