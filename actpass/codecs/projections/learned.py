"""Projection onto a subspace that follows the data: what its methods share, and how a subspace moves.

Shapes: T tokens, N in-features, R rank, K columns of the state (kept directions and a few to spare), S sampled tokens.

The compiled region takes the state as an input and, on a refresh step, gives back a sketch of each tensor that it projects:
Y = X_S^T (X_S Q), one block power step on S sampled tokens, and their energy |X_S|^2. State and sketch are (N + 1, K): Q or
Y, and a row for what else a method keeps (the probabilities of `sampled`) or a sketch says (the energy). No (T, N) matrix is
ever factored. Between two steps `moved` turns Q and Y into the next Q: a K x K eigenproblem and QR of N x K in float64, of
`sampled`, whose K is N, N x N; small moves do with Cholesky factors of K x K (`nudged`). Inside a step only `prac` factors, its
random part of N x r2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from actpass.codecs.generator import bits32, normals, stream
from actpass.codecs.projections.orthonormal import orthonormal

SPARE = 8
"""Directions beyond the rank that are iterated, too: the last ones that count converge with the gap behind the spare ones
(N. Halko, P.-G. Martinsson, J. Tropp, "Finding structure with randomness", 2011, arXiv 0909.4061, section 4)."""
HALF_WAY = 0.5
"""A step size between a sketch of one batch and those before it. A batch's best subspace is not the best of others: all the way
to each, the last one captures less of held-out batches (llama-mini, N/16 directions, worst tensor: 0.977 of the best, half-way
0.984)."""
_RIDGE = 1e-6


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
    default_nonlinear_rank: ClassVar[float | None] = None
    """Of tensors that are decoded for other uses than weight gradients; None: they are not, unless asked for."""
    refresh_interval: ClassVar[int] = 20
    """Optimizer steps between two sketches, where ``refresh_interval`` is not given. This project's choice: a warm block power
    step is cheap enough to follow a run's first thousand steps."""
    step_size: ClassVar[float] = 1.0
    """How far a basis moves to what a sketch says, after its first moves; 1: all the way."""
    points: ClassVar[int] = 2048
    """Tokens that a sketch samples at least."""

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

    @abstractmethod
    def draw(self, state: torch.Tensor, noise: torch.Tensor | None, rank: int) -> torch.Tensor:
        """The basis (N, R) in float32."""

    def relative_variance(self, width: int, rank: int, tail: float = 1.0) -> float:
        """E|v P P^T - v|^2 / |v|^2 of a row with the fraction ``tail`` of its energy beyond the principal directions; of a
        biased method what is lost."""
        return tail


class Pca(LearnedProjection):
    """P = Q, the leading R right singular directions of x. Biased: what lies beyond them is lost.

    x ~ x Q Q^T (Eckart-Young: no projection of rank R loses less of x). Loses 1 - captured energy. The iteration is
    this project's choice.
    """

    name = "pca"
    unbiased = False
    step_size = HALF_WAY

    def draw(self, state: torch.Tensor, noise: torch.Tensor | None, rank: int) -> torch.Tensor:
        return state[:-1, :rank]


