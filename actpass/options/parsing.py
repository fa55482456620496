"""`options=` of ``torch.compile(model, backend="actcomp", options=...)`` -> a frozen `Config`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from actpass.codecs import ALL_PROJECTIONS, LEARNED, PROJECTIONS, QUANTIZERS
from actpass.errors import OptionError, PlanError
from actpass.options.memory_budget import LARGEST_BYTES, global_budget, parse_memory_budget
from actpass.options.old_names import OLD_NAMES, OLD_VALUES
from actpass.options.options import Config
from actpass.options.tensor_options import BUDGET, DEFAULT, EXACT, Rank, TensorOptions
from actpass.plan.plan import SAVE
from actpass.plan.policies import POLICIES
from actpass.plan.request import AUTO
from actpass.plan.sensitivity import Sensitivities
from actpass.plan_file import ModelPlan

_ROUNDINGS = (AUTO, "stochastic", "nearest")
_WGRADS = ("fp8",)
_LEAST_CHUNK = 16


def options_for(name: str) -> dict[str, str]:
    """The one option that ``name``, of a policy, a codec or a projection, is the value of. Raises `OptionError`."""
    kind = _kind_of(name)
    if kind is None:
        _one_of("policy, codec or projection", name, (*_policies(), *QUANTIZERS, *ALL_PROJECTIONS), "")
    return {str(kind): name}


def _policies() -> tuple[str, ...]:
    """The policies that may be named: not those that come with a codec."""
    return tuple(name for name, policy in POLICIES.items() if not policy.needs_codec)


def _kind_of(name: Any) -> str | None:
    kinds = {"policy": _policies(), "codec": QUANTIZERS, "projection": ALL_PROJECTIONS}
    return next((kind for kind, names in kinds.items() if isinstance(name, str) and name in names), None)


def parse(options: Mapping[str, Any] | None, mode: str | None = None) -> Config:
    """Check ``options`` and turn them into a `Config`. Raises `OptionError`, `BudgetError` or `PlanError`."""
    given = dict(options or {})
    _known("option", given, (*_PARSERS, *_TENSOR_OPTIONS))
    own = {k: given.pop(k) for k in _TENSOR_OPTIONS if k in given}
    overrides = given.pop("module_overrides", {})
    config = Config(tensor_options=_tensor_options(own, TensorOptions(), ""), mode=mode)
    config = replace(config, module_overrides=_overrides(overrides, config.tensor_options))
    if "memory_budget" not in given:
        config = replace(config, memory_budget=global_budget.get(), follows_global_budget=True)
    config = replace(config, **{name: _PARSERS[name](name, value) for name, value in given.items()})
    if config.plan is not None:
        _nothing_to_decide(options or {})
        return replace(config, min_tensor_bytes=0, tensor_options=TensorOptions(policy=EXACT))
    _check_projections(config)
    return config


def _check_projections(config: Config) -> None:
    """Raise for options that go with a projection where there is none."""
    all_options = [config.tensor_options, *(t for _, t in config.module_overrides)]
    alone = next((t for t in all_options if t.rank is not None and t.projection is None), None)
    if alone is not None and not config.projects:
        raise OptionError(
            f"rank={alone.rank!r} goes with a projection ({', '.join(ALL_PROJECTIONS)}), not with {alone.described}, which has "
            "no rank. Name a projection: projection='haar', say, for all or in an override."
        )
    if any(t.projection_scaling != "unbiased" for t in all_options) and not config.projects:
        raise OptionError("projection_scaling='orthonormal' goes with a projection: projection='haar', say. Leave it out.")
    if any(t.ranks_from_budget for t in all_options) and config.memory_budget is None:
        raise OptionError(
            f"rank={BUDGET!r} takes the ranks from a budget, and there is none. Give one: memory_budget=0.5 (of the bytes that "
            "Inductor's default saves) or memory_budget='20GiB' (of a step's peak), or actpass.set_memory_budget(...). Without "
            "one use a rank: an int >= 1, or a float in (0, 1]."
        )
    if config.weight_gradient_format == "low_rank" and not config.projects:
        raise OptionError(
            f"weight_gradient_format='low_rank' goes with a projection ({', '.join(ALL_PROJECTIONS)}), not with "
            f"{config.tensor_options.described}, which forms them whole. Name one: projection='haar', say."
        )


def _nothing_to_decide(given: Mapping[str, Any]) -> None:
    """Raise for options that decide what a plan has decided."""
    requested = [name for name in given if name in (*_TENSOR_OPTIONS, *_DECIDED)]
    if requested:
        allowed = ", ".join(name for name in _PARSERS if name not in (*_DECIDED, "plan"))
        raise OptionError(
            f"{requested[0]}={given[requested[0]]!r} can't be given beside a plan, which has decided it. Allowed beside one: "
            f"{allowed}. Edit the plan, or leave it out."
        )


def _plan(name: str, value: Any) -> ModelPlan | None:
    if value is None or isinstance(value, ModelPlan):
        return value
    if isinstance(value, str | os.PathLike):
        return ModelPlan.load(cast(str | os.PathLike[str], value))
    raise PlanError(f"{name}={value!r} is no plan. Allowed: actpass.report(model).plan, or the path of a file that it saved.")


def _known(what: str, given: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for name in given:
        if name in OLD_NAMES and name not in allowed:
            raise OptionError(f"unknown {what} {name!r}: it is {_new_name(name, given[name])} now.")
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"unknown {what} {name!r}.{hint} Known: {', '.join(sorted(allowed))}.")


def _new_name(name: str, value: Any) -> str:
    if name != "method":
        return repr(OLD_NAMES[name])
    value = OLD_VALUES.get(value, value) if isinstance(value, str) else value
    kind = _kind_of(value)
    return OLD_NAMES[name] if kind is None else f"{kind}={value!r}"


def _tensor_options(given: Mapping[str, Any], base: TensorOptions, where: str) -> TensorOptions:
    """``base`` with what is ``given``. Whoever names a policy, a codec or a projection names all three."""
    _known(f"option{where}", given, _TENSOR_OPTIONS)
    if not {"policy", "codec", "projection"} & given.keys():
        policy, codec, projection = base.policy, base.codec, base.projection
    else:
        policy, codec, projection = _format(given, where)
    projection, wgrad = _weight_gradients(given, projection, base, where)
    rank = given.get("rank", base.rank)
    scaling = given.get("projection_scaling", base.projection_scaling)
    scaling = _one_of("projection_scaling", scaling, ("unbiased", "orthonormal"), where)
    if rank == BUDGET:
        _check_rank_from_budget(policy, projection, scaling, where)
    if scaling == "orthonormal" and projection in LEARNED:
        raise OptionError(
            f"projection_scaling='orthonormal'{where} has no meaning for {projection}, whose columns are orthonormal or "
            "weighted. Leave it out."
        )
    group_size = given.get("group_size", base.group_size)
    is_size = isinstance(group_size, int) and not isinstance(group_size, bool) and 8 <= group_size <= 4096
    if group_size is not None and not is_size:
        raise OptionError(f"group_size={group_size!r}{where} is not usable. Allowed: an int in [8, 4096], or None.")
    rotation = given.get("hadamard_rotation", base.hadamard_rotation)
    if not isinstance(rotation, bool):
        raise OptionError(f"hadamard_rotation={rotation!r}{where} is not usable. Allowed: True or False.")
    activation_rank = given.get("activation_rank", base.activation_rank)
    return TensorOptions(
        policy=policy,
        codec=codec,
        projection=projection,
        wgrad=wgrad,
        rank=None if rank is None else _rank(rank, where),
        activation_rank=_activation_rank(activation_rank, projection, "activation_rank" in given, where),
        projection_scaling=scaling,
        group_size=group_size,
        rounding=_one_of("rounding", given.get("rounding", base.rounding), _ROUNDINGS, where),
        hadamard_rotation=rotation,
    )


def _weight_gradients(
    given: Mapping[str, Any], projection: str | None, base: TensorOptions, where: str
) -> tuple[str | None, str | None]:
    """(projection, wgrad). Of the two an override names one."""
    wgrad = given.get("wgrad", base.wgrad)
    if wgrad is not None:
        _one_of("wgrad", wgrad, _WGRADS, where)
    if projection is None or wgrad is None:
        return projection, wgrad
    if "wgrad" in given and given.get("projection") is not None:
        raise OptionError(
            f"wgrad={wgrad!r}{where} can't be given with projection={projection!r}: a weight gradient is formed in one way. "
            "Leave out one of them, or name modules for it in module_overrides."
        )
    return (None, wgrad) if "wgrad" in given else (projection, None)


def _format(given: Mapping[str, Any], where: str) -> tuple[str | None, str | None, str | None]:
    """(policy, codec, projection) as they are given."""
    codec, projection, policy = given.get("codec"), given.get("projection"), given.get("policy")
    if codec is not None:
        _one_of("codec", codec, tuple(QUANTIZERS), where)
    if projection is not None:
        _one_of("projection", projection, tuple(ALL_PROJECTIONS), where)
    if policy is None:
        return None, codec, projection
    _one_of("policy", policy, _policies(), where)
    if codec is not None:
        raise OptionError(
            f"policy={policy!r}{where} can't be given with codec={codec!r}, which is the format of all that is stored. Leave "
            "out the policy, or leave out the codec."
        )
    return policy, codec, projection


def _check_rank_from_budget(policy: str | None, projection: str | None, scaling: str, where: str) -> None:
    if projection is not None and not ALL_PROJECTIONS[projection].known_variance:
        known = ", ".join(name for name, p in ALL_PROJECTIONS.items() if p.known_variance)
        raise OptionError(
            f"rank={BUDGET!r}{where} goes with projections whose error is a known function of their rank ({known}); that of "
            f"{projection} is the data's. Give {projection} a rank: a float in (0, 1], or an int."
        )
    if policy == AUTO:
        raise OptionError(
            f"rank={BUDGET!r}{where} goes with a projection ({', '.join(PROJECTIONS)}), not with policy={AUTO!r}, which meets "
            "a budget by bits and by what is recomputed. Leave out the policy, and name the projection: projection='haar', say."
        )
    if scaling != "unbiased":
        raise OptionError(
            f"rank={BUDGET!r}{where} weighs the errors of unbiased estimates. Allowed with it: projection_scaling='unbiased', "
            f"not projection_scaling={scaling!r}. For a fixed subspace give the rank: an int >= 1, or a float in (0, 1]."
        )


def _one_of(name: str, value: Any, allowed: tuple[str, ...], where: str) -> Any:
    if value in allowed:
        return value
    if isinstance(value, str) and OLD_VALUES.get(value) in allowed:
        raise OptionError(f"unknown {name} {value!r}{where}: it is {OLD_VALUES[value]!r} now.")
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise OptionError(f"unknown {name} {value!r}{where}.{hint} Known: {', '.join(allowed)}.")


def _rank(rank: Any, where: str) -> Rank:
    allowed = (
        "Allowed: an int >= 1 (directions), a float in (0, 1] (a fraction of the width N), e.g. rank=0.25, or "
        f"{BUDGET!r} (for each layer, from memory_budget)."
    )
    if rank == BUDGET:
        return BUDGET
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise OptionError(f"rank={rank!r}{where} is not a number. {allowed}")
    if isinstance(rank, int) and rank < 1:
        raise OptionError(f"rank={rank}{where} is not positive. {allowed}")
    if isinstance(rank, float) and not 0.0 < rank <= 1.0:
        raise OptionError(f"rank={rank}{where} is outside (0, 1]. {allowed}")
    return rank


def _activation_rank(rank: Any, projection: str | None, is_given: bool, where: str) -> Any:
    if rank in (None, DEFAULT):
        return rank
    if is_given and projection not in LEARNED:
        named = f"projection={projection!r}" if projection is not None else "none"
        raise OptionError(
            f"activation_rank={rank!r}{where} goes with a projection that follows the data ({', '.join(LEARNED)}), not with "
            f"{named}: what is rebuilt from any other has little of the tensor in it. Leave it out."
        )
    is_number = isinstance(rank, int | float) and not isinstance(rank, bool)
    if not is_number or not rank > 0 or (isinstance(rank, float) and rank > 1.0):
        raise OptionError(
            f"activation_rank={rank!r}{where} is not usable. Allowed: an int >= 1 (directions), a float in (0, 1] (a fraction "
            "of the width N), None (such tensors stay exact), or 'default' (the projection's own)."
        )
    return rank


def _overrides(value: Any, base: TensorOptions) -> tuple[tuple[str, TensorOptions], ...]:
    if not isinstance(value, Mapping):
        raise OptionError(
            f"module_overrides={value!r} is not a mapping. Allowed: {{'module.path.pattern': 'save' | a codec, projection or "
            "policy | {'projection': ..., 'rank': ...}}."
        )
    overrides = cast(Mapping[Any, Any], value)
    return tuple((str(pattern), _override(pattern, v, base)) for pattern, v in overrides.items())


def _override(pattern: Any, value: Any, base: TensorOptions) -> TensorOptions:
    where = f" in module_overrides[{pattern!r}]"
    if value == SAVE:
        return replace(base, policy=EXACT, codec=None, projection=None, wgrad=None, forced=True)
    if isinstance(value, str):
        kind = _kind_of(value)
        if kind is None:
            _one_of("override", value, (SAVE, *_policies(), *QUANTIZERS, *ALL_PROJECTIONS), where)
        value = {str(kind): value}
    if isinstance(value, Mapping):
        return replace(_tensor_options(cast(Mapping[str, Any], value), base, where), forced=True)
    raise OptionError(
        f"{value!r}{where} is not usable. Allowed: 'save', the name of a codec, a projection or a policy, or a dict of options."
    )


def _integer(minimum: int, maximum: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise OptionError(f"{name}={value!r} is not usable. Allowed: an int in [{minimum}, {maximum}].")
        return value

    return check


def _choice(*allowed: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        return _one_of(name, value, allowed, "")

    return check


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r} is not usable. Allowed: True or False.")
    return value


def _chunked_loss(name: str, value: Any) -> bool | int:
    if isinstance(value, bool) or (isinstance(value, int) and value >= _LEAST_CHUNK):
        return value
    raise OptionError(f"{name}={value!r} is not usable. Allowed: True, False, or the rows of a chunk, {_LEAST_CHUNK} or more.")


def _sensitivities(name: str, value: Any) -> Sensitivities | None:
    if value is None or isinstance(value, Sensitivities):
        return value
    if isinstance(value, str | os.PathLike):
        return Sensitivities.load(os.fspath(value))
    raise OptionError(f"{name}={value!r} is not usable. Allowed: what actpass.calibrate returned, or the path of its file.")


def _mode(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise OptionError(f"{name}={value!r} is not usable. Allowed: a torch.compile mode, e.g. 'max-autotune'.")
    return value


def _inductor_options(name: str, value: Any) -> tuple[tuple[str, Any], ...]:
    if not isinstance(value, Mapping):
        raise OptionError(f"{name}={value!r} is not a mapping. Allowed: Inductor's own options, e.g. {{'cpp_wrapper': True}}.")
    return tuple(sorted(cast(Mapping[str, Any], value).items()))


_TENSOR_OPTIONS = (
    "policy", "codec", "projection", "wgrad", "rank", "activation_rank", "projection_scaling", "group_size", "rounding",
    "hadamard_rotation",
)  # fmt: skip
_PARSERS: dict[str, Any] = {
    "module_overrides": None,
    "memory_budget": parse_memory_budget,
    "refresh_interval": _integer(1, 2**31),
    "resample": _choice(AUTO, "every_step", "every_refresh"),
    "weight_gradient_format": _choice("dense", "low_rank"),
    "optimizer_state_bytes": _integer(0, LARGEST_BYTES),
    "seed": _integer(0, 2**63 - 1),
    "skip_unprofitable": _boolean,
    "min_tensor_bytes": _integer(0, 2**62),
    "chunked_loss": _chunked_loss,
    "defer_logits": _boolean,
    "infer_masks": _boolean,
    "sensitivities": _sensitivities,
    "mode": _mode,
    "inductor_options": _inductor_options,
    "plan": _plan,
    "fallback": _choice("error", "warn"),
}
_DECIDED = (
    "weight_gradient_format",
    "module_overrides",
    "skip_unprofitable",
    "min_tensor_bytes",
    "chunked_loss",
    "sensitivities",
)
"""What a plan decides, beside the tensor options."""
