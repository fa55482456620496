"""Projection onto a subspace that follows the data: what its methods share, and how a subspace moves.

Shapes: T tokens, N in-features, R rank, K columns of the state (kept directions and a few to spare), S sampled tokens.

The compiled region takes the state as an input and, on a refresh step, gives back a sketch of each tensor that it projects:
Y = X_S^T (X_S Q), one block power step on S sampled tokens, and their energy |X_S|^2. State and sketch are (N + 1, K): Q or
Y, and a row for what else a method keeps (the probabilities of `sampled`) or a sketch says (the energy). No (T, N) matrix is
ever factored. Between two steps `moved` turns Q and Y into the next Q: a K x K eigenproblem and QR of N x K in float64, of
`sampled`, whose K is N, N x N; small moves do with Cholesky factors of K x K (`approximate_step`). Inside a step only `prac`
factors, its random part of N x r2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from actpass.codecs.generator import normals, stream
from actpass.torch_compat import cholesky_ex, eigh, qr, solve_triangular

SPARE = 8
"""Directions beyond the rank that are iterated, too: the last ones that count converge with the gap behind the spare ones
(N. Halko, P.-G. Martinsson, J. Tropp, "Finding structure with randomness", 2011, arXiv 0909.4061, section 4)."""
HALF_WAY = 0.5
"""A step size between a sketch of one batch and those before it. A batch's best subspace is not the best of others: all the way
to each, the last one captures less of held-out batches (llama-mini, N/16 directions, worst tensor: 0.977 of the best, half-way
0.984)."""
RIDGE = 1e-6
"""The least share of the leading energy that counts as one."""


@dataclass(frozen=True)
class Spectrum:
    """What a sketch says of a tensor. captured: energy along each direction of the state, largest first, as fractions of the
    whole. A float64 vector."""

    captured: torch.Tensor

    def tail(self, rank: int) -> float:
        """The fraction of the energy beyond the first ``rank`` directions."""
        return max(0.0, 1.0 - float(self.captured[:rank].sum()))


class LearnedProjection(ABC):
    """A basis P (N, R) built from a state that lives across steps, and from the step's key where a part of it is random.

    What is stored, and what it costs in FLOPs, is as for `SeededProjection`. The state takes (N + 1) K float32 numbers a site.
    """

    name: ClassVar[str]
    unbiased: ClassVar[bool]
    """Whether E[P P^T] = I over the keys."""
    draws: ClassVar[bool] = False
    """Whether a part of the basis is random."""
    default_rank: ClassVar[float] = 0.25
    default_activation_rank: ClassVar[float | None] = None
    """Of tensors that are decoded for other uses than weight gradients; None: they are not, unless asked for."""
    refresh_interval: ClassVar[int] = 20
    """Optimizer steps between two sketches, where ``refresh_interval`` is not given. This project's choice: a warm block power
    step is cheap enough to follow a run's first thousand steps."""
    step_size: ClassVar[float] = 1.0
    """How far a basis moves to what a sketch says, after its first moves; 1: all the way."""
    points: ClassVar[int] = 2048
    """Tokens that a sketch samples at least."""
    known_variance: ClassVar[bool] = False
    """Whether `relative_variance` is a known function of the rank, by which a budget may choose the rank."""

    def columns(self, width: int, rank: int) -> int:
        """K, the columns of the state."""
        return min(width, self.principal(rank) + SPARE)

    def principal(self, rank: int) -> int:
        """How many of the ``rank`` directions follow the data."""
        return rank

    def leading(self, rank: int) -> int:
        """How many first columns of the basis are those of the state, and a sketch need not multiply by again."""
        return self.principal(rank)

    def noise(self, key: torch.Tensor, width: int, rank: int, sequence: int = 0) -> torch.Tensor | None:
        """What is drawn for a basis, if anything is: the same for all sites of a shape and a ``sequence``."""
        return None

    def last_row(self, energies_K: torch.Tensor, rank: int) -> torch.Tensor:
        """What else the state keeps, (K,): of the energies along its directions."""
        return torch.zeros_like(energies_K)

    @abstractmethod
    def draw(self, state: torch.Tensor, noise: torch.Tensor | None, rank: int) -> torch.Tensor:
        """The basis (N, R) in float32. With dimensions in front of those of ``state`` a batch of them, each with its own noise
        or all with one."""

    def relative_variance(self, width: int, rank: int, tail: float = 1.0) -> float:
        """E|v P P^T - v|^2 / |v|^2 of a row with the fraction ``tail`` of its energy beyond the principal directions; of a
        biased method what is lost."""
        return tail


def with_sequence(width: int, sequence: int) -> int:
    """A number for a width and a sequence that no other pair has: widths are below 2^32."""
    return width + (sequence << 32)


