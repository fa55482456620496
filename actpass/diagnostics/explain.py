"""Run the pass on a model without compiling it: Dynamo and AOTAutograd trace, the pass decides, and the regions then run
as they are."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from actpass.backend.backend import noting
from actpass.backend.dynamo_graph import prepared
from actpass.backend.headroom import peak_budget
from actpass.backend.partitioner import no_code, run_passes, run_passes_with_state
from actpass.backend.state_inputs import RegionRequest
from actpass.diagnostics.advise import advise as advise_on
from actpass.diagnostics.advise import can_checkpoint, checkpointing, losses_alone, other_storage
from actpass.diagnostics.interpreter import isolated_forward, own_errors, preserve_buffers_and_rng
from actpass.diagnostics.pareto_sweep import tradeoff
from actpass.errors import ActpassError, ActpassWarning, InternalError, OptionError
from actpass.ir.copying import copy_module
from actpass.ir.graph_inputs import GraphInputs
from actpass.memory.resident import frozen_around, storages
from actpass.options import Config, parse
from actpass.pipeline import Compiled
from actpass.plan import POLICIES
from actpass.reporting import Report
from actpass.reporting.eager_estimate import with_eager_curve
from actpass.torch_compat import compile_fx, detect_fake_mode, dynamo, functorch_config


@dataclass(frozen=True)
class Explanation:
    """report: as after training, and with advice where that was asked for. regions: every region's graphs by stage
    (`Compiled`)."""

    report: Report
    regions: tuple[Compiled, ...]


def explain_model(
    model: torch.nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    *,
    explore: bool = False,
    advise: bool = False,
    eager: bool = True,
) -> Explanation:
    """See `actpass.explain`, and `actpass.explore`. eager: whether to say what eager mode takes, too."""
    config = parse(options)
    other = other_storage(config) if advise else None
    trials = _Trials(advise, None if other is None else (other[0], parse(_with_storage(options, other[1]))))
    if explore and POLICIES[config.tensor_options.decided_by].needs_codec:
        raise OptionError(
            f"explore: {config.tensor_options.described} names the one format that tensors take. Give a policy that has a "
            "choice under a budget, policy='auto' for one."
        )
    compiled: list[Compiled] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any], **_: Any) -> Any:
        done = _analyse(model, gm, example_inputs, config, explore, eager)
        if done is not None:
            compiled.append(done)
            trials.run(model, gm, example_inputs, config, done)
        return gm.forward

    model = getattr(model, "_orig_mod", model)
    saved_eager: int | None = None
    with torch.enable_grad(), preserve_buffers_and_rng(model), own_errors():
        dynamo.optimize(backend)(isolated_forward(model))(*inputs, **kwargs)
        if len(compiled) == 1 and eager:
            saved_eager = _saved_bytes_eager(model, inputs, kwargs)
    records = [c.record for c in compiled]
    if len(records) == 1:
        records[0] = replace(records[0], totals=replace(records[0].totals, saved_bytes_eager=saved_eager))
    why = None if records else "no part of this model has both a forward and a backward that Dynamo can trace"
    given = [t for t in pytree.tree_leaves((inputs, dict(kwargs))) if isinstance(t, torch.Tensor)]
    if advise and can_checkpoint(model):
        trials.done[_CHECKPOINTING] = _with_checkpoints(model, inputs, kwargs, options)
    advice = advise_on(model, given, config, compiled, trials.of_all(len(compiled))) if advise else None
    return Explanation(Report(tuple(records), why, advice=advice), tuple(compiled))


_CHECKPOINTING = "activation checkpointing (model.gradient_checkpointing_enable())"
_LOSS_ALONE = "a forward that returns the loss alone"


def _with_storage(options: Mapping[str, Any] | None, storage: Mapping[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in (options or {}).items() if k not in ("policy", "codec")}, **storage}


@dataclass
class _Trials:
    """The same graphs with other settings. done: by the words for a setting, what became of each region so far."""

    wanted: bool
    storage: tuple[str, Config] | None
    done: dict[str, list[Compiled]] = field(default_factory=dict[str, list[Compiled]])

    def run(
        self, model: torch.nn.Module, gm: fx.GraphModule, example_inputs: list[Any], config: Config, compiled: Compiled
    ) -> None:
        """compiled: what became of ``gm`` as it is."""
        if not self.wanted:
            return
        if self.storage is not None:
            what, other = self.storage
            self._run(what, model, gm, example_inputs, other)
        alone = losses_alone(gm, compiled)
        if alone is not None:
            self._run(_LOSS_ALONE, model, alone, example_inputs, config)

    def _run(self, what: str, model: torch.nn.Module, gm: fx.GraphModule, example_inputs: list[Any], config: Config) -> None:
        try:
            with _quietly():
                found = _analyse(model, gm, example_inputs, config, explore=False, eager=False)
        except InternalError:
            raise
        except ActpassError:  # the setting can't be had here, and is not told of
            return
        if found is not None:
            self.done.setdefault(what, []).append(found)

    def of_all(self, regions: int) -> dict[str, list[Compiled]]:
        """Those that are known of all ``regions``: where there are fewer, or more, some of the step is not seen. What one
        region returns beside a loss another may take: a graph without it is one of a whole step only."""
        whole = {what: found for what, found in self.done.items() if len(found) == regions}
        return {what: found for what, found in whole.items() if what != _LOSS_ALONE or regions == 1}


@contextmanager
def _quietly() -> Generator[None, None, None]:
    """What is only tried warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ActpassWarning)
        yield


