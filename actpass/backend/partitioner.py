"""The pass in place of Inductor's partitioner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from actpass.backend.inductor_options import inductor_options
from actpass.backend.returned_logits import take_logits
from actpass.backend.state_inputs import RegionRequest, StateInputs, with_state
from actpass.errors import ActpassError, BudgetError, GraphUnsupported, InternalError, LogitsReturned, SubspacesDiffer
from actpass.ir.graph_inputs import GraphInputs
from actpass.ir.joint_graph import Joint
from actpass.options import Config
from actpass.passes.base import RegionState
from actpass.pipeline import Compiled, compile_joint
from actpass.plan import Plan
from actpass.plan_file import ModelPlan
from actpass.planner.peak_budget import PeakBudget
from actpass.reporting.record import Record
from actpass.runtime import progress
from actpass.runtime import record_cache as records
from actpass.runtime.deferred_logits import delivering
from actpass.runtime.subspaces import Site
from actpass.torch_compat import CustomPartitionerFn, compile_fx, functorch_config, sizes_as_planned

_ROUNDS = 4
"""In which a region is asked anew for its subspaces. What a cut stores may depend on them, if only where two cuts are equal."""


def run_passes_with_state(
    request: RegionRequest,
    compiler: Callable[..., Any],
    record: Record | None = None,
    *,
    dense: bool = False,
    **compiler_options: Any,
) -> tuple[Compiled | None, Callable[..., Any], StateInputs]:
    """`run_passes` with what the region takes beside the model's own inputs and the seed, and what that is. record: see
    `probe_state_inputs`. dense: all gradients come back so."""
    extra = probe_state_inputs(request, record)
    for _ in range(_ROUNDS):
        extra = replace(extra, factors=()) if dense else extra
        given = replace(request, peak=extra.with_state_bytes(request.peak), extra=extra)
        try:
            return *run_passes(given, compiler, **compiler_options), extra
        except SubspacesDiffer as error:
            extra = StateInputs.of(error.plan, request.inputs.paths)
    raise AssertionError(f"the subspaces of a region are others in each of {_ROUNDS} rounds, at last {len(extra.sites)}")


def run_passes(
    request: RegionRequest, compiler: Callable[..., Any], **compiler_options: Any
) -> tuple[Compiled | None, Callable[..., Any]]:
    """Give the graph of ``request`` to ``compiler`` (`compile_fx`) with the pass in place of the partitioner. Returns what the
    pass did (None on a cache hit, or if there is no backward), and the compiled callable, which returns what the graph does,
    deferred logits among it."""
    inputs = request.inputs
    if not request.config.defer_logits:
        inputs = replace(inputs, whole="defer_logits=False keeps them so; return only the loss, or leave the option out")
    taken = None
    try:
        if request.config.defers_logits and inputs.whole is None:
            taken = take_logits(request.gm, request.example_inputs, inputs)
    except GraphUnsupported as error:
        inputs = replace(inputs, whole=str(error))
    if taken is not None:
        deferring = replace(inputs, deferred=sum(not isinstance(o, int) for o in taken.outputs))
        try:
            compiled, fn = _run_passes(replace(request, gm=taken.gm, inputs=deferring), compiler, **compiler_options)
            return compiled, delivering(fn, taken.outputs)
        except LogitsReturned as error:
            inputs = replace(inputs, whole=str(error))
    return _run_passes(replace(request, inputs=inputs), compiler, **compiler_options)


def _run_passes(
    request: RegionRequest, compiler: Callable[..., Any], **compiler_options: Any
) -> tuple[Compiled | None, Callable[..., Any]]:
    """`run_passes` for a graph whose results stay what they are."""
    config = request.config
    request = with_state(request) if config.needs_seed else request
    partitioner = Partitioner(config, request.inputs, request.nonce, request.peak, request.extra.decided, request.extra.sites)
    patches = {**inductor_options(config), "custom_partitioner_fn": partitioner}
    fn = compiler(request.gm, request.example_inputs, config_patches=patches, **compiler_options)
    return (partitioner.done[0] if partitioner.done else None), fn


def probe_state_inputs(request: RegionRequest, record: Record | None = None) -> StateInputs:
    """What a region will take. record: of the region, if it was compiled before, and something came of what it was given.
    Otherwise the pass is run once without any of it, and no code is made; under a budget of peak bytes twice: the second time
    beside the subspaces that the first one asked for."""
    config, peak, paths = request.config, request.peak, request.inputs.paths
    if not (config.learned or config.keeps_low_rank_gradients):
        return StateInputs()
    if record is not None and not record.active:
        record = None  # it does not say what the region took
    extra = StateInputs.of(record.plan, paths) if record is not None else StateInputs()
    rounds = 0 if record is not None else 1 if peak is None else 2
    for _ in range(rounds):
        with functorch_config.patch(enable_autograd_cache=False):
            without = replace(request, nonce="", peak=extra.with_state_bytes(peak), extra=StateInputs())
            found, _ = run_passes(without, compile_fx, inner_compile=no_code)
        if found is None:
            return StateInputs()
        record, extra = found.record, StateInputs.of(found.record.plan, paths)
        if not extra.sites:
            break
    if record is None or not extra or not config.searches or (peak is not None and peak.part):
        return extra
    return replace(extra, decided=ModelPlan.of([record.plan]).regions[0].bare)


def no_code(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Any:
    """An inner compiler for who only asks what the pass does."""

    def never(args: list[Any]) -> Any:
        raise AssertionError("this graph was made to be looked at, not to be run")

    return never


@dataclass(frozen=True)
class Partitioner(CustomPartitionerFn):
    """The pass, as Inductor's caches see it: everything its result depends on is in its fields. done: what it did, which is no
    part of the keys, and there for whatever thread asks."""

    config: Config
    inputs: GraphInputs
    nonce: str
    peak: PeakBudget | None = None
    decided: Plan | None = None
    sites: tuple[Site, ...] = ()
    source: str = field(default_factory=records.source_hash)
    donated: bool = field(default_factory=lambda: functorch_config.donated_buffer)
    """Inductor's graph cache does not key on it: a backward that overwrites what it read would be found again after the
    user turned donation off for `retain_graph=True`, and its second run would give wrong gradients (torch 2.13)."""
    done: list[Compiled] = field(default_factory=list[Compiled], init=False, repr=False, compare=False)

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        try:
            static = frozenset(kwargs.get("static_lifetime_input_indices") or ())
            joint = Joint(gm, self.inputs, kwargs["num_fwd_outputs"], static)
            state = RegionState(joint=joint, joint_inputs=joint_inputs, kwargs=kwargs, config=self.config)
            compiled = self._within_headroom(lambda peak: compile_joint(state, peak, self.decided))
            if self.sites and compiled.record.active:
                self._check_sites(compiled.record)
        except ActpassError:
            raise
        except Exception as error:
            raise InternalError.of(error) from error
        self.done.append(compiled)
        if self.nonce:  # or it was only asked what would be done
            progress.planned()
        return compiled.forward, compiled.backward

    def _check_sites(self, record: Record) -> None:
        if StateInputs.of(record.plan, self.inputs.paths).sites != self.sites:
            raise SubspacesDiffer(len(self.sites), record.plan)

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
            repr(self.sites),
        )
