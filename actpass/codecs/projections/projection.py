"""Projection onto a seeded subspace: what all its methods share.

Shapes: T tokens (all leading dimensions), N in-features, M out-features, R rank, E batch of experts (may be absent).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch


class SeededProjection(ABC):
    """A random basis P (N, R) with E[P P^T] = I, regenerated from a seed.

    What is stored in place of x (T, N) is z = x P (T, R): R/N of the bytes. dW = dy^T x is estimated through the factors,
    (dy^T z) P^T, so x is never rebuilt. FLOPs: 2 T N R once for all consumers of x, then 2 T M R + 2 M N R in place of
    2 T M N for each. Unbiased: E[dW_hat] = dW.
    """

    name: ClassVar[str]
    known_variance: ClassVar[bool] = True
    """See `LearnedProjection`."""

    @abstractmethod
    def draw(self, key: torch.Tensor, width: int, rank: int) -> torch.Tensor:
        """The basis (N, R) in float32 with E[P P^T] = I. key: `round_keys` on the device where it is wanted."""

    @abstractmethod
    def relative_variance(self, width: int, rank: int) -> float:
        """E|v P P^T - v|^2 / |v|^2, the same for every v: the relative variance of each row of dW."""

    def basis(self, key: torch.Tensor, width: int, rank: int, *, unbiased: bool, dtype: torch.dtype) -> torch.Tensor:
        """The basis in ``dtype``. ``unbiased=False`` scales it to E[P^T P] = I (orthonormal columns for `haar` and `srht`),
        for optimizers that step inside a fixed subspace."""
        basis_NR = self.draw(key, width, rank)
        if not unbiased:
            basis_NR = basis_NR * math.sqrt(rank / width)
        return basis_NR.to(dtype)


def encode(x: torch.Tensor, basis_NR: torch.Tensor) -> torch.Tensor:
    """z = x P. x: (T, N) or (E, T, N) -> (T, R) or (E, T, R)."""
    if x.dim() == 3:
        return torch.bmm(x, basis_NR.expand(x.shape[0], *basis_NR.shape))
    return torch.mm(x, basis_NR)


def decode(z: torch.Tensor, basis_NR: torch.Tensor) -> torch.Tensor:
    """x_hat = z P^T, for uses that need x itself."""
    return torch.matmul(z, basis_NR.t())


def contract(coefficients: torch.Tensor, basis_NR: torch.Tensor, *, left: bool) -> torch.Tensor:
    """The weight gradient from its coefficients.

    left=False: coefficients = dy^T z (M, R) -> dW = coefficients P^T (M, N).
    left=True:  coefficients = z^T dy (R, M) -> dW^T = P coefficients (N, M), as `Conv1D` and experts store it.
    A leading E is kept; the basis may have it, too.
    """
    if coefficients.dim() == 3:
        expanded = basis_NR if basis_NR.dim() == 3 else basis_NR.expand(coefficients.shape[0], *basis_NR.shape)
        return torch.bmm(expanded, coefficients) if left else torch.bmm(coefficients, expanded.transpose(1, 2))
    return torch.mm(basis_NR, coefficients) if left else torch.mm(coefficients, basis_NR.t())
