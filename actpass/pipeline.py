"""The pipeline from a joint graph to a partitioned pair of graphs and a record of what was done.

`PASSES` is the whole of it: each takes a `RegionState` and returns the next (`actpass.passes.base`). Between them a plan is
made: graphs are read, a `Planner` chooses where to cut and what to store how, by carrying choices out, and what was
done is described (`actpass.reporting.describe`)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from actpass.analysis.partitioned import PartitionConstraints, PartitionedGraph
from actpass.analysis.weight_gradients import find_weight_gradient_matmuls
from actpass.errors import ActpassError, ActpassWarning, BudgetError, GraphUnsupported, PlanError
from actpass.ir.fingerprint import fingerprint, plain_inputs
from actpass.ir.joint_graph import Joint, module_path
from actpass.passes.base import Pass, RegionState, Stage
from actpass.passes.batch_weight_gradients import BatchWeightGradients
from actpass.passes.chunked_loss import ChunkedLoss
from actpass.passes.contract_from_codes import ContractFromCodes
from actpass.passes.low_rank_gradients import LowRankGradients
from actpass.passes.merge_duplicates import MergeDuplicates
from actpass.passes.partition import Partition, cut
from actpass.passes.project_saved import ProjectSaved
from actpass.passes.project_weight_gradients import ProjectWeightGradients
from actpass.passes.quantize_saved import QuantizeSaved
from actpass.passes.save_written_inputs import SaveWrittenInputs
from actpass.passes.scatter_onto_sums import ScatterOntoSums
from actpass.passes.spell_flips import SpellFlips
from actpass.passes.sum_one_hots import SumOneHots
from actpass.plan import Plan
from actpass.plan.multi_region import OperatingPoint
from actpass.planner import apply_plan as follow
from actpass.planner.peak_budget import PeakBudget
from actpass.planner.plan_source import Planner, RegionPlan, Searching
from actpass.planner.region import PartitionPlan, Region
from actpass.reporting.describe import describe, describe_fallback
from actpass.reporting.record import Record
from actpass.torch_compat import fusion_gate_growth, inductor_config

PREPARE: tuple[Pass, ...] = (SpellFlips(), SumOneHots(), MergeDuplicates(), SaveWrittenInputs())
"""Before anything is decided."""
SPLIT_LOSS: tuple[Pass, ...] = (ChunkedLoss(), ScatterOntoSums())
"""Before a plan is made."""
CARRY_OUT: tuple[Pass, ...] = (
    ProjectWeightGradients(),
    ContractFromCodes(),
    LowRankGradients(),
    BatchWeightGradients(),
    Partition(),
    ProjectSaved(),
    QuantizeSaved(),
)
"""What a plan asks for."""
WITHIN_LAYERS = tuple(p for p in CARRY_OUT if not isinstance(p, BatchWeightGradients))
"""What a plan asks for, but what joins layers: a deep model is reckoned from single ones. Its run forms the same gradients in
batches, which take up to 32 MiB more for a moment."""
PASSES = (*PREPARE, *SPLIT_LOSS, *CARRY_OUT)


def until(name: str) -> tuple[Pass, ...]:
    """`PASSES` up to the one of that ``name``. What is left out of them is left as it is."""
    names = [p.name for p in PASSES]
    return PASSES[: names.index(name) + 1]


@dataclass(frozen=True)
class PlanResult:
    """What was decided, of a region that was not left to Inductor. whole: the joint graph before its loss went to pieces."""

    whole: Joint
    region: Region
    choice: PartitionPlan


@dataclass(frozen=True)
class Compiled:
    """The graphs to hand to Inductor, what was done, the cut that they are, what each pass made (the first stage is the joint
    graph as it came), and the region before anything was decided. decided: None if the region was left to Inductor."""

    record: Record
    cut: PartitionedGraph
    stages: tuple[Stage, ...]
    traced: RegionState
    decided: PlanResult | None = None

    @property
    def forward(self) -> fx.GraphModule:
        return self.cut.forward

    @property
    def backward(self) -> fx.GraphModule:
        return self.cut.backward

    @property
    def seconds(self) -> dict[str, float]:
        """That each pass took, by name."""
        return {stage.name: stage.seconds for stage in self.stages}


def run_pass(step: Pass, before: RegionState) -> RegionState:
    """``before`` after ``step``, checked, with a stage more."""
    start = time.perf_counter()
    after = step.run(before)
    known, is_upstreams = before.graphs.values(), before.cut is None and after.cut is not None
    for gm in after.graphs.values():
        if gm not in known and not is_upstreams:
            gm.graph.lint()
    step.check(before, after)
    stage = Stage(step.name, after.graphs, time.perf_counter() - start)
    return replace(after, stages=(*before.stages, stage))


def run_passes(steps: Sequence[Pass], state: RegionState) -> RegionState:
    """``state`` after all ``steps``. What serves something that may be given up is undone where the graph does not allow it and
    the plan is not given."""
    undone: dict[str, RegionState] = {}
    for step in steps:
        if step.serves is not None:
            undone.setdefault(step.serves, state)
        try:
            state = run_pass(step, state)
        except GraphUnsupported as error:
            if step.serves is None or state.decides.is_given:
                raise
            off, back = f"the {step.serves} of this region are off: {error}", undone[step.serves]
            state = replace(back, cut=back.cut or back.exact, off=(*state.off, off), stages=state.stages)
    return state


def compile_joint(
    state: RegionState, peak: PeakBudget | None = None, decided: Plan | None = None, passes: Sequence[Pass] = PASSES
) -> Compiled:
    """Partition the joint graph of ``state`` as its configuration asks, by those of `PASSES` that are in ``passes``. peak: the
    budget, if it is one of peak bytes. decided: the plan, if a search has found it for the same graph.

    A graph that can't be read falls back to the stock cut, with a warning and the reason in the record. Raises for a mistake in
    the options, for a given plan that can't be followed, `BudgetError` where the stock cut does not fit a budget of peak bytes
    (but under ``fallback="warn"``), and whatever a bug of the pass raises: under ``fallback="warn"`` that falls back, too."""
    traced, given, config = None, decided, state.config
    try:
        prepared = run_passes([p for p in PREPARE if p in passes], replace(state, stages=(Stage("traced", state.graphs),)))
        if config.plan is not None:
            given = follow.find(config.plan, prepared.joint)
        default = cut(prepared.joint, state.joint_inputs, state.kwargs, PartitionConstraints(recompute_materialized=False))
        traced = replace(prepared, default=default, default_bytes=default.saved_bytes)
        return _compile(traced, peak, Searching() if given is None else follow.Following(given), passes)
    except Exception as error:
        unreadable = isinstance(error, GraphUnsupported)
        if isinstance(error, PlanError) and decided is not None:
            raise AssertionError(f"a plan that was searched for can't be followed: {error}") from error
        expected = isinstance(error, ActpassError) or config.fallback == "error"
        if traced is None or (expected and not unreadable):
            raise
        cause, reason = error, f"{error}" if unreadable else f"{type(error).__name__}: {error}"
    if given is not None and decided is None and not given.is_default:
        raise follow.refusal(reason) from cause
    return _left_to_inductor(traced, peak, reason)


def _left_to_inductor(traced: RegionState, peak: PeakBudget | None, reason: str) -> Compiled:
    """The region as Inductor cuts it. Raises `BudgetError` where that exceeds a budget of peak bytes, but under
    ``fallback="warn"``."""
    config, default = traced.config, traced.default
    assert default is not None
    fits = peak is not None and peak.needs(default) <= peak.nbytes
    if peak is not None and not fits and config.fallback == "error":
        raise _does_not_fit(peak, default, reason)
    if config.searches and not fits:
        reason = f"{reason}; its memory_budget is not held"
    warnings.warn(f"actpass left a region to Inductor alone, because {reason}", ActpassWarning, stacklevel=2)
    record = describe_fallback(traced.joint, default, config, reason)
    if peak is not None and fits:  # it has no choice, but counts in one plan over all parts of a step
        record = _under(peak, replace(record, levels=(OperatingPoint(default.saved_bytes, 0, default.footprint),)))
    return Compiled(record, default, traced.stages, traced)


def _does_not_fit(peak: PeakBudget, default: PartitionedGraph, reason: str) -> BudgetError:
    needed = peak.needs(default)
    return BudgetError(
        f"memory_budget={peak.nbytes} bytes of peak can't be met: the pass can't change this region, because {reason}, and as "
        f"Inductor cuts it it needs {needed} bytes: {peak.resident}, and above them {default.peak_bytes} predicted (and a "
        f"margin). Use memory_budget={needed} or more, a smaller batch, or options={{'fallback': 'warn'}}, which trains over "
        "the budget, with a warning.",
        needed,
    )


def _under(peak: PeakBudget, record: Record) -> Record:
    totals = replace(record.totals, resident_bytes=peak.resident.total, scratch_bytes=peak.resident.scratch)
    return replace(record, totals=totals)


def read(
    traced: RegionState, default_bytes: int | None = None, planner: Planner | None = None, passes: Sequence[Pass] = PASSES
) -> tuple[Region, RegionState]:
    """What a plan can be made for: the joint graph, with its loss in pieces if the ``planner`` (default: a search) asks for
    that. default_bytes: what Inductor's default saves, which the logits are weighed against, if it is not the traced graph's
    own."""
    planner, config, default = planner or Searching(), traced.config, traced.default
    assert default is not None
    weighed = traced.default_bytes if default_bytes is None else default_bytes
    state = replace(traced, default_bytes=weighed, loss_rows=planner.loss_rows(config))
    state = run_passes([p for p in SPLIT_LOSS if p in passes], state)
    planner.check_loss(state)
    finding = find_weight_gradient_matmuls(state.joint)
    rows = state.chunked.rows if state.chunked is not None else 0
    return Region(state.joint, traced.joint_inputs, traced.kwargs, config, finding, default, rows), replace(
        state, finding=finding
    )


def _compile(traced: RegionState, peak: PeakBudget | None, planner: Planner, passes: Sequence[Pass]) -> Compiled:
    region, state = read(traced, planner=planner, passes=passes)

    choice, done = planner.plan(region, lambda source: carry_out(source, state, passes), peak)
    off = "; ".join(done.off)
    if off:
        warnings.warn(f"actpass: {off}", ActpassWarning, stacklevel=2)
    plan = replace(done.plan, graph=fingerprint(traced.joint), inputs=plain_inputs(traced.joint))
    record = describe(traced.joint, region.joint, replace(done, plan=plan))
    notes = (*done.notes, *([choice.note] if choice.note is not None else []))
    record = replace(record, notes=(*record.notes, *notes))
    if peak is not None:
        record = _under(peak, replace(record, levels=choice.levels, limited=choice.limited))
    if off:
        record = replace(record, active=False, inactive_because=off)
    return Compiled(record, done.partitioned, done.stages, traced, PlanResult(traced.joint, region, choice))


def carry_out(source: RegionPlan, state: RegionState | None = None, passes: Sequence[Pass] = CARRY_OUT) -> RegionState:
    """The region of ``source`` after what it decides. state: what `read` returned with the region, if its stages and what is
    told of its loss matter."""
    region, choice = source.region, source.choice
    if state is None:
        state = RegionState(
            joint=region.joint,
            joint_inputs=region.joint_inputs,
            kwargs=region.kwargs,
            config=region.config,
            default=region.default,
            finding=region.finding,
        )
    start = replace(state, source=source, constraints=choice.constraints, exact=choice.cut, reasons=choice.reasons)
    done = run_passes([p for p in CARRY_OUT if p in passes], start)
    return replace(done, cut=done.cut or done.exact, plan=_whole(done.plan, region, choice.constraints))


def _whole(plan: Plan, region: Region, constraints: PartitionConstraints) -> Plan:
    """The decisions of ``plan`` with all else that was chosen."""
    recompute, must_save = tuple(sorted(constraints.recompute)), tuple(sorted(constraints.must_save))
    nodes = {n.name: n for n in region.joint.gm.graph.nodes}
    modules = tuple((name, module_path(nodes[name])) for name in sorted({*recompute, *must_save}))
    return replace(
        plan,
        recompute=recompute,
        must_save=must_save,
        modules=modules,
        recompute_materialized=constraints.recompute_materialized,
        chunk_rows=region.chunk_rows,
        seeded=region.joint.seed is not None,
        least_shared_bytes=inductor_config.score_fusion_memory_threshold,
        peak_growth=fusion_gate_growth(),
    )
