"""Directions drawn by their energy."""

from __future__ import annotations

import torch

from actpass.codecs.generator import bits32, stream
from actpass.codecs.projections.learned import RIDGE, LearnedProjection, with_sequence
from actpass.codecs.registry import register_projection


@register_projection
class Sampled(LearnedProjection):
    """R of N orthonormal directions, drawn with probabilities pi_i and weighted 1 / sqrt(pi_i).

    Source: Li et al., "Optimal low-rank stochastic gradient estimation", 2026, arXiv 2603.20632, the law with known
    covariance: pi_i = min(1, c sqrt(sigma_i)), sum pi = R: leading directions surely, the tail by the root of its energy.
    Unbiased: E[P P^T] = sum q_i q_i^T. Relative variance sum (1 / pi_i - 1) sigma_i / sum sigma_i. The state has
    all N directions and pi. This project's choice: sigma is the energy of x along a direction, and the draw
    is systematic sampling (W. Madow, 1949): one uniform number, always R directions. Drawn at each step, or with low-rank
    gradients once between two refreshes (``resample``), which is the paper's: V stays for K steps.
    """

    name = "sampled"
    unbiased = True
    draws = True

    def columns(self, width: int, rank: int) -> int:
        return width

    def last_row(self, energies_K: torch.Tensor, rank: int) -> torch.Tensor:
        return inclusion_probabilities(energies_K, rank)

    def leading(self, rank: int) -> int:
        return 0

    def noise(self, key: torch.Tensor, width: int, rank: int, sequence: int = 0) -> torch.Tensor | None:
        return bits32(key, stream(with_sequence(width, sequence), 41), 1).to(torch.float64) * 2.0**-32

    def draw(self, state: torch.Tensor, noise: torch.Tensor | None, rank: int) -> torch.Tensor:
        assert noise is not None
        width = state.shape[-1]
        points_R = torch.arange(rank, device=state.device, dtype=torch.float64) + noise
        below_NR = torch.cumsum(state[..., -1, :].double(), -1).unsqueeze(-1) <= points_R.unsqueeze(-2)
        chosen_1R = below_NR.sum(-2, keepdim=True).clamp(max=width - 1)
        chosen = state.gather(-1, chosen_1R.expand(*state.shape[:-1], rank))  # of the directions and, last, probabilities
        return chosen[..., :-1, :] * chosen[..., -1:, :] ** -0.5

    def relative_variance(self, width: int, rank: int, tail: float = 1.0) -> float:
        """Of a flat spectrum, the worst."""
        return (width / rank - 1.0) * tail


def inclusion_probabilities(energies_N: torch.Tensor, rank: int) -> torch.Tensor:
    """pi = min(1, c sqrt(energy)) with sum ``rank``, for energies in falling order; float64. No direction is left out for good:
    an energy counts as at least a millionth of the mean, which keeps the estimate unbiased where a sketch saw nothing."""
    energies_N = energies_N.double()
    floor = max(float(energies_N.mean()) * RIDGE, torch.finfo(torch.float64).tiny)
    root_N = energies_N.clamp_min(floor).sqrt()
    left_N = root_N.flip(0).cumsum(0).flip(0)
    surely = int((root_N[:rank] * torch.arange(rank, 0, -1, device=root_N.device) > left_N[:rank]).sum())
    share_N = root_N[surely:] * ((rank - surely) / left_N[surely]) if surely < rank else torch.zeros_like(root_N[surely:])
    return torch.cat([torch.ones(surely, dtype=torch.float64, device=root_N.device), share_N])
