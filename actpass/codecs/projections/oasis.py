"""A subspace that moves a little at every step."""

from __future__ import annotations

import torch

from actpass.codecs.projections.learned import LearnedProjection
from actpass.codecs.registry import register_projection


@register_projection
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
        return state[..., :-1, :rank]
