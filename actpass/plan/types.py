"""The values that pass between reading, deciding and rewriting. Frozen, comparable, JSON in and out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

SCHEMA_VERSION = 1

ProjectIn = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tensor x that weight-gradient contractions read from the same side, with the same wish.

    name: graph node of x. matmuls: nodes of the contractions. parameters: paths of the weights whose gradients they are.
    groups, tokens, width: the shape of x at the traced size. outs: out-features M of each contraction. root: the node that
    allocated the storage of x; x_bytes: that storage. element_size: bytes of one element. frees: whether the storage goes
    if every contraction that reads any part of it is projected (the exact cut saves it, and nothing else reads it).
    rank_multiple: the kernel that contracts takes only multiples of this (grouped matmul: rows of 16 bytes).
    """

    name: str
    matmuls: tuple[str, ...]
    parameters: tuple[str, ...]
    groups: int
    tokens: int
    width: int
    outs: tuple[int, ...]
    root: str
    x_bytes: int
    element_size: int
    frees: bool
    rank_multiple: int = 1

    @property
    def flops(self) -> int:
        """FLOPs of the exact weight gradients."""
        return sum(2 * self.groups * self.tokens * self.width * m for m in self.outs)

    def flops_at(self, rank: int) -> int:
        """FLOPs through the factors: z = x P once, then dy^T z and the lift by P^T for each contraction."""
        tokens = self.groups * self.tokens
        project = 2 * tokens * self.width * rank
        return project + sum(2 * tokens * m * rank + 2 * self.groups * m * self.width * rank for m in self.outs)

    def payload_bytes(self, rank: int) -> int:
        return self.groups * self.tokens * rank * self.element_size


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one candidate.

    site: graph node of x. matmuls: the contractions it is about (no matmul is in two decisions). method: ``exact`` or a
    projection. project_in: where z = x P is computed: ``forward`` (z is saved in place of x) or ``backward`` (x is there
    anyway or is rebuilt for free: z costs no bytes, and the weight gradient fewer FLOPs).
    """

    site: str
    matmuls: tuple[str, ...]
    parameters: tuple[str, ...]
    method: str
    reason: str
    width: int = 0
    rank: int | None = None
    scale: str = "unbiased"
    project_in: ProjectIn | None = None
    extra_flops: int = 0

    @property
    def projects(self) -> bool:
        return self.rank is not None


@dataclass(frozen=True, slots=True)
class Plan:
    """One decision for every candidate of a region, in graph order."""

    decisions: tuple[Decision, ...]

    @property
    def projections(self) -> tuple[Decision, ...]:
        return tuple(d for d in self.decisions if d.projects)

    def to_dict(self) -> dict[str, Any]:
        decisions = [{**asdict(d), "parameters": list(d.parameters), "matmuls": list(d.matmuls)} for d in self.decisions]
        return {"schema_version": SCHEMA_VERSION, "decisions": decisions}

    @property
    def hash(self) -> str:
        """The same in every process and on every rank for the same plan."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
