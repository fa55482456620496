"""What a memory budget does to the gradient, against one bit width for everything that takes no more bytes.

    python tools/bench_error.py --model stories260K.bin --tokenizer tok512.bin --train input.txt --json out.json
    python tools/bench_error.py --model llama-mini --train valid.txt --warm-up 200 --budgets 10

At each of N budgets, from the least that can be met to 1.0: the saved bytes and the error of one batch's gradient, and the
same for the widest single width (int16, int8, int4 for all that is stored, queries and keys, too) whose bytes are no more.
Error: 1 - cosine of the preconditioned direction (the gradient's sign, or Adam's step after --warm-up steps), by parameter,
weighted by elements; and the largest relative error of a parameter. Budgets with and without a calibration. A projection of
weight gradients is no row: with fused attention its uniform rank frees no bytes (docs/guide/methods.md). Graphs are
interpreted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from arguments import positive_int
from bench_loss import MODELS, model_of, texts
from bench_rows import least_of
from torch import Tensor

import actpass

WIDTHS = ("int16", "int8", "int4")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-mini", help=f"{', '.join(MODELS)} or a .bin file of llama2.c")
    parser.add_argument("--tokenizer", type=Path, metavar="BIN", help="of a llama2.c model")
    parser.add_argument("--train", type=Path, required=True, metavar="TXT")
    parser.add_argument("--batch", type=positive_int, default=16)
    parser.add_argument("--seq", type=positive_int, default=128)
    parser.add_argument("--budgets", type=positive_int, default=10)
    parser.add_argument("--warm-up", type=int, default=0, metavar="STEPS", help="AdamW steps before, in eager mode")
    parser.add_argument("--seeds", type=positive_int, default=3, help="draws of stochastic rounding")
    parser.add_argument("--no-calibration", action="store_true", help="budgets as they are, in half of the time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    given.evaluate = None
    rows = measure(given)
    files = ("model", "tokenizer", "train")
    what = {k: Path(v).name if k in files and v else v for k, v in vars(given).items() if k not in ("json", "evaluate")}
    if given.json is not None:
        given.json.write_text(json.dumps({"torch": torch.__version__, "what": what, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    return 0


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    model = model_of(given, 0)
    text, _ = texts(given)
    batches = text.training(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for _, batch in zip(range(given.warm_up), batches, strict=False):
        model(**batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    batch = next(batches)
    judge = Judge(model, batch, optimizer if given.warm_up else None, given.seeds)
    kinds: dict[str, dict[str, Any]] = {"": {}}
    if not given.no_calibration:
        two = {k: v[:2] for k, v in batch.items()}
        kinds[", calibrated"] = {"sensitivities": actpass.calibrate(model, two, optimizer=judge.optimizer)}
    widths = [judge.row(width, {"module_overrides": {"*": width}}) for width in WIDTHS]
    least = judge.least()
    rows = [*widths]
    for i in range(given.budgets):
        budget = least + (1.0 - least) * i / max(given.budgets - 1, 1)
        for label, more in kinds.items():
            rows.append(judge.row(f"budget {budget:.3f}{label}", {"memory_budget": budget, **more}))
            # more is taken where gradients that are formed early with the loss come on top of a budget
            most = max(rows[-1]["allowed_bytes"], rows[-1]["saved_bytes"])
            fits = [w for w in widths if w["saved_bytes"] <= most]
            rows[-1]["rival"] = min(fits, key=lambda w: w["direction"])["row"] if fits else None
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


class Judge:
    """One model and batch under different options."""

    def __init__(self, model: torch.nn.Module, batch: Mapping[str, Tensor], optimizer: Any, seeds: int) -> None:
        self.model, self.batch, self.optimizer, self.seeds = model, dict(batch), optimizer, seeds

    def row(self, label: str, options: Mapping[str, Any]) -> dict[str, Any]:
        totals = self._explain(options).totals
        torch.compiler.reset()
        audit = actpass.audit(self.model, self.batch, options=options, seeds=self.seeds, optimizer=self.optimizer)
        count = sum(p.numel for p in audit.parameters)
        return {
            "row": label, "saved_bytes": totals.saved_bytes,
            "allowed_bytes": int(options.get("memory_budget", 1.0) * totals.saved_bytes_default),
            "direction": sum(p.numel * (1 - p.preconditioned_cosine) for p in audit.parameters) / count,
            "worst": max(p.error for p in audit.parameters),
            "again": totals.extra_matmuls, "attention_again": totals.extra_attention,
        }  # fmt: skip

    def least(self) -> float:
        """The smallest fraction that every region can meet."""
        found, more = 0.0, least_of(self._within, 0.0)
        while more is not None:
            found, more = more, least_of(self._within, more)
        return found

    def _within(self, budget: float) -> Any:
        return self._explain({"memory_budget": budget})

    def _explain(self, options: Mapping[str, Any]) -> Any:
        torch.compiler.reset()
        return actpass.explain(self.model, options=options, advise=False, **self.batch)


def table(rows: list[dict[str, Any]]) -> str:
    by = {r["row"]: r for r in rows}
    head = (
        "",
        "saved MB",
        "1 - cosine",
        "worst parameter",
        "matmuls / attention again",
        "widest single width",
        "its MB",
        "its 1 - cosine",
    )
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for r in rows:
        rival = by.get(r.get("rival"))
        last = ("-", "-", "-")
        if rival is not None:
            last = (rival["row"], f"{rival['saved_bytes'] / 1e6:.2f}", f"{rival['direction']:.1e}")
        again = f"{r['again']} / {r['attention_again']}"
        cells = (r["row"], f"{r['saved_bytes'] / 1e6:.2f}", f"{r['direction']:.1e}", f"{r['worst']:.1e}", again, *last)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
