"""What errors in saved tensors do to the gradients, measured on a batch. Plain data; JSON in and out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actpass.errors import OptionError

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """One saved tensor.

    module, node: which it is: the module whose forward made it, and its node in the joint graph. errors: (form, squared
    relative error of the tensor in it). factor: the squared relative error of the preconditioned gradient, of all parameters
    together, for a squared relative error of one in the tensor.
    """

    module: str
    node: str
    errors: tuple[tuple[str, float], ...]
    factor: float


@dataclass(frozen=True)
class Sensitivities:
    """What `actpass.calibrate` measured. preconditioner: whose direction the gradient was compared in. Give it to a compile as
    ``options={"sensitivities": sensitivities}``, or the path of its file."""

    rows: tuple[Sensitivity, ...]
    preconditioner: str

    def find(self, module: str, node: str) -> Sensitivity | None:
        return next((r for r in self.rows if r.node == node and r.module == module), None)

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivities:
        """Read what `save` wrote. Raises `OptionError` for a file that is none."""
        try:
            return cls._read(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise OptionError(
                f"sensitivities={str(path)!r} is not usable: {reason}. Allowed: what actpass.calibrate returned, or the "
                "path of a file that its save() wrote."
            ) from error

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> Sensitivities:
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {data['schema_version']!r} is not {SCHEMA_VERSION}")
        rows = tuple(
            Sensitivity(
                str(r["module"]), str(r["node"]), tuple((str(f), _number(e)) for f, e in r["errors"]), _number(r["factor"])
            )
            for r in data["rows"]
        )
        return cls(rows, str(data["preconditioner"]))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no finite number >= 0")
    return float(value)
