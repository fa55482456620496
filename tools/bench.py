"""Time, memory and gradients of one training step: eager, Inductor at several recompute budgets, and actpass.

    python tools/bench.py --workload llama-60m --batch 8 --seq 256 \\
        --rows eager inductor inductor-budget=0.5 inductor-recompute actcomp:exact actcomp:haar:0.25
    python tools/bench.py --config config.json --rows inductor actcomp:exact,memory_budget=0.5 --rounds 3 --steps 5
    python tools/bench.py --workload llama-60m --compile-time --repeat 3

Rows run in one process, interleaved, from the same weights on the same random tokens. One JSON object a row, then a table.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import other_build
import torch
from arguments import positive_int, probability
from bench_compile_time import measure_compile_times, work
from bench_rows import ROW_FORMS, Row, RowSpec, Setup, least_of, parse_row, run_rows
from bench_tables import COMPILE_COLUMNS, COMPILE_NOTES, ROW_COLUMNS, add_ratios, finish, header, markdown, row_notes
from torch._dynamo import config as dynamo_config
from workloads import (
    DTYPES,
    HEADS,
    WORKLOADS,
    UsageError,
    Workload,
    build_config,
    build_model,
    drops,
    make_batch,
    with_adapters,
    workload_from_file,
    workload_named,
)

import actpass

ROWS = ("eager", "inductor", "inductor-budget=0.5", "inductor-recompute", "actcomp:exact", "actcomp:haar:0.25")
COMPILE_ROWS = ("inductor", "actcomp:exact", "actcomp:haar:0.25")
BATCHES = 4
MOST_ROWS = 64


def main() -> int:
    parser = _parser()
    given = parser.parse_args()
    try:
        check_device(given.device)
        if given.against is not None:
            other_build.load(given.against)
        specs = rows_of(given)
        if given.compile_time and given.compile_worker is None:
            return compile_time(given, specs)
        setup, title = set_up(given)
        if given.budgets:
            specs = [*specs, *budget_rows(setup, given.budgets)]
    except UsageError as error:
        parser.error(str(error))
    if given.compile_worker is not None:
        print(json.dumps(work(given.compile_worker, setup)))
        return 0
    return bench(given, specs, setup, title)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--workload", default="llama-mini", help=f"one of {', '.join(WORKLOADS)} (default: llama-mini)")
    model.add_argument("--config", type=Path, metavar="JSON", help="a transformers config instead")
    parser.add_argument("--head", choices=HEADS, help="task of --config (default: the config's architectures say it)")
    parser.add_argument("--batch", type=positive_int, help="sequences in a step (default: the workload's)")
    parser.add_argument("--seq", type=positive_int, help="tokens in a sequence (default: the workload's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--autocast", action="store_true", help="forward under bfloat16 autocast")
    parser.add_argument("--dropout", type=probability, help="replaces the config's dropout probabilities")
    parser.add_argument(
        "--lora-rank", type=positive_int, metavar="R", help="fine-tune adapters of this rank on all linear layers"
    )
    parser.add_argument("--lora-dropout", type=probability, default=0.0, help="in front of the adapters (default: 0)")
    parser.add_argument(
        "--attention", choices=("sdpa", "eager"), default="sdpa",
        help="of transformers: fused, or in matmuls that keep the scores (default: sdpa)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--optimizer", action="store_true", help="a step includes AdamW")
    parser.add_argument("--steps", type=positive_int, default=5, help="timed steps of a row in a round")
    parser.add_argument(
        "--mean", action="store_true",
        help="a round's time is the mean of its steps, not the median: with --steps 20 one of them moves learned subspaces",
    )  # fmt: skip
    parser.add_argument("--rounds", type=positive_int, default=5, help="rounds over all rows")
    parser.add_argument("--rows", type=parse_row, nargs="+", metavar="ROW", help=ROW_FORMS)
    parser.add_argument(
        "--budgets", type=positive_int, metavar="N",
        help="add N rows of actcomp:auto at budgets of peak bytes, from the least that can be met to Inductor's default peak",
    )  # fmt: skip
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="another build of this project, whose rows are before:METHOD"
    )
    parser.add_argument("--compile-time", action="store_true", help="cold and warm compile times, in fresh processes")
    parser.add_argument("--repeat", type=positive_int, default=3, help="processes a row and phase of --compile-time")
    parser.add_argument("--compile-worker", type=parse_row, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    return parser


def rows_of(given: argparse.Namespace) -> list[RowSpec]:
    specs = given.rows or [parse_row(text) for text in (COMPILE_ROWS if given.compile_time else ROWS)]
    labels = [spec.label for spec in specs]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise UsageError(f"--rows has {', '.join(sorted(twice))} more than once. Give each row once.")
    if len(specs) > MOST_ROWS:
        raise UsageError(f"--rows has {len(specs)} rows. Allowed: at most {MOST_ROWS}.")
    return specs


def budget_rows(setup: Setup, count: int) -> list[RowSpec]:
    """Rows at budgets of peak bytes, spread evenly over what can be met."""
    model = setup.copy_model()
    without = {} if setup.optimizer else {"optimizer_state_bytes": 0}  # with one it is AdamW, as is assumed

    def explain(budget: int, model: torch.nn.Module = model) -> actpass.Report:
        return actpass.explain(model, advise=False, options={"memory_budget": budget, **without}, **setup.batches[0])

    least = least_of(explain, 2)
    assert least is not None
    report = explain(least)
    totals = report.totals
    assert totals.resident_bytes is not None
    assert totals.peak_bytes_default is not None
    most = totals.resident_bytes + int(1.05 * totals.peak_bytes_default)
    del model
    more = least if len(report.regions) > 1 else None  # what they need together is known when a step has shown them
    while more is not None:
        least, more = more, least_of(functools.partial(train_at, setup), more)
    budgets = [least + (most - least) * i // max(count - 1, 1) for i in range(count)]
    return [row_within(setup, b) for b in budgets]


def row_within(setup: Setup, budget: int) -> RowSpec:
    return parse_row(f"actcomp:auto,memory_budget={budget}{'' if setup.optimizer else ',optimizer_state_bytes=0'}")


def train_at(setup: Setup, budget: int) -> None:
    torch.compiler.reset()
    row = Row.prepare(row_within(setup, budget), setup)
    for i in range(2):
        row.step(i)


def check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has no CUDA device. Allowed here: cpu.")


def workload_of(given: argparse.Namespace) -> Workload:
    if given.config is not None:
        return workload_from_file(given.config, given.head)
    workload = workload_named(given.workload)
    if given.head not in (None, workload.head):
        raise UsageError(f"--head {given.head}: {workload.name} is a {workload.head} model. Give a --config instead.")
    return workload


def set_up(given: argparse.Namespace) -> tuple[Setup, str]:
    """The model and its batches, and a line that says what they are."""
    workload = workload_of(given)
    batch, seq = workload.shape(given.device)
    shape = given.batch or batch, given.seq or seq
    config = build_config(workload, shape[1], given.dropout, given.attention)
    torch.manual_seed(0)
    model = build_model(config, workload.head, DTYPES[given.dtype])
    if given.lora_rank is not None:
        model = with_adapters(model, given.lora_rank, given.lora_dropout)
    batches = [make_batch(config, workload.head, shape, given.device, seed) for seed in range(BATCHES)]
    device = torch.device(given.device)
    setup = Setup(
        model, batches, device, given.autocast, given.optimizer, not (drops(config) or given.lora_dropout), config.vocab_size
    )
    count = sum(p.numel() for p in model.parameters())
    precision = given.dtype + (", bfloat16 autocast" if given.autocast else "")
    precision += ", unfused attention" if given.attention == "eager" else ""
    precision += f", LoRA of rank {given.lora_rank}, dropout {given.lora_dropout}" if given.lora_rank is not None else ""
    return setup, f"{workload.name} ({count / 1e6:.1f} M parameters), {shape[0]} x {shape[1]} tokens, {precision}"


def bench(given: argparse.Namespace, specs: list[RowSpec], setup: Setup, title: str) -> int:
    head = header(title, given.device)
    with tempfile.TemporaryDirectory(prefix="inductor-") as root, dynamo_config.patch(recompile_limit=2 * MOST_ROWS):
        average = statistics.mean if given.mean else statistics.median
        results = run_rows(specs, setup, given.steps, given.rounds, root, average)
    add_ratios(results)
    for result in results:
        print(json.dumps(result), flush=True)
    table = markdown(head, ROW_COLUMNS, results, row_notes(results, given.optimizer, setup.comparable))
    finish(given, {**head, "rows": results}, table)
    return 1 if any(result["failed"] for result in results) else 0


def compile_time(given: argparse.Namespace, specs: list[RowSpec]) -> int:
    workload = workload_of(given)
    batch, seq = workload.shape(given.device)
    title = f"{workload.name}, {given.batch or batch} x {given.seq or seq} tokens, {given.dtype}: compile time"
    head = header(title, given.device)
    results = measure_compile_times(specs, given.repeat)
    finish(given, {**head, "rows": results}, markdown(head, COMPILE_COLUMNS, results, COMPILE_NOTES))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints that it starts and stops
    sys.exit(main())
