"""JSON -> `Plan`, every field checked: what a user edited by hand arrives here.

A checker is a function (where, value) -> value that raises `PlanError` with where it stands, what it is and what is allowed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from actpass.codecs import ALL_PROJECTIONS, QUANTIZERS
from actpass.errors import PlanError
from actpass.plan import SAVE, Decision, FactoredGradient, Plan, Predicted, Storage

SCHEMA_VERSION = 3
_LARGEST = 2**62

Check = Callable[[str, Any], Any]


def parse(text: str, source: str) -> tuple[tuple[Plan, ...], str]:
    """The regions of a plan file, and the hash that stands in it. source: where ``text`` is from, for errors."""
    try:
        data: Any = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_without_duplicates)
    except ValueError as error:
        raise PlanError(
            f"{source} is not a plan: not JSON, {error}. Save one with actpass.report(model).plan.save(path)."
        ) from error
    if not isinstance(data, dict) or "schema_version" not in data:
        raise PlanError(
            f"{source} is not a plan: it has no schema_version. Save one with actpass.report(model).plan.save(path)."
        )
    fields = cast(dict[str, Any], data)
    version = fields.pop("schema_version")
    if version != SCHEMA_VERSION:
        raise PlanError(
            f"{source}: schema_version is {version!r}. Allowed: {SCHEMA_VERSION} (the fields of older files "
            "have other names). Make the plan anew with this actpass."
        )
    try:
        checked = _record(_FILE)("", fields)
    except PlanError as error:
        raise PlanError(f"{source}: {error}") from None
    return checked["regions"], checked["hash"]


def region(where: str, value: Any) -> Plan:
    """One region from plain data, `Plan.to_dict` without its version. Older files lack ``peak_growth``, and in their decisions
    ``wgrad`` and ``rounding``."""
    if isinstance(value, Mapping):
        value = {"peak_growth": None, **cast(Mapping[str, Any], value)}
    return Plan(**_record(_REGION)(where, value))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((n for n in names if names.count(n) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise ValueError(f"the field {twice!r} stands twice in one object")
    return dict(pairs)


def _error(where: str, value: Any, allowed: str) -> PlanError:
    shown = repr(value)
    return PlanError(f"{where} is {shown if len(shown) < 80 else shown[:77] + '...'}. Allowed: {allowed}.")


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _error(where, value, "a string")
    return value


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _error(where, value, "true or false")
    return value


def _integer(minimum: int = 0, maximum: int = _LARGEST) -> Check:
    def check(where: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise _error(where, value, f"an int in [{minimum}, {maximum}]")
        return value

    return check


def _fraction(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise _error(where, value, "a number >= 0")
    return float(value)


def _one_of(*allowed: str) -> Check:
    def check(where: str, value: Any) -> str:
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            raise _error(where, value, f"{', '.join(allowed)}{f' (did you mean {near[0]}?)' if near else ''}")
        return value

    return check


def _optional(check: Check) -> Check:
    return lambda where, value: None if value is None else check(where, value)


def _tuple_of(check: Check) -> Check:
    def check_all(where: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _error(where, value, "a list")
        return tuple(check(f"{where}[{i}]", item) for i, item in enumerate(cast(list[Any], value)))

    return check_all


def _distinct(where: str, value: Any) -> tuple[str, ...]:
    names = _tuple_of(_text)(where, value)
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    if twice is not None:
        raise PlanError(f"{where} names {twice!r} twice. Allowed: every name once.")
    return names


def _pairs(where: str, value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping):
        raise _error(where, value, "an object of strings")
    return tuple((name, _text(f"{where}.{name}", text)) for name, text in cast(Mapping[str, Any], value).items())


def _record(fields: Mapping[str, Check]) -> Callable[[str, Any], dict[str, Any]]:
    """An object that has these fields and no others."""

    def check(where: str, value: Any) -> dict[str, Any]:
        what, prefix = where or "the plan", f"{where}." if where else ""
        if not isinstance(value, Mapping):
            raise _error(what, value, "an object")
        given = cast(Mapping[str, Any], value)
        missing, unknown = [f for f in fields if f not in given], [f for f in given if f not in fields]
        if missing:
            raise PlanError(f"{what} lacks the field {missing[0]!r}. It must have: {', '.join(fields)}.")
        if unknown:
            near = difflib.get_close_matches(unknown[0], fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise PlanError(f"{what} has an unknown field {unknown[0]!r}.{hint} Allowed: {', '.join(fields)}.")
        return {name: check_field(f"{prefix}{name}", given[name]) for name, check_field in fields.items()}

    return check


_DECISION: dict[str, Check] = {
    "site": _text,
    "matmuls": _distinct,
    "parameters": _tuple_of(_text),
    "projection": _optional(lambda where, value: _one_of(*ALL_PROJECTIONS)(where, value)),
    "reason": _text,
    "width": _integer(),
    "rank": _optional(_integer(1)),
    "projection_scaling": _one_of("unbiased", "orthonormal"),
    "project_in": _optional(_one_of("forward", "backward")),
    "extra_flops": _integer(-_LARGEST),
    "linear": _flag,
    "wgrad": _optional(_one_of("fp8")),
    "rounding": _optional(_one_of("stochastic", "nearest")),
}
_STORAGE: dict[str, Check] = {
    "node": _text,
    "saved_for_backward": _tuple_of(_text),
    "base": _text,
    "codec": lambda where, value: _one_of(SAVE, *QUANTIZERS)(where, value),
    "reason": _text,
    "nbytes": _integer(),
    "stored_bytes": _integer(),
    "unbiased": _flag,
    "group_size": _optional(_integer(8, 4096)),
    "rounding": _one_of("stochastic", "nearest"),
    "hadamard_rotation": _flag,
    "forced": _flag,
    "module": _text,
    "shape": _tuple_of(_integer()),
    "dtype": _text,
}
_FACTORED: dict[str, Check] = {
    "parameter": _text,
    "site": _text,
    "side": _one_of("left", "right"),
    "shape": _tuple_of(_integer(1)),
}
_PREDICTED: dict[str, Check] = {
    "saved_bytes": _integer(),
    "peak_bytes": _optional(_integer()),
    "extra_matmuls": _integer(),
    "extra_attention": _integer(),
    "backward_matmul_flops": _integer(),
}


_TOGETHER = ("projection", "rank", "project_in", "wgrad", "rounding")


def _decision(where: str, value: Any) -> Decision:
    if isinstance(value, Mapping):
        value = {"wgrad": None, "rounding": None, **cast(Mapping[str, Any], value)}
    decision = Decision(**_record(_DECISION)(where, value))
    projected, coded = (decision.projection, decision.rank), (decision.wgrad, decision.rounding)
    by, others = (projected, coded) if decision.wgrad is None else (coded, projected)
    if len({v is None for v in (*by, decision.project_in)}) > 1 or any(v is not None for v in others):
        given = {name: getattr(decision, name) for name in _TOGETHER}
        allowed = "projection, rank and project_in all null, or none of them, and without wgrad no rounding"
        if decision.wgrad is not None:
            allowed = "wgrad, rounding and project_in together, projection and rank null"
        raise _error(where, given, allowed)
    if decision.wgrad is not None and not decision.matmuls:
        raise _error(f"{where}.wgrad", decision.wgrad, "null where there are no matmuls")
    return decision


def _storage(where: str, value: Any) -> Storage:
    return Storage(**_record(_STORAGE)(where, value))


def _factored(where: str, value: Any) -> FactoredGradient:
    return FactoredGradient(**_record(_FACTORED)(where, value))


def _predicted(where: str, value: Any) -> Predicted:
    return Predicted(**_record(_PREDICTED)(where, value))


def _unique(what: str, check: Check, name: Callable[[Any], tuple[str, ...]]) -> Check:
    """A list in which no two entries are about the same."""

    def check_all(where: str, value: Any) -> tuple[Any, ...]:
        seen: dict[str, int] = {}
        found = _tuple_of(check)(where, value)
        for i, item in enumerate(found):
            for n in name(item):
                if n in seen:
                    raise PlanError(f"{where}[{i}] is about the {what} {n!r}, as {where}[{seen[n]}] is. Allowed: one entry.")
                seen[n] = i
        return found

    return check_all


_REGION: dict[str, Check] = {
    "graph": _text,
    "inputs": _pairs,
    "recompute_materialized": _flag,
    "chunk_rows": _integer(),
    "seeded": _flag,
    "must_save": _distinct,
    "recompute": _distinct,
    "storages": _unique("tensor", _storage, lambda s: (s.node,)),
    "decisions": _unique("matmul or tensor", _decision, lambda d: d.matmuls or (d.site,)),
    "modules": _pairs,
    "least_shared_bytes": _integer(),
    "peak_growth": _optional(_fraction),
    "predicted": _optional(_predicted),
    "low_rank_gradients": _unique("parameter", _factored, lambda g: (g.parameter,)),
}
_FILE: dict[str, Check] = {"hash": _text, "regions": _tuple_of(region)}
