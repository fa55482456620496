"""What can be registered as a codec or a projection, and what is."""

from __future__ import annotations

from typing import TypeVar

from actpass.codecs.projections.learned import LearnedProjection
from actpass.codecs.projections.projection import SeededProjection
from actpass.codecs.quantizers.quantizer import Quantizer
from actpass.registry import Registry, Selection, instance_of

Q = TypeVar("Q", bound=Quantizer | type[Quantizer])
P = TypeVar("P", bound=SeededProjection | LearnedProjection | type[SeededProjection] | type[LearnedProjection])

QUANTIZERS: Registry[Quantizer] = Registry("codec", "actpass.codecs")
"""Low-bit forms by the name that ``options={"codec": ...}`` takes."""
ALL_PROJECTIONS: Registry[SeededProjection | LearnedProjection] = Registry("projection", "actpass.projections")
PROJECTIONS: Selection[SeededProjection] = Selection(ALL_PROJECTIONS, SeededProjection)
LEARNED: Selection[LearnedProjection] = Selection(ALL_PROJECTIONS, LearnedProjection)


def register_codec(codec: Q) -> Q:
    """Add a `Quantizer`, or a class of them that is made without arguments, under its ``name``. A class decorator, too."""
    found: Quantizer = instance_of(codec)
    QUANTIZERS.register(found.name, found)
    return codec


def register_projection(projection: P) -> P:
    """As `register_codec`, of a `SeededProjection` or a `LearnedProjection`."""
    found: SeededProjection | LearnedProjection = instance_of(projection)
    ALL_PROJECTIONS.register(found.name, found)
    return projection
