"""The rows of a benchmark: one model trained through eager, Inductor at some recompute budget, or actpass.

Every row has its own copy of the same weights and sees the same batches. All rows live in one process; memory is measured
above the level at the start of a step, so that idle rows do not count.
"""

from __future__ import annotations

import argparse
import copy
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import other_build
import torch
from arguments import option, probability, rank
from bench_counts import BudgetCut, Counts, count_default, count_eager, counts_of_report
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from workloads import checkpoint_layers

import actpass
from actpass import optim
from actpass.low_rank_gradient import nbytes
from actpass.memory.profiler import measure
from actpass.options import options_for

ROW_FORMS = (
    "eager, inductor, inductor-budget=B, inductor-recompute, inductor-fp8, actcomp:NAME[:RANK][,KEY=VALUE], "
    "before:NAME[:RANK][,KEY=VALUE] or before,KEY=VALUE, with options as that build spells them (the build of --against); "
    "for any of them also optimizer=NAME, lr=X, optimizer.KEY=VALUE, and checkpointing=true: transformers' own for every layer"
)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch": torch.optim.AdamW,
    **optim.OPTIMIZERS,
}
FP8_PASS = {
    "quant_type": "torch.float8_e5m2", "size_in_mb": 0.0, "use_scaling": True,
    "allowed_dtypes": "torch.float32;torch.bfloat16",
}  # fmt: skip
"""Inductor's own pass that stores saved tensors in float8, for tensors of any size."""
Gradients = list[Tensor | None]
Average = Callable[[Sequence[float]], float]


@dataclass(frozen=True, slots=True)
class RowSpec:
    """label: as given on the command line. budget: Inductor's ``activation_memory_budget``. options: the back end's own.
    optimizer: a name of `OPTIMIZERS`. training: the optimizer's options. checkpointing: whether transformers checkpoints every
    layer."""

    label: str
    kind: str
    budget: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "torch"
    training: Mapping[str, Any] = field(default_factory=dict)
    checkpointing: bool = False

    def optimize(self, model: nn.Module, **defaults: Any) -> torch.optim.Optimizer:
        """Its optimizer for all of ``model``. defaults: options that the row may replace."""
        return OPTIMIZERS[self.optimizer](model.named_parameters(), **{**defaults, **self.training})


def parse_row(text: str) -> RowSpec:
    """Read a row as `ROW_FORMS` has them; an argparse type."""
    form, *others = text.split(",")
    options = dict(map(option, others))
    optimizer, checkpointing = options.pop("optimizer", "torch"), options.pop("checkpointing", False)
    if not isinstance(checkpointing, bool):
        raise argparse.ArgumentTypeError(f"checkpointing={checkpointing} in {text!r}. Allowed: true, false.")
    if optimizer not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(f"optimizer={optimizer} in {text!r}. Allowed: {', '.join(OPTIMIZERS)}.")
    training = {k.removeprefix("optimizer."): options.pop(k) for k in list(options) if k == "lr" or k.startswith("optimizer.")}
    kind, budget, named = _form(form)
    if named is None and not (kind and options.keys() == set()):
        raise argparse.ArgumentTypeError(f"{text!r} is no row. Allowed: {ROW_FORMS}.")
    if form == "inductor-fp8":
        options = {"post_grad_fusion_options": {"activation_quantization_aten_pass": FP8_PASS}}
    return RowSpec(text, kind, budget, {**(named or {}), **options}, optimizer, training, checkpointing)


def _form(text: str) -> tuple[str, float | None, dict[str, Any] | None]:
    """Kind ("": none), recompute budget, and actpass's option of that name with its rank."""
    plain = {"eager": ("eager", None), "inductor": ("inductor", None), "inductor-recompute": ("inductor", 0.0)}
    if text in plain or text == "inductor-fp8":
        return *plain.get(text, ("inductor", 1.0)), None
    if text == "before":
        return "before", None, {}
    name, _, rest = text.partition(":")
    if name in ("actcomp", "before") and rest:
        option_name, _, r = rest.partition(":")
        return name, None, {**options_for(option_name), **({"rank": rank(r)} if r else {})}
    name, _, budget = text.partition("=")
    return ("inductor", probability(budget), None) if name == "inductor-budget" else ("", None, None)


