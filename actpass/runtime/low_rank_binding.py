"""How a compiled region's coefficients become the gradients of parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from actpass.codecs import LEARNED
from actpass.codecs.generator import step_seed
from actpass.errors import ActpassWarning
from actpass.low_rank_gradient import Basis, Coefficients, LowRankGradient
from actpass.options import Config
from actpass.runtime.data_parallel import note_buckets
from actpass.runtime.step_counter import STEP_COUNTER
from actpass.torch_compat import FakeTensor, active_ddp


@dataclass(frozen=True, slots=True)
class Factor:
    """A parameter whose gradient a region leaves in its factors. position: in the region's arguments. shape: of the
    coefficients. left: see `actpass.low_rank_gradient.LowRankGradient`. method, width, rank, unbiased: of the basis. state:
    which of the region's learned subspaces it is built from, None: none."""

    position: int
    shape: tuple[int, ...]
    left: bool
    projection: str
    width: int
    rank: int
    unbiased: bool
    state: int | None


def factors_of(plan: Mapping[str, Any], paths: Sequence[str | None]) -> tuple[Factor, ...]:
    """Those of a plan (as its `to_dict` has it). paths: of the region's inputs."""
    projected = [d for d in plan["decisions"] if d["rank"] is not None]
    learned = [d for d in projected if d["projection"] in LEARNED]
    found: list[Factor] = []
    for g in plan["low_rank_gradients"]:
        d = next(d for d in projected if d["site"] == g["site"] and g["parameter"] in d["parameters"] and d["matmuls"])
        state = learned.index(d) if d in learned else None
        position, unbiased = paths.index(g["parameter"]), d["projection_scaling"] == "unbiased"
        found.append(
            Factor(position, tuple(g["shape"]), g["side"] == "left", d["projection"], d["width"], d["rank"], unbiased, state)
        )
    return tuple(found)


def start() -> None:
    """Let optimizers that don't know low-rank gradients get dense ones (once a process)."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before_step)


_hook: Any = None
_told: set[type] = set()


def clear() -> None:
    """Forget which optimizers were told."""
    _told.clear()


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch's own go by operators, which see the dense gradient one parameter at a time. Others may read memory themselves, as
    kernels of a library do, or compile their step, and Dynamo can't trace a tensor of a kind of its own."""
    kind = type(optimizer)
    if getattr(optimizer, "takes_low_rank_gradients", False) or kind.step.__module__.startswith("torch.optim."):
        return None
    _give_dense(optimizer)
    own, *rest = args
    closure = rest[0] if rest else kwargs.get("closure")
    if closure is None:
        return None

    def and_dense() -> Any:
        loss = closure()
        _give_dense(optimizer)
        return loss

    return (own, and_dense, *rest[1:]) if rest else args, kwargs if rest else {**kwargs, "closure": and_dense}


def _give_dense(optimizer: torch.optim.Optimizer) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"] if isinstance(p.grad, LowRankGradient)]
    for parameter in parameters:
        parameter.grad = parameter.grad.dense()
    kind = type(optimizer)
    if parameters and kind not in _told:
        _told.add(kind)
        warnings.warn(
            f"{kind.__module__}.{kind.__name__} does not know low-rank gradients: all of them are made dense before its step, "
            "which is right, but takes their memory. Use an optimizer of actpass.optim or torch.optim; one of your own that "
            "takes them sets takes_low_rank_gradients = True.",
            ActpassWarning,
            stacklevel=4,
        )


def with_coefficients(
    fn: Callable[..., Any], factors: Sequence[Factor], count: int, config: Config, *, copies: bool
) -> Callable[..., Any]:
    """``fn(*inputs, *state)`` for a compiled one that also takes the places of coefficients, last. count: of the model's own
    inputs; the state begins with the seeds' keys (and has points and subspaces behind two of them). copies: whether ``fn``
    keeps the memory of what it returns, as CUDA graphs do."""

    start()
    kept: dict[Any, Basis] = {}  # seeded ones, while their draw stays: an optimizer has made their matrices

    def run(*args: Any) -> Any:
        if any(isinstance(a, FakeTensor) for a in args[:count]):
            return fn(*args, *(args[f.position].new_zeros(()).expand(f.shape) for f in factors))
        if (ddp := active_ddp()) is not None:
            note_buckets(ddp)
        step, state = STEP_COUNTER.steps, args[count:]
        bases: dict[Any, Basis] = {}
        places: list[Any] = []
        for f in factors:
            at = 0 if f.state is None else 1
            draw = step_seed(config.seed, config.draw_at(step) if f.state is None else config.learned_draw_at(step))
            key = (f.projection, f.width, f.rank, f.unbiased, f.state, draw)
            if key not in bases:
                subspace = None if f.state is None else state[3 + f.state]
                new = Basis(f.projection, f.width, f.rank, state[at], draw, f.unbiased, subspace)
                bases[key] = kept.get(key, new)
            places.append(Coefficients.apply(args[f.position], bases[key], f.left, f.shape, copies))
        kept.clear()
        kept.update((key, basis) for key, basis in bases.items() if basis.state is None)
        return fn(*args, *places)

    return run
