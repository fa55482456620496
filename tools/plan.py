"""Plan the training of a model that is far larger than this machine: no memory for it and no weights are needed.

    python tools/plan.py llama-70b --memory-budget 80GiB --batch 1 --seq 4096 --dtype bfloat16 --fsdp 8 --optimizer adamw-fused
    python tools/plan.py llama-7b --memory-budget 24GiB --dtype bfloat16
    python tools/plan.py config.json --memory-budget 40GiB         any transformers causal-LM or encoder config
    python tools/plan.py llama-13b                                 without a budget: what is free, and int8

Five layers are traced with fake tensors; all others are reckoned from them, layer by layer
(`actpass.extrapolation.extrapolate`). Printed are, for each kind of layer, the form of every saved tensor, its bytes before
(Inductor's default) and after, and what is run again; the plan's hash; and the predicted peak of a step, on one GPU and, with
``--fsdp N``, on each of N ranks under FSDP2 (``fully_shard`` on every layer and on the root).

The exit code is 2 if the budget can't be met, on one GPU or, with ``--fsdp``, on each rank; the least that can is said.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from arguments import memory_budget, options_from, override, positive_int, probability
from arguments import option as option_argument
from inspect_graph import errors_unwrapped
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from workloads import (
    DTYPES,
    HEADS,
    LARGE,
    WORKLOADS,
    UsageError,
    Workload,
    build_config,
    build_model,
    make_batch,
    workload_from_file,
)

from actpass.backend.backend import options_within
from actpass.diagnostics.explain import explain_model
from actpass.errors import ActpassError, BudgetError
from actpass.extrapolation.extrapolate import FoldedCut, FoldedPlan, FoldedRegion, LayerKind, ShardedBudget, Stack
from actpass.extrapolation.fsdp import Optimizer, Sharded
from actpass.extrapolation.layer_map import TRACED
from actpass.memory.footprint import MARGIN
from actpass.memory.resident import Resident
from actpass.options.config import memory_budget as bytes_of
from actpass.options.config import parse
from actpass.pipeline import Traced, finish, read
from actpass.planner.budget import Choice, PeakBudget, Region, Search, free_choice
from actpass.reporting.record import SiteRow
from actpass.reporting.report import table
from actpass.torch_compat import inductor_config

OPTIMIZERS = {"adamw": Optimizer(2, "all"), "adamw-fused": Optimizer(2, "none"), "none": Optimizer(0, "none")}
"""``adamw``: as torch.optim.AdamW is by default on a GPU (foreach)."""
UNLIMITED = sys.maxsize


@dataclass(frozen=True)
class Model:
    """A deep model, of which a few layers were traced. inputs: bytes of a batch and of buffers. check: a less deep one that was
    traced whole, and the same reckoned."""

    title: str
    region: FoldedRegion
    sharded: Sharded
    inputs: int
    check: tuple[Region, FoldedRegion] | None = None


@dataclass(frozen=True)
class Outcome:
    """A plan for one GPU, or for each rank: within ``limit``, or where nothing is (``failed`` says why), what comes nearest."""

    where: str
    plan: FoldedPlan
    limit: PeakBudget | ShardedBudget
    choice: Choice
    failed: BudgetError | None

    @property
    def needs(self) -> int:
        """Bytes, with the margin of the prediction."""
        return self.limit.needs(self.plan.cut)

    @cached_property
    def parts(self) -> dict[str, int]:
        limit = self.limit
        return _one_gpu(limit, self.plan.cut) if isinstance(limit, PeakBudget) else _each_rank(limit, self.plan.cut)


def main() -> int:
    parser = _parser()
    given = parser.parse_args()
    started = time.perf_counter()
    try:
        within = options_within(given.memory_budget, parse(options_of(given)))
        with inductor_config.patch(within):  # as what is planned will be compiled
            model = trace(given)
            outcomes = [plan_for(model, limit, where) for where, limit in limits(given, model)]
    except (UsageError, ActpassError) as error:
        parser.error(str(error))
    spent = f"{time.perf_counter() - started:.0f} s, {_peak_rss() / 2**30:.2f} GiB of this machine's memory"
    text = "\n".join(_lines(model, outcomes, spent))
    print(text)
    if given.json is not None:
        _write(given.json, json.dumps(to_dict(model, outcomes), indent=1) + "\n")
    if given.markdown is not None:
        _write(given.markdown, f"```\n$ python {' '.join(['tools/plan.py', *sys.argv[1:]])}\n{text}\n```\n")
    return 2 if any(o.failed for o in outcomes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help=f"{', '.join((*LARGE, *WORKLOADS))}; a transformers config (JSON)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a transformers config (JSON), in place of a name")
    parser.add_argument("--head", choices=HEADS, help="task of a config (default: the config's architectures say it)")
    parser.add_argument("--memory-budget", type=memory_budget, metavar="BYTES", help="peak of a step: 80GiB (default: none)")
    parser.add_argument("--batch", type=positive_int, help="sequences in a step, on each rank (default: the model's usual)")
    parser.add_argument("--seq", type=positive_int, help="tokens in a sequence (default: the model's usual)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights, gradients and optimizer state")
    parser.add_argument("--dropout", type=probability, help="replaces the config's dropout probabilities")
    parser.add_argument("--fsdp", type=positive_int, metavar="RANKS", help="plan for each of so many ranks, too")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="adamw is torch's default on a GPU (foreach)")
    parser.add_argument("--check", type=positive_int, metavar="LAYERS", help="trace so many layers whole, too, and compare")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    group = parser.add_argument_group("actpass options", "as in torch.compile(..., options={...})")
    group.add_argument("--policy", help="auto or exact")
    group.add_argument("--codec", help="int8, int4, ...; unknown ones are listed by the error")
    group.add_argument("--override", type=override, action="append", default=[], metavar="PATTERN=NAME[:RANK]")
    group.add_argument("--option", type=option_argument, action="append", default=[], metavar="KEY=VALUE")
    return parser


# ---------------------------------------------------------------------------------------------------------------- tracing


def options_of(given: argparse.Namespace) -> dict[str, Any]:
    """Those for the trace, without what is decided after it."""
    decided_later = {"projection": None, "memory_budget": None, "rank": None, "plan": None, "off": False}
    return options_from(argparse.Namespace(**{**vars(given), **decided_later}))


def trace(given: argparse.Namespace) -> Model:
    """Trace a few layers. Raises `UsageError` or `ActpassError`."""
    workload = _workload(given)
    batch, seq = workload.shape("cuda")
    shape = given.batch or batch, given.seq or seq
    config = build_config(workload, shape[1], given.dropout)
    layers, group = config.num_hidden_layers, _group(config)
    if layers < TRACED * group:
        raise UsageError(f"{workload.name!r} has {layers} layers: fewer than {TRACED * group} are planned by inspect_graph.py.")
    kinds = getattr(config, "layer_types", None)
    options = options_of(given)

    def traced(depth: int) -> tuple[nn.Module, dict[str, torch.Tensor], Traced]:
        """The model with ``depth`` layers, a batch, and its joint graph."""
        config.num_hidden_layers = depth
        if kinds:
            config.layer_types = kinds[:depth]
        torch.compiler.reset()
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"), errors_unwrapped():
            torch.manual_seed(0)
            model = build_model(config, workload.head, DTYPES[given.dtype])
            inputs = make_batch(config, workload.head, shape, "cpu", seed=0)
            regions = explain_model(model, (), inputs, options).regions
        if len(regions) != 1:
            raise UsageError(f"{workload.name!r} is traced as {len(regions)} graphs; only one can be folded.")
        return model, inputs, regions[0].traced

    model, inputs, few = traced(TRACED * group)
    stack = Stack(_list_of(model, TRACED * group), layers // group, group)
    root, units = stack.units(model)
    check = None
    if given.check is not None:
        if given.check % group or not TRACED * group <= given.check <= layers:
            raise UsageError(f"--check {given.check}: allowed are {TRACED * group} to {layers} layers, in steps of {group}.")
        whole = read(traced(given.check)[2])[0]
        check = whole, FoldedRegion(few, replace(stack, layers=given.check // group))
    there = [*model.buffers(), *inputs.values()]
    count = (root.nbytes + sum(u.nbytes for u in units)) / root.element_size
    title = f"{workload.name}, {count / 1e9:.2f} G parameters, {layers} layers, {shape[0]} x {shape[1]} tokens, {given.dtype}"
    return Model(
        f"{title}, optimizer {given.optimizer}",
        FoldedRegion(few, stack),
        Sharded(root, units, given.fsdp or 1),
        sum(t.numel() * t.element_size() for t in there),
        check,
    )


def _workload(given: argparse.Namespace) -> Workload:
    file = given.config or (Path(given.model) if given.model and Path(given.model).exists() else None)
    if file is not None:
        return workload_from_file(file, given.head)
    known = {**LARGE, **WORKLOADS}
    if given.model not in known:
        raise UsageError(f"{given.model!r} is no known model. Allowed: {', '.join(known)}, or the path of a config (JSON).")
    workload = known[given.model]
    if given.model in LARGE and given.seq:
        workload = replace(workload, fields={**workload.fields, "max_position_embeddings": max(4096, given.seq)})
    return workload


def _group(config: Any) -> int:
    """How many layers take turns (of sliding and full attention, say)."""
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    for group in range(1, len(kinds) + 1):
        if len(kinds) % group == 0 and kinds == kinds[:group] * (len(kinds) // group):
            return group
    raise AssertionError("a list is a repetition of itself")


def _list_of(model: nn.Module, depth: int) -> str:
    """The path of the module list that holds the layers."""
    found = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise UsageError(f"the layers are not in one list: {len(found)} lists have {depth} members ({', '.join(found)}).")
    return found[0]


# --------------------------------------------------------------------------------------------------------------- planning


def limits(given: argparse.Namespace, model: Model) -> Iterator[tuple[str, PeakBudget | ShardedBudget]]:
    """What to plan for. Without a budget: as much as there may be."""
    asked = bytes_of("memory_budget", given.memory_budget)
    if isinstance(asked, float):
        raise UsageError(f"--memory-budget {asked}: a fraction says nothing of a GPU. Allowed: bytes of peak, 80GiB say.")
    nbytes = UNLIMITED if asked is None else asked
    optimizer, one = OPTIMIZERS[given.optimizer], replace(model.sharded, ranks=1)
    parameters = one.parameters
    state, scratch = optimizer.state_bytes(parameters, one.count), optimizer.scratch_bytes(parameters, one.largest)
    resident = Resident(inputs=parameters + model.inputs, optimizer_state=state, accumulated=0, scratch=scratch)
    yield "one GPU", PeakBudget(nbytes, resident)
    if given.fsdp is not None:
        yield f"each of {given.fsdp} ranks under FSDP2", ShardedBudget(nbytes, model.sharded, optimizer, model.inputs)


def plan_for(model: Model, limit: PeakBudget | ShardedBudget, where: str) -> Outcome:
    """The plan within ``limit``, or the one that comes nearest to it."""
    region, failed = model.region, None
    if limit.nbytes == UNLIMITED:
        choice = region.free()
    else:
        try:
            choice = region.choose(limit)
        except BudgetError as error:
            failed = error
            choice = region.choose(replace(limit, nbytes=int(error.least or 0)))
    plan = region.describe(choice)
    return Outcome(where, plan, limit, choice, failed)


# ---------------------------------------------------------------------------------------------------------------- output


def _lines(model: Model, outcomes: list[Outcome], spent: str) -> Iterator[str]:
    yield model.title
    for outcome in outcomes:
        yield ""
        yield f"== {outcome.where}" + (f", memory_budget={outcome.limit.nbytes}" if outcome.limit.nbytes != UNLIMITED else "")
        yield from _plan_lines(outcome.plan)
        yield from _peak_lines(outcome)
        if model.check is not None:
            yield _check_line(model, outcome)
    yield ""
    yield f"planned in {spent}"


def _plan_lines(plan: FoldedPlan) -> Iterator[str]:
    header = ("tensor", "module", "shape", "dtype", "form", "before", "after")
    yield f"plan {plan.plan.hash}; bytes are those of one layer"
    for kind in (*plan.kinds, plan.rest):
        rows = [_cells(row) for row in kind.rows if row.bytes_before or row.bytes_after]
        before, after = sum(r.bytes_before for r in kind.rows), sum(r.bytes_after for r in kind.rows)
        yield f"{_which(kind.layers)}: {_gb(before)} -> {_gb(after)}"
        yield from (f"  {line}" for line in table([header, *rows]))
        if kind.again:
            yield f"  run again in the backward: {', '.join(kind.again)}"
    yield from (f"note: {note}" for note in plan.notes)
    now, default = plan.cut.saved_bytes, plan.default.saved_bytes
    yield f"saved for backward: Inductor default {_gb(default)}, now {_gb(now)} ({now / default:.2f})"


def _check_line(model: Model, outcome: Outcome) -> str:
    """The prediction for a less deep model from the traced layers, against that from the whole of it, at as tight a plan."""
    assert model.check is not None
    whole, folded = model.check
    deep, direct, few = model.region.search, Search(whole, free_choice(whole)), folded.search
    share = (outcome.plan.cut.saved_bytes - deep.least) / (deep.most - deep.least)
    capacity = direct.least + int(min(max(share, 0.0), 1.0) * (direct.most - direct.least))
    want, got = finish(whole, direct.at(capacity).choice).swapped, folded.carry_out(few.at(capacity).choice)
    return (
        f"checked on {folded.stack.layers * folded.stack.group} layers traced whole, as tight a plan: saved "
        f"{want.saved_bytes} bytes, reckoned {got.saved_bytes}; peak {want.peak_bytes}, reckoned {got.peak_bytes} "
        f"({got.peak_bytes / want.peak_bytes - 1:+.2%})"
    )


def _which(layers: tuple[int, ...]) -> str:
    if not layers:
        return "outside of layers"
    starts = [i for i in layers if i - 1 not in layers]
    ends = [i for i in layers if i + 1 not in layers]
    runs = (f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
    return f"layers {', '.join(runs)} (x{len(layers)})"


def _cells(row: SiteRow) -> tuple[str, ...]:
    form = row.stored_as
    shape = "x".join(map(str, row.shape))
    return row.kind, row.module or "-", shape, row.dtype, form, _gb(row.bytes_before), _gb(row.bytes_after)


def _peak_lines(outcome: Outcome) -> Iterator[str]:
    yield "predicted peak of a step:"
    yield from (f"  {line}" for line in table([(name, _gb(nbytes)) for name, nbytes in outcome.parts.items()]))
    if isinstance(outcome.limit, PeakBudget):
        largest = ", ".join(f"{what} {_gb(nbytes)}" for what, nbytes in outcome.plan.cut.largest_at_peak[:6])
        yield f"  largest while forward and backward run, all layers together: {largest}"
    yield f"  to allow for, with a margin of {MARGIN:.0%} for the prediction: {_gb(outcome.needs)}"
    if outcome.failed is not None:
        yield f"CAN'T BE MET: {outcome.failed}"


def _one_gpu(limit: PeakBudget, cut: FoldedCut) -> dict[str, int]:
    """What the peak is made of."""
    gradients, saved, running = cut.at_peak
    resident = limit.resident
    return {
        "parameters and inputs": resident.inputs,
        "optimizer state": resident.optimizer_state,
        "while forward and backward run: gradients that are there": gradients,
        "  what is saved": saved,
        "  what runs": running,
        "while the optimizer steps: gradients": cut.footprint.gradients,
        "  its scratch": resident.scratch,
        "in all": resident.total + max(cut.peak_bytes, cut.footprint.gradients + resident.scratch),
    }


def _each_rank(limit: ShardedBudget, cut: FoldedCut) -> dict[str, int]:
    sharded, peak = limit.sharded.parameters, limit.peak(cut)
    return {
        "sharded parameters": sharded,
        "inputs": limit.inputs,
        "optimizer state": limit.resident - sharded - limit.inputs,
        "while forward and backward run: parameters that are whole": peak.parameters,
        "  gradients, sharded or whole": peak.gradients,
        "  the reduce-scatter's buffer": peak.buffer,
        "  what is saved and what runs": peak.activations,
        "while the optimizer steps: sharded gradients": sharded,
        "  its scratch": limit.step - sharded,
        "in all": limit.resident + max(peak.total, limit.step),
    }


def to_dict(model: Model, outcomes: list[Outcome]) -> dict[str, Any]:
    """Plain data. Bytes; layers count from 0."""
    return {"model": model.title, "outcomes": [_outcome_dict(o) for o in outcomes]}


def _outcome_dict(outcome: Outcome) -> dict[str, Any]:
    plan = outcome.plan
    return {
        "where": outcome.where,
        "memory_budget": None if outcome.limit.nbytes == UNLIMITED else outcome.limit.nbytes,
        "met": outcome.failed is None,
        "why_not": None if outcome.failed is None else str(outcome.failed),
        "needs": outcome.needs,
        "peak": outcome.parts,
        "saved_bytes": plan.cut.saved_bytes,
        "saved_bytes_default": plan.default.saved_bytes,
        "plan_hash": plan.plan.hash,
        "kinds": [_kind_dict(kind) for kind in (*plan.kinds, plan.rest)],
        "plan": plan.plan.to_dict(),
    }


def _kind_dict(kind: LayerKind) -> dict[str, Any]:
    fields = ("kind", "module", "shape", "dtype", "form", "codec", "bytes_before", "bytes_after")
    rows = [{name: getattr(row, name) for name in fields} for row in kind.rows]
    return {"layers": kind.layers, "again": kind.again, "rows": rows}


def _gb(nbytes: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} B"


def _peak_rss() -> int:
    """Bytes of this process at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
