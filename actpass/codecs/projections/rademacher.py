"""Random signs.

Source: D. Achlioptas, "Database-friendly random projections: Johnson-Lindenstrauss with binary coins", JCSS 66 (2003),
theorem 1.1, first distribution.
"""

from __future__ import annotations

import torch

from actpass.codecs.generator import signs, stream
from actpass.codecs.projections.projection import SeededProjection
from actpass.codecs.registry import register_projection


@register_projection
class Rademacher(SeededProjection):
    """P_ij = +-1 / sqrt(R) with equal odds. Bias 0. Relative variance (N - 1) / R: the least of all independent entries."""

    name = "rademacher"

    def draw(self, key: torch.Tensor, width: int, rank: int) -> torch.Tensor:
        return signs(key, stream(width, 8), width * rank).view(width, rank) * rank**-0.5

    def relative_variance(self, width: int, rank: int) -> float:
        return (width - 1) / rank
