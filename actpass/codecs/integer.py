"""Integer codes of 8, 4 and 2 bits, symmetric about zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from actpass.codecs.quantizer import Quantizer, by_piece


@dataclass(frozen=True)
class Integer(Quantizer):
    """``levels`` evenly spaced values, from minus to plus the largest magnitude of the group (rounded up to bfloat16).

    8 and 4 bits take an odd number of levels (255, 15), so that zero is exact; 2 bits take all four: there a smaller step
    is worth more. Stochastic rounding: variance step^2 f (1 - f) an element, f the distance to the level below in steps.
    """

    bits: int
    levels: int
    group: int

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def largest(self) -> float:
        return (self.levels - 1) / 2

    def round(self, steps: torch.Tensor, uniform: torch.Tensor | None) -> torch.Tensor:
        levels = steps + self.largest
        rounded = torch.round(levels) if uniform is None else torch.floor(levels + uniform)
        return rounded.clamp(0, self.levels - 1).to(torch.int32)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        packed = codes[0]
        for i in range(1, self.pieces):
            packed = packed | (codes[i] << (i * self.bits))
        return packed.to(torch.uint8)

    def unpack(self, payload: torch.Tensor) -> torch.Tensor:
        codes = payload.to(torch.int32).unsqueeze(0)
        if self.pieces > 1:
            codes = (codes >> by_piece(self.pieces, self.bits, codes)) & (2**self.bits - 1)
        return codes.to(torch.float32) - self.largest
