"""`options=` of ``torch.compile(model, backend="actcomp", options=...)`` -> a frozen `Config`."""

from __future__ import annotations

import difflib
import fnmatch
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from actpass.codecs import ALL_PROJECTIONS, LEARNED, PROJECTIONS, QUANTIZERS
from actpass.codecs.projections.learned import state_shape
from actpass.errors import BudgetError, OptionError, PlanError
from actpass.plan.policies import POLICIES
from actpass.plan.sensitivity import Calibration
from actpass.plan_file import ModelPlan

BUDGET = "budget"
"""The rank that asks for ranks layer by layer, from what ``memory_budget`` leaves (`actpass.plan.rank_allocation`)."""
Rank = int | float | Literal["budget"]
Scale = Literal["unbiased", "none"]
AUTO = "auto"
ROUNDINGS = (AUTO, "stochastic", "nearest")
COMPLEMENTS = (AUTO, "fresh", "frozen")
GRADIENTS = ("dense", "low_rank")
FALLBACKS = ("error", "warn")
KEEP = "keep"
EXACT = "exact"
DEFAULT_RANK = 0.25
DEFAULT = "default"
AUTO_PROJECTION = "haar"
"""What ``method="auto"`` projects with when it is given a rank: the least variance of all without statistics."""


def methods() -> tuple[str, ...]:
    """Everything that ``method`` may be: a policy, a projection or a codec."""
    return (*(name for name, policy in POLICIES.items() if not policy.needs_codec), *ALL_PROJECTIONS, *QUANTIZERS)