def _with_checkpoints(
    model: torch.nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any] | None
) -> list[Compiled]:
    """The regions of ``model`` with its layers in checkpoints; none where that can't be traced or planned."""
    with checkpointing(model), _quietly():
        try:
            return list(explain_model(model, inputs, kwargs, options, eager=False).regions)
        except InternalError:
            raise
        except (ActpassError, RuntimeError):
            return []


def _analyse(
    model: torch.nn.Module, gm: fx.GraphModule, example_inputs: list[Any], config: Config, explore: bool, eager: bool
) -> Compiled | None:
    gm, notes = prepared(gm, example_inputs, config, guarded=False)
    plain = GraphInputs.of(gm, example_inputs)
    peak = peak_budget(config, example_inputs, frozen_around(example_inputs, [model]))  # of parameters, which fakes are not
    gm, example_inputs = _off_meta(gm, example_inputs)
    request = RegionRequest.of(gm, example_inputs, config, inputs=plain, peak=peak)
    # what a region takes beside its inputs fixes its plan, and then there is no choice whose alternatives could be explored
    run = run_passes if explore else run_passes_with_state
    with functorch_config.patch(enable_autograd_cache=False):
        compiled = run(request, compile_fx, inner_compile=no_code)[0]
    if compiled is None:
        return None
    record = noting(compiled.record, notes)
    record = with_eager_curve(record, gm, example_inputs) if eager else record
    if explore and compiled.decided is not None:
        record = replace(record, tradeoff=tradeoff(compiled.decided))
    return replace(compiled, record=record)


def _off_meta(gm: fx.GraphModule, example_inputs: list[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """The same region with the CPU in place of the meta device: Inductor drops whatever is computed on meta tensors.
    Inputs become fake CPU tensors, so that nothing is allocated."""
    fakes = [n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode([*fakes, *example_inputs])
    if mode is None or not any(isinstance(e, torch.Tensor) and e.device.type == "meta" for e in example_inputs):
        return gm, example_inputs
    clone, _ = copy_module(gm)
    for node in clone.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(_cpu_for_meta, (node.args, dict(node.kwargs)))
    clone.recompile()

    def on_cpu(fake: Any, example: Any) -> Any:
        if not isinstance(example, torch.Tensor):
            return example
        source = fake if isinstance(fake, torch.Tensor) else example
        with mode:
            new = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="cpu")
        return new.requires_grad_(example.requires_grad)

    return clone, [on_cpu(f, e) for f, e in zip(fakes, example_inputs, strict=True)]


def _cpu_for_meta(value: Any) -> Any:
    is_meta = value == "meta" or (isinstance(value, torch.device) and value.type == "meta")
    return torch.device("cpu") if is_meta else value


def _saved_bytes_eager(model: torch.nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Bytes of all storages that eager autograd saves, parameters, buffers and inputs excluded. None where the model's eager
    code reads a value that a meta tensor does not have."""
    own = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((inputs, dict(kwargs)))]
    resident = {key for t in own if isinstance(t, torch.Tensor) for key, _ in storages(t)}
    saved: dict[int, int] = {}
    keep: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.update((key, nbytes) for key, nbytes in storages(t) if key not in resident)
        keep.append(t)
        return t

    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.forward(*inputs, **kwargs)
    except RuntimeError:
        if not any(t.is_meta for t in own if isinstance(t, torch.Tensor)):
            raise
        return None
    return sum(saved.values())
