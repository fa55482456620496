"""The leading singular directions."""

from __future__ import annotations

import torch

from actpass.codecs.projections.learned import HALF_WAY, LearnedProjection
from actpass.codecs.registry import register_projection


@register_projection
class Pca(LearnedProjection):
    """P = Q, the leading R right singular directions of x. Biased: what lies beyond them is lost.

    x ~ x Q Q^T (Eckart-Young: no projection of rank R loses less of x). Loses 1 - captured energy. The iteration is
    this project's choice.
    """

    name = "pca"
    unbiased = False
    step_size = HALF_WAY

    def draw(self, state: torch.Tensor, noise: torch.Tensor | None, rank: int) -> torch.Tensor:
        return state[..., :-1, :rank]
