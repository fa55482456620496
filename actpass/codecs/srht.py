"""Signed subsampled Hadamard: orthonormal columns from integer ops, without QR, for any width.

Sources: N. Ailon and B. Chazelle, "Approximate nearest neighbors and the fast Johnson-Lindenstrauss transform", STOC
2006; J. Tropp, "Improved analysis of the subsampled randomized Hadamard transform", 2011, arXiv 1011.1595.
This project's own: for N = 2^a m with m odd the orthogonal matrix is the Kronecker product of the 2^a Hadamard matrix
and the m-point Hartley matrix (R. Bracewell, 1983), so that no width has to be padded.
"""

from __future__ import annotations

import math

import torch

from actpass.codecs.generator import permutation, signs, stream
from actpass.codecs.projection import SeededProjection


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
        return flip_N1 * _orthogonal(row_N1, column_1R, width) * rank**-0.5

    def relative_variance(self, width: int, rank: int) -> float:
        return width / rank - 1.0


def _orthogonal(row: torch.Tensor, column: torch.Tensor, width: int) -> torch.Tensor:
    """Entries of the (width, width) Hadamard-Hartley matrix, scaled to length sqrt(width) a column."""
    odd = width // (width & -width)
    hadamard = 1 - 2 * _parity((row // odd) & (column // odd))
    if odd == 1:
        return hadamard.to(torch.float32)
    angle = (((row % odd) * (column % odd)) % odd).to(torch.float32) * (2.0 * math.pi / odd)
    return hadamard.to(torch.float32) * (torch.cos(angle) + torch.sin(angle))


def _parity(x: torch.Tensor) -> torch.Tensor:
    """1 where an odd number of the low 32 bits is set."""
    for shift in (16, 8, 4, 2, 1):
        x = x ^ (x >> shift)
    return x & 1
