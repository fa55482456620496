"""Sparse random signs: two thirds of the entries are zero.

Source: D. Achlioptas, "Database-friendly random projections: Johnson-Lindenstrauss with binary coins", JCSS 66 (2003),
theorem 1.1, second distribution.
"""

from __future__ import annotations

import torch

from actpass.codecs.generator import bits32, stream
from actpass.codecs.projections.projection import SeededProjection
from actpass.codecs.registry import register_projection

_SIXTH = round(2**32 / 6)


@register_projection
class Sparse(SeededProjection):
    """P_ij = sqrt(3 / R) * {+1, 0, -1} with odds 1/6, 2/3, 1/6. Bias 0. Relative variance (N + 1) / R.

    The matmul is dense: the zeros save nothing on today's hardware. It is here as the published baseline.
    """

    name = "sparse"

    def draw(self, key: torch.Tensor, width: int, rank: int) -> torch.Tensor:
        u = bits32(key, stream(width, 9), width * rank)
        entries = (u < _SIXTH).to(torch.float32) - (u >= 2**32 - _SIXTH).to(torch.float32)
        return entries.view(width, rank) * (3.0 / rank) ** 0.5

    def relative_variance(self, width: int, rank: int) -> float:
        return (width + 1) / rank