@dataclass(frozen=True)
class Setup:
    """What all rows share. base: the initial weights, on the CPU. batches: keyword arguments, on the device.
    comparable: whether two rows compute the same gradients (no dropout). vocab: width of the logits."""

    base: nn.Module
    batches: Sequence[Mapping[str, Tensor]]
    device: torch.device
    autocast: bool
    optimizer: bool
    comparable: bool
    vocab: int

    def precision(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)

    def copy_model(self) -> nn.Module:
        return copy.deepcopy(self.base).to(self.device)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def settle(self) -> None:
        """Free what is garbage, and let the device finish."""
        gc.collect()
        self.wait()


@dataclass
class Row:
    """A row that runs, and what was measured of it."""

    spec: RowSpec
    setup: Setup
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    call: Callable[..., Tensor]
    measured: dict[str, Any] = field(default_factory=dict)
    round_step_s: list[float] = field(default_factory=list)

    @classmethod
    def prepare(cls, spec: RowSpec, setup: Setup) -> Row:
        model = setup.copy_model()
        if spec.checkpointing:
            checkpoint_layers(model)
        optimizer = spec.optimize(model, lr=1e-5) if setup.optimizer else None
        if optimizer is not None:
            actpass.set_optimizer(optimizer)
        return cls(spec, setup, model, optimizer, compiled(spec, model, setup.vocab))

    def forward(self, index: int) -> Tensor:
        with self.setup.precision():
            return self.call(**self.setup.batches[index % len(self.setup.batches)])

    def finish(self) -> None:
        """All of a step that comes after the backward."""
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def step(self, index: int) -> None:
        self.forward(index).backward()
        self.finish()


def compiled(spec: RowSpec, module: nn.Module, vocab: int) -> Callable[..., Tensor]:
    """What to call instead of ``module``."""
    if spec.kind == "eager":
        return module
    if spec.kind == "actcomp":
        return torch.compile(module, backend="actcomp", options=dict(spec.options))
    if spec.kind == "before":
        return torch.compile(module, backend=other_build.loaded().backend.actcomp, options=dict(spec.options))
    if spec.budget is None:
        return torch.compile(module)
    return torch.compile(module, options={"custom_partitioner_fn": BudgetCut(spec.label, spec.budget, vocab), **spec.options})


def run_rows(
    specs: Sequence[RowSpec], setup: Setup, steps: int, rounds: int, cache_root: str, average: Average = statistics.median
) -> list[dict[str, Any]]:
    """Measure every row. A row that fails says why in ``failed``, and the others go on. average: of a round's steps."""
    rows: dict[str, Row] = {}
    failed: dict[str, str] = {}
    reference: Gradients | None = None
    warm_up_compiler(setup.device, cache_root)
    for spec in sorted(specs, key=lambda spec: spec.kind != "eager"):  # eager has the gradients to compare with
        _say(f"compiling and measuring {spec.label}")
        try:
            row = first_step(spec, setup, cache_root)
            if spec.kind == "eager" and setup.comparable:
                reference = gradients_of(row.model)
            row.measured |= compare_gradients(reference, row.model)
            measure_row(row)
            rows[spec.label] = row
        except Exception as error:
            failed[spec.label] = failure(error)
            _say(f"{spec.label} failed: {failed[spec.label]}")
    del reference
    _time_rows(rows, failed, steps, rounds, average)
    if "inductor" in rows:
        rows["inductor"].measured |= _default_counts(setup)
    return [_result(spec, rows.get(spec.label), failed.get(spec.label)) for spec in specs]


