"""`torch.compile(model, backend="actcomp")`: from Dynamo's graph to a compiled callable.

Dynamo's own graph is never touched (Dynamo reads its placeholders again). The step's seed is a placeholder appended to a
clone, and a thin wrapper appends its value at each call; the pass enters through ``custom_partitioner_fn``, which
Inductor's and AOTAutograd's caches key on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from actpass.backend.call_wrappers import given_state, plain_call, with_unused_seed
from actpass.backend.headroom import as_planned, headrooms, is_part, peak_budget
from actpass.backend.inductor_options import inductor_options
from actpass.backend.partitioner import ask, run_passes
from actpass.backend.stack import in_one_piece
from actpass.backend.state_inputs import RegionRequest, device_of
from actpass.errors import ActpassError, ActpassWarning, InternalError
from actpass.ir.graph_inputs import GraphInputs, arguments_of
from actpass.ir.inline import inline_regions
from actpass.options.config import Config, parse
from actpass.reporting.eager_estimate import with_eager_curve
from actpass.reporting.record import Record, describe_unknown
from actpass.reporting.structured_trace import trace
from actpass.runtime import plan_agreement as ranks
from actpass.runtime import progress, regions, subspaces
from actpass.runtime import record_cache as records
from actpass.runtime import replan as steps
from actpass.runtime.deferred_logits import taking_ordinary
from actpass.torch_compat import (
    TESTED_TORCH,
    RestartAnalysis,
    compile_fx,
    current_code,
    current_frame,
    is_part_of_a_step,
    is_piece_of_ddp,
    sizes_as_planned,
    torch_is_tested,
    went_through_inductor,
)


def actcomp(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """The backend behind ``torch.compile(model, backend="actcomp", options={...})``.

    Options (all optional):

    - ``method``: ``"auto"`` (default: what can be rebuilt for free is dropped, the rest is stored in 8 bits, or 4 where it
      serves weight gradients alone, or 16 as a query or key of fused attention), ``"exact"`` (only what is free), a low-bit
      form for all that is stored: ``"int16"``, ``"int8"``, ``"int4"``, ``"int2"``, ``"fp8"``,
      ``"fp8_e5m2"``, or a projection of the weight gradients' inputs: ``"gaussian"``, ``"rademacher"``, ``"sparse"``,
      ``"haar"``, ``"srht"``, or onto a subspace that follows the data: ``"pca"``, ``"prac"``, ``"oasis"``, ``"sampled"`` (see
      `actpass.codecs.projections.learned` and `actpass.runtime.subspaces`).
    - ``rank``: of projections: an int (directions), a float in (0, 1] (a fraction of the width; default 0.25, `prac` 0.6, half
      of which follows the data), or, of seeded ones, ``"budget"``: layer by layer from ``memory_budget``, where the projection
      is stored in place of its input (see `actpass.plan.rank_allocation`); elsewhere exact. Nothing is run again then. With
      ``auto`` a number asks for weight gradients through `haar`, for fewer FLOPs; without one they are exact; ``"budget"`` is
      an error.
    - ``nonlinear_rank``: of projections that follow the data: the rank at which tensors that the backward uses otherwise than
      for weight gradients (inputs of norms and activation functions, the residual stream) are stored, and decoded before their
      first use: an int, a float in (0, 1], or None (they stay exact). Default: `prac` 0.4, the paper's, others None. Biased
      where the use is nonlinear; fused attention's tensors stay as they are.
    - ``quantize``: with a projection, the low-bit form of what is stored (default: none).
    - ``rounding``: of low-bit forms, ``"stochastic"`` (unbiased), ``"nearest"`` (half the variance or less), or ``"auto"``
      (default): stochastic where the backward is linear in the tensor, so that the gradient stays unbiased, else nearest.
    - ``group``: elements that share a scale (default: the form's own, 32 or 64). ``rotate``: True spreads outliers by a
      Hadamard rotation of each group.
    - ``smallest``: bytes below which a tensor is stored as it is (default 16384).
    - ``chunk_loss``: True (default) forms large logits, the loss and the head's gradients in pieces of rows, as
      many as suit the device (half as many as features on a CPU, else four times; an int sets it: fewer take less memory, more
      are faster); see `actpass.passes.chunked_loss`.
    - ``defer_logits``: True (default): logits that are returned beside such a loss are computed when they are first read; see
      `actpass.runtime.deferred_logits`. False: they are whole, and so is the loss.
    - ``scale``: ``"unbiased"`` (default) or ``"none"`` (orthonormal scaling, for an optimizer inside a fixed subspace).
    - ``refresh_interval``: optimizer steps for which a basis stays (default 1), or between two sketches of a learned subspace
      (default: `oasis` 1, others 20). ``complement``: the random part of `prac` and `sampled`, ``"fresh"`` (drawn at each
      step, unbiased), ``"frozen"`` (between two refreshes), or ``"auto"`` (default: frozen with low-rank gradients, whose
      moments are those of one basis, else fresh).
    - ``gradients``: ``"dense"`` (default), or ``"low_rank"``: projected weight gradients stay in their factors, see
      `actpass.low_rank_gradient` and `actpass.optim`. All that can be projected is, then.
    - ``seed``: base seed of all bases (default 0).
    - ``memory_budget``: bytes of the peak of a step (an int > 1, ``"20GiB"``), ``"auto"``, or a float in [0, 1], the fraction
      of the bytes that Inductor's default would save for backward; see `actpass.planner.budget`.
    - ``optimizer_state_bytes``: with a ``memory_budget`` in bytes, the state of an optimizer that is not known: none has
      stepped yet and none was named (`actpass.set_optimizer`), or it is no torch optimizer. Default: AdamW's, two copies of
      every trainable parameter.
    - ``calibration``: what `actpass.calibrate` returned, or the path of its file: what a budget weighs errors by.
    - ``overrides``: ``{"lm_head": "keep", "layers.*.mlp": {"method": "srht", "rank": 64}}``, by module path: of the weight for
      projections, of the module that made a tensor or the weight whose gradient reads it for low-bit forms.
    - ``profitable_only``: True (default) leaves a tensor exact where projecting it costs FLOPs and frees no bytes.
    - ``plan``: an `actpass.ModelPlan` or the path of its file, to be followed in place of all that decides; see
      `actpass.planner.apply_plan`.
    - ``fallback``: what becomes of a region that the pass fails on, by a bug of its own: ``"error"`` (default) raises
      `InternalError`, which says what to report; ``"warn"`` leaves the region to Inductor, with an `ActpassWarning` and the
      reason in the report, and training goes on. A region that the pass can't read is left to Inductor with a warning under
      both, but under ``"error"`` a budget of peak bytes that it does not fit raises `BudgetError`.
    - ``mode``, ``inductor``: a torch.compile mode, and a dict of Inductor's own options.

    Raises `OptionError` / `BudgetError` / `PlanError` (inside Dynamo's ``BackendCompilerFailed``) on bad options, and where
    ranks that compile the same region have decided differently; `InternalError` for a bug of the pass.
    """
    config = parse(options, mode)
    if not torch_is_tested():
        warnings.warn(
            f"actpass was tested on torch {TESTED_TORCH[0]} to {TESTED_TORCH[1]}; this is {torch.__version__}",
            ActpassWarning,
            stacklevel=2,
        )
    if not torch.is_grad_enabled():
        compiler: Callable[..., Any] = compile_fx
        return compiler(gm, example_inputs, config_patches=inductor_options(config))
    return compile_region(gm, example_inputs, config)


def compile_region(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, **compiler_options: Any
) -> Callable[..., Any]:
    """Compile one training graph and register its region. compiler_options: for `compile_fx`, e.g. ``inner_compile``."""
    try:
        gm, called = inline_regions(gm, example_inputs)
        with progress.compiling():
            run = in_one_piece(_compile_region, gm, example_inputs, config, called, **compiler_options)
        return taking_ordinary(run) if is_piece_of_ddp(gm) else run  # the piece before it may have returned deferred logits
    except Exception as error:
        if isinstance(error, ActpassError) and not isinstance(error, InternalError):
            raise
        if config.fallback == "warn" and not isinstance(error, RestartAnalysis):
            return _without_the_pass(gm, example_inputs, config, error, **compiler_options)
        if isinstance(error, InternalError) or went_through_inductor(error):
            raise
        raise InternalError.of(error) from error


def _without_the_pass(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, error: Exception, **compiler_options: Any
) -> Callable[..., Any]:
    """Inductor alone, where the pass failed before it knew what that saves."""
    cause = error.__cause__ if isinstance(error, InternalError) else error
    reason = f"{type(cause).__name__}: {cause}{'; its memory_budget is not held' if config.searches else ''}"
    warnings.warn(f"actpass left a region to Inductor alone, because {reason}", ActpassWarning, stacklevel=2)
    compiler: Callable[..., Any] = compile_fx
    fn = compiler(gm, example_inputs, config_patches=inductor_options(config), **compiler_options)
    positions = tuple(i for i, e in enumerate(example_inputs) if isinstance(e, torch.nn.Parameter))
    region = regions.Region(describe_unknown(config, reason), config, positions, current_frame(), code=current_code())
    regions.register(region)
    return plain_call(fn, region)


def _compile_region(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, called: int, **compiler_options: Any
) -> Callable[..., Any]:
    """called: how many of the user's nested regions were put in line."""
    plain = GraphInputs.of(gm, example_inputs)
    code, shapes = current_code(), repr([tuple(e.shape) for e in example_inputs if isinstance(e, torch.Tensor)])
    if config.plan is not None:
        shapes += config.plan.hash  # what a search gave the same code is not this plan's
    before = steps.running() if is_part_of_a_step(gm) or any(plain.computed) else []
    peak = peak_budget(config, example_inputs, [p for r in before for p in r.parameters.values()])
    if peak is not None:
        peak = replace(peak, headrooms=headrooms(gm, example_inputs, again=regions.is_compiled(code)))
        shapes += repr([h.sizes for h in peak.headrooms[:1]])
    positions = tuple(i for i, path in enumerate(plain.paths) if path is not None)
    first = id(example_inputs[positions[0]]) if positions else None
    if peak is not None and is_part(gm, plain, peak, steps.is_part(code, first)):
        peak = replace(peak, part=True, capacity=steps.capacity_of(code, shapes, peak.nbytes))
    if config.learned and config.ranks_from_budget:
        config = replace(config, tails=subspaces.tails(example_inputs, plain.paths))
    key = records.region_key(gm, example_inputs, plain, config, peak)
    nonce, record = records.load(key)
    device = device_of(example_inputs)
    if record is not None and record.whole is not None:
        plain = replace(plain, whole=record.whole)  # known: nothing is traced in vain
    request = RegionRequest(
        gm=gm, example_inputs=example_inputs, config=config, inputs=plain, device=device, nonce=nonce, peak=peak
    )
    extra = ask(request, record)
    peak = extra.counted_in(peak)
    compiled, fn = run_passes(replace(request, peak=peak, extra=extra), compile_fx, **compiler_options)
    if compiled is not None:
        with sizes_as_planned(compiled.record.sizes):
            record = with_eager_curve(noting_calls(compiled.record, called), gm, example_inputs)
        records.store(key, nonce, record)
    elif record is not None and not record.active:
        warnings.warn(f"actpass: a region is not as asked, because {record.inactive_because}", ActpassWarning, stacklevel=2)
    if record is None:  # no backward: nothing to save, nothing to report, no seed to draw
        return with_unused_seed(fn, device) if config.needs_seed else fn
    ranks.check(record)
    if peak is not None:
        peak = as_planned(peak, record, example_inputs)
    if peak is not None and peak.part and peak.capacity is None:
        steps.check_first(record, peak)
    arguments = arguments_of(gm, example_inputs, plain)
    if arguments:
        record = _with_arguments(record, config, [path for path, _ in arguments])
    positions = positions or tuple(i for _, i in arguments)
    named = tuple((path, tuple(example_inputs[i].shape)) for path, i in arguments)
    trace(record)
    region = regions.Region(record, config, positions, current_frame(), code=code, shapes=shapes, peak=peak, arguments=named)
    regions.register(region)
    return given_state(fn, region, replace(request, extra=extra))


def noting_calls(record: Record, called: int) -> Record:
    """``record`` with a note on the calls of regions that `inline_regions` has put in line."""
    if not called:
        return record
    calls = "a call" if called == 1 else f"{called} calls"
    why = "Inductor overwrites what a region that is called still needs for its backward, and one budget is over all of them"
    return replace(record, notes=(*record.notes, f"{calls} of nested_compile_region in line, each compiled by itself: {why}"))


def _with_arguments(record: Record, config: Config, paths: Sequence[str]) -> Record:
    """``record`` with what is not done where parameters are arguments, and a warning if it was asked for."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    note = (
        f"the gradients of {', '.join(paths[:3])}{more} are exact, because these are arguments of the compiled function (as "
        "with torch.func.functional_call) and not parameters of a module, whose weight gradients alone are projected"
    )
    if config.projects:
        warnings.warn(
            f"actpass: method={config.treatment.method!r} projects nothing here: {note}. Compile the module itself.",
            ActpassWarning,
            stacklevel=2,
        )
    return replace(record, notes=(*record.notes, note))
