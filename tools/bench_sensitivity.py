"""Which prediction of a form's cost tells the loss: errors put into one kind of saved tensor at a time, and what they cost.

    python tools/bench_sensitivity.py --model stories260K.bin --tokenizer tok512.bin --train input.txt --steps 300 --lr 5e-4 \\
        --seeds 0 1 --json out.json

A group is a kind of tensor (gate pre-activations, say) in all layers, or one layer's. For each, the model is trained with that
group in few bits and all else exact, and compared with exact training (`bench_loss`: the same weights and data). Against
the gap in loss stand, of one batch at the initial weights: the share of saved elements that is coded times the form's
error (what a budget takes without a calibration), 1 - cosine of the gradient, 1 - cosine of its sign, and what
`actpass.calibrate` measured. Graphs are interpreted, not compiled. Prints rank and log correlations.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arguments import positive_int
from bench_loss import MODELS, Text, model_of, rate, texts
from torch import Tensor, fx

import actpass
from actpass.backend.backend import compile_region
from actpass.codecs import QUANTIZERS
from actpass.diagnostics.audit import audit_model, loss_of
from actpass.diagnostics.interpreter import interpret
from actpass.ir.joint_graph import fold_indices
from actpass.options import parse
from actpass.plan_file import ModelPlan
from actpass.runtime.step_counter import STEP_COUNTER
from actpass.torch_compat import functorch_config

PREDICTORS = ("share", "cosine", "sign", "calibrated")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-mini", help=f"{', '.join(MODELS)}, or a .bin file of llama2.c")
    parser.add_argument("--tokenizer", type=Path, metavar="BIN", help="of a llama2.c model")
    parser.add_argument("--train", type=Path, required=True, metavar="TXT")
    parser.add_argument("--evaluate", type=Path, metavar="TXT", help="default: the last tenth of --train")
    parser.add_argument("--steps", type=positive_int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--batch", type=positive_int, default=16)
    parser.add_argument("--seq", type=positive_int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--eval-batches", type=positive_int, default=64)
    parser.add_argument("--form", choices=("int8", "int4", "int2"), default="int2", help="the coarse form")
    parser.add_argument(
        "--warm-up", type=int, default=0, metavar="STEPS", help="exact steps before all else, for random weights"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    found = measure(given)
    files = ("model", "tokenizer", "train", "evaluate", "json")
    what = {k: Path(v).name if k in files and v else v for k, v in vars(given).items() if k != "json"}
    result = {"torch": torch.__version__, "what": what, "groups": found, "correlations": correlations(found)}
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(found))
    print(json.dumps(result["correlations"]))
    return 0


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    text, held_out = texts(given)
    start = warmed(given, text)
    batch = next(text.training(1000))
    exact = explain(start(), batch, {"policy": "exact"}).plan
    calibration = actpass.calibrate(start(), batch)
    factor = {row.node: (dict(row.errors), row.factor) for row in calibration.rows}
    groups = groups_of(exact, set(factor))
    elements = {s.node: math.prod(s.shape) for r in exact.regions for s in r.storages}
    base = {seed: train(given, start(), {"plan": exact}, seed, text, held_out) for seed in given.seeds}
    rows = []
    for name, nodes in groups.items():
        plan = coded(exact, nodes, given.form)
        compared = audit(start(), batch, plan)
        losses = [train(given, start(), {"plan": plan}, seed, text, held_out) for seed in given.seeds]
        gaps = [loss / base[seed] - 1 for loss, seed in zip(losses, given.seeds, strict=True)]
        rows.append(
            {
                "group": name, "tensors": len(nodes), "gap": statistics.fmean(gaps), "gaps": gaps,
                "share": sum(elements[n] for n in nodes) / sum(elements[n] for n in factor) * QUANTIZERS[given.form].error,
                "cosine": compared["cosine"], "sign": compared["sign"],
                "calibrated": sum(error_in(factor[n][0], given.form) * factor[n][1] for n in nodes),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def error_in(errors: Mapping[str, float], form: str) -> float:
    """Squared relative error of a tensor; of a form that was not measured, from that in 4 bits."""
    return errors[form] if form in errors else errors["int4"] * QUANTIZERS[form].error / QUANTIZERS["int4"].error


def warmed(given: argparse.Namespace, text: Text) -> Callable[[], Any]:
    """A function that gives a fresh model with the weights that all start from."""
    weights: dict[str, Tensor] | None = None

    def start() -> Any:
        model = model_of(given, 0)
        if weights is not None:
            model.load_state_dict(weights)
        return model

    if given.warm_up:
        model = start()
        steps(model, model, text, 999, given.warm_up, given.lr)
        weights = model.state_dict()
    return start


def groups_of(plan: ModelPlan, nodes: set[str]) -> dict[str, tuple[str, ...]]:
    """Tensors of one kind in all layers, and every second layer's on its own."""
    kinds: dict[str, list[str]] = defaultdict(list)
    layers: dict[str, list[str]] = defaultdict(list)
    for s in (s for r in plan.regions for s in r.storages if s.node in nodes):
        kind = "".join(c for c in s.node if not c.isdigit()).rstrip("_")
        kinds[f"{fold_indices(s.module)} {kind}"].append(s.node)
        index = next((part for part in s.module.split(".") if part.isdigit()), None)
        if index is not None:
            layers[f"layer {index}"].append(s.node)
    return {name: tuple(members) for name, members in {**kinds, **dict(list(layers.items())[::2])}.items()}


