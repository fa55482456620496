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
from actpass.backend.dynamo_graph import prepared
from actpass.backend.headroom import as_planned, headrooms, is_part, peak_budget
from actpass.backend.inductor_options import inductor_options
from actpass.backend.partitioner import run_passes_with_state
from actpass.backend.stack import in_one_piece
from actpass.backend.state_inputs import RegionRequest, device_of
from actpass.errors import ActpassError, ActpassWarning, InternalError
from actpass.ir.graph_inputs import GraphInputs, arguments_of
from actpass.memory.resident import frozen_around
from actpass.options import Config, parse
from actpass.planner.peak_budget import PeakBudget
from actpass.reporting.describe import describe_unknown
from actpass.reporting.eager_estimate import with_eager_curve
from actpass.reporting.record import Record
from actpass.reporting.structured_trace import trace
from actpass.runtime import plan_agreement as ranks
from actpass.runtime import progress, regions, subspaces
from actpass.runtime import record_cache as records
from actpass.runtime import replan as steps
from actpass.runtime.deferred_logits import taking_ordinary
from actpass.torch_compat import (
    TESTED_TORCH,
    FakeTensor,
    RestartAnalysis,
    compile_fx,
    current_code,
    current_frame,
    is_part_of_a_step,
    is_piece_of_ddp,
    running_modules,
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

    - ``policy``: who chooses how each saved tensor is stored. ``"auto"``: what can be recomputed for free is not saved, the
      rest is stored in 8 bits, or 4 where it serves weight gradients alone, or 16 as a query or key of fused attention.
      ``"exact"``: only what is free. Default: ``"auto"`` without a codec and a projection, else ``"exact"``. Not with a
      codec.
    - ``codec``: one low-bit format for all that is saved, projections included: ``"int16"``, ``"int8"``, ``"int4"``,
      ``"int2"``, ``"float8_e4m3"``, ``"float8_e5m2"``, or a registered one. Default: none.
    - ``projection``: what weight gradients are formed through: a random basis (``"gaussian"``, ``"rademacher"``,
      ``"sparse"``, ``"haar"``, ``"srht"``), or a subspace that follows the data (``"pca"``, ``"prac"``, ``"oasis"``,
      ``"sampled"``, see `actpass.codecs.projections.learned` and `actpass.runtime.subspaces`). Default: none, weight
      gradients are exact.
    - ``wgrad``: ``"fp8"``: each weight gradient is one matmul of the codes of x and dy in float8_e4m3, which are not decoded,
      where tokens and features are multiples of 16; see `actpass.codecs.fp8_contraction`. Where x is saved for weight gradients
      alone its codes are saved in its place; elsewhere it is cast in the backward. Default: None. Not with a projection. On
      CUDA devices of capability 9.0 (Hopper) or newer; on a CPU it is emulated, for what it does to a loss.
    - ``rank``: of a projection: an int (directions), a float in (0, 1] (a fraction of the width; default 0.25, `prac` 0.6,
      half of which follows the data), or, of seeded ones and `prac`, ``"budget"``: layer by layer from ``memory_budget``,
      where the projection is stored in place of its input (see `actpass.plan.rank_allocation`), elsewhere exact; nothing is
      recomputed then. ``"budget"`` does not go with ``policy="auto"``.
    - ``activation_rank``: of a projection that follows the data: the rank at which tensors that the backward uses otherwise
      than for weight gradients (inputs of norms and activation functions, the residual stream) are stored, and reconstructed
      before their first use: an int, a float in (0, 1], or None (they stay exact). Default: `prac` 0.4, the paper's, others
      None. Biased where the use is nonlinear; fused attention's tensors stay as they are.
    - ``projection_scaling``: ``"unbiased"`` (default, E[P P^T] = I), or ``"orthonormal"`` (E[P^T P] = I, for an optimizer
      inside a fixed subspace).
    - ``rounding``: of codecs and of ``wgrad``: ``"stochastic"`` (unbiased), ``"nearest"`` (half the variance or less), or
      ``"auto"`` (default): stochastic where the backward is linear in the tensor, so that the gradient stays unbiased, else
      nearest.
    - ``group_size``: elements that share a scale (default: the codec's own, 32 or 64).
    - ``hadamard_rotation``: True spreads outliers by a Hadamard rotation of each group (default False).
    - ``min_tensor_bytes``: smaller tensors are stored as they are (default 16384).
    - ``chunked_loss``: True (default) computes large logits, the loss and the head's gradients in chunks of rows, as many as
      suit the device (half as many as features on a CPU, else four times). An int sets the rows: fewer take less memory, more
      are faster. See `actpass.passes.chunked_loss`.
    - ``defer_logits``: True (default): logits that are returned beside a chunked loss are computed when they are first read;
      see `actpass.runtime.deferred_logits`. False: they are whole, and so is the loss.
    - ``infer_masks``: True (default): an attention mask that is proved to say no more than ``is_causal=True`` is left out; see
      `actpass.backend.attention_masks`. False: masks are left alone.
    - ``refresh_interval``: optimizer steps for which a seeded basis stays (default 1), or between two sketches of a learned
      subspace (default: `oasis` 1, others 20).
    - ``resample``: when the random part of `prac` and `sampled` is drawn: ``"every_step"`` (unbiased), ``"every_refresh"``,
      or ``"auto"`` (default): at every refresh with low-rank gradients, whose moments are those of one basis, else at every
      step.
    - ``weight_gradient_format``: ``"dense"`` (default), or ``"low_rank"``: projected weight gradients stay coefficients and a
      basis, see `actpass.low_rank_gradient` and `actpass.optim`. All that can be projected is, then.
    - ``skip_unprofitable``: True (default) leaves a weight gradient exact where projecting it costs FLOPs and frees no bytes.
    - ``seed``: base seed of all bases and of rounding (default 0).
    - ``memory_budget``: bytes of the peak of a step (an int > 1, ``"20GiB"``), ``"auto"`` (what the CUDA device has free), or
      a float in [0, 1], the fraction of the bytes that Inductor's default would save for backward; see
      `actpass.planner.budget`. Default: what `actpass.set_memory_budget` set, else none.
    - ``optimizer_state_bytes``: with a ``memory_budget`` in bytes, the state of an optimizer that is not known: none has
      stepped yet and none was named (`actpass.set_optimizer`), or it is no torch optimizer. Default: AdamW's, two copies of
      every trainable parameter.
    - ``sensitivities``: what `actpass.calibrate` returned, or the path of its file: what a budget weighs errors by.
    - ``module_overrides``: ``{"lm_head": "save", "layers.*.mlp": {"projection": "srht", "rank": 64}}``, by module path, the
      last match wins: of the weight for projections; for codecs of the module that made a tensor, or the weight whose
      gradient reads it.
    - ``plan``: an `actpass.ModelPlan` or the path of its file, to be followed in place of all that decides; see
      `actpass.planner.apply_plan`.
    - ``fallback``: what becomes of a region that the pass fails on, by a bug of its own: ``"error"`` (default) raises
      `InternalError`, which says what to report; ``"warn"`` leaves the region to Inductor, with an `ActpassWarning` and the
      reason in the report, and training goes on. A region that the pass can't read is left to Inductor with a warning under
      both, but under ``"error"`` a budget of peak bytes that it does not fit raises `BudgetError`.
    - ``mode``: a mode of ``torch.compile``.
    - ``inductor_options``: a dict of Inductor's own options.

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
        gm, notes = prepared(gm, example_inputs, config)
        with progress.compiling():
            run = in_one_piece(_compile_region, gm, example_inputs, config, notes, **compiler_options)
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
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, notes: tuple[str, ...], **compiler_options: Any
) -> Callable[..., Any]:
    """notes: on what was done to Dynamo's graph."""
    plain = GraphInputs.of(gm, example_inputs)
    code, shapes = current_code(), repr([tuple(e.shape) for e in example_inputs if isinstance(e, torch.Tensor)])
    if config.plan is not None:
        shapes += config.plan.hash  # what a search gave the same code is not this plan's
    before = steps.running() if is_part_of_a_step(gm) or any(plain.computed) else []
    others = [*(p for r in before for p in r.parameters.values()), *frozen_around(example_inputs, running_modules())]
    peak, shapes = _peak_budget(gm, example_inputs, config, shapes, others)
    positions = tuple(i for i, path in enumerate(plain.paths) if path is not None)
    first = id(example_inputs[positions[0]]) if positions else None
    if peak is not None and is_part(gm, plain, peak, steps.is_part(code, first)):
        peak = replace(peak, part=True, capacity=steps.capacity_of(code, shapes, peak.nbytes))
    if config.learned and config.ranks_from_budget:
        config = replace(config, residual_energies=subspaces.residual_energies(example_inputs, plain.paths))
    key = records.region_key(gm, example_inputs, plain, config, peak)
    nonce, record = records.load(key)
    device = device_of(example_inputs)
    if record is not None and record.whole is not None:
        plain = replace(plain, whole=record.whole)  # known: nothing is traced in vain
    request = RegionRequest(
        gm=gm, example_inputs=example_inputs, config=config, inputs=plain, device=device, nonce=nonce, peak=peak
    )
    compiled, fn, extra = run_passes_with_state(request, compile_fx, record, **compiler_options)
    peak = extra.with_state_bytes(peak)
    if compiled is not None:
        with sizes_as_planned(compiled.record.sizes):
            record = with_eager_curve(noting(compiled.record, notes), gm, example_inputs)
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
    trace(record)
    positions = positions or tuple(i for _, i in arguments)
    parameters = [example_inputs[i] for i in positions if not isinstance(example_inputs[i], FakeTensor)]
    region = regions.Region(
        record,
        config,
        positions,
        current_frame(),
        code=code,
        shapes=shapes,
        peak=peak,
        arguments=tuple((path, tuple(example_inputs[i].shape)) for path, i in arguments),
        compiled_with=regions.weakly(parameters),
        beside=regions.weakly(others),
    )
    regions.register(region)
    return given_state(fn, region, replace(request, extra=extra))


def _peak_budget(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, shapes: str, others: Sequence[torch.Tensor]
) -> tuple[PeakBudget | None, str]:
    """The budget of a region beside ``others``, with the sizes to plan for, and ``shapes`` with these."""
    peak = peak_budget(config, example_inputs, others)
    if peak is None:
        return None, shapes
    peak = replace(peak, headrooms=headrooms(gm, example_inputs, again=regions.is_compiled(current_code())))
    return peak, shapes + repr([h.sizes for h in peak.headrooms[:1]])


def noting(record: Record, notes: tuple[str, ...]) -> Record:
    return replace(record, notes=(*record.notes, *notes))


def _with_arguments(record: Record, config: Config, paths: Sequence[str]) -> Record:
    """``record`` with what is not done where parameters are arguments, and a warning if it was asked for."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    note = (
        f"the gradients of {', '.join(paths[:3])}{more} are exact, because these are arguments of the compiled function (as "
        "with torch.func.functional_call) and not parameters of a module, whose weight gradients alone are projected"
    )
    if config.projects or config.contracts_codes:
        does = "projects" if config.projects else "casts"
        warnings.warn(
            f"actpass: {config.tensor_options.described} {does} nothing here: {note}. Compile the module itself.",
            ActpassWarning,
            stacklevel=2,
        )
    return replace(record, notes=(*record.notes, note))
