"""Uniformly random subspace (Haar measure on the Stiefel manifold).

Source: Li et al., "Optimal low-rank stochastic gradient estimation", 2026, arXiv 2603.20632: among all draws with
E[P P^T] = I, scaled orthonormal columns have the least variance when nothing is known of the gradient.
Construction: QR of a Gaussian matrix with the signs of R's diagonal moved into Q (F. Mezzadri, "How to generate random
matrices from the classical compact groups", 2007).
"""

from __future__ import annotations

import torch

from actpass.codecs.generator import normals, stream
from actpass.codecs.projection import SeededProjection


class Haar(SeededProjection):
    """P = sqrt(N / R) Q with Q (N, R) orthonormal. Bias 0. Relative variance N / R - 1: none at full rank.

    Costs a QR of (N, R) a width and step. QR is LAPACK's or cuSOLVER's, so unlike the other methods the basis agrees
    between devices only to rounding; forward, backward and ranks on one kind of device still agree bit for bit.
    """

    name = "haar"

    def draw(self, key: torch.Tensor, width: int, rank: int) -> torch.Tensor:
        gaussian_NR = normals(key, stream(width, 16), width * rank).view(width, rank)
        q_NR, r_RR = torch.linalg.qr(gaussian_NR)
        diagonal_R = (r_RR * torch.eye(rank, device=key.device)).sum(0)
        return q_NR * (torch.where(diagonal_R < 0, -1.0, 1.0) * (width / rank) ** 0.5)

    def relative_variance(self, width: int, rank: int) -> float:
        return width / rank - 1.0
