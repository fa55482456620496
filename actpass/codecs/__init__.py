"""The maths of the forms: pure tensor functions, one published method a file.

A codec is traced with ``make_fx`` and spliced into the joint graph; nobody writes FX for one. A new projection is one file
with a `SeededProjection` or a `LearnedProjection` under ``@register_projection``, a new low-bit form one with a `Quantizer`
under ``@register_codec``; what a budget or a plan must know of it is in its class. In this package the file is imported below;
another package names it in an entry point (`actpass.registry`).
"""

from actpass.codecs.projections import gaussian, haar, oasis, pca, prac, rademacher, sampled, sparse, srht
from actpass.codecs.projections.learned import LearnedProjection
from actpass.codecs.projections.projection import SeededProjection, contract, decode, encode
from actpass.codecs.quantizers import float8, integer
from actpass.codecs.quantizers.groups import Groups
from actpass.codecs.quantizers.quantizer import Quantizer
from actpass.codecs.registry import ALL_PROJECTIONS, LEARNED, PROJECTIONS, QUANTIZERS, register_codec, register_projection

_REGISTERED = (float8, gaussian, haar, integer, oasis, pca, prac, rademacher, sampled, sparse, srht)
"""By being imported."""

__all__ = [
    "ALL_PROJECTIONS", "LEARNED", "PROJECTIONS", "QUANTIZERS", "Groups", "LearnedProjection", "Quantizer", "SeededProjection",
    "contract", "decode", "encode", "register_codec", "register_projection",
]  # fmt: skip
