"""The maths of the forms: pure tensor functions, one published method a file.

A codec is traced with ``make_fx`` and spliced into the joint graph; nobody writes FX for one. A new seeded projection is
one file with a `SeededProjection` and one entry in `PROJECTIONS`.
"""

from __future__ import annotations

from actpass.codecs.gaussian import Gaussian
from actpass.codecs.haar import Haar
from actpass.codecs.projection import SeededProjection, contract, decode, encode
from actpass.codecs.rademacher import Rademacher
from actpass.codecs.sparse import Sparse
from actpass.codecs.srht import Srht

PROJECTIONS: dict[str, SeededProjection] = {p.name: p for p in (Gaussian(), Rademacher(), Sparse(), Haar(), Srht())}
"""Seeded projections by the name that ``options={"method": ...}`` takes."""

__all__ = ["PROJECTIONS", "SeededProjection", "contract", "decode", "encode"]
