"""Integer codes of 16, 8, 4 and 2 bits, symmetric about zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from actpass.codecs.quantizers.quantizer import Quantizer
from actpass.codecs.registry import register_codec

_ERROR = {16: 8e-10, 8: 4.4e-5, 4: 1.1e-2, 2: 0.2}
_LARGEST = 2.7
"""Of 32 to 64 Gaussian numbers, in standard deviations."""


@dataclass(frozen=True)
class Integer(Quantizer):
    """``levels`` evenly spaced values, from minus to plus the largest magnitude of the group (and a hundredth more).

    16, 8 and 4 bits take an odd number of levels (65535, 255, 15), so that zero is exact; 2 bits take all four: there a
    smaller step is worth more. Stochastic rounding: variance step^2 f (1 - f) an element, f the distance to the level below in
    steps.
    """

    bits: int
    levels: int
    group: int

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def error(self) -> float:
        if self.bits in _ERROR:
            return _ERROR[self.bits]
        return (2 * _LARGEST / (self.levels - 1)) ** 2 / 12

    @property
    def in_budgets(self) -> bool:
        return self.bits >= 4

    @property
    def safe_for_scores(self) -> bool:
        return self.bits >= 16

    @property
    def safe_for_recomputed_scores(self) -> bool:
        return self.bits >= 8

    @property
    def largest(self) -> float:
        return (self.levels - 1) / 2

    def round(self, steps: torch.Tensor, uniform: torch.Tensor | None) -> torch.Tensor:
        up = 0.5 if uniform is None else uniform + 2.0 ** -(self.random_bits + 1)
        if self.bits == 16:  # signed: one bit more is left behind the point
            return torch.floor(steps + up)
        return torch.floor(steps + self.largest + up)  # in [0, levels - 1] as it is, for the scale has a margin

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        if self.bits == 16:
            return codes[0].to(torch.int16)
        if self.pieces == 1:
            return codes[0].to(torch.uint8)
        # In floating point, where conversions from and to bytes are fast on a CPU, and as a sum, which uses ``codes`` once:
        # Inductor writes to memory what is used twice. A NaN must not reach its neighbours' bits.
        codes = torch.where(codes >= 0.0, codes, 0.0)
        return (codes * self._units(codes.device, codes.dim())).sum(0).to(torch.uint8)

    def unpack(self, payload: torch.Tensor) -> torch.Tensor:
        codes = payload.unsqueeze(0)
        if self.bits == 16:
            return codes.to(torch.float32)
        if self.pieces > 1:
            shifts = torch.arange(self.pieces, dtype=torch.uint8, device=codes.device) * self.bits
            codes = (codes >> shifts.view(self.pieces, *(1 for _ in payload.shape))) & (2**self.bits - 1)
        return codes.to(torch.float32) - self.largest

    def _units(self, device: torch.device, dims: int) -> torch.Tensor:
        """What a one in each piece of a byte is worth, (K, 1, ...), float32."""
        shifts = torch.arange(self.pieces, dtype=torch.int64, device=device) * self.bits
        return (1 << shifts).to(torch.float32).view(self.pieces, *(1 for _ in range(dims - 1)))


for _codec in (Integer(16, 65535, 64), Integer(8, 255, 64), Integer(4, 15, 32), Integer(2, 4, 32)):
    register_codec(_codec)
