"""Orthonormal columns without Householder reflections."""

from __future__ import annotations

import torch

from actpass.torch_compat import cholesky_ex, qr, solve_triangular


def orthonormal(columns_NR: torch.Tensor, within: int | None = None) -> torch.Tensor:
    """Orthonormal columns with the span of the given ones, those of QR with a positive diagonal: the first k span what the
    first k of ``columns_NR`` span. (..., N, R), R <= N, any full-rank float32 matrix, or a batch of them.

    CholeskyQR, twice (Y. Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm", 2015): two Gram matrices of
    R x R, their factors, two triangular solves, 8 N R^2 FLOPs as matmuls. It is exact to rounding up to a condition number
    of 1e3 in float32, which a Gaussian matrix has where R <= N / 2; wider ones take LAPACK's or cuSOLVER's QR. within: the
    dimension of the space that the columns lie in, if it is less than N.
    """
    width, rank = columns_NR.shape[-2:]
    if 2 * rank > (within or width):
        q_NR, r_RR = qr(columns_NR)
        diagonal_1R = (r_RR * torch.eye(rank, device=columns_NR.device)).sum(-2, keepdim=True)
        return q_NR * torch.where(diagonal_1R < 0, -1.0, 1.0)
    return _cholesky_qr(_cholesky_qr(columns_NR))


def _cholesky_qr(columns_NR: torch.Tensor) -> torch.Tensor:
    gram_RR = columns_NR.mT @ columns_NR
    factor_RR, _ = cholesky_ex(gram_RR, upper=True)
    return solve_triangular(factor_RR, columns_NR, upper=True, left=False)
