"""The functions that a user calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from actpass.diagnostics.audit import Audit, audit_model, loss_of
from actpass.diagnostics.calibrate import calibrate_model
from actpass.diagnostics.explain import explain_model
from actpass.errors import ReportError, StateError
from actpass.extrapolation.deep_model import Training
from actpass.extrapolation.deep_model import plan_deep_model as plan_training
from actpass.extrapolation.deep_plan import DeepPlan
from actpass.memory.resident import ASSUMED
from actpass.options import global_budget, parse
from actpass.plan.sensitivity import Sensitivities
from actpass.reporting import Record, Report
from actpass.runtime import regions, subspaces
from actpass.runtime.data_parallel import why_dense
from actpass.runtime.regions import Region, following_global_budget, modules_of, recompile, regions_of, why_no_more_graphs
from actpass.runtime.step_counter import STEP_COUNTER
from actpass.torch_compat import has_all_graphs, module_in


def report(model: torch.nn.Module) -> Report:
    """What the compiled regions of ``model`` save for backward, in which form, and why.

    Call it after the first training step: regions are compiled when they first run. Before that, or for a model that was
    not compiled with ``backend="actcomp"``, the report says ``inactive`` and why.
    """
    found = regions_of(_module(model, "report"))
    rows = tuple(subspaces.rows(_plain(model))) if found else ()
    why = None if found else _why_nothing(model)
    factored = any(r.record.plan.get("low_rank_gradients") for r in found)
    dense = why_dense(_plain(model)) if factored else None
    assumed = any(r.peak.resident.assumed for r in found if r.peak is not None)
    notes = [dense, f"optimizer state is {ASSUMED}" if assumed else None, _no_more_graphs(found)]
    said = tuple(n for n in notes if n is not None)
    return Report(tuple(map(_record, found)), why, rows, notes=said, modules=modules_of(_plain(model), found))


def _no_more_graphs(found: Sequence[Region]) -> str | None:
    codes = {r.code for r in found if r.code is not None}
    why = next((why_no_more_graphs(code) for code in codes if has_all_graphs(code)), None)
    return f"{why}." if why else None


def _record(region: Region) -> Record:
    """What a region did in the last step: nothing, if that did not run it."""
    missed = region.missed
    return region.record if missed is None else replace(region.record, active=False, inactive_because=missed)


def _why_nothing(model: torch.nn.Module) -> str:
    why = "no training step of this model has run through backend='actcomp' in this process yet"
    recurrent = sorted({type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.RNNBase)})
    if not recurrent:
        return why
    return f"{why}, or Dynamo compiled nothing of it: what calls {' or '.join(recurrent)} of torch.nn runs in eager mode"


def explain(
    model: torch.nn.Module, *inputs: Any, options: Mapping[str, Any] | None = None, advise: bool = True, **kwargs: Any
) -> Report:
    """What `report` would say, without compiling and without training: traces ``model(*inputs, **kwargs)``, runs the pass and
    throws the graphs away. Works on the meta device, for models that do not fit this machine.

    advise: whether the report ends with at most five lines of advice (``report.advice``): what a step's memory at its peak is,
    and what would lower it, with the predicted peak of the whole step. The next storage (``policy="auto"`` for exact, then
    ``codec="int4"``; none under a budget, a plan or a codec), the loss alone where more is returned, and activation
    checkpointing where the model is one of ``transformers`` are planned, which takes up to four times the time. AdamW's state
    in 8 bits, frozen weights in 4 bits and adapters are computed. What takes a hundredth less than now is told.

    The model runs forward twice in eager mode (so on a real device it takes the memory of that); buffers and random state are
    put back. The report's ``saved_bytes_eager`` is known here. Raises `OptionError` for bad options, `BudgetError` for a budget
    that can't be met, `PlanError` for a plan that can't be followed; none inside Dynamo's ``BackendCompilerFailed``.
    """
    return explain_model(_module(model, "explain"), inputs, kwargs, options, advise=advise).report


def explore(model: torch.nn.Module, *inputs: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """`explain`, and what other budgets would give: for `Report.plot_pareto`. Makes some twenty cuts more, in which a large
    model takes minutes. For any policy that has a choice under a budget; raises `OptionError` for a ``codec`` that is named,
    and what `explain` raises."""
    return explain_model(_module(model, "explore"), inputs, kwargs, options, explore=True).report


def plan_deep_model(
    make: Callable[[int], tuple[torch.nn.Module, Mapping[str, Any]]],
    training: Training,
    *,
    options: Mapping[str, Any] | None = None,
) -> DeepPlan:
    """Plan a model of many identical layers that does not fit this machine, from five of them, on fake tensors.

    make: from a number of layers to the model that has so many and a batch (keyword arguments of its forward); it is called
    with five, under a ``FakeTensorMode``: nothing is allocated. The layers lie in one ``nn.ModuleList``. training: how many
    layers the model has, and how it is trained (`actpass.Training`). options: as for ``torch.compile``; a ``memory_budget`` is
    bytes of peak of one device, and of each rank.

    Returns an `actpass.DeepPlan`: ``print`` it, or read ``outcomes``, ``fits``, ``to_dict()``. Raises `OptionError` for
    options and depths that are not usable, `GraphUnsupported` where the layers are not alike. A budget that can't be met does
    not raise: its outcome has the error in ``failed``, and the plan that comes nearest.
    """
    return plan_training(make, training, options=options)


def audit(
    model: torch.nn.Module,
    batch: Any,
    *,
    options: Mapping[str, Any] | None = None,
    seeds: int = 8,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> Audit:
    """The gradient of one batch under ``options`` against the exact one, from the same joint graph, per parameter.

    batch: what the model's forward takes: a dict of keyword arguments, a tuple of positional ones, or one tensor. options: as
    for ``torch.compile``; None takes those that the model was compiled with (or the defaults). seeds: how many draws; at least
    2 for bias z-scores. optimizer: its Adam state gives the preconditioned direction; without state it is the gradient's sign.
    loss: from what the model returns to a scalar; default: the output, or its ``.loss``.

    Graphs are interpreted, not compiled: 1 + seeds forwards and backwards at the memory of the exact form, and one more set
    of gradients. Parameters' ``.grad``, buffers and random state are put back. Raises `OptionError`.
    """
    if options is None:
        found = regions_of(_module(model, "audit"))
        config = found[0].config if found else parse(None)
    else:
        config = parse(options)
    return audit_model(_module(model, "audit"), _arguments(batch), config, seeds, optimizer, loss)


def calibrate(
    model: torch.nn.Module,
    batch: Any,
    *,
    options: Mapping[str, Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> Sensitivities:
    """Measure on one small batch what an error in each saved tensor does to the gradients, so that a memory budget knows where
    bits matter: ``options={"memory_budget": ..., "sensitivities": actpass.calibrate(model, batch)}``.

    batch, loss: as for `audit`; two sequences are enough, and the memory that it takes grows with them. optimizer: Adam's
    second moments precondition the gradients; without them, Adafactor's estimate from the batch's own gradient. options: as
    for ``torch.compile``; what they say of forms and budgets is ignored.

    One forward, and 2 + S backwards for S saved tensors, interpreted, at the memory of the exact form and one set of gradients;
    2^16 coordinates of each gradient are compared. Parameters' ``.grad``, buffers and random state are put back. Raises
    `OptionError` where there is nothing to measure.
    """
    config = parse(options)
    inputs, kwargs = _arguments(batch)
    return calibrate_model(_module(model, "calibrate"), inputs, kwargs, config, optimizer, loss or loss_of)


def set_memory_budget(budget: float | int | str | None) -> None:
    """The budget of every model in this process whose ``options`` name none: a float in [0, 1] (a fraction of the bytes that
    Inductor's default would save for backward), bytes of a step's peak (an int > 1, or ``"20GiB"``), ``"auto"`` (what the CUDA
    device has free), or None (no budget).

    What was compiled under another global budget is compiled again when it is next called. Raises `BudgetError` for what is
    no budget, and changes nothing then; one that can't be met raises when a model is compiled.
    """
    global_budget.set(budget)
    now = global_budget.get()
    for region in following_global_budget():
        if region.config.memory_budget != now:
            recompile(region)


@contextlib.contextmanager
def memory_budget(budget: float | int | str | None) -> Generator[None, None, None]:
    """`set_memory_budget` for what is compiled inside (a model is compiled at its first call): it stays so afterwards."""
    before = global_budget.set(budget)
    try:
        yield
    finally:
        global_budget.set(before)


def set_optimizer(*optimizers: torch.optim.Optimizer) -> None:
    """Name the optimizers that will step what is compiled, before the first training step. Only a ``memory_budget`` in bytes
    asks for them: what they hold is part of the peak.

    An optimizer is known from its first step on without this. Until then AdamW's state is assumed, two copies of every
    trainable parameter, which wastes what another does not take, or refuses a budget that another would meet; and where its
    first step shows that there is less room, the model is compiled again. What its first step will add is known by its class,
    in closed form; no code of it is run. It is not kept alive. Raises `TypeError` for what is no torch optimizer.
    """
    for optimizer in optimizers:
        if not isinstance(cast(object, optimizer), torch.optim.Optimizer):
            raise TypeError(
                f"actpass.set_optimizer takes torch optimizers, not {type(optimizer).__name__}. For any other, give the bytes "
                "of its state: options={'optimizer_state_bytes': ...}."
            )
    regions.meet(optimizers)


def step() -> None:
    """Advance the clock by one optimizer step. Only for training loops without a torch optimizer: a torch optimizer's
    ``step()`` does it by itself."""
    STEP_COUNTER.advance()
    regions.step_done()


def state_dict(model: torch.nn.Module) -> dict[str, Any]:
    """What a resumed run needs to draw the same bases as the run that was not stopped: plain ints and tensors, loads with
    ``torch.load(weights_only=True)``."""
    return {**STEP_COUNTER.state_dict(), "subspaces": subspaces.state_dict(_plain(_module(model, "state_dict")))}


def load_state_dict(model: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Restore what `state_dict` returned. The base seed and `refresh_interval` are options and must be given as before.

    Raises `StateError` if ``state`` is not such a dict; nothing is changed then.
    """
    own = _plain(_module(model, "load_state_dict"))
    state = dict(state)
    learned = state.pop("subspaces", {})
    before = STEP_COUNTER.state_dict()
    STEP_COUNTER.load_state_dict(state)
    try:
        subspaces.load_state_dict(own, learned)
    except StateError:
        STEP_COUNTER.load_state_dict(before)
        raise


def register_with_accelerate() -> None:
    """Let HF ``TrainingArguments(torch_compile=True, torch_compile_backend="actcomp")`` through.

    accelerate accepts only the members of its ``DynamoBackend`` enumeration; this adds one. Without it use
    ``model.compile(backend="actcomp", options={...})`` before the Trainer, which also takes options. Raises `ImportError` if
    accelerate is not installed.
    """
    from accelerate.utils.dataclasses import DynamoBackend  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]

    if "ACTCOMP" not in DynamoBackend.__members__:
        member = str.__new__(DynamoBackend, "ACTCOMP")
        member._name_, member._value_ = "ACTCOMP", "ACTCOMP"
        DynamoBackend._member_map_["ACTCOMP"] = member
        DynamoBackend._value2member_map_["ACTCOMP"] = member
        DynamoBackend._member_names_.append("ACTCOMP")


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(cast(Mapping[str, Any], batch))
    return (tuple(cast(Sequence[Any], batch)) if isinstance(batch, tuple | list) else (batch,)), {}


def _plain(model: torch.nn.Module) -> torch.nn.Module:
    """What `torch.compile` and DDP wrapped, whose names of parameters do not change with the wrapping."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), torch.nn.Module):
            model = inner
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            model = module_in(model)
        else:
            return model


def _module(model: Any, what: str) -> torch.nn.Module:
    if not isinstance(model, torch.nn.Module):
        raise ReportError(
            f"actpass.{what} takes the torch.nn.Module that was compiled (or what torch.compile returned for it), not "
            f"{type(model).__name__}."
        )
    return model