class Prac(LearnedProjection):
    """P = [Q1, sqrt(k) Q2]: r1 principal directions and r2 random ones of their complement, k = (N - r1) / r2.

    Source: Li, Zhang, Fang, "PRAC", ICML 2026, arXiv 2602.23111: x ~ x Q1 Q1^T + k x Q2 Q2^T. Unbiased with the complement
    drawn from the step's key, as here by default with dense gradients: E[Q2 Q2^T] = (I - Q1 Q1^T) r2 / (N - r1). Relative
    variance (k - 1) tail, tail the energy beyond Q1. With ``complement="frozen"``, the paper's, Q2 stays until the next
    refresh, and the gradients between two are biased. The paper's ranks are r1 = r2 = 0.3 N for inputs of linear layers (rank
    0.6, the default), and 0.2 N for those of norms and activation functions (``nonlinear_rank`` 0.4), which are decoded,
    x_hat = z P^T, and whose gradients are biased. This project's choice: r1 is half of the rank, rounded down, and
    ``nonlinear_rank`` holds for all that crosses with other uses than weight gradients, fused attention's tensors excepted.
    """

    name = "prac"
    unbiased = True
    draws = True
    step_size = HALF_WAY
    default_rank = 0.6
    default_nonlinear_rank = 0.4

    def principal(self, rank: int) -> int:
        return rank // 2

    def leading(self, rank: int) -> int:
        return 0  # with a forward that reads z twice the cut saves the basis, too, in place of drawing it again

    def noise(self, key: torch.Tensor, width: int, rank: int, sequence: int = 0) -> torch.Tensor | None:
        random = rank - self.principal(rank)
        return normals(key, stream(_own(width, sequence), 40), width * random).view(width, random)

    def draw(self, state: torch.Tensor, noise: torch.Tensor | None, rank: int) -> torch.Tensor:
        assert noise is not None
        width, principal = state.shape[0] - 1, self.principal(rank)
        leading_NR = state[:-1, :principal]
        left = width - principal
        beyond_NR = noise - leading_NR @ (leading_NR.t() @ noise)
        for _ in range(2 if 2 * (rank - principal) > left else 1):  # a matrix that is nearly square there is badly conditioned
            beyond_NR = orthonormal(beyond_NR - leading_NR @ (leading_NR.t() @ beyond_NR), within=left)
        scale = (left / (rank - principal)) ** 0.5
        return torch.cat([leading_NR, beyond_NR * scale], 1)

    def relative_variance(self, width: int, rank: int, tail: float = 1.0) -> float:
        principal = self.principal(rank)
        return ((width - principal) / (rank - principal) - 1.0) * tail


class Oasis(LearnedProjection):
    """P = Q, moved a little at every step. Biased, as `pca`.

    Source: Choudhary, Saxena, Roy, "OASIS", 2026, arXiv 2604.09406: an Oja update of an orthonormal basis with a step size
    of its own, re-orthonormalised. This project's choice: Oja's direction is preconditioned by the Gram matrix in the
    subspace, Q <- orth((1 - eta) Q + eta Y (Q^T Y)^-1), so that one eta serves all directions (plain Oja moves a direction of
    a thousandth of the leading energy a thousand times slower), and eta = 1 is the block power step of `pca`.
    """

    name = "oasis"
    unbiased = False
    refresh_interval = 1
    step_size = 0.2
    points = 512

    def draw(self, state: torch.Tensor, noise: torch.Tensor | None, rank: int) -> torch.Tensor:
        return state[:-1, :rank]


class Sampled(LearnedProjection):
    """R of N orthonormal directions, drawn with probabilities pi_i and weighted 1 / sqrt(pi_i).

    Source: Li et al., "Optimal low-rank stochastic gradient estimation", 2026, arXiv 2603.20632, the law with known
    covariance: pi_i = min(1, c sqrt(sigma_i)), sum pi = R: leading directions surely, the tail by the root of its energy.
    Unbiased: E[P P^T] = sum q_i q_i^T. Relative variance sum (1 / pi_i - 1) sigma_i / sum sigma_i. The state has
    all N directions and pi. This project's choice: sigma is the energy of x along a direction, and the draw
    is systematic sampling (W. Madow, 1949): one uniform number, always R directions. Drawn at each step, or with low-rank
    gradients once between two refreshes (``complement``), which is the paper's: V stays for K steps.
    """

    name = "sampled"
    unbiased = True
    draws = True

    def columns(self, width: int, rank: int) -> int:
        return width

    def leading(self, rank: int) -> int:
        return 0

    def noise(self, key: torch.Tensor, width: int, rank: int, sequence: int = 0) -> torch.Tensor | None:
        return bits32(key, stream(_own(width, sequence), 41), 1).to(torch.float64) * 2.0**-32

    def draw(self, state: torch.Tensor, noise: torch.Tensor | None, rank: int) -> torch.Tensor:
        assert noise is not None
        width = state.shape[1]
        directions_NN, probabilities_N = state[:-1], state[-1]
        points_R = torch.arange(rank, device=state.device, dtype=torch.float64) + noise
        below_NR = torch.cumsum(probabilities_N.double(), 0).unsqueeze(1) <= points_R.unsqueeze(0)
        chosen_R = below_NR.sum(0).clamp(max=width - 1)
        return directions_NN[:, chosen_R] * probabilities_N[chosen_R] ** -0.5

    def relative_variance(self, width: int, rank: int, tail: float = 1.0) -> float:
        """Of a flat spectrum, the worst."""
        return (width / rank - 1.0) * tail


