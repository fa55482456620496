"""Leading directions and random ones of their complement."""

from __future__ import annotations

import torch

from actpass.codecs.generator import normals, stream
from actpass.codecs.projections.learned import HALF_WAY, LearnedProjection, with_sequence
from actpass.codecs.projections.orthonormal import orthonormal
from actpass.codecs.registry import register_projection


@register_projection
class Prac(LearnedProjection):
    """P = [Q1, sqrt(k) Q2]: r1 principal directions and r2 random ones of their complement, k = (N - r1) / r2.

    Source: Li, Zhang, Fang, "PRAC", ICML 2026, arXiv 2602.23111: x ~ x Q1 Q1^T + k x Q2 Q2^T. Unbiased with the complement
    drawn from the step's key, as here by default with dense gradients: E[Q2 Q2^T] = (I - Q1 Q1^T) r2 / (N - r1). Relative
    variance (k - 1) tail, tail the energy beyond Q1. With ``resample="every_refresh"``, the paper's, Q2 stays until the next
    refresh, and the gradients between two are biased. The paper's ranks are r1 = r2 = 0.3 N for inputs of linear layers (rank
    0.6, the default), and 0.2 N for those of norms and activation functions (``activation_rank`` 0.4), which are decoded,
    x_hat = z P^T, and whose gradients are biased. This project's choice: r1 is half of the rank, rounded down, and
    ``activation_rank`` holds for all that crosses with other uses than weight gradients, fused attention's tensors excepted.
    """

    name = "prac"
    unbiased = True
    draws = True
    known_variance = True
    step_size = HALF_WAY
    default_rank = 0.6
    default_activation_rank = 0.4

    def principal(self, rank: int) -> int:
        return rank // 2

    def leading(self, rank: int) -> int:
        return 0  # with a forward that reads z twice the cut saves the basis, too, in place of drawing it again

    def noise(self, key: torch.Tensor, width: int, rank: int, sequence: int = 0) -> torch.Tensor | None:
        random = rank - self.principal(rank)
        return normals(key, stream(with_sequence(width, sequence), 40), width * random).view(width, random)

    def draw(self, state: torch.Tensor, noise: torch.Tensor | None, rank: int) -> torch.Tensor:
        assert noise is not None
        width, principal = state.shape[-2] - 1, self.principal(rank)
        leading_NR = state[..., :-1, :principal]
        left = width - principal
        beyond_NR = noise - leading_NR @ (leading_NR.mT @ noise)
        for _ in range(2 if 2 * (rank - principal) > left else 1):  # a matrix that is nearly square there is badly conditioned
            beyond_NR = orthonormal(beyond_NR - leading_NR @ (leading_NR.mT @ beyond_NR), within=left)
        scale = (left / (rank - principal)) ** 0.5
        return torch.cat([leading_NR, beyond_NR * scale], -1)

    def relative_variance(self, width: int, rank: int, tail: float = 1.0) -> float:
        principal = self.principal(rank)
        return ((width - principal) / (rank - principal) - 1.0) * tail
