"""What a search for plans within capacities of saved bytes offers, and what it asks of a region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actpass.analysis.partitioned import PartitionConstraints
from actpass.options import Config
from actpass.plan import SavedTensor
from actpass.plan.storage_options import Costs
from actpass.plan.store import StoredBytes
from actpass.planner.region import PartitionPlan

RANGE = 64
"""The most bytes to the least, where capacities are listed."""
TRIES = 4
"""Attempts to meet one capacity."""


@dataclass(frozen=True, slots=True)
class Found:
    """choice, the bytes that it stores, and what it costs."""

    choice: PartitionPlan
    stored: int
    cost: int


class Searched(Protocol):
    """What a search asks of a region, be it one that was traced or one that is reckoned
    (`actpass.extrapolation.extrapolate`)."""

    @property
    def config(self) -> Config: ...
    def cut(self, constraints: PartitionConstraints) -> Any: ...
    def tensors(self, cut: Any) -> list[SavedTensor]: ...
    def sizes(self, cut: Any) -> StoredBytes: ...
    def costs(self, cut: Any, tensors: Sequence[SavedTensor]) -> Costs: ...


class CapacitySearch(Protocol):
    """Plans within capacities of saved bytes. stride: each how manieth capacity is looked at for one that fits. unlimited: what
    is chosen without a budget, where within one matmuls are run again. reason_not_quantizable: the end of an error."""

    @property
    def stride(self) -> int: ...
    @property
    def region(self) -> Searched: ...
    @property
    def tensors(self) -> list[SavedTensor]: ...
    @property
    def least(self) -> int: ...
    @property
    def unlimited(self) -> Found | None: ...
    @property
    def reason_not_quantizable(self) -> str: ...
    def capacities(self, step: float) -> list[int]: ...
    def at(self, capacity: int) -> Found: ...