def sketch(
    x: torch.Tensor,
    state: torch.Tensor,
    points_S: torch.Tensor,
    *,
    left: bool = False,
    flat: bool = False,
    z: torch.Tensor | None = None,
    known: int = 0,
) -> torch.Tensor:
    """(N + 1, K) in float32: X_S^T (X_S Q), and a row of |X_S|^2.

    x, points, left, flat: see `sample_tokens`; with no points it is all zeros, and costs nothing. z: as x, with R for N: of its
    columns the first ``known`` are x times those of Q, and are not computed again. Costs 2 S N (2 K - known) FLOPs.
    """
    if x.numel() == 0:  # an expert without tokens
        return torch.zeros_like(state)
    sample_SN = sample_tokens(x, points_S, left=left, flat=flat)
    if z is None or not known:
        return sketch_of(sample_SN, state)
    return sketch_of(sample_SN, state, sample_tokens(z, points_S, flat=flat)[:, :known])


def sketch_of(sample_SN: torch.Tensor, state: torch.Tensor, known_SR: torch.Tensor | None = None) -> torch.Tensor:
    """The `sketch` of sampled tokens, (..., S, N), one in each state, (..., N + 1, K). known: the first columns of X_S Q."""
    projected_SK = sample_SN @ state[..., :-1, 0 if known_SR is None else known_SR.shape[-1] :]
    if known_SR is not None:
        projected_SK = torch.cat([known_SR, projected_SK], -1)
    energies_1S = sample_SN.square().sum(-1).unsqueeze(-2)  # summed by a matmul: a reduction would set limits to S in Inductor
    energy_12 = energies_1S @ energies_1S.new_ones(energies_1S.shape[-1], 2)
    last_1K = energy_12[..., :1].expand(*state.shape[:-2], 1, state.shape[-1])
    return torch.cat([sample_SN.mT @ projected_SK, last_1K], -2)


def sample_tokens(x: torch.Tensor, points_S: torch.Tensor, *, left: bool = False, flat: bool = False) -> torch.Tensor:
    """The tokens of ``x`` at ``points_S``, in [0, 1), as rows in float32.

    x: (T, N), or (E, T, N), of each of whose E experts S tokens are taken: (E S, N); with ``left`` (N, T) or (E, N, T). With
    ``flat`` all dimensions but the last are tokens, of which S are taken in all.
    """
    return _rows(x, points_S) if flat else _of_each(x, points_S, -1 if left else -2)


def _of_each(x: torch.Tensor, points_S: torch.Tensor, tokens: int) -> torch.Tensor:
    """(E S, N) in float32: of each expert the tokens, which lie along dimension ``tokens``, at ``points_S``."""
    sample = x.index_select(tokens, (points_S * x.shape[tokens]).to(torch.int64)).to(torch.float32)
    return (sample.transpose(-1, -2) if tokens == -1 else sample).reshape(-1, x.shape[-3 - tokens])


def _rows(x: torch.Tensor, points_S: torch.Tensor) -> torch.Tensor:
    """(S, N) in float32: the rows of ``x``, over all dimensions but the last, at ``points_S``. ``x`` is read where it lies."""
    *leading, _ = x.shape
    count = math.prod(leading)
    left_S, places = (points_S * count).to(torch.int64).clamp(max=count - 1), list[torch.Tensor]()
    for size in reversed(leading[1:]):
        places.insert(0, left_S % size)
        left_S = left_S // size
    return x[(left_S, *places)].to(torch.float32)


def power_iteration_step(
    projection: LearnedProjection, state: torch.Tensor, sketched: torch.Tensor, rank: int, size: float
) -> tuple[torch.Tensor, Spectrum | None]:
    """The next state, and the spectrum in the present one. size: how far to move; see `LearnedProjection.step_size`.

    Directions come in falling order of energy: the Ritz values of the sampled tokens in the present subspace. A direction in
    which the sample has no energy stays. A sketch of zeros, or one that is not finite, moves nothing and has no spectrum.
    """
    basis_NK, product_NK, energy = state[:-1].double(), sketched[:-1].double(), float(sketched[-1, 0])
    gram_KK = basis_NK.t() @ product_NK
    if not math.isfinite(energy) or energy <= 0 or not bool(torch.isfinite(gram_KK).all()):
        return state, None
    energies_K, rotation_KK = eigh((gram_KK + gram_KK.t()) / 2)
    energies_K, rotation_KK = energies_K.flip(0).clamp_min(0), rotation_KK.flip(1)
    basis_NK, product_NK = basis_NK @ rotation_KK, product_NK @ rotation_KK
    seen_K = energies_K > RIDGE * energies_K[0]
    stepped_NK = (1 - size) * basis_NK + size * product_NK / torch.where(seen_K, energies_K, 1.0)
    basis_NK = _upright(torch.where(seen_K, stepped_NK, basis_NK))
    return _state(projection, basis_NK, energies_K, rank), Spectrum(energies_K / energy)