def warm_up_compiler(device: torch.device, cache_root: str) -> None:
    """Compile something small, so that the first row does not pay for what a process pays once."""
    module = nn.Sequential(nn.Linear(16, 16), nn.GELU()).to(device)
    with fresh_cache(dir=cache_root, delete=False):
        torch.compile(module)(torch.randn(4, 16, device=device)).sum().backward()


def first_step(spec: RowSpec, setup: Setup, cache_root: str) -> Row:
    """Compile with an empty cache, and run one forward and backward from the initial weights; leaves the gradients."""
    setup.settle()
    row = Row.prepare(spec, setup)
    setup.wait()
    began = time.perf_counter()
    with fresh_cache(dir=cache_root, delete=False):
        loss = row.forward(0)
        loss.backward()
        setup.wait()
        elapsed = time.perf_counter() - began
    row.measured["compile_s"] = None if spec.kind == "eager" else elapsed
    row.measured["first_loss"] = loss.item()
    return row


def gradients_of(model: nn.Module) -> Gradients:
    return [None if p.grad is None else p.grad.detach().cpu().clone() for p in model.parameters()]


def compare_gradients(reference: Gradients | None, model: nn.Module) -> dict[str, float | None]:
    """Cosine over all parameters, and the share of equal signs where the reference is not zero."""
    if reference is None:
        return {"gradient_cosine": None, "sign_agreement": None}
    dot = norm = reference_norm = 0.0
    agreeing = counted = 0
    for expected, p in zip(reference, model.parameters(), strict=True):
        if expected is None and p.grad is None:
            continue
        a = (torch.zeros(p.shape) if expected is None else expected).double()
        b = (torch.zeros(p.shape) if p.grad is None else p.grad.detach().cpu()).double()
        dot += (a * b).sum().item()
        norm += b.square().sum().item()
        reference_norm += a.square().sum().item()
        agreeing += int(((a.sign() == b.sign()) & (a != 0)).sum())
        counted += int((a != 0).sum())
    scale = (norm * reference_norm) ** 0.5
    return {"gradient_cosine": dot / scale if scale else None, "sign_agreement": agreeing / counted if counted else None}


def measure_row(row: Row) -> None:
    """Peak of a step, bytes that a forward leaves, and the counts from the row's graph."""
    row.model.zero_grad(set_to_none=True)
    for _ in range(2):  # the first shows all regions, and those whose plan changes are compiled again
        row.step(1)
    row.setup.settle()
    row.measured["peak_bytes"] = measure(lambda: row.step(2), row.setup.device, before=lambda: row.step(1)).peak_bytes
    row.setup.settle()
    forward = measure(lambda: row.forward(3), row.setup.device)
    row.measured["saved_bytes_measured"] = forward.kept_bytes
    forward.result.backward()
    row.measured["gradient_bytes"] = sum(nbytes(p.grad) for p in row.model.parameters() if p.grad is not None)
    row.measured["block_bytes"] = block_bytes(row)
    row.finish()
    row.measured["resident_bytes"] = resident_bytes(row)
    row.measured |= _counts(row).to_dict()


def block_bytes(row: Row) -> int:
    """Bytes of gradients and optimizer state of the matrices of the model's blocks (what has a number in its name), with the
    bases that gradients in factors share."""
    matrices = [p for n, p in row.model.named_parameters() if p.dim() > 1 and re.search(r"\.\d+\.", n)]
    state = [] if row.optimizer is None else [t for p in matrices for t in row.optimizer.state[p].values()]
    gradients = [p.grad for p in matrices if p.grad is not None]
    bases = {id(g.basis): g.basis.made for g in gradients if isinstance(g, actpass.LowRankGradient) and g.is_factored}
    tensors = [t for t in (*state, *bases.values()) if isinstance(t, Tensor)]
    return sum(map(nbytes, gradients)) + sum(t.numel() * t.element_size() for t in tensors)


