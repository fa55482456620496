"""The rows of a benchmark: one model trained through eager, Inductor at some recompute budget, or actpass.

Every row has its own copy of the same weights and sees the same batches. Rows live in one process; what they measure is
memory above the level at the start of a step, so that idle rows do not count.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from arguments import option, probability, rank
from bench_counts import BudgetCut, Counts, count_eager, counts_of_report
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from workloads import LossOnly, UsageError

import actpass
from actpass.measure import measure

ROW_FORMS = "eager, inductor, inductor-budget=B, inductor-recompute, actcomp:METHOD[:RANK][,key=value]"


@dataclass(frozen=True, slots=True)
class RowSpec:
    """label: as given on the command line. budget: Inductor's ``activation_memory_budget``. options: actpass's."""

    label: str
    kind: str
    budget: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_row(text: str) -> RowSpec:
    """Read a row; `argparse.ArgumentTypeError` names what is wrong with it."""
    name, _, rest = text.partition(":")
    if text in ("eager", "inductor"):
        return RowSpec(text, text)
    if text == "inductor-recompute":
        return RowSpec(text, "inductor", 0.0)
    if text.startswith("inductor-budget="):
        return RowSpec(text, "inductor", probability(text.partition("=")[2]))
    if name == "actcomp" and rest:
        form, *others = rest.split(",")
        method, _, r = form.partition(":")
        options = {"method": method, **({"rank": rank(r)} if r else {}), **dict(option(o) for o in others)}
        return RowSpec(text, "actcomp", None, options)
    raise UsageError(f"{text!r} is no row. Allowed: {ROW_FORMS}.")


def compiled(spec: RowSpec, module: nn.Module) -> Callable[..., Tensor]:
    """What to call instead of ``module``."""
    if spec.kind == "eager":
        return module
    if spec.kind == "actcomp":
        return torch.compile(module, backend="actcomp", options=dict(spec.options))
    if spec.budget is None:
        return torch.compile(module)
    return torch.compile(module, options={"custom_partitioner_fn": BudgetCut(spec.budget)})


@dataclass(frozen=True)
class Setup:
    """What all rows share. base: the initial weights, on the CPU. batches: keyword arguments, on the device."""

    base: LossOnly
    batches: Sequence[Mapping[str, Tensor]]
    device: torch.device
    autocast: bool
    optimizer: bool
    vocab: int
    cache_root: str

    def precision(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)


@dataclass
class Row:
    """A row that runs, and what was measured of it."""

    spec: RowSpec
    setup: Setup
    model: nn.Module
    call: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer | None
    measured: dict[str, Any]
    round_step_s: list[float] = field(default_factory=list)

    def forward(self, index: int) -> Tensor:
        with self.setup.precision():
            return self.call(**self.setup.batches[index % len(self.setup.batches)])

    def finish(self, loss: Tensor) -> None:
        """All of a step that comes after the forward."""
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def step(self, index: int) -> None:
        self.finish(self.forward(index))


def start_row(spec: RowSpec, setup: Setup, reference: list[Tensor | None] | None) -> Row:
    """Compile a row with an empty cache, compare its first gradients with ``reference``, and measure its memory."""
    model = copy.deepcopy(setup.base).to(setup.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if setup.optimizer else None
    settle(setup.device)
    began = time.perf_counter()
    with fresh_cache(dir=setup.cache_root, delete=False):
        row = Row(spec, setup, model, compiled(spec, model), optimizer, {})
        loss = row.forward(0)
        loss.backward()
        wait(setup.device)
        row.measured["compile_s"] = time.perf_counter() - began if spec.kind != "eager" else None
        row.measured["first_loss"] = loss.item()
        row.measured.update(compare_gradients(reference, model))
        del loss
        if spec.kind != "eager" or reference is None:
            model.zero_grad(set_to_none=True)
            measure_row(row)
    return row


def measure_row(row: Row) -> None:
    """Peak of a step, bytes that a forward leaves, and the counts from the graph."""
    row.model.zero_grad(set_to_none=True)
    row.step(1)
    settle(row.setup.device)
    row.measured["peak_bytes"] = measure(lambda: row.step(2), row.setup.device).peak_bytes
    settle(row.setup.device)
    kept = measure(lambda: row.forward(3), row.setup.device)
    row.measured["saved_bytes_measured"] = kept.kept_bytes
    row.finish(kept.result)
    del kept
    row.measured["resident_bytes"] = resident_bytes(row)
    counts = counts_of(row)
    if counts is not None:
        row.measured.update(counts.to_dict())


def counts_of(row: Row) -> Counts | None:
    """What the graph says, for the rows that know their graph (plain Inductor's is known from actpass's explain)."""
    if row.spec.kind == "eager":
        return count_eager(lambda: row.forward(0), row.model, row.setup.vocab)
    if row.spec.kind == "actcomp":
        return counts_of_report(actpass.report(row.model), row.setup.vocab)
    return None


def time_round(row: Row, steps: int) -> float:
    """Median step time over ``steps`` steps, after one that does not count."""
    settle(row.setup.device)
    row.step(0)
    times = []
    for index in range(steps):
        wait(row.setup.device)
        began = time.perf_counter()
        row.step(index)
        wait(row.setup.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)