@dataclass(frozen=True, slots=True)
class Treatment:
    """What is wanted for a layer.

    method: one of `methods`. rank: an int R in [1, N], or a float in (0, 1], a fraction of the width N (at least 1
    direction), or `BUDGET`. nonlinear_rank: of a learned projection, the rank at which tensors with other uses than weight
    gradients are stored and decoded; None: they are not; `DEFAULT`: the method's own. scale: ``unbiased`` (E[P P^T] = I) or
    ``none`` (E[P^T P] = I, for an optimizer in the subspace). quantize: with a projection, the low-bit form of all that is
    stored, its payloads with it. group: elements that share a scale (None: the form's own choice). rounding, rotate: of
    low-bit forms. named: whether an override asks for it by module.
    """

    method: str = AUTO
    rank: Rank | None = None
    nonlinear_rank: int | float | Literal["default"] | None = DEFAULT
    scale: Scale = "unbiased"
    quantize: str | None = None
    group: int | None = None
    rounding: str = AUTO
    rotate: bool = False
    named: bool = False

    @property
    def projection(self) -> str | None:
        """How weight gradients are formed; None: exactly."""
        if self.method == AUTO:
            return None if self.rank is None else AUTO_PROJECTION
        return self.method if self.method in ALL_PROJECTIONS else None

    @property
    def policy(self) -> str:
        """Who says in which form saved tensors are stored."""
        return self.method if self.method in POLICIES else EXACT if self.codec is None else "uniform"

    @property
    def codec(self) -> str | None:
        """In which form saved tensors are stored; None: as they are, ``auto``: the policy chooses."""
        if self.method in POLICIES and self.method != EXACT:
            return AUTO
        return self.method if self.method in QUANTIZERS else self.quantize

    @property
    def ranks_from_budget(self) -> bool:
        return self.rank == BUDGET and self.projection is not None

    @property
    def draws(self) -> bool:
        """Whether it takes random numbers."""
        return self.projection is not None or (self.codec is not None and self.rounding != "nearest")

    @property
    def decodes(self) -> bool:
        """Whether tensors with other uses than weight gradients are stored as projections."""
        return self._nonlinear_rank is not None

    @property
    def _nonlinear_rank(self) -> int | float | None:
        if self.method not in LEARNED:
            return None
        return LEARNED[self.method].default_nonlinear_rank if self.nonlinear_rank == DEFAULT else self.nonlinear_rank

    def rank_of(self, width: int) -> int:
        """The rank in directions for a feature axis of ``width``; `OptionError` if an integer rank exceeds it."""
        rank = self.rank
        if rank is None:
            rank = LEARNED[self.method].default_rank if self.method in LEARNED else DEFAULT_RANK
        assert rank != BUDGET, "ranks from the budget are chosen for all layers together"
        return _directions("rank", rank, width)

    def nonlinear_rank_of(self, width: int) -> int:
        """As `rank_of`, for what is decoded."""
        rank = self._nonlinear_rank
        assert rank is not None
        return _directions("nonlinear_rank", rank, width)

    def relative_variance(self, width: int, rank: int) -> float:
        """Of a weight gradient's estimate at ``rank``; 0 without a projection. Of a learned one, if the data's energy is in no
        direction that it follows."""
        return ALL_PROJECTIONS[self.projection].relative_variance(width, rank) if self.projection is not None else 0.0

    def state_bytes(self, width: int, rank: int) -> int:
        """Of a learned subspace, and of the sketch that moves it."""
        if self.method not in LEARNED:
            return 0
        rows, columns = state_shape(LEARNED[self.method], width, rank)
        return 2 * 4 * rows * columns

    def bytes_of_direction(self, rows: int, element_size: int) -> int:
        """What one direction of rank adds to a projection of ``rows`` rows as it is stored, rounded up."""
        if self.quantize is None:
            return rows * element_size
        form = QUANTIZERS[self.quantize]
        group = self.group or form.group
        return -(-rows * (form.bits * group + 16) // (8 * group))


def _directions(name: str, rank: Any, width: int) -> int:
    if isinstance(rank, float):
        return max(1, round(rank * width))
    if rank > width:
        raise OptionError(
            f"{name}={rank} is larger than the width {width} of a compressed tensor. Allowed: an int in [1, N], or "
            f"a float in (0, 1] (a fraction of N). Use {name}=0.25, say, or an override for the layer."
        )
    return rank


@dataclass(frozen=True, slots=True)
class Config:
    """Everything the user can set, checked. Picklable and comparable: it is part of the compile cache's key.

    memory_budget: a fraction of saved bytes (float), bytes of peak (int), or None. follows_global_budget: whether the options
    named none, so that it is the global one's. calibration: what a budget weighs errors by. plan: what to follow in place of
    a policy. gradients: one of `GRADIENTS`. tails: of the learned subspaces that there are when a region is compiled, by the
    path of their parameter. complement: one of `COMPLEMENTS`. fallback: one of `FALLBACKS`. optimizer_state_bytes: of an
    optimizer that is not known; None: AdamW's.
    """

    treatment: Treatment = Treatment()
    overrides: tuple[tuple[str, Treatment], ...] = ()
    memory_budget: float | int | None = None
    follows_global_budget: bool = False
    refresh_interval: int | None = None
    complement: str = AUTO
    seed: int = 0
    profitable_only: bool = True
    smallest: int = 16384
    chunk_loss: bool | int = True
    defer_logits: bool = True
    calibration: Calibration | None = None
    mode: str | None = None
    inductor: tuple[tuple[str, Any], ...] = ()
    plan: ModelPlan | None = None
    tails: tuple[tuple[str, float], ...] = ()
    gradients: str = "dense"
    fallback: str = "error"
    optimizer_state_bytes: int | None = None

    @property
    def defers_logits(self) -> bool:
        """Whether logits that are returned may be computed when they are read: where the loss may be formed in pieces."""
        chunks = bool(self.chunk_loss) and self.memory_budget != 1.0
        return self.defer_logits and (chunks if self.plan is None else any(r.chunk_rows for r in self.plan.regions))

    @property
    def factors_gradients(self) -> bool:
        """Whether weight gradients stay in their factors where they can."""
        return any(r.factored for r in self.plan.regions) if self.plan is not None else self.gradients == "low_rank"

    @property
    def draws_afresh(self) -> bool:
        """Whether the random part of a learned basis is another at each step. Moments of coefficients want one that stays."""
        return self.complement == "fresh" or (self.complement == AUTO and not self.factors_gradients)

    @property
    def needs_seed(self) -> bool:
        """Whether any tensor may need random numbers, and so whether the region takes the step's seed as an input."""
        if self.plan is not None:
            return self.plan.seeded
        return any(t.draws for t in (self.treatment, *(t for _, t in self.overrides)))

    @property
    def ranks_from_budget(self) -> bool:
        """Whether any rank is chosen from the budget. Then the ranks meet it, and nothing is run again."""
        return any(t.ranks_from_budget for t in (self.treatment, *(t for _, t in self.overrides)))

    @property
    def searches(self) -> bool:
        """Whether what is stored, and how, is searched for within a budget."""
        return self.plan is None and self.memory_budget not in (None, 1.0)

    @property
    def learned(self) -> tuple[str, ...]:
        """The learned projections that any tensor may get."""
        if self.plan is not None:
            return tuple(sorted({d.method for r in self.plan.regions for d in r.projections} & set(LEARNED)))
        return tuple(sorted({t.method for t in (self.treatment, *(t for _, t in self.overrides))} & set(LEARNED)))

    @property
    def projects(self) -> bool:
        """Whether any weight gradient may be formed through a projection."""
        return any(t.projection is not None for t in (self.treatment, *(t for _, t in self.overrides)))

    @property
    def decodes(self) -> bool:
        """Whether any tensor may be stored as a projection for other uses than weight gradients."""
        return any(t.decodes for t in (self.treatment, *(t for _, t in self.overrides)))

    @property
    def recomputes(self) -> bool:
        """Whether a policy may have something run again without a budget."""
        return any(POLICIES[t.policy].recomputes for t in (self.treatment, *(t for _, t in self.overrides)))

    @property
    def stores_exactly(self) -> bool:
        """Whether all that is stored is stored as it is."""
        if self.plan is not None:
            return not any(r.coded or r.projections for r in self.plan.regions)
        return all(t.codec is None and t.projection is None for t in (self.treatment, *(t for _, t in self.overrides)))

    def draw_at(self, step: int) -> int:
        """Which draw of random numbers an optimizer step sees: a new one with each seeded basis."""
        return step // (self.refresh_interval or 1)

    def sketches_at(self, method: str, step: int) -> bool:
        """Whether a learned subspace is shown a sketch in an optimizer step."""
        return step % (self.refresh_interval or LEARNED[method].refresh_interval) == 0

    def learned_draw_at(self, step: int) -> int:
        """As `draw_at`, for the random part of learned bases (the complement of `prac`, which directions `sampled` has): drawn
        at each step, or, if it is frozen, as long as they stay, which is until the step after a sketch."""
        if self.draws_afresh:
            return step
        interval = self.refresh_interval or min(
            (LEARNED[m].refresh_interval for m in self.learned if LEARNED[m].draws), default=1
        )
        return (step + interval - 1) // interval

    def treatment_of(self, paths: tuple[str, ...]) -> tuple[Treatment, str | None]:
        """The treatment for a parameter known under ``paths``, and the override pattern that decided, if any.

        The last matching pattern wins, as later rules refine earlier ones.
        """
        for pattern, treatment in reversed(self.overrides):
            if any(matches(pattern, path) for path in paths):
                return treatment, pattern
        return self.treatment, None

    def treatment_of_any(self, paths: tuple[str, ...]) -> Treatment:
        return self.treatment_of(paths)[0]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def exactly(config: Config) -> Config:
    """``config`` with everything stored as it is, and no budget."""
    return replace(config, treatment=Treatment("exact"), overrides=(), memory_budget=None, plan=None)


def matches(pattern: str, path: str) -> bool:
    """Whether a module-path pattern names ``path``, a module above it, or the tail of either.

    ``layers.*.mlp`` matches ``model.layers.3.mlp.gate_proj``; ``lm_head`` matches ``model.lm_head``.
    """
    return any(fnmatch.fnmatchcase(path, p) for p in (pattern, f"{pattern}.*", f"*.{pattern}", f"*.{pattern}.*"))


def parse(options: Mapping[str, Any] | None, mode: str | None = None) -> Config:
    """Check ``options`` and turn them into a `Config`. Raises `OptionError` or `BudgetError`."""
    given = dict(options or {})
    _known("option", given, (*_PARSERS, *_TREATMENT))
    treatment = _treatment({k: given.pop(k) for k in _TREATMENT if k in given}, Treatment(), "")
    config = Config(treatment=treatment, mode=mode)
    if "memory_budget" not in given:
        config = replace(config, memory_budget=global_budget.get(), follows_global_budget=True)
    for name, value in given.items():
        if name == "overrides":
            config = replace(config, overrides=_overrides(value, treatment))
        else:
            config = replace(config, **{name: _PARSERS[name](name, value)})
    if config.plan is None:
        _check_ranks_from_budget(config)
        if config.gradients == "low_rank" and not config.projects:
            raise OptionError(
                f"gradients='low_rank' goes with a projection ({', '.join(ALL_PROJECTIONS)}), not with "
                f"method={config.treatment.method!r}, which forms them whole. Name one: method='haar', say, or with "
                "method='auto' a rank."
            )
        return config
    _nothing_to_decide(options or {})
    return replace(config, smallest=0, treatment=Treatment("exact"))


def _nothing_to_decide(given: Mapping[str, Any]) -> None:
    """Raise for options that decide what a plan has decided."""
    asked = [name for name in given if name in (*_TREATMENT, *_DECIDED)]
    if asked:
        allowed = ", ".join(name for name in _PARSERS if name not in (*_DECIDED, "plan"))
        raise OptionError(
            f"{asked[0]}={given[asked[0]]!r} can't be given beside a plan, which has decided it. Allowed beside one: "
            f"{allowed}. Edit the plan, or leave it out."
        )


def _plan(name: str, value: Any) -> ModelPlan | None:
    if value is None or isinstance(value, ModelPlan):
        return value
    if isinstance(value, str | os.PathLike):
        return ModelPlan.load(value)
    raise PlanError(f"{name}={value!r} is no plan. Allowed: actpass.report(model).plan, or the path of a file that it saved.")


def _check_ranks_from_budget(config: Config) -> None:
    asked = [t for t in (config.treatment, *(t for _, t in config.overrides)) if t.rank == BUDGET]
    if not asked:
        return
    if not config.ranks_from_budget:
        raise OptionError(
            f"rank={BUDGET!r} goes with a projection ({', '.join(PROJECTIONS)}), not with method={asked[0].method!r}, which "
            "has no rank. Name a projection: method='haar', say, for all or in an override."
        )
    if config.memory_budget is None:
        raise OptionError(
            f"rank={BUDGET!r} takes the ranks from a budget, and there is none. Give one: memory_budget=0.5 (of the bytes that "
            "Inductor's default saves) or memory_budget='20GiB' (of a step's peak), or actpass.set_memory_budget(...). Without "
            "one use a rank: an int >= 1, or a float in (0, 1]."
        )


def _known(what: str, given: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"unknown {what} {name!r}.{hint} Known: {', '.join(sorted(allowed))}.")


def _treatment(given: Mapping[str, Any], base: Treatment, where: str) -> Treatment:
    _known(f"option{where}", given, _TREATMENT)
    method = _one_of("method", given.get("method", base.method), methods(), where)
    quantize = given.get("quantize", base.quantize)
    if quantize is not None:
        quantize = _one_of("quantize", quantize, tuple(QUANTIZERS), where)
    if given.get("quantize") is not None and method not in ALL_PROJECTIONS:
        raise OptionError(
            f"quantize={quantize!r}{where} goes with a projection ({', '.join(ALL_PROJECTIONS)}), not with method={method!r}. "
            f"Use method={quantize!r} for low-bit forms alone."
        )
    rank = given.get("rank", base.rank)
    scale = _one_of("scale", given.get("scale", base.scale), ("unbiased", "none"), where)
    if rank == BUDGET:
        _check_rank_from_budget(method, scale, where)
    if scale == "none" and method in LEARNED:
        raise OptionError(
            f"scale='none'{where} has no meaning for {method}, whose columns are orthonormal or weighted. Leave it out."
        )
    group = given.get("group", base.group)
    if group is not None and (isinstance(group, bool) or not isinstance(group, int) or not 8 <= group <= 4096):
        raise OptionError(f"group={group!r}{where} is not usable. Allowed: an int in [8, 4096], or None.")
    rotate = given.get("rotate", base.rotate)
    if not isinstance(rotate, bool):
        raise OptionError(f"rotate={rotate!r}{where} is not usable. Allowed: True or False.")
    return Treatment(
        method,
        None if rank is None else _rank(rank, where),
        _nonlinear_rank(given.get("nonlinear_rank", base.nonlinear_rank), method, "nonlinear_rank" in given, where),
        scale,
        quantize if method in ALL_PROJECTIONS else None,
        group,
        _one_of("rounding", given.get("rounding", base.rounding), ROUNDINGS, where),
        rotate,
    )


def _check_rank_from_budget(method: str, scale: str, where: str) -> None:
    if method in ALL_PROJECTIONS and not ALL_PROJECTIONS[method].known_variance:
        known = ", ".join(name for name, p in ALL_PROJECTIONS.items() if p.known_variance)
        raise OptionError(
            f"rank={BUDGET!r}{where} goes with projections whose error is a known function of their rank ({known}); that of "
            f"{method} is the data's. Give {method} a rank: a float in (0, 1], or an int."
        )
    if method == AUTO:
        raise OptionError(
            f"rank={BUDGET!r}{where} goes with a projection ({', '.join(PROJECTIONS)}), not with method={AUTO!r}, which meets "
            f"a budget by bits and by what runs again. Name the projection: method={AUTO_PROJECTION!r}, say."
        )
    if scale != "unbiased":
        raise OptionError(
            f"rank={BUDGET!r}{where} weighs the errors of unbiased estimates. Allowed with it: scale='unbiased', not "
            f"scale={scale!r}. For a fixed subspace give the rank: an int >= 1, or a float in (0, 1]."
        )


def _one_of(name: str, value: Any, allowed: tuple[str, ...], where: str) -> Any:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise OptionError(f"unknown {name} {value!r}{where}.{hint} Known: {', '.join(allowed)}.")
    return value


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


def _nonlinear_rank(rank: Any, method: str, is_given: bool, where: str) -> Any:
    if rank in (None, DEFAULT):
        return rank
    if is_given and method not in LEARNED:
        raise OptionError(
            f"nonlinear_rank={rank!r}{where} goes with a projection that follows the data ({', '.join(LEARNED)}), not with "
            f"method={method!r}: what is rebuilt from any other has little of the tensor in it. Leave it out."
        )
    is_number = isinstance(rank, int | float) and not isinstance(rank, bool)
    if not is_number or not rank > 0 or (isinstance(rank, float) and rank > 1.0):
        raise OptionError(
            f"nonlinear_rank={rank!r}{where} is not usable. Allowed: an int >= 1 (directions), a float in (0, 1] (a fraction "
            "of the width N), None (such tensors stay exact), or 'default' (the method's own)."
        )
    return rank


def _overrides(value: Any, base: Treatment) -> tuple[tuple[str, Treatment], ...]:
    if not isinstance(value, Mapping):
        raise OptionError(
            f"overrides={value!r} is not a mapping. Allowed: "
            "{'module.path.pattern': 'keep' | method | {'method': ..., 'rank': ...}}."
        )
    return tuple((str(pattern), _override(pattern, v, base)) for pattern, v in value.items())


def _override(pattern: Any, value: Any, base: Treatment) -> Treatment:
    where = f" in overrides[{pattern!r}]"
    if value == KEEP:
        return replace(base, method="exact", named=True)
    if isinstance(value, str):
        return replace(_treatment({"method": value}, base, where), named=True)
    if isinstance(value, Mapping):
        return replace(_treatment(value, base, where), named=True)
    raise OptionError(f"{value!r}{where} is not usable. Allowed: 'keep', a method name, or a dict with method and rank.")


def _integer(minimum: int, maximum: int):
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise OptionError(f"{name}={value!r} is not usable. Allowed: an int in [{minimum}, {maximum}].")
        return value

    return check


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r} is not usable. Allowed: True or False.")
    return value


