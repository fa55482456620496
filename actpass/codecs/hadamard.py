"""An orthogonal matrix of any size from index arithmetic: Hadamard for powers of two, times Hartley for the odd rest.

For N = 2^a m with m odd it is the Kronecker product of the 2^a Hadamard matrix and the m-point Hartley matrix
(R. Bracewell, 1983), so that no width has to be padded.
"""

from __future__ import annotations

import math

import torch


def entries(row: torch.Tensor, column: torch.Tensor, width: int) -> torch.Tensor:
    """Entries (row, column), broadcast, of the (width, width) matrix with columns of length sqrt(width). float32.

    Bit-identical on every back end where ``width`` is a power of two (else the cosine may differ in the last bit).
    """
    odd = width // (width & -width)
    hadamard = 1 - 2 * _parity((row // odd) & (column // odd))
    if odd == 1:
        return hadamard.to(torch.float32)
    angle = (((row % odd) * (column % odd)) % odd).to(torch.float32) * (2.0 * math.pi / odd)
    return hadamard.to(torch.float32) * (torch.cos(angle) + torch.sin(angle))


def orthogonal(width: int, device: torch.device) -> torch.Tensor:
    """The whole matrix (width, width), columns of length sqrt(width)."""
    index = torch.arange(width, dtype=torch.int64, device=device)
    return entries(index.unsqueeze(1), index.unsqueeze(0), width)


def _parity(x: torch.Tensor) -> torch.Tensor:
    """1 where an odd number of the low 32 bits is set."""
    for shift in (16, 8, 4, 2, 1):
        x = x ^ (x >> shift)
    return x & 1
