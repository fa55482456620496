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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arguments import memory_budget, options_from, override, positive_int, probability
from arguments import option as option_argument
from torch import nn
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

import actpass
from actpass import ActpassError, Training
from actpass.diagnostics.interpreter import own_errors
from actpass.extrapolation.deep_model import OPTIMIZERS


def main() -> int:
    parser = _parser()
    given = parser.parse_args()
    started = time.perf_counter()
    try:
        workload = _workload(given)
        batch, seq = workload.shape("cuda")
        shape = given.batch or batch, given.seq or seq
        config = build_config(workload, shape[1], given.dropout)
        training = Training(
            layers=config.num_hidden_layers,
            period=_period(config),
            ranks=given.fsdp,
            optimizer=given.optimizer,
            check=given.check,
        )
        options = options_from(
            argparse.Namespace(**{**vars(given), "projection": None, "rank": None, "plan": None, "off": False})
        )
        with own_errors():
            plan = actpass.plan_deep_model(_maker(workload, config, shape, given.dtype), training, options=options)
    except (UsageError, ActpassError) as error:
        parser.error(str(error))
    title = (
        f"{workload.name}, {plan.parameters / 1e9:.2f} G parameters, {training.layers} layers, {shape[0]} x {shape[1]} tokens, "
        f"{given.dtype}, optimizer {given.optimizer}"
    )
    spent = f"{time.perf_counter() - started:.0f} s, {_peak_rss() / 2**30:.2f} GiB of this machine's memory"
    text = f"{title}\n\n{plan}\nplanned in {spent}"
    print(text)
    if given.json is not None:
        _write(given.json, json.dumps({"model": title, **plan.to_dict()}, indent=1) + "\n")
    if given.markdown is not None:
        _write(given.markdown, f"```\n$ python {' '.join(['tools/plan.py', *sys.argv[1:]])}\n{text}\n```\n")
    return 0 if plan.fits else 2


def _maker(
    workload: Workload, config: Any, shape: tuple[int, int], dtype: str
) -> Callable[[int], tuple[nn.Module, dict[str, Any]]]:
    """From a number of layers to the model and a batch."""
    kinds = getattr(config, "layer_types", None)

    def make(layers: int) -> tuple[nn.Module, dict[str, Any]]:
        config.num_hidden_layers = layers
        if kinds:
            config.layer_types = kinds[:layers]
        torch.manual_seed(0)
        return build_model(config, workload.head, DTYPES[dtype]), make_batch(config, workload.head, shape, "cpu", seed=0)

    return make


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


def _period(config: Any) -> int:
    """How many layers take turns (of sliding and full attention, say)."""
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    for group in range(1, len(kinds) + 1):
        if len(kinds) % group == 0 and kinds == kinds[:group] * (len(kinds) // group):
            return group
    raise AssertionError("a list is a repetition of itself")


def _peak_rss() -> int:
    """Bytes of this process at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
