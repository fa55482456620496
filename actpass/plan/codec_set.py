"""What a plan must know of the low-bit forms, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from actpass.plan.plan import RECOMPUTED_SCORE, SCORE, SavedTensor
from actpass.registry import Registry


class Codec(Protocol):
    """A low-bit form (`actpass.codecs.Quantizer`). error: squared relative error of a Gaussian tensor, rounded to nearest."""

    @property
    def bits(self) -> int: ...
    @property
    def error(self) -> float: ...
    @property
    def in_budgets(self) -> bool: ...
    @property
    def safe_for_scores(self) -> bool: ...
    @property
    def safe_for_recomputed_scores(self) -> bool: ...


@dataclass(frozen=True)
class CodecSet:
    """by_name: all that there are. coarsest_codec: where given, `offered` ends with it. foreign: those of other packages. That
    a package is installed changes nobody's training: they are chosen only where they are named, or by a budget.

    The backward of fused attention forms exp(q k - logsumexp) with the logsumexp of the exact queries and keys. Where scores
    are large (200 on a small pretrained Llama) an error of 8 bits makes rows sum to 8 in place of 1 and a gradient wrong by its
    own size, 4 bits by 10^30 times: each codec says whether it is `safe_for_scores`. Where attention is run again from what was
    stored, rows sum to one, and coarser ones are as good as anywhere (`safe_for_recomputed_scores`).
    """

    by_name: Mapping[str, Codec]
    coarsest_codec: str | None = None
    foreign: frozenset[str] = frozenset()

    @classmethod
    def of(cls, registry: Registry[Any]) -> CodecSet:
        """All codecs of ``registry``."""
        return cls(registry, foreign=frozenset(registry.foreign))

    @cached_property
    def offered(self) -> tuple[str, ...]:
        """What a budget chooses from beside exact, the finest first."""
        found = sorted((n for n, c in self.by_name.items() if c.in_budgets), key=lambda n: self.by_name[n].error)
        return tuple(found[: found.index(self.coarsest_codec) + 1] if self.coarsest_codec is not None else found)

    @cached_property
    def own(self) -> tuple[str, ...]:
        """What is chosen from where nobody named a codec and there is no budget, the finest first."""
        return tuple(n for n in replace(self, coarsest_codec=None).offered if n not in self.foreign)

    def offered_for(self, t: SavedTensor) -> tuple[str, ...]:
        """Of `offered`, what ``t`` may take: for what fused attention reads, what is safe for recomputed scores."""
        if t.role is None and RECOMPUTED_SCORE not in t.kinds:
            return self.offered
        return tuple(n for n in self.offered if self.by_name[n].safe_for_recomputed_scores)

    def no_coarser_than(self, name: str) -> CodecSet:
        return replace(self, coarsest_codec=name)

    def safe_for(self, kind: str) -> tuple[str, ...] | None:
        """What a tensor with uses of ``kind`` may take, the finest first; None: all."""
        if kind not in (SCORE, RECOMPUTED_SCORE):
            return None
        found = [
            n
            for n, c in self.by_name.items()
            if c.safe_for_scores or (kind == RECOMPUTED_SCORE and c.safe_for_recomputed_scores)
        ]
        return tuple(sorted(found, key=lambda n: self.by_name[n].error))

    def coarsest_safe_for(self, kind: str) -> str:
        """Of `own`, what a tensor with uses of ``kind`` takes where a coarser form was asked for."""
        safe = self.safe_for(kind) or self.own
        return [n for n in self.own if n in safe][-1]

    def made_safe(self, codec: str, kinds: tuple[str, ...]) -> str:
        """``codec``, or what a tensor with uses of ``kinds`` takes in its place."""
        for kind in (SCORE, RECOMPUTED_SCORE):
            safe = self.safe_for(kind) if kind in kinds else None
            if safe is not None and codec not in safe:
                return self.coarsest_safe_for(kind)
        return codec

    @property
    def bytes_of_a_factor(self) -> float:
        """Of an element of a query or a key that is stored in place of scores, scales and all."""
        safe = [self.by_name[n].bits for n in self.offered if self.by_name[n].safe_for_recomputed_scores]
        return min(safe) / 8 + 0.1