def _own(width: int, sequence: int) -> int:
    """A number for a width and a sequence that no other pair has: widths are below 2^32."""
    return width + (sequence << 32)


def inclusion_probabilities(energies_N: torch.Tensor, rank: int) -> torch.Tensor:
    """pi = min(1, c sqrt(energy)) with sum ``rank``, for energies in falling order; float64. No direction is left out for good:
    an energy counts as at least a millionth of the mean, which keeps the estimate unbiased where a sketch saw nothing."""
    energies_N = energies_N.double()
    floor = max(float(energies_N.mean()) * _RIDGE, torch.finfo(torch.float64).tiny)
    root_N = energies_N.clamp_min(floor).sqrt()
    left_N = root_N.flip(0).cumsum(0).flip(0)
    surely = int((root_N[:rank] * torch.arange(rank, 0, -1, device=root_N.device) > left_N[:rank]).sum())
    share_N = root_N[surely:] * ((rank - surely) / left_N[surely]) if surely < rank else torch.zeros_like(root_N[surely:])
    return torch.cat([torch.ones(surely, dtype=torch.float64, device=root_N.device), share_N])


def sketch(
    x: torch.Tensor,
    state: torch.Tensor,
    points_S: torch.Tensor,
    *,
    left: bool = False,
    z: torch.Tensor | None = None,
    known: int = 0,
) -> torch.Tensor:
    """(N + 1, K) in float32: X_S^T (X_S Q), and a row of |X_S|^2.

    x: (T, N) or (E, T, N), with ``left`` (N, T) or (E, N, T). points: where to sample tokens, in [0, 1); with none of them
    it is all zeros, and costs nothing. z: (T, R) or (E, T, R), of which the first ``known`` columns are x times those of Q, and
    are not computed again. Costs 2 S N (2 K - known) FLOPs.
    """
    tokens = -1 if left else -2
    if x.shape[tokens] == 0:  # an expert without tokens
        return torch.zeros_like(state)
    places_S = (points_S * x.shape[tokens]).to(torch.int64)
    sample = x.index_select(tokens, places_S).to(torch.float32)
    sample_SN = (sample.transpose(-1, -2) if left else sample).reshape(-1, state.shape[0] - 1)
    projected_SK = sample_SN @ state[:-1, known:]
    if z is not None and known:
        known_SR = z.index_select(-2, places_S).to(torch.float32).reshape(-1, z.shape[-1])
        projected_SK = torch.cat([known_SR[:, :known], projected_SK], 1)
    energies_1S = sample_SN.square().sum(1).unsqueeze(0)  # summed by a matmul: a reduction would set limits to S in Inductor
    energy_12 = energies_1S @ energies_1S.new_ones(energies_1S.shape[1], 2)
    return torch.cat([sample_SN.t() @ projected_SK, energy_12[:, :1].expand(1, state.shape[1])])


def moved(
    method: LearnedProjection, state: torch.Tensor, sketched: torch.Tensor, rank: int, size: float
) -> tuple[torch.Tensor, Spectrum | None]:
    """The next state, and the spectrum in the present one. size: how far to move; see `LearnedProjection.step_size`.

    Directions come in falling order of energy: the Ritz values of the sampled tokens in the present subspace. A direction in
    which the sample has no energy stays. A sketch of zeros, or one that is not finite, moves nothing and has no spectrum.
    """
    basis_NK, product_NK, energy = state[:-1].double(), sketched[:-1].double(), float(sketched[-1, 0])
    gram_KK = basis_NK.t() @ product_NK
    if not math.isfinite(energy) or energy <= 0 or not bool(torch.isfinite(gram_KK).all()):
        return state, None
    energies_K, rotation_KK = torch.linalg.eigh((gram_KK + gram_KK.t()) / 2)
    energies_K, rotation_KK = energies_K.flip(0).clamp_min(0), rotation_KK.flip(1)
    basis_NK, product_NK = basis_NK @ rotation_KK, product_NK @ rotation_KK
    seen_K = energies_K > _RIDGE * energies_K[0]
    stepped_NK = (1 - size) * basis_NK + size * product_NK / torch.where(seen_K, energies_K, 1.0)
    basis_NK = _upright(torch.where(seen_K, stepped_NK, basis_NK))
    return _state(method, basis_NK, energies_K, rank), Spectrum(energies_K / energy)


