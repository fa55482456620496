"""`torch.compile(model, backend="actcomp")`: from Dynamo's graph to a compiled callable.

Dynamo's own graph is never touched (Dynamo reads its placeholders again). The step's seed is a placeholder appended to a
clone, and a thin wrapper appends its value at each call; the pass enters through ``custom_partitioner_fn``, which
Inductor's and AOTAutograd's caches key on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from actpass.backend.returned_logits import Taken, take_logits
from actpass.backend.stack import in_one_piece
from actpass.codecs.generator import round_keys, step_seed
from actpass.errors import ActpassError, ActpassWarning, BudgetError, GraphUnsupported, InternalError, LogitsReturned
from actpass.ir.copying import copy_module
from actpass.ir.graph_inputs import GraphInputs, arguments_of
from actpass.ir.inline import inline_regions
from actpass.memory.resident import resident
from actpass.options.config import Config, parse
from actpass.pipeline import Compiled, compile_joint
from actpass.plan import Plan
from actpass.plan_file import ModelPlan
from actpass.planner.budget import Headroom, PeakBudget
from actpass.reporting.eager_estimate import with_eager_curve
from actpass.reporting.record import Record, describe_unknown
from actpass.reporting.structured_trace import trace
from actpass.runtime import low_rank_binding as factors
from actpass.runtime import plan_agreement as ranks
from actpass.runtime import progress, regions, subspaces
from actpass.runtime import record_cache as records
from actpass.runtime import replan as steps
from actpass.runtime import step_counter as clock
from actpass.runtime.deferred_logits import delivering, taking_ordinary
from actpass.torch_compat import (
    FUSION_GATE,
    TESTED_TORCH,
    ConstantSource,
    CustomPartitionerFn,
    RestartAnalysis,
    compile_fx,
    current_code,
    current_frame,
    detect_fake_mode,
    fake_input,
    functorch_config,
    fusion_gate,
    fusion_gate_limit,
    inductor_config,
    is_part_of_a_step,
    is_piece_of_ddp,
    list_mode_options,
    size_hint,
    sizes_as_planned,
    symbol_of,
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
        return compiler(gm, example_inputs, config_patches=_inductor_options(config))
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
    fn = compiler(gm, example_inputs, config_patches=_inductor_options(config), **compiler_options)
    positions = tuple(i for i, e in enumerate(example_inputs) if isinstance(e, torch.nn.Parameter))
    region = regions.Region(describe_unknown(config, reason), config, positions, current_frame(), code=current_code())
    regions.register(region)
    return _plain(fn, region)


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
    if peak is not None and _is_part(gm, plain, peak, steps.is_part(code, first)):
        peak = replace(peak, part=True, capacity=steps.capacity_of(code, shapes, peak.nbytes))
    if config.learned and config.ranks_from_budget:
        config = replace(config, tails=subspaces.tails(example_inputs, plain.paths))
    key = records.region_key(gm, example_inputs, plain, config, peak)
    nonce, record = records.load(key)
    device = device_of(example_inputs)
    if record is not None and record.whole is not None:
        plain = replace(plain, whole=record.whole)  # known: nothing is traced in vain
    extra = ask(gm, example_inputs, config, plain, device, peak, record)
    peak = extra.counted_in(peak)
    compiled, fn = run_passes(gm, example_inputs, config, plain, device, nonce, peak, compile_fx, extra, **compiler_options)
    if compiled is not None:
        with sizes_as_planned(compiled.record.sizes):
            record = with_eager_curve(noting_calls(compiled.record, called), gm, example_inputs)
        records.store(key, nonce, record)
    elif record is not None and not record.active:
        warnings.warn(f"actpass: a region is not as asked, because {record.inactive_because}", ActpassWarning, stacklevel=2)
    if record is None:  # no backward: nothing to save, nothing to report, no seed to draw
        return _with_unused_seed(fn, device) if config.needs_seed else fn
    ranks.check(record)
    if peak is not None:
        peak = _as_planned(peak, record, example_inputs)
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
    return _given_state(fn, region, extra, plain, device)


def _given_state(
    fn: Callable[..., Any], region: regions.Region, extra: Extra, plain: GraphInputs, device: torch.device
) -> Callable[..., Any]:
    """``fn`` as Dynamo calls it: with the model's own inputs, and without what it returns beside the model's results."""
    config = region.config
    if not config.needs_seed:
        return _plain(fn, region)
    if extra and Extra.of(region.record.plan, plain.paths) != extra:
        return _with_seed(_without(fn, extra, device), region, config, device)
    copies = device.type == "cuda" and _has_cuda_graphs(config)
    if extra.factors:
        fn = factors.with_coefficients(fn, extra.factors, len(plain.paths), config, copies=copies)
    if extra.sites:
        fn = subspaces.with_subspaces(fn, extra.sites, config, device, copies=copies, written=plain.written)
        return _with_subspaces(fn, region, config, device)
    return _with_seed(fn, region, config, device)


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


@dataclass(frozen=True)
class Extra:
    """What a region takes beside the model's own inputs and the seed. sites: the learned subspaces. factors: the parameters
    whose gradients come back as coefficients. decided: the plan that it is to follow with them, where a budget was searched
    for it."""

    sites: tuple[subspaces.Site, ...] = ()
    factors: tuple[factors.Factor, ...] = ()
    decided: Plan | None = field(default=None, compare=False)

    @classmethod
    def of(cls, plan: Mapping[str, Any], paths: Sequence[str | None]) -> Extra:
        return cls(subspaces.sites_of(plan, paths), factors.factors_of(plan, paths))

    def __bool__(self) -> bool:
        return bool(self.sites or self.factors)

    def counted_in(self, peak: PeakBudget | None) -> PeakBudget | None:
        """``peak`` beside the subspaces."""
        if peak is None or not self.sites:
            return peak
        return replace(peak, resident=peak.resident.with_more(sum(site.nbytes for site in self.sites)))


def ask(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    plain: GraphInputs,
    device: torch.device,
    peak: PeakBudget | None,
    record: Record | None = None,
) -> Extra:
    """What a region will take. record: of the region, if it was compiled before. Otherwise the pass is run once without any of
    it, and no code is made; under a budget of peak bytes twice: the second time beside the subspaces that the first one asked
    for."""
    if not (config.learned or config.factors_gradients):
        return Extra()
    extra = Extra.of(record.plan, plain.paths) if record is not None else Extra()
    rounds = 0 if record is not None else 1 if peak is None else 2
    for _ in range(rounds):
        with functorch_config.patch(enable_autograd_cache=False):
            around = extra.counted_in(peak)
            found, _ = run_passes(gm, example_inputs, config, plain, device, "", around, compile_fx, inner_compile=no_code)
        if found is None:
            return Extra()
        record, extra = found.record, Extra.of(found.record.plan, plain.paths)
        if not extra.sites:
            break
    if record is None or not extra or not config.searches or (peak is not None and peak.part):
        return extra
    return replace(extra, decided=ModelPlan.of([record.plan]).regions[0].bare)


def peak_budget(config: Config, inputs: Sequence[Any], others: Iterable[torch.Tensor] = ()) -> PeakBudget | None:
    """The budget of a region that runs with ``inputs``, if it is one of peak bytes. others: parameters of regions that ran
    before it in the step."""
    asked = config.memory_budget
    return PeakBudget(asked, resident(inputs, others, config.optimizer_state_bytes)) if isinstance(asked, int) else None


def headrooms(gm: fx.GraphModule, example_inputs: Sequence[Any], *, again: bool) -> tuple[Headroom, ...]:
    """What to take sizes that change for. What was traced; but where the code was compiled before, and a size has grown, the
    next power of two first, so that sizes that go on growing take few graphs, and what lies half-way if that can't be met."""
    symbols = [s for s in map(symbol_of, (e for e in example_inputs if isinstance(e, torch.SymInt))) if s is not None]
    if not symbols:
        return ()
    traced = [n for _, n, _ in symbols]
    grown = [min(most, 1 << (n - 1).bit_length()) for _, n, most in symbols] if again else traced
    tensors = [
        node.meta["example_value"]
        for node, e in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
        if isinstance(e, torch.Tensor) and not isinstance(e, torch.nn.Parameter)
    ]
    found = []
    for sizes in (grown, [(a + b) // 2 for a, b in zip(grown, traced, strict=True)], traced):
        planned = tuple((name, n) for (name, _, _), n in zip(symbols, sizes, strict=True))
        with sizes_as_planned(planned):
            nbytes = sum(size_hint(t.numel()) * t.element_size() for t in tensors)
        found.append(Headroom(planned, nbytes - sum(size_hint(t.numel()) * t.element_size() for t in tensors)))
    return tuple(dict.fromkeys(found))


def _as_planned(peak: PeakBudget, record: Record, example_inputs: Sequence[Any]) -> PeakBudget:
    """The budget of what was compiled. Guards on sizes: for more than was planned for there is another plan."""
    sizes = dict(record.sizes)
    for e in example_inputs:
        symbol = symbol_of(e) if isinstance(e, torch.SymInt) else None
        if isinstance(e, torch.SymInt):
            bool(e <= (size_hint(e) if symbol is None else sizes.get(symbol[0], symbol[1])))
    return next((peak.within(h) for h in peak.headrooms if h.sizes == record.sizes), peak)


def _is_part(gm: fx.GraphModule, inputs: GraphInputs, peak: PeakBudget, seen: bool | None) -> bool:
    """Whether the region is one of several of a step: behind or before a graph break, as a step has shown it (``seen``), beside
    trained parameters that it does not take, or, while the optimizer that would show those is unknown, with a computed
    input."""
    if is_part_of_a_step(gm):
        return True
    return seen if seen is not None else peak.resident.elsewhere or (not peak.resident.known and any(inputs.computed))


def run_passes(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    inputs: GraphInputs,
    device: torch.device,
    nonce: str,
    peak: PeakBudget | None,
    compiler: Callable[..., Any],
    extra: Extra | None = None,
    **compiler_options: Any,
) -> tuple[Compiled | None, Callable[..., Any]]:
    """Give ``gm`` to ``compiler`` (`compile_fx`) with the pass in place of the partitioner. extra: what the region takes beside
    the seed: behind it the points at which tokens are sampled and the learned subspaces, of each of which it returns a sketch,
    and the places for coefficients. Returns what the pass did (None on a cache hit, or if there is no backward), and the
    compiled callable, which returns what ``gm`` does, deferred logits among it."""
    extra = extra or Extra()
    if not config.defer_logits:
        inputs = replace(inputs, whole="defer_logits=False keeps them so; return only the loss, or leave the option out")
    try:
        taken = _taken(gm, example_inputs, config, inputs)
    except GraphUnsupported as error:
        taken, inputs = None, replace(inputs, whole=str(error))
    if taken is not None:
        deferring = replace(inputs, deferred=sum(not isinstance(o, int) for o in taken.outputs))
        try:
            compiled, fn = _run_passes(
                taken.gm, example_inputs, config, deferring, device, nonce, peak, compiler, extra, **compiler_options
            )
            return compiled, delivering(fn, taken.outputs)
        except LogitsReturned as error:
            inputs = replace(inputs, whole=str(error))
    return _run_passes(gm, example_inputs, config, inputs, device, nonce, peak, compiler, extra, **compiler_options)


def _taken(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, inputs: GraphInputs) -> Taken | None:
    """``gm`` without the logits that it returns, if they may be deferred and it is not known that they can't."""
    return take_logits(gm, example_inputs, inputs) if config.defers_logits and inputs.whole is None else None


def _run_passes(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    inputs: GraphInputs,
    device: torch.device,
    nonce: str,
    peak: PeakBudget | None,
    compiler: Callable[..., Any],
    extra: Extra,
    **compiler_options: Any,
) -> tuple[Compiled | None, Callable[..., Any]]:
    """`run_passes` for a graph whose results stay what they are."""
    if config.needs_seed:
        gm, own = _append_state(gm, example_inputs, device, extra)
        first, sites = len(inputs.paths), len(extra.sites)
        end = first + len(own)
        if sites:
            states = tuple(range(first + 3, first + 3 + sites))
            inputs = replace(inputs, learned_seed=first + 1, points=first + 2, subspaces=states)
        inputs = replace(inputs, seed=first, coefficients=tuple(range(end - len(extra.factors), end)))
        example_inputs = [*example_inputs, *own]
    partitioner = Partitioner(config, inputs, nonce, peak, extra.decided)
    fn = compiler(
        gm,
        example_inputs,
        config_patches={**_inductor_options(config), "custom_partitioner_fn": partitioner},
        **compiler_options,
    )
    return (partitioner.done[0] if partitioner.done else None), fn


@dataclass(frozen=True)
class Partitioner(CustomPartitionerFn):
    """The pass, as Inductor's caches see it: everything its result depends on is in its fields. done: what it did, which is no
    part of the keys, and there for whatever thread asks."""

    config: Config
    inputs: GraphInputs
    nonce: str
    peak: PeakBudget | None = None
    decided: Plan | None = None
    source: str = field(default_factory=records.source_hash)
    donated: bool = field(default_factory=lambda: functorch_config.donated_buffer)
    """Inductor's graph cache does not key on it: a backward that overwrites what it read would be found again after the
    user turned donation off for `retain_graph=True`, and its second run would give wrong gradients (torch 2.13)."""
    done: list[Compiled] = field(default_factory=list, init=False, repr=False, compare=False)

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        try:
            compiled = self._within_headroom(
                lambda peak: compile_joint(gm, joint_inputs, self.config, self.inputs, kwargs, peak, self.decided)
            )
        except ActpassError:
            raise
        except Exception as error:
            raise InternalError.of(error) from error
        self.done.append(compiled)
        if self.nonce:  # or it was only asked what would be done
            progress.planned()
        return compiled.forward, compiled.backward

    def _within_headroom(self, compiled: Callable[[PeakBudget | None], Compiled]) -> Compiled:
        """As ``compiled`` comes within the first headroom of the budget that can be met."""
        headrooms = self.peak.headrooms if self.peak is not None else ()
        if self.peak is None or not headrooms:
            return compiled(self.peak)
        for headroom in headrooms:
            try:
                with sizes_as_planned(headroom.sizes):
                    done = compiled(self.peak.within(headroom))
                return replace(done, record=replace(done.record, sizes=headroom.sizes))
            except BudgetError:
                if headroom is headrooms[-1]:
                    raise
        raise AssertionError("the last headroom returns or raises")

    def __getstate__(self) -> dict[str, Any]:
        """For the pickles that caches make keys of."""
        return {**self.__dict__, "done": []}

    def uuid(self) -> Any:
        return (
            self.source,
            self.nonce,
            self.donated,
            repr(self.config),
            repr(self.inputs),
            repr(self.peak),
            repr(self.decided),
        )


_LEAST_SHARED_BYTES = 2**16
"""Under a budget, and where tensors are decoded from projections, loops that share fewer bytes than this are not fused.
Inductor's 10 let a rope's 32 frequencies fuse loops of two layers; where both are run again, that keeps a layer's tensors alive
through the next one's backward (0.06 of llama-mini's peak) to save a read of 128 bytes. And the step's seed let it draw the
random numbers of all layers' bases in one loop (half of llama-60m's peak with `prac`)."""


_PEAK_GROWTH = 0.02
"""Of a graph's peak before any fusion: what fusions may add (torch 2.15; before, nothing asks). With 0 called graphs
lose fusions that cost a few scales. What is refused reads its inputs once more; on a CPU one refusal also keeps a row's
reduction and the loop behind it apart, in the whole graph (`actpass.memory.fusion`)."""


def options_within(
    memory_budget: float | int | str | None, config: Config, growth: float | None = _PEAK_GROWTH
) -> dict[str, Any]:
    """Inductor's options for what ``config`` compiles within a budget, or decodes from projections, or plans at all."""
    if memory_budget == 1.0 and not config.decodes:
        return {}
    few = memory_budget is not None or config.decodes
    return _options_of(_LEAST_SHARED_BYTES if few else None, growth, config)


def _options_of(least_shared_bytes: int | None, growth: float | None, config: Config) -> dict[str, Any]:
    """Where few loops are fused, memory is given back behind its last reader, too: Inductor keeps it for a later result of the
    same size up to what it takes for the peak, which is the end of the backward where an embedding's gradient is large
    (RoBERTa-large: a quarter of the peak). So it is beside a gate, ours or the user's, which is for the peak, too: with what is
    held predictions were 5 % off, without it they are exact (2.15). Not where nothing is coded: peaks are the same there, and
    on a CPU each new tensor costs page faults (4 % of a step of llama-60m). growth: see `_PEAK_GROWTH`."""
    gate = fusion_gate(growth)
    within = least_shared_bytes is not None and least_shared_bytes >= _LEAST_SHARED_BYTES
    is_gated = bool(gate) or fusion_gate_limit() is not None
    kept = {"allow_buffer_reuse": False} if within or (is_gated and not config.stores_exactly) else {}
    shared = {} if least_shared_bytes is None else {"score_fusion_memory_threshold": least_shared_bytes}
    return {**shared, **kept, **gate}


def _inductor_options(config: Config) -> dict[str, Any]:
    asked = dict(config.inductor)
    gate = {name: asked[name] for name in FUSION_GATE if name in asked and hasattr(inductor_config, name)}
    with inductor_config.patch(gate):
        own = options_within(config.memory_budget, config, None if gate else _PEAK_GROWTH)
        if config.plan is not None:
            regions = config.plan.regions
            growth = next((r.peak_growth for r in regions if r.peak_growth is not None), None)
            own = _options_of(max(r.least_shared_bytes for r in regions), None if gate else growth, config)
    return {**own, **(list_mode_options(config.mode) if config.mode else {}), **asked}


def _has_cuda_graphs(config: Config) -> bool:
    return bool(_inductor_options(config).get("triton.cudagraphs", inductor_config.triton.cudagraphs))


def device_of(example_inputs: Sequence[Any]) -> torch.device:
    """The device of the region: that of its first tensor off the CPU, else the CPU."""
    devices = [e.device for e in example_inputs if isinstance(e, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def _append_state(
    gm: fx.GraphModule, example_inputs: Sequence[Any], device: torch.device, extra: Extra
) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """A clone of Dynamo's graph with the step's seed as its next input, and, if there are learned subspaces, a seed for their
    bases, the points of sampled tokens (as many as a call brings) and the subspaces, then the places for coefficients; it also
    returns a tensor for each subspace, where the pass will put the sketch (made by an operator that stays one node and that no
    model has, so that all others keep their names). And the new inputs as fake tensors."""
    clone, _ = copy_module(gm)
    mode = detect_fake_mode([n.meta.get("example_value") for n in gm.graph.nodes] + list(example_inputs))
    placeholders = clone.graph.find_nodes(op="placeholder")
    last, own = (placeholders[-1] if placeholders else None), []

    def append(name: str, real: torch.Tensor, *, most: int | None = None) -> fx.Node:
        nonlocal last
        with clone.graph.inserting_after(last) if last is not None else clone.graph.inserting_before():
            last = clone.graph.placeholder(name)
        source = ConstantSource(name)
        fake = real if mode is None else fake_input(mode, real, source, most=most)
        last.meta["example_value"] = fake
        last._dynamo_source = source  # pyright: ignore[reportAttributeAccessIssue]
        own.append(fake)
        return last

    append("actpass_seed", round_keys(0, device))
    if extra.sites:
        append("actpass_learned_seed", round_keys(0, device))
        most = subspaces.most_points(extra.sites)  # traced so: a plan's peak holds a sketch, too
        append("actpass_points", torch.zeros(most, dtype=torch.float32, device=device), most=most)
        empty = [torch.zeros(site.shape, dtype=torch.float32, device=device) for site in extra.sites]
        states = [append(f"actpass_subspace_{i}", state) for i, state in enumerate(empty)]
        (output,) = clone.graph.find_nodes(op="output")
        with clone.graph.inserting_before(output):
            stand_ins = [clone.graph.call_function(torch.ops.aten.i0.default, (state,)) for state in states]
        output.args = ((*output.args[0], *stand_ins),)  # pyright: ignore[reportGeneralTypeIssues]
    for i, factor in enumerate(extra.factors):
        like = example_inputs[factor.position]
        place = torch.empty_strided(factor.shape, (0,) * len(factor.shape), dtype=like.dtype, device=like.device)
        append(f"actpass_coefficients_{i}", place.requires_grad_())
    clone.recompile()
    return clone, own


def no_code(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Any:
    """An inner compiler for who only asks what the pass does."""

    def never(args: list[Any]) -> Any:
        raise AssertionError("this graph was made to be looked at, not to be run")

    return never


def _with_subspaces(
    run: Callable[..., Any], region: regions.Region, config: Config, device: torch.device
) -> Callable[..., Any]:
    clock.start()

    def call(*args: Any) -> Any:
        region.note(args)
        step = clock.CLOCK.read()
        keys = [round_keys(step_seed(config.seed, d), device) for d in (config.draw_at(step), config.learned_draw_at(step))]
        return run(args, keys, step)

    return call


def _without(fn: Callable[..., Any], extra: Extra, device: torch.device) -> Callable[..., Any]:
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
        return fn(*args, round_keys(step_seed(config.seed, config.draw_at(clock.CLOCK.read())), device))

    return run


def _with_unused_seed(fn: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return fn(*args, round_keys(0, device))

    return run


def _plain(fn: Callable[..., Any], region: regions.Region) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        region.note(args)
        return fn(*args)

    return run