def _chunk_loss(name: str, value: Any) -> bool | int:
    if isinstance(value, bool) or (isinstance(value, int) and value >= _LEAST_PIECE):
        return value
    raise OptionError(f"{name}={value!r} is not usable. Allowed: True, False, or the rows of a piece, {_LEAST_PIECE} or more.")


def _calibration(name: str, value: Any) -> Calibration | None:
    if value is None or isinstance(value, Calibration):
        return value
    if isinstance(value, str | os.PathLike):
        return Calibration.load(os.fspath(value))
    raise OptionError(f"{name}={value!r} is not usable. Allowed: what actpass.calibrate returned, or the path of its file.")


def _mode(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise OptionError(f"{name}={value!r} is not usable. Allowed: a torch.compile mode, e.g. 'max-autotune'.")
    return value


def _inductor(name: str, value: Any) -> tuple[tuple[str, Any], ...]:
    if not isinstance(value, Mapping):
        raise OptionError(f"{name}={value!r} is not a mapping. Allowed: Inductor's own options, e.g. {{'cpp_wrapper': True}}.")
    return tuple(sorted(value.items()))


_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b\s*", re.IGNORECASE)
_FACTOR = {"": 1, **{f"{u}{i}": (1024 if i else 1000) ** (n + 1) for n, u in enumerate("kmgt") for i in ("", "i")}}
_LARGEST = 2**60


def memory_budget(name: str, value: Any) -> float | int | None:
    """A budget, checked. Returns a float (a fraction of saved bytes) or an int (bytes of peak). Raises `BudgetError`."""
    allowed = (
        "Allowed: a float in [0, 1], the fraction of the bytes that Inductor's default would save for backward (1.0: "
        "Inductor's own cut); an int > 1 or a string like '20GiB' or '800 MB', the peak of a step in bytes with parameters and "
        "optimizer state counted in; 'auto', what the device has free."
    )
    if value is None:
        return None
    if isinstance(value, str):
        if value.strip().lower() == AUTO:
            return _free_memory(name)
        match = _BYTES.fullmatch(value)
        if match is None:
            raise BudgetError(f"{name}={value!r} is not a number of bytes. {allowed}")
        return _checked_bytes(name, value, int(float(match[1]) * _FACTOR[(match[2] or "").lower()]), allowed)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BudgetError(f"{name}={value!r} is not a number. {allowed}")
    if isinstance(value, int) and value > 1:
        return _checked_bytes(name, value, value, allowed)
    if math.isnan(value) or not 0.0 <= value <= 1.0:
        raise BudgetError(f"{name}={value!r} is outside [0, 1]. {allowed}")
    return float(value)


def _checked_bytes(name: str, asked: Any, nbytes: int, allowed: str) -> int:
    """``nbytes``, which ``asked`` says. What is written with a unit is never a fraction: "0GB" and "1 B" are too few bytes."""
    if nbytes <= 1:
        raise BudgetError(f"{name}={asked!r} is {nbytes} bytes, which nothing fits in. {allowed}")
    if nbytes > _LARGEST:
        raise BudgetError(f"{name}={asked!r} is more than any machine has. {allowed}")
    return nbytes


class GlobalBudget:
    """The budget of every region whose options name none. Read when a region is compiled, and ``"auto"`` then."""

    def __init__(self) -> None:
        self.asked: Any = None

    def set(self, asked: Any) -> Any:
        """Check ``asked`` and put it in force; returns what was before. Raises `BudgetError`, and changes nothing then."""
        memory_budget("memory_budget", asked)
        self.asked, before = asked, self.asked
        return before

    def get(self) -> float | int | None:
        return memory_budget("memory_budget", self.asked)


global_budget = GlobalBudget()
_LEFT_FREE = 0.05
"""Of a device's memory, with ``auto``: for the allocator's own gaps and for libraries."""


_GRID = 32
"""Of a device's memory, with ``auto``: what is free is rounded down to a multiple of this part of it."""


def _free_memory(name: str) -> int:
    """What this process may use of the current CUDA device: what it has allocated and what is free, less a margin, rounded
    down so that a few megabytes more or less give the same plan: on all ranks, and in the next process, which then finds the
    compiled graphs.

    Ranks do not agree on one number. The smallest would take a collective, which hangs where ranks compile different regions,
    and the first rank's does not fit a smaller card. Where equal cards fall on two sides of a step of the grid, or cards
    differ, plans may differ; `actpass.runtime.plan_agreement` says so, and a number of bytes is the cure.
    """
    if not torch.cuda.is_available():
        raise BudgetError(
            f"{name}='auto' takes what the CUDA device has free, and there is none. Give the bytes: {name}='20GiB', say."
        )
    free, total = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    usable = int(free + unused + torch.cuda.memory_allocated() - _LEFT_FREE * total)
    step = total // _GRID
    return usable // step * step


_LEAST_PIECE = 16
_TREATMENT = ("method", "rank", "nonlinear_rank", "scale", "quantize", "group", "rounding", "rotate")
_PARSERS = {
    "overrides": None,
    "memory_budget": memory_budget,
    "refresh_interval": _integer(1, 2**31),
    "complement": lambda name, value: _one_of(name, value, COMPLEMENTS, ""),
    "gradients": lambda name, value: _one_of(name, value, GRADIENTS, ""),
    "optimizer_state_bytes": _integer(0, _LARGEST),
    "seed": _integer(0, 2**63 - 1),
    "profitable_only": _boolean,
    "smallest": _integer(0, 2**62),
    "chunk_loss": _chunk_loss,
    "defer_logits": _boolean,
    "calibration": _calibration,
    "mode": _mode,
    "inductor": _inductor,
    "plan": _plan,
    "fallback": lambda name, value: _one_of(name, value, FALLBACKS, ""),
}
_DECIDED = ("gradients", "overrides", "profitable_only", "smallest", "chunk_loss", "calibration")
"""What a plan decides, beside treatments."""
