"""What returned logits cost: peak memory of a step that calls a model as `transformers` users do, ``model(input_ids, labels)``.

    python tools/bench_returned_logits.py --workload llama-60m --batch 8 --seq 256

Rows: plain Inductor; ``auto`` of the model that returns its loss alone; ``auto`` with the logits returned and not read, read by
a metric, and read by a distillation loss, each deferred and (``whole``) as it is with ``defer_logits=False``, which is the step
before logits could be deferred. Columns: peak above what is there before the step, and to the first row's; the peak that the
report predicts of the region, to it; seconds of a step; the loss, and whether it is bit-equal to the one of the model that
returns its loss alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from arguments import positive_int
from torch import nn
from workloads import LossOnly, build_config, build_model, make_batch, workload_named

import actpass
from actpass.memory.profiler import measure
from actpass.options import options_for

ROWS = (
    "inductor", "inductor:metric", "inductor:distillation", "loss", "returned", "whole", "metric", "whole:metric",
    "distillation", "whole:distillation",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One step of a row. peak_bytes, predicted_bytes: above parameters. loss: of the last step."""

    peak_bytes: int
    predicted_bytes: int | None
    seconds: float
    loss: torch.Tensor


def run(row: str, model: Any, batch: dict[str, torch.Tensor], name: str, steps: int) -> Step:
    kind, _, reads = row.rpartition(":")
    reads, kind = (reads, kind) if reads in ("metric", "distillation") else ("", row)
    options = {**options_for(name), **({"defer_logits": False} if kind == "whole" else {})}
    given: dict[str, Any] = {} if kind == "inductor" else {"backend": "actcomp", "options": options}
    function = torch.compile(LossOnly(model) if kind == "loss" else model, **given)
    labels = batch["labels"]
    target = torch.randn(*labels.shape, model.config.vocab_size, generator=torch.Generator().manual_seed(2))
    target = target.log_softmax(-1) if reads == "distillation" else None

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        output = function(**batch)
        loss = output if kind == "loss" else output.loss
        own = loss.detach()
        if reads == "metric":
            with torch.no_grad():
                (output.logits[:, :-1].argmax(-1) == labels[:, 1:]).float().mean()
        if target is not None:
            student = output.logits.float().log_softmax(-1)
            loss = loss + nn.functional.kl_div(student, target, log_target=True, reduction="batchmean")
        loss.backward()
        return own

    step()
    return _measured(step, model, steps, predicts=kind != "inductor")


def _measured(step: Callable[[], torch.Tensor], model: nn.Module, steps: int, *, predicts: bool) -> Step:
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)

    def begin() -> None:
        step()
        model.zero_grad(set_to_none=True)

    memory = measure(step, before=begin)
    predicted = None
    if predicts:
        regions = [r.footprint for r in actpass.report(model).regions if r.footprint is not None]
        predicted = max(regions[0].forward, regions[0].backward) if len(regions) == 1 else None
    return Step(memory.peak_bytes, predicted, sorted(seconds)[len(seconds) // 2] if seconds else 0.0, memory.result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="llama-mini")
    parser.add_argument("--batch", type=positive_int, default=8)
    parser.add_argument("--seq", type=positive_int, default=256)
    parser.add_argument("--format", default="auto", metavar="NAME", help="of a policy, a codec or a projection")
    parser.add_argument("--steps", type=int, default=3, help="timed steps; the median counts")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    given = parser.parse_args()

    config = build_config(workload_named(given.workload), given.seq)
    batch = make_batch(config, "causal-lm", (given.batch, given.seq), "cpu", seed=1)
    print(f"{given.workload}, {given.batch} x {given.seq}, {given.format}, torch {torch.__version__}")
    print("| row | peak | to the first | predicted / measured | s a step | loss | bit-equal |")
    print("|---|---:|---:|---:|---:|---:|---|", flush=True)
    first: Step | None = None
    alone: Step | None = None
    for row in given.rows:
        torch.compiler.reset()
        torch.manual_seed(0)
        model: Any = build_model(config, "causal-lm", torch.float32).model
        found = run(row, model, batch, given.format, given.steps)
        first, alone = first or found, found if row == "loss" else alone
        predicted = f"{found.predicted_bytes / found.peak_bytes:.3f}" if found.predicted_bytes else "-"
        equal = "-" if alone is None else str(torch.equal(found.loss, alone.loss))
        print(
            f"| {row} | {found.peak_bytes / 1e6:.2f} MB | {found.peak_bytes / first.peak_bytes:.3f} | {predicted} "
            f"| {found.seconds:.2f} | {float(found.loss):.9f} | {equal} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