def resident_bytes(row: Row) -> int:
    """Bytes of parameters, buffers and optimizer state: what a peak comes on top of."""
    states = row.optimizer.state.values() if row.optimizer is not None else ()
    tensors = [*row.model.parameters(), *row.model.buffers(), *(v for s in states for v in s.values())]
    storages = [t.untyped_storage() for t in tensors if isinstance(t, Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _counts(row: Row) -> Counts:
    vocab = row.setup.vocab
    if row.spec.kind == "eager":
        return count_eager(lambda: row.forward(0), row.model, vocab)
    if row.spec.kind in ("actcomp", "before"):
        report = package_of(row.spec).report(row.model)
        row.measured["budget_bytes"] = row.spec.options.get("memory_budget")
        try:
            row.measured["predicted_peak_bytes"] = predicted_peak(row, report)
            return counts_of_report(report, vocab)
        except AttributeError as error:
            if row.spec.kind == "actcomp":
                raise
            _say(f"the report of {row.spec.label} has no counts that this build can read: {failure(error)}")
            return Counts()
    return Counts() if row.spec.budget is None else BudgetCut(row.spec.label, row.spec.budget, vocab).counts()


def package_of(spec: RowSpec) -> Any:
    """The build that compiled a row."""
    return other_build.loaded() if spec.kind == "before" else actpass


def predicted_peak(row: Row, report: actpass.Report) -> int | None:
    """Above what is resident; with the optimizer's step, where the row has one and a budget made its scratch known."""
    if row.optimizer is None or report.step_bytes is None:
        return report.totals.peak_bytes
    return report.step_bytes - (report.totals.resident_bytes or 0)


def _default_counts(setup: Setup) -> dict[str, Any]:
    _say("reading Inductor's own graph")
    try:
        with setup.precision():
            return count_default(setup.copy_model(), setup.batches[0], setup.vocab).to_dict()
    except Exception as error:
        _say(f"counts of Inductor's default are missing: {failure(error)}")
        return {}


def _time_rows(rows: dict[str, Row], failed: dict[str, str], steps: int, rounds: int, average: Average) -> None:
    """Interleaved: in each round every row runs ``steps`` steps, and another row begins."""
    for number in range(rounds):
        _say(f"timing, round {number + 1} of {rounds}")
        labels = list(rows)
        turn = number % max(len(labels), 1)
        for label in [*labels[turn:], *labels[:turn]]:
            try:
                rows[label].round_step_s.append(time_round(rows[label], steps, average))
            except Exception as error:
                failed[label] = failure(error)
                del rows[label]


def time_round(row: Row, steps: int, average: Average) -> float:
    """Average step time, after a step that does not count."""
    row.setup.settle()
    row.step(0)
    times = []
    for index in range(steps):
        row.setup.wait()
        began = time.perf_counter()
        row.step(index)
        row.setup.wait()
        times.append(time.perf_counter() - began)
    return average(times)


def _result(spec: RowSpec, row: Row | None, failed: str | None) -> dict[str, Any]:
    if row is None:
        return {"row": spec.label, "failed": failed}
    return {"row": spec.label, "failed": None, **row.measured, "round_step_s": row.round_step_s}


BudgetT = TypeVar("BudgetT", int, float)


def least_of(call: Callable[[BudgetT], Any], budget: BudgetT) -> BudgetT | None:
    """The least budget that the error names that ``budget`` raises; None if it raises none."""
    try:
        call(budget)
    except Exception as error:  # Dynamo wraps what a backend raises
        least = getattr(getattr(error, "inner_exception", error), "least", None)
        if least is None:
            raise
        return type(budget)(least)
    return None


def failure(error: Exception) -> str:
    """The first line of what went wrong."""
    inner = getattr(error, "inner_exception", error)
    return f"{type(inner).__name__}: {str(inner).strip().partition(chr(10))[0]}"


def _say(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)
