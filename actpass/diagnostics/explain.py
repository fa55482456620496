"""Run the pass on a model without compiling it: Dynamo and AOTAutograd trace, the pass decides, and the regions then run
as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from actpass.backend.backend import noting
from actpass.backend.dynamo_graph import prepared
from actpass.backend.headroom import peak_budget
from actpass.backend.partitioner import no_code, run_passes, run_passes_with_state
from actpass.backend.state_inputs import RegionRequest
from actpass.diagnostics.interpreter import isolated_forward, own_errors, preserve_buffers_and_rng
from actpass.diagnostics.pareto_sweep import tradeoff
from actpass.errors import OptionError
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
    """report: as after training. regions: every region's graphs by stage (`Compiled`)."""

    report: Report
    regions: tuple[Compiled, ...]


def explain_model(
    model: torch.nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    *,
    explore: bool = False,
) -> Explanation:
    """See `actpass.explain`, and `actpass.explore`."""
    config = parse(options)
    if explore and POLICIES[config.tensor_options.decided_by].needs_codec:
        raise OptionError(
            f"explore: {config.tensor_options.described} names the one format that tensors take. Give a policy that has a "
            "choice under a budget, policy='auto' for one."
        )
    compiled: list[Compiled] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any], **_: Any) -> Any:
        done = _analyse(model, gm, example_inputs, config, explore)
        if done is not None:
            compiled.append(done)
        return gm.forward

    model = getattr(model, "_orig_mod", model)
    eager: int | None = None
    with torch.enable_grad(), preserve_buffers_and_rng(model), own_errors():
        dynamo.optimize(backend)(isolated_forward(model))(*inputs, **kwargs)
        if len(compiled) == 1:
            eager = _saved_bytes_eager(model, inputs, kwargs)
    records = [c.record for c in compiled]
    if len(records) == 1:
        records[0] = replace(records[0], totals=replace(records[0].totals, saved_bytes_eager=eager))
    why = None if records else "no part of this model has both a forward and a backward that Dynamo can trace"
    return Explanation(Report(tuple(records), why), tuple(compiled))


def _analyse(
    model: torch.nn.Module, gm: fx.GraphModule, example_inputs: list[Any], config: Config, explore: bool
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
    record = with_eager_curve(noting(compiled.record, notes), gm, example_inputs)
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
