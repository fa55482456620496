"""The values that pass between reading, deciding and rewriting. Frozen, comparable, JSON in and out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

SCHEMA_VERSION = 7
SAVE = "save"
RECOMPUTE = "recompute"
"""Not stored: the backward runs what it came from again."""
SCORE = "score"
"""The kind of a query or key: a fused attention's backward exponentiates their product, less a statistic of the exact one."""
RECOMPUTED_SCORE = "recomputed score"
"""The kind of a query or key where the attention is run again in the backward: the statistic is that of what was stored."""
EXPONENTIAL = "exponential"
"""The kind of a tensor that the backward exponentiates (logits): its absolute error becomes a factor."""

ProjectIn = Literal["forward", "backward"]
Role = Literal["score", "value", "output"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tensor x that weight-gradient contractions read from the same side, with the same wish.

    name: graph node of x. matmuls: nodes of the contractions. parameters: paths of the weights whose gradients they are.
    groups, tokens, width: the shape of x at the traced size. outs: out-features M of each contraction. base: the node that
    allocated the storage of x; x_bytes: that storage. element_size: bytes of one element. frees: whether the storage goes
    if every contraction that reads any part of it is projected (the exact cut saves it, and nothing else reads it).
    rank_multiple: the kernel that contracts takes only multiples of this (grouped matmul: rows of 16 bytes). narrow: whether
    all weights are far less wide on one side than the region's are (an adapter's factors, a router). fp8_obstacle: why no
    matmul in fp8 can form the weight gradients; None: one can. fp8_bytes: of the codes of x and their scales.
    """

    name: str
    matmuls: tuple[str, ...]
    parameters: tuple[str, ...]
    groups: int
    tokens: int
    width: int
    outs: tuple[int, ...]
    base: str
    x_bytes: int
    element_size: int
    frees: bool
    rank_multiple: int = 1
    narrow: bool = False
    fp8_obstacle: str | None = None
    fp8_bytes: int = 0

    @property
    def key(self) -> str:
        """What ranks from a budget are known by: no contraction is in two candidates."""
        return self.matmuls[0]

    @property
    def weight_elements(self) -> int:
        """Of the weight gradients together."""
        return sum(self.groups * self.width * m for m in self.outs)

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
    """What happens to one candidate, or, without ``matmuls``, to a tensor that crosses with other uses and is decoded.

    site: graph node of x. matmuls: the weight-gradient matmuls it is about (no matmul is in two decisions). parameters: of
    those; of a tensor that is decoded the one that its subspace belongs to. projection: its name; None: exact. project_in:
    where z = x P is computed: ``forward`` (z is saved in place of x) or ``backward`` (x is there anyway or is rebuilt for
    free: z costs no bytes, and the weight gradient fewer FLOPs). linear: whether the backward is linear in x, so that an
    unbiased projection keeps the gradient unbiased. wgrad: ``fp8``: the weight gradients are matmuls of the codes of x and dy
    in 8 bits; project_in is then where x is cast, and rounding is that of both.
    """

    site: str
    matmuls: tuple[str, ...]
    parameters: tuple[str, ...]
    projection: str | None
    reason: str
    width: int = 0
    rank: int | None = None
    projection_scaling: str = "unbiased"
    project_in: ProjectIn | None = None
    extra_flops: int = 0
    linear: bool = True
    wgrad: str | None = None
    rounding: str | None = None

    @property
    def projects(self) -> bool:
        return self.rank is not None

    @property
    def projects_activations(self) -> bool:
        """Whether the backward rebuilds x from z, for whatever use."""
        return self.projects and not self.matmuls


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One memory that is kept alive from forward to backward.

    node: the node to store in another form, the only crossing one or the one that all others are views of. saved_for_backward:
    the nodes that cross. base: the node that allocated the memory. nbytes: of the memory. kinds: the kinds of its uses in the
    backward, sorted. linear: whether the backward is linear in it as a whole, so that an unbiased form keeps the gradient
    unbiased. paths: the module whose forward made it, and the weights whose gradients contract with it. obstacle: why it can
    only be kept as it is, or None.

    recompute, recompute_flops: the matmuls and fused attentions that the backward would run again to rebuild it from all else
    that is stored, and what that costs; empty if it can't or must not be. of_factors, of_factors_flops, factors: the same of
    the scores of an attention that is not fused, if the ``factors`` elements of its queries and keys are stored in their place;
    its statistics are formed again with them. attention, role: the fused attention that it belongs
    to, as its ``q`` or ``k`` (``score``), its ``v`` (``value``) or its ``output``. elements: how many it has. shape, dtype: of
    the node at the traced size. joins: on a GPU, whether codes of it are made, and whether they are read, inside kernels that
    there are anyway; a library's kernel, a matmul, takes it from memory as it is. None on a CPU, where codecs are functions
    that are called.
    """

    node: str
    saved_for_backward: tuple[str, ...]
    base: str
    nbytes: int
    kinds: tuple[str, ...]
    linear: bool
    paths: tuple[str, ...]
    obstacle: str | None
    recompute: tuple[str, ...] = ()
    recompute_flops: int = 0
    of_factors: tuple[str, ...] = ()
    of_factors_flops: int = 0
    factors: int = 0
    attention: str | None = None
    role: Role | None = None
    elements: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""
    joins: tuple[bool, bool] | None = None

    def traffic(self, stored_bytes: int) -> int:
        """Bytes that are read and written more if it is stored in ``stored_bytes``."""
        made, read = self.joins or (False, False)
        encode = stored_bytes if made else self.nbytes + stored_bytes
        decode = stored_bytes - self.nbytes if read else stored_bytes + self.nbytes
        return max(0, encode + decode)


