"""The maths of the forms: pure tensor functions, one published method a file.

A codec is traced with ``make_fx`` and spliced into the joint graph; nobody writes FX for one. A new seeded projection is
one file with a `SeededProjection` and one entry in `PROJECTIONS`, a new learned one a `LearnedProjection` in `LEARNED`, a new
low-bit form a `Quantizer` and one entry in `QUANTIZERS`; what a budget or a plan must know of a form is in its class.
"""

from __future__ import annotations

import torch

from actpass.codecs.projections.gaussian import Gaussian
from actpass.codecs.projections.haar import Haar
from actpass.codecs.projections.learned import LEARNED, LearnedProjection
from actpass.codecs.projections.projection import SeededProjection, contract, decode, encode
from actpass.codecs.projections.rademacher import Rademacher
from actpass.codecs.projections.sparse import Sparse
from actpass.codecs.projections.srht import Srht
from actpass.codecs.quantizers.float8 import Float8
from actpass.codecs.quantizers.groups import Groups
from actpass.codecs.quantizers.integer import Integer
from actpass.codecs.quantizers.quantizer import Quantizer

PROJECTIONS: dict[str, SeededProjection] = {p.name: p for p in (Gaussian(), Rademacher(), Sparse(), Haar(), Srht())}
"""Seeded projections by the name that ``options={"method": ...}`` takes."""

QUANTIZERS: dict[str, Quantizer] = {
    q.name: q
    for q in (
        Integer(16, 65535, 64),
        Integer(8, 255, 64),
        Integer(4, 15, 32),
        Integer(2, 4, 32),
        Float8("fp8", torch.float8_e4m3fn, 64),
        Float8("fp8_e5m2", torch.float8_e5m2, 64),
    )
}
"""Low-bit forms by the name that ``options={"method": ...}`` takes."""


def errors() -> dict[str, float]:
    """Low-bit form -> squared relative error of a Gaussian tensor, rounded to nearest."""
    return {name: quantizer.error for name, quantizer in QUANTIZERS.items()}


ALL_PROJECTIONS: dict[str, SeededProjection | LearnedProjection] = {**PROJECTIONS, **LEARNED}

__all__ = [
    "ALL_PROJECTIONS", "LEARNED", "PROJECTIONS", "QUANTIZERS", "Groups", "LearnedProjection", "Quantizer", "SeededProjection",
    "contract", "decode", "encode", "errors",
]  # fmt: skip
