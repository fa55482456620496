"""Integer codes of 8, 4 and 2 bits, symmetric about zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from actpass.codecs.quantizer import Quantizer, by_piece


@dataclass(frozen=True)
class Integer(Quantizer):
    """``levels`` evenly spaced values, from minus to plus the largest magnitude of the group (and a hundredth more).

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
        up = 0.5 if uniform is None else uniform + 2.0 ** -(self.random_bits + 1)
        return (steps + self.largest + up).to(torch.int32)  # truncates; nothing here is negative

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        packed = codes[0]
        if self.pieces > 1:  # a NaN makes any integer, which must not reach its neighbours' bits
            packed = packed & (2**self.bits - 1)
        for i in range(1, self.pieces):
            packed = packed | ((codes[i] & (2**self.bits - 1)) << (i * self.bits))
        return packed.to(torch.uint8)

    def unpack(self, payload: torch.Tensor) -> torch.Tensor:
        codes = payload.to(torch.int32).unsqueeze(0)
        if self.pieces > 1:
            codes = (codes >> by_piece(self.pieces, self.bits, codes)) & (2**self.bits - 1)
        return codes.to(torch.float32) - self.largest