def nudged(
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
    ridge = _RIDGE * gram_KK.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    seen = torch.isfinite(ridge) & (ridge > 0)
    gram_KK = torch.where(seen, gram_KK + ridge * unit_KK, unit_KK)
    factor_KK, failed = torch.linalg.cholesky_ex(gram_KK)
    stepped_NK = (1 - size) * basis_NK + size * (product_NK @ torch.cholesky_inverse(factor_KK).float())
    squared_KK = (stepped_NK.mT @ stepped_NK).double()
    energies_K, turn_KK = None, unit_KK
    if sort:
        factor_KK, failed_in_turn = torch.linalg.cholesky_ex(gram_KK @ gram_KK, upper=True)
        turn_KK = torch.linalg.solve_triangular(factor_KK, gram_KK, upper=True, left=False)
        lengths_K = turn_KK.square().sum(-2)
        energies_K = (turn_KK * (gram_KK @ turn_KK)).sum(-2) / lengths_K / sketched[..., -1, :1].double()
        squared_KK, failed = turn_KK.mT @ squared_KK @ turn_KK, failed + failed_in_turn
    factor_KK, failed_again = torch.linalg.cholesky_ex(squared_KK, upper=True)
    turn_KK = torch.linalg.solve_triangular(factor_KK, turn_KK.expand_as(factor_KK), upper=True, left=False)
    moves = seen & ((failed == 0) & (failed_again == 0))[..., None, None]
    next_NK = torch.where(moves, stepped_NK @ turn_KK.float(), basis_NK)  # a matmul: faster than N solves
    energies_K = energies_K.where(moves[..., 0], torch.nan) if energies_K is not None else None
    return torch.cat([next_NK, states[..., -1:, :]], -2), energies_K


def first_state(method: LearnedProjection, key: torch.Tensor, width: int, rank: int) -> torch.Tensor:
    """Random directions to begin the iteration with."""
    columns = method.columns(width, rank)
    basis_NK = _upright(normals(key, stream(width, 42), width * columns).view(width, columns).double())
    return _state(method, basis_NK, torch.ones(columns, dtype=torch.float64, device=key.device), rank)


def resized(method: LearnedProjection, state: torch.Tensor, key: torch.Tensor, rank: int) -> torch.Tensor:
    """The subspace for another rank: its leading directions, and behind them random ones where they are too few."""
    width, wanted = state.shape[0] - 1, method.columns(state.shape[0] - 1, rank)
    basis_NK, roots_K = state[:-1, :wanted].double(), state[-1, :wanted].double()
    missing = wanted - basis_NK.shape[1]
    if missing:
        more_NK = normals(key, stream(width, 43), width * missing).view(width, missing)
        basis_NK = _upright(torch.cat([basis_NK, more_NK.double()], 1))
        roots_K = torch.cat([roots_K, torch.zeros(missing, dtype=torch.float64, device=key.device)])
    return _state(method, basis_NK, roots_K.square(), rank)


def state_shape(method: LearnedProjection, width: int, rank: int) -> tuple[int, int]:
    return width + 1, method.columns(width, rank)


def _state(method: LearnedProjection, basis_NK: torch.Tensor, energies_K: torch.Tensor, rank: int) -> torch.Tensor:
    last_K = inclusion_probabilities(energies_K, rank) if isinstance(method, Sampled) else torch.zeros_like(energies_K)
    return torch.cat([basis_NK, last_K.unsqueeze(0)]).float()


def _upright(columns_NK: torch.Tensor) -> torch.Tensor:
    """Orthonormal in float64, by QR: between two steps, where a K x K factor in float32 is no saving."""
    q_NK, r_KK = torch.linalg.qr(columns_NK)
    return q_NK * torch.where(r_KK.diagonal() < 0, -1.0, 1.0)


LEARNED: dict[str, LearnedProjection] = {p.name: p for p in (Pca(), Prac(), Oasis(), Sampled())}
"""Learned projections by the name that ``options={"method": ...}`` takes."""
