"""The plan of a whole model: of all its regions, in the order in which they were compiled."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from actpass.errors import PlanError
from actpass.plan import Plan
from actpass.plan_file import schema as read
from actpass.plan_file.diff import differences


@dataclass(frozen=True)
class ModelPlan:
    """Which form every saved tensor has, and what runs again: ``actpass.report(model).plan``.

    Give it, or the path of its file, to another compilation of the same model and shapes, ``options={"plan": ...}``, and it is
    followed to the letter: nothing is searched for, and `hash` is the same. regions: one `Plan` for each compiled graph.
    edited: whether the file's own hash is not that of what stands in it; it was edited by hand, and its bytes may be stale.
    """

    regions: tuple[Plan, ...]
    edited: bool = field(default=False, compare=False)

    @property
    def hash(self) -> str:
        """Of all that is decided: equal in every process, and to the report's ``plan_hash``."""
        return "-".join(r.hash for r in self.regions)

    @property
    def seeded(self) -> bool:
        """Whether its regions take the step's seed as an input."""
        return any(r.seeded or r.draws for r in self.regions)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, atomically: ranks may write to one path."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        temporary.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModelPlan:
        """Read what `save` wrote, perhaps edited since. Raises `PlanError` that names the field, its value and what is allowed;
        whether a graph allows what it says is checked when one is compiled."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"the plan {os.fspath(path)!r} can't be read: {error}") from error
        regions, stored = read.parse(text, os.fspath(path))
        plan = cls(regions)
        return replace(plan, edited=plan.hash != stored)

    @classmethod
    def of(cls, regions: Iterable[Mapping[str, Any]]) -> ModelPlan:
        """From what `Plan.to_dict` wrote, region by region."""
        bare = ({k: v for k, v in r.items() if k != "schema_version"} for r in regions)
        return cls(tuple(read.region(f"regions[{i}]", r) for i, r in enumerate(bare)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ``schema_version``, ``hash``, ``regions``."""
        bare = [{k: v for k, v in r.to_dict().items() if k != "schema_version"} for r in self.regions]
        return {"schema_version": read.SCHEMA_VERSION, "hash": self.hash, "regions": bare}

    def diff(self, other: ModelPlan) -> str:
        """What ``other`` does differently, as text: tensors whose form is another (layers that are alike in one line), bytes
        before and after, what runs again. Of a plan that was edited by hand, the bytes are those of its file."""
        notes = [f"{name} was edited by hand: its bytes are from before" for name, p in _both(self, other) if p.edited]
        return "\n".join((*differences(self.regions, other.regions), *notes))


def _both(one: ModelPlan, other: ModelPlan) -> tuple[tuple[str, ModelPlan], ...]:
    return ("the plan", one), ("the other", other)
