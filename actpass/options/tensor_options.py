"""What the user asked for one saved tensor or weight gradient: one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from actpass.codecs import ALL_PROJECTIONS, LEARNED, QUANTIZERS
from actpass.codecs.projections.learned import state_shape
from actpass.errors import OptionError
from actpass.plan.request import AUTO

EXACT, UNIFORM = "exact", "uniform"
BUDGET = "budget"
"""The rank that asks for ranks layer by layer, from what ``memory_budget`` leaves (`actpass.plan.rank_allocation`)."""
DEFAULT = "default"
DEFAULT_RANK = 0.25
Rank = int | float | Literal["budget"]
ProjectionScaling = Literal["unbiased", "orthonormal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorOptions:
    """The options that may differ from module to module.

    policy: a name of `actpass.plan.policies.POLICIES`; None becomes ``uniform`` beside a codec, ``exact`` beside a projection
    alone, else ``auto``. codec: the low-bit format of all that is stored, projections included; None: by the policy.
    projection: what weight gradients are formed through; None: exactly. rank: an int R in [1, N], a float in (0, 1] (a fraction
    of the width N, at least 1 direction), or `BUDGET`; None: the projection's own. activation_rank: of a learned projection,
    the rank at which tensors with other uses than weight gradients are stored and reconstructed; None: they are not; `DEFAULT`:
    the projection's own. projection_scaling: ``unbiased`` (E[P P^T] = I) or ``orthonormal`` (E[P^T P] = I, for an optimizer in
    the subspace). wgrad: ``fp8``: weight gradients are matmuls of codes in 8 bits, where they can be; not with a projection;
    None: they are exact, or projected. group_size: elements that share a scale (None: the codec's own). rounding: of codecs and
    of ``wgrad``. hadamard_rotation: of codecs.
    forced: whether an override names the module.
    """

    policy: str | None = None
    codec: str | None = None
    projection: str | None = None
    wgrad: str | None = None
    rank: Rank | None = None
    activation_rank: int | float | Literal["default"] | None = DEFAULT
    projection_scaling: ProjectionScaling = "unbiased"
    group_size: int | None = None
    rounding: str = AUTO
    hadamard_rotation: bool = False
    forced: bool = False

    def __post_init__(self) -> None:
        if self.policy is None:
            policy = UNIFORM if self.codec is not None else EXACT if self.projection is not None else AUTO
            object.__setattr__(self, "policy", policy)

    @property
    def decided_by(self) -> str:
        """The name of the policy."""
        assert self.policy is not None
        return self.policy

    @property
    def described(self) -> str:
        """The options that decide the storage format, as they are written in code: ``projection='haar', codec='int8'``."""
        by_policy = self.policy if self.policy not in (EXACT, UNIFORM) else None
        given = {"policy": by_policy, "projection": self.projection, "codec": self.codec, "wgrad": self.wgrad}
        return ", ".join(f"{k}={v!r}" for k, v in given.items() if v is not None) or f"policy={EXACT!r}"

    @property
    def stores_exactly(self) -> bool:
        """Whether what is stored is stored in its own dtype."""
        return self.format is None

    @property
    def format(self) -> str | None:
        """In which format saved tensors are stored: a codec; None: in their own dtype; ``auto``: the policy says."""
        return self.codec if self.policy in (EXACT, UNIFORM) else AUTO

    @property
    def ranks_from_budget(self) -> bool:
        return self.rank == BUDGET and self.projection is not None

    @property
    def draws(self) -> bool:
        """Whether it takes random numbers."""
        rounds = self.wgrad is not None or not self.stores_exactly
        return self.projection is not None or (rounds and self.rounding != "nearest")

    @property
    def projects_activations(self) -> bool:
        """Whether tensors with other uses than weight gradients are stored as projections."""
        return self._activation_rank is not None

    @property
    def _activation_rank(self) -> int | float | None:
        if self.projection not in LEARNED:
            return None
        return LEARNED[self.projection].default_activation_rank if self.activation_rank == DEFAULT else self.activation_rank

    def rank_of(self, width: int) -> int:
        """The rank in directions for a feature axis of ``width``; `OptionError` if an integer rank exceeds it."""
        rank = self.rank
        if rank is None:
            rank = LEARNED[self.projection].default_rank if self.projection in LEARNED else DEFAULT_RANK
        assert rank != BUDGET, "ranks from the budget are chosen for all layers together"
        return _directions("rank", rank, width)

    def activation_rank_of(self, width: int) -> int:
        """As `rank_of`, for activations that are stored as projections."""
        rank = self._activation_rank
        assert rank is not None
        return _directions("activation_rank", rank, width)

    def relative_variance(self, width: int, rank: int) -> float:
        """Of a weight gradient's estimate at ``rank``; 0 without a projection. Of a learned one, if the data's energy is in no
        direction that it follows."""
        return ALL_PROJECTIONS[self.projection].relative_variance(width, rank) if self.projection is not None else 0.0

    def state_bytes(self, width: int, rank: int) -> int:
        """Of a learned subspace, and of the sketch that updates it."""
        if self.projection not in LEARNED:
            return 0
        rows, columns = state_shape(LEARNED[self.projection], width, rank)
        return 2 * 4 * rows * columns

    def bytes_of_direction(self, rows: int, element_size: int) -> int:
        """What one direction of rank adds to a projection of ``rows`` rows as it is stored, rounded up."""
        if self.codec is None:
            return rows * element_size
        codec = QUANTIZERS[self.codec]
        group_size = self.group_size or codec.group
        return -(-rows * (codec.bits * group_size + 16) // (8 * group_size))


def _directions(name: str, rank: Any, width: int) -> int:
    if isinstance(rank, float):
        return max(1, round(rank * width))
    if rank > width:
        raise OptionError(
            f"{name}={rank} is larger than the width {width} of a compressed tensor. Allowed: an int in [1, N], or "
            f"a float in (0, 1] (a fraction of N). Use {name}=0.25, say, or an override for the layer."
        )
    return rank
