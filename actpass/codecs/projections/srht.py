"""Signed subsampled Hadamard: orthonormal columns from integer ops, without QR, for any width.

Sources: N. Ailon and B. Chazelle, "Approximate nearest neighbors and the fast Johnson-Lindenstrauss transform", STOC
2006; J. Tropp, "Improved analysis of the subsampled randomized Hadamard transform", 2011, arXiv 1011.1595.
This project's own: any width, without padding (see ``hadamard.py``).
"""

from __future__ import annotations

import torch

from actpass.codecs.generator import permutation, signs, stream
from actpass.codecs.hadamard import entries
from actpass.codecs.projections.projection import SeededProjection
from actpass.codecs.registry import register_projection


@register_projection
class Srht(SeededProjection):
    """P = sqrt(N / R) D H S: random signs D, orthogonal H (N, N), R columns S drawn without replacement.

    Bias 0. Relative variance N / R - 1, as `haar`. Signs and columns are bit-identical on every back end; the entries are,
    too, where N is a power of two (the Hartley factor's cosine may differ in the last bit).
    """

    name = "srht"

    def draw(self, key: torch.Tensor, width: int, rank: int) -> torch.Tensor:
        row_N1 = torch.arange(width, dtype=torch.int64, device=key.device).unsqueeze(1)
        column_1R = permutation(key, stream(width, 24), width)[:rank].unsqueeze(0)
        flip_N1 = signs(key, stream(width, 25), width).unsqueeze(1)
        return flip_N1 * entries(row_N1, column_1R, width) * rank**-0.5

    def relative_variance(self, width: int, rank: int) -> float:
        return width / rank - 1.0
