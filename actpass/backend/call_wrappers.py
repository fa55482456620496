"""A compiled region as Dynamo calls it: with the model's own inputs, and without what it returns beside its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from actpass.backend.inductor_options import has_cuda_graphs
from actpass.backend.state_inputs import RegionRequest, StateInputs
from actpass.codecs.generator import region_keys, round_keys, step_seed
from actpass.options import Config
from actpass.runtime import low_rank_binding as factors
from actpass.runtime import regions, subspaces
from actpass.runtime import step_counter as clock
from actpass.torch_compat import FakeTensor


def given_state(fn: Callable[..., Any], region: regions.Region, request: RegionRequest) -> Callable[..., Any]:
    """``fn`` as Dynamo calls it: with the model's own inputs, and without what it returns beside the model's results."""
    config, extra, plain, device = region.config, request.extra, request.inputs, request.device
    if not config.needs_seed:
        return plain_call(fn, region)
    planned = StateInputs.of(region.record.plan, plain.paths)
    if planned.sites and planned.sites != extra.sites:
        raise AssertionError(f"{len(extra.sites)} subspaces are given to a region that projects onto {len(planned.sites)}")
    if extra and not planned:
        return _with_seed(_without(fn, extra, device), region, config, device)
    if planned.factors != extra.factors:
        raise AssertionError(
            f"{len(extra.factors)} low-rank gradients are asked of a region that returns {len(planned.factors)}"
        )
    copies = device.type == "cuda" and has_cuda_graphs(config)
    if extra.factors:
        fn = factors.with_coefficients(fn, extra.factors, len(plain.paths), config, copies=copies)
    if extra.sites:
        fn = subspaces.WithSubspaces(
            fn=fn, sites=extra.sites, config=config, device=device, copies=copies, written=plain.written
        )
        return _with_subspaces(fn, region, config, device)
    return _with_seed(fn, region, config, device)


def _with_subspaces(
    run: Callable[..., Any], region: regions.Region, config: Config, device: torch.device
) -> Callable[..., Any]:
    clock.start()

    def call(*args: Any) -> Any:
        region.note(args)
        now = _now(args)
        learned = round_keys(step_seed(config.seed, config.learned_draw_at(now.step)), device)
        return run(args, [_keys(now, config, device), learned], now.step)

    return call


def _without(fn: Callable[..., Any], extra: StateInputs, device: torch.device) -> Callable[..., Any]:
    """A region that takes more, but was left to Inductor after all."""
    states = [torch.zeros(site.shape, dtype=torch.float32, device=device) for site in extra.sites]

    def run(*args: Any) -> Any:
        *first, key = args
        places = [args[f.position].new_zeros(()).expand(f.shape) for f in extra.factors]
        learned = [key, torch.zeros(2, dtype=torch.float32, device=device), *states] if states else []
        results = fn(*first, key, *learned, *places)
        return results[: len(results) - len(states)]

    return run


def _with_seed(fn: Callable[..., Any], region: regions.Region, config: Config, device: torch.device) -> Callable[..., Any]:
    clock.start()

    def run(*args: Any) -> Any:
        region.note(args)
        return fn(*args, _keys(_now(args), config, device))

    return run


def _now(args: Sequence[Any]) -> clock.Moment:
    """When a call runs. One that only asks for shapes (DDP's graph splitting, where it compiles) is none."""
    if any(isinstance(a, FakeTensor) for a in args):
        return clock.Moment(0, 0)
    return clock.STEP_COUNTER.read()


def _keys(now: clock.Moment, config: Config, device: torch.device) -> torch.Tensor:
    """What a call draws from: a basis stays for as many steps as the user asks, rounding is another at each call."""
    rounding = step_seed(step_seed(config.seed, now.step), now.call)
    return region_keys(step_seed(config.seed, config.draw_at(now.step)), rounding, device)


def with_unused_seed(fn: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return fn(*args, region_keys(0, 0, device))

    return run


def plain_call(fn: Callable[..., Any], region: regions.Region) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        region.note(args)
        return fn(*args)

    return run
