"""Integer codes of 16, 8, 4 and 2 bits, symmetric about zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actpass.codecs.quantizers.quantizer import Quantizer
from actpass.codecs.registry import register_codec

_ERROR = {16: 8e-10, 8: 4.4e-5, 4: 1.1e-2, 2: 0.2}
_LARGEST = 2.7
"""Of 32 to 64 Gaussian numbers, in standard deviations."""
_WHOLE = 1.5 * 2.0**23
"""Float32 numbers near it are whole ones, which their last bits count."""


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
        lowest = 0.0 if self.bits == 16 else self.largest  # 16 bits are signed: one more is left behind the point
        up = steps + lowest if uniform is None else steps + (uniform + (lowest - 0.5))
        # The sum is a whole number, rounded to nearest, and its last bits are the code: in [0, levels - 1] as it is, for the
        # scale has a margin. A NaN's are masked like all others, and do not reach their neighbours'.
        return (up + _WHOLE).view(torch.int32) & (2**self.bits - 1)

    def neighbours(self, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        below = torch.floor(steps + self.largest) - self.largest
        return below, below + 1.0

    def pack(self, codes: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.bits == 16:
            return ((codes[0] << 16) >> 16).to(torch.int16)
        packed = codes[0]
        for k, code in enumerate(codes[1:], 1):
            packed = packed | (code << (k * self.bits))
        return packed.to(torch.uint8)

    def unpack(self, payload: torch.Tensor) -> torch.Tensor:
        codes = payload.unsqueeze(0)
        if self.bits == 16:
            return codes.to(torch.float32)
        if self.pieces > 1:
            shifts = torch.arange(self.pieces, dtype=torch.uint8, device=codes.device) * self.bits
            codes = (codes >> shifts.view(self.pieces, *(1 for _ in payload.shape))) & (2**self.bits - 1)
        return codes.to(torch.float32) - self.largest


for _codec in (Integer(16, 65535, 64), Integer(8, 255, 64), Integer(4, 15, 32), Integer(2, 4, 32)):
    register_codec(_codec)