def coded(plan: ModelPlan, nodes: Sequence[str], form: str) -> ModelPlan:
    """``plan`` with ``nodes`` in ``form``, rounded to nearest; queries and keys, too."""
    regions = []
    for region in plan.regions:
        storages = (
            replace(s, codec=form, rounding="nearest", unbiased=False, forced=True) if s.node in nodes else s
            for s in region.storages
        )
        regions.append(replace(region, storages=tuple(storages)))
    return ModelPlan(tuple(regions))


def explain(model: Any, batch: Mapping[str, Tensor], options: Mapping[str, Any]) -> Any:
    torch.compiler.reset()
    return actpass.explain(model, advise=False, options={"min_tensor_bytes": 0, "chunked_loss": False, **options}, **batch)


def audit(model: Any, batch: Mapping[str, Tensor], plan: ModelPlan) -> dict[str, float]:
    """1 - cosine of the gradient and of its sign, over all parameters together by their elements."""
    torch.compiler.reset()
    found = audit_model(model, ((), batch), parse({"plan": plan}), 1, None, loss_of).parameters
    count = sum(p.numel for p in found)
    return {
        "cosine": sum(p.numel * (1 - p.cosine) for p in found) / count,
        "sign": sum(p.numel * (1 - p.preconditioned_cosine) for p in found) / count,
    }


def train(given: argparse.Namespace, model: Any, options: Mapping[str, Any], seed: int, text: Text, held_out: Text) -> float:
    """The held-out loss after training under ``options``."""
    torch.compiler.reset()
    STEP_COUNTER.steps = 0
    config = parse({**options, "seed": seed})

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
        with functorch_config.patch(enable_autograd_cache=False):
            return compile_region(gm, example_inputs, config, inner_compile=interpret)

    steps(model, torch.compile(model, backend=backend), text, seed, given.steps, given.lr)
    model.eval()
    with torch.no_grad():
        return statistics.fmean(model(**b).item() for b in held_out.held_out(given.eval_batches))


def steps(model: Any, call: Callable[..., Tensor], text: Text, seed: int, count: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, count))
    for _, batch in zip(range(count), text.training(seed), strict=False):
        call(**batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


def correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each predictor with the gap: of ranks (Spearman; training that ended in NaN, and a cosine that is NaN, are the worst),
    and of logarithms over the groups whose gap is a number above 0."""
    found = {}
    for name in PREDICTORS:
        x, y = ([_or_worst(r[key]) for r in rows] for key in (name, "gap"))
        both = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if 0 < a < math.inf and 0 < b < math.inf]
        logs = statistics.correlation([a for a, _ in both], [b for _, b in both]) if len(both) > 1 else math.nan
        found[name] = {"rank": statistics.correlation(ranks(x), ranks(y)), "log": logs}
    return found


def _or_worst(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def ranks(values: Sequence[float]) -> list[float]:
    """Equal values share the mean of their ranks."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| group | tensors | loss gap | share | 1 - cosine | 1 - cosine of signs | calibrated |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in sorted(rows, key=lambda r: -r["gap"]):
        numbers = " | ".join(f"{r[name]:.2e}" for name in PREDICTORS)
        lines.append(f"| {r['group']} | {r['tensors']} | {r['gap']:+.2%} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