def approximate_step(
    states: torch.Tensor, sketched: torch.Tensor, size: float, *, sort: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The next states after a small move, by `moved`'s formula without its eigenvectors: Q + size (Y (Q^T Y)^-1 - Q), made
    orthonormal by one CholeskyQR in float32 (its Gram matrix is I + size^2 E^T E, with E orthogonal to Q): 8 N K^2 FLOPs in
    float32 in place of `moved`'s 14 in float64. (..., N + 1, K) each: those of one shape move together, and a GPU is not waited
    for. A sketch of nothing, or of what is not finite, moves nothing.

    sort: turn the directions by a step of the QR algorithm on the Gram matrix, too, which keeps them in falling order of
    energy where they nearly are (12 K^3 FLOPs in float64), and give back the energies, as fractions of the whole: (..., K),
    NaN of what moves nothing.
    """
    basis_NK, product_NK = states[..., :-1, :], sketched[..., :-1, :]
    gram_KK = (basis_NK.mT @ product_NK).double()
    gram_KK = (gram_KK + gram_KK.mT) / 2
    unit_KK = torch.eye(gram_KK.shape[-1], dtype=torch.float64, device=states.device)
    ridge = RIDGE * gram_KK.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    seen = torch.isfinite(ridge) & (ridge > 0)
    gram_KK = torch.where(seen, gram_KK + ridge * unit_KK, unit_KK)
    factor_KK, failed = cholesky_ex(gram_KK)
    stepped_NK = (1 - size) * basis_NK + size * (product_NK @ torch.cholesky_inverse(factor_KK).float())
    squared_KK = (stepped_NK.mT @ stepped_NK).double()
    energies_K, turn_KK = None, unit_KK
    if sort:
        factor_KK, failed_in_turn = cholesky_ex(gram_KK @ gram_KK, upper=True)
        turn_KK = solve_triangular(factor_KK, gram_KK, upper=True, left=False)
        lengths_K = turn_KK.square().sum(-2)
        energies_K = (turn_KK * (gram_KK @ turn_KK)).sum(-2) / lengths_K / sketched[..., -1, :1].double()
        squared_KK, failed = turn_KK.mT @ squared_KK @ turn_KK, failed + failed_in_turn
    factor_KK, failed_again = cholesky_ex(squared_KK, upper=True)
    turn_KK = solve_triangular(factor_KK, turn_KK.expand_as(factor_KK), upper=True, left=False)
    moves = seen & ((failed == 0) & (failed_again == 0))[..., None, None]
    next_NK = torch.where(moves, stepped_NK @ turn_KK.float(), basis_NK)  # a matmul: faster than N solves
    energies_K = energies_K.where(moves[..., 0], torch.nan) if energies_K is not None else None
    return torch.cat([next_NK, states[..., -1:, :]], -2), energies_K


def first_state(projection: LearnedProjection, key: torch.Tensor, width: int, rank: int) -> torch.Tensor:
    """Random directions to begin the iteration with."""
    columns = projection.columns(width, rank)
    basis_NK = _upright(normals(key, stream(width, 42), width * columns).view(width, columns).double())
    return _state(projection, basis_NK, torch.ones(columns, dtype=torch.float64, device=key.device), rank)


def resized(projection: LearnedProjection, state: torch.Tensor, key: torch.Tensor, rank: int) -> torch.Tensor:
    """The subspace for another rank: its leading directions, and behind them random ones where they are too few."""
    width, wanted = state.shape[0] - 1, projection.columns(state.shape[0] - 1, rank)
    basis_NK, roots_K = state[:-1, :wanted].double(), state[-1, :wanted].double()
    missing = wanted - basis_NK.shape[1]
    if missing:
        more_NK = normals(key, stream(width, 43), width * missing).view(width, missing)
        basis_NK = _upright(torch.cat([basis_NK, more_NK.double()], 1))
        roots_K = torch.cat([roots_K, torch.zeros(missing, dtype=torch.float64, device=key.device)])
    return _state(projection, basis_NK, roots_K.square(), rank)


def state_shape(projection: LearnedProjection, width: int, rank: int) -> tuple[int, int]:
    return width + 1, projection.columns(width, rank)


def _state(projection: LearnedProjection, basis_NK: torch.Tensor, energies_K: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.cat([basis_NK, projection.last_row(energies_K, rank).unsqueeze(0)]).float()


def _upright(columns_NK: torch.Tensor) -> torch.Tensor:
    """Orthonormal in float64, by QR: between two steps, where a K x K factor in float32 is no saving."""
    q_NK, r_KK = qr(columns_NK)
    return q_NK * torch.where(r_KK.diagonal() < 0, -1.0, 1.0)