@dataclass(frozen=True, slots=True)
class Storage:
    """How one memory that crosses from forward to backward is stored.

    node: the graph node that is stored. saved_for_backward: the nodes that cross, views of it. base: the node that allocated
    the memory. codec: ``save`` or a low-bit format. group_size: elements that share a scale (None: the form's own choice).
    rounding: ``stochastic`` or ``nearest``. hadamard_rotation: Hadamard rotation inside the group.
    nbytes, stored_bytes: of the memory as it is, and as it is stored. unbiased: whether the gradient's expectation is exact.
    forced: whether somebody asked for this form of this very tensor, which allows what is refused otherwise (fewer than 16 bits
    for a query). module, shape, dtype: of the node, for the reader of a plan.
    """

    node: str
    saved_for_backward: tuple[str, ...]
    base: str
    codec: str
    reason: str
    nbytes: int
    stored_bytes: int
    unbiased: bool = True
    group_size: int | None = None
    rounding: str = "stochastic"
    hadamard_rotation: bool = False
    forced: bool = False
    module: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""

    @property
    def coded(self) -> bool:
        return self.codec != SAVE


@dataclass(frozen=True, slots=True)
class FactoredGradient:
    """A weight gradient that stays in its factors. parameter: its path. site: of the decision that projects its x. side:
    ``left`` if the axis of the parameter that the basis spans is the last but one, else ``right``. shape: of the
    coefficients."""

    parameter: str
    site: str
    side: Literal["left", "right"]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a region takes under its plan. saved_bytes: from forward to backward. peak_bytes: see `Totals`. extra_matmuls,
    extra_attention: that the backward runs again. backward_matmul_flops: of all matmuls of the backward."""

    saved_bytes: int
    peak_bytes: int | None
    extra_matmuls: int
    extra_attention: int
    backward_matmul_flops: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All that was decided for one region, and what it takes to decide the same again.

    decisions, storages: one for every candidate and one for everything that crosses, in graph order. recompute: the matmuls and
    fused attentions of the forward that the backward may run again. recompute_materialized, must_save: see
    `actpass.passes.partition.PartitionConstraints`. chunk_rows: of a piece of the loss; 0: it is formed whole. seeded: whether
    the region takes the step's seed as an input, drawn from or not: upstream's min-cut breaks ties otherwise with one input
    more. graph: fingerprint of the joint graph that the plan is for (`actpass.ir.fingerprint`); no node's name means anything
    in another. inputs: (name, dtype and shape) of the region's inputs but parameters. modules: (node, module) for the nodes of
    ``recompute`` and ``must_save``. least_shared_bytes: Inductor fuses no loops that share fewer (its
    ``score_fusion_memory_threshold``), on which the peak depends. peak_growth: of a graph's peak, what fusions may add
    (``fusion_memory_timeline_peak_memory_pct_threshold``); None: no limit is set. predicted: what it takes. low_rank_gradients:
    the weight gradients that are never formed, in the order of the inputs that get their coefficients.
    """

    decisions: tuple[Decision, ...] = ()
    storages: tuple[Storage, ...] = ()
    recompute: tuple[str, ...] = ()
    recompute_materialized: bool = False
    must_save: tuple[str, ...] = ()
    chunk_rows: int = 0
    seeded: bool = False
    graph: str = ""
    inputs: tuple[tuple[str, str], ...] = ()
    modules: tuple[tuple[str, str], ...] = ()
    least_shared_bytes: int = 0
    peak_growth: float | None = None
    predicted: Predicted | None = None
    low_rank_gradients: tuple[FactoredGradient, ...] = ()

    @property
    def projections(self) -> tuple[Decision, ...]:
        return tuple(d for d in self.decisions if d.projects)

    @property
    def contracted(self) -> tuple[Decision, ...]:
        """The projections that weight gradients are formed through."""
        return tuple(d for d in self.projections if d.matmuls)

    @property
    def decoded(self) -> tuple[Decision, ...]:
        """The projections of which the backward rebuilds the tensor."""
        return tuple(d for d in self.projections if d.projects_activations)

    @property
    def from_codes(self) -> tuple[Decision, ...]:
        """Those by which weight gradients are matmuls of codes."""
        return tuple(d for d in self.decisions if d.wgrad is not None)

    @property
    def rewrites(self) -> bool:
        """Whether any weight gradient is formed otherwise than exactly, or any tensor is decoded from a projection."""
        return bool(self.projections or self.from_codes)

    @property
    def coded(self) -> tuple[Storage, ...]:
        return tuple(s for s in self.storages if s.coded)

    @property
    def draws(self) -> bool:
        """Whether it takes random numbers."""
        return bool(self.projections) or any(s.rounding == "stochastic" for s in (*self.coded, *self.from_codes))

    @property
    def is_default(self) -> bool:
        """Whether it is Inductor's own cut, untouched."""
        return not (
            self.recompute_materialized or self.chunk_rows or self.must_save or self.recompute or self.coded or self.rewrites
        )

    @property
    def bare(self) -> Plan:
        """What is done, without what is said about it."""
        decisions = tuple(replace(d, reason="") for d in self.decisions)
        return replace(self, decisions=decisions, storages=tuple(replace(s, reason="") for s in self.storages), predicted=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON gives it back."""
        data = {**asdict(self), "inputs": dict(self.inputs), "modules": dict(self.modules)}
        return {"schema_version": SCHEMA_VERSION, **json.loads(json.dumps(data))}

    @property
    def hash(self) -> str:
        """The same in every process and on every rank for the same plan: of what is done, not of what is said about it (bytes,
        reasons), nor of what stays exact, nor of the graph it is done to."""
        forms = [(s.node, s.codec, s.group_size, s.rounding, s.hadamard_rotation) for s in self.coded]
        projections = [
            (d.site, sorted(d.matmuls), d.projection, d.rank, d.projection_scaling, d.project_in) for d in self.projections
        ]
        settings = [self.recompute_materialized, self.chunk_rows, self.seeded, sorted(self.must_save), sorted(self.recompute)]
        low_rank_gradients = sorted((g.parameter, g.site, g.side) for g in self.low_rank_gradients)
        from_codes = sorted([d.site, sorted(d.matmuls), d.wgrad, d.project_in, d.rounding] for d in self.from_codes)
        done = [
            settings,
            sorted(forms, key=str),
            sorted(projections, key=str),
            *([low_rank_gradients] if low_rank_gradients else []),
            *([from_codes] if from_codes else []),
        ]
        canonical = json.dumps(done, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
