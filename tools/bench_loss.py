"""What a form costs in loss: the same model trained on the same text from the same weights, exactly and compressed.

    python tools/bench_loss.py --model llama-mini --train valid.txt --evaluate test.txt --steps 1000 --seeds 0 1 2 \\
        --rows inductor actcomp:int4 --json out.json
    python tools/bench_loss.py --model stories260K.bin --tokenizer tok512.bin --train input.txt --steps 300 --lr 5e-4
    python tools/bench_loss.py --model MINILM_FOLDER --train valid.txt --evaluate test.txt --steps 300 --lr 2e-4 --seq 64

Models: the language models of WORKLOADS (llama-mini with a vocabulary of bytes), gpt2-mini, bert-mini (masked), all without
dropout and with random weights; or, continued from their weights, a file of llama2.c or a folder with a BERT of Hugging Face
and its tokenizer (trained to fill in masked words; what its folder lacks of the head for that starts at random). Without
--evaluate the last tenth of the text is held out. A seed draws the weights that are random and the order of the data; every
row of a seed sees the same. Losses are nats a token on the held-out text. One JSON object a run, then a table with the mean
and the spread over the seeds, and the gap to the first row, seed by seed. Of learned subspaces also the energy of held-out
batches that the last ones capture, as a fraction of what the best subspaces would: the least of all tensors and seeds, and the
mean. A row may name its own optimizer: actcomp:haar:0.25,weight_gradient_format=low_rank,refresh_interval=50,optimizer=lazy.
Runs that --json or --merge hold are not run again, so rows may run side by side, or on several machines, each with its own
file; then one call with all rows and no seeds makes the table.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arguments import positive_int
from bench_rows import ROW_FORMS, RowSpec, compiled, parse_row
from llama2c import Tokenizer, load_model
from torch import Tensor
from workloads import WORKLOADS, LossOnly, UsageError, Workload, build_config, build_model

import actpass
from actpass.runtime.step_counter import STEP_COUNTER

BYTES = 256
VOCABULARY = 260
MASKED = 0.15
CAPTURE_BATCHES = 16
IGNORE = -100
_SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 259}
MODELS = {
    **{name: w for name, w in WORKLOADS.items() if w.head.startswith("causal-lm")},
    "llama-mini": Workload("llama-mini", "llama", {**WORKLOADS["llama-mini"].fields, **_SMALL}),
    "gpt2-mini": Workload("gpt2-mini", "gpt2", {**_SMALL, "n_embd": 192, "n_layer": 4, "n_head": 6, "n_positions": 512}),
    "bert-mini": Workload(
        "bert-mini",
        "bert",
        {**_SMALL, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 6},
        "masked-lm",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-mini", help=f"{', '.join(MODELS)}, a .bin file of llama2.c, or a folder")
    parser.add_argument("--tokenizer", type=Path, metavar="BIN", help="of a llama2.c model")
    parser.add_argument("--train", type=Path, required=True, metavar="TXT")
    parser.add_argument("--evaluate", type=Path, metavar="TXT", help="default: the last tenth of --train")
    parser.add_argument("--steps", type=positive_int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="(0 1 2); none: the table of what is done")
    parser.add_argument("--batch", type=positive_int, default=16)
    parser.add_argument("--seq", type=positive_int, default=128)
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[1e-3], metavar="LR",
        help="peak; 5 %% warm-up, then a cosine to a tenth. Of several a row takes the one of least loss on the first seed",
    )  # fmt: skip
    parser.add_argument("--eval-batches", type=positive_int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=positive_int, help="of torch")
    parser.add_argument("--rows", type=parse_row, nargs="+", metavar="ROW", help=ROW_FORMS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after each run; what it holds is not run again")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], metavar="FILE", help="more files of runs that are done")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    specs = given.rows or [parse_row(t) for t in ("actcomp:exact", "actcomp:int4")]
    what = {k: Path(v).name if k in _FILES and v else v for k, v in vars(given).items() if k not in _NOT_THE_RUN}
    runs: list[dict[str, Any]] = []
    for file in (given.json, *given.merge):
        runs += [r for r in earlier(file, what) if r not in runs]
    try:
        for i, seed in enumerate(given.seeds):
            for spec in specs:
                for lr in given.lr if i == 0 else [tuned(runs, spec.label)]:
                    if not any((r["row"], r["seed"], r["lr"]) == (spec.label, seed, lr) for r in runs):
                        runs.append(run(given, spec, seed, lr))
                        save(given.json, what, runs, specs)
    except UsageError as error:
        parser.error(str(error))
    save(given.json, what, runs, specs)
    print(table(summary(runs, [s.label for s in specs])))
    return 0


_NOT_THE_RUN = ("rows", "json", "merge", "seeds", "threads", "lr", "device")
_FILES = ("model", "tokenizer", "train", "evaluate")


def earlier(file: Path | None, what: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that ``file`` holds of the same settings: a run that is there is not run again."""
    if file is None or not file.exists():
        return []
    found = json.loads(file.read_text())
    if found["what"] != what:
        raise SystemExit(f"{file} holds runs of other settings ({found['what']}). Give another --json.")
    return found["runs"]


def save(file: Path | None, what: dict[str, Any], runs: list[dict[str, Any]], specs: list[RowSpec]) -> None:
    if file is not None:
        data = {"torch": torch.__version__, "what": what, "rows": summary(runs, [s.label for s in specs]), "runs": runs}
        file.write_text(json.dumps(data, indent=1) + "\n")


class Text:
    """Windows of token ids; a batch is a function of (seed, number). mask: what stands for a masked token, None: none is."""

    def __init__(self, tokens: Tensor, batch: int, seq: int, mask: int | None) -> None:
        self.windows = tokens[: len(tokens) // seq * seq].view(-1, seq)
        self.batch, self.mask = batch, mask
        if len(self.windows) < batch:
            raise UsageError(f"the text has {len(tokens)} tokens; a batch of {batch} x {seq} needs {batch * seq}.")

    def training(self, seed: int) -> Iterator[dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.windows), generator=draw)
            for rows in order[: len(order) // self.batch * self.batch].view(-1, self.batch):
                yield self.inputs(self.windows[rows], draw)

    def held_out(self, count: int) -> Iterator[dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(0)
        available = len(self.windows) // self.batch
        for i in range(min(count, available)):
            start = i * available // min(count, available) * self.batch
            yield self.inputs(self.windows[start : start + self.batch], draw)

    def inputs(self, ids: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        if self.mask is None:
            return {"input_ids": ids, "labels": ids}
        hidden = torch.rand(ids.shape, generator=draw) < MASKED
        return {"input_ids": ids.masked_fill(hidden, self.mask), "labels": ids.masked_fill(~hidden, IGNORE)}


def texts(given: argparse.Namespace) -> tuple[Text, Text]:
    mask = BYTES if given.model in MODELS and MODELS[given.model].head == "masked-lm" else None
    words = None
    if Path(given.model).is_dir():
        from transformers import AutoTokenizer

        words = AutoTokenizer.from_pretrained(given.model)
        mask = words.mask_token_id

    def read(path: Path) -> Tensor:
        text = path.read_text(encoding="utf-8")
        if words is not None:
            return torch.tensor(words(text, add_special_tokens=False)["input_ids"])
        if given.tokenizer:
            return torch.tensor(Tokenizer.load(given.tokenizer).encode(text))
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()

    train = read(given.train)
    split = len(train) * 9 // 10
    parts = (train, read(given.evaluate)) if given.evaluate else (train[:split], train[split:])
    first, second = (Text(tokens, given.batch, given.seq, mask) for tokens in parts)
    return first, second


def model_of(given: argparse.Namespace, seed: int) -> LossOnly:
    torch.manual_seed(seed)
    if given.model in MODELS:
        workload = MODELS[given.model]
        return build_model(build_config(workload, given.seq, dropout=0.0), workload.head, torch.float32)
    if Path(given.model).is_dir():
        from transformers import AutoModelForMaskedLM

        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return LossOnly(AutoModelForMaskedLM.from_pretrained(given.model, **off)).train()
    return LossOnly(load_model(Path(given.model))).train()


def run(given: argparse.Namespace, spec: RowSpec, seed: int, lr: float) -> dict[str, Any]:
    """Train one row from one seed at one rate."""
    torch.compiler.reset()
    STEP_COUNTER.steps = 0
    train, held_out = texts(given)
    model = model_of(given, seed).to(given.device)
    options = {**spec.options, "seed": seed} if spec.kind == "actcomp" else spec.options
    call = compiled(replace(spec, options=options), model, VOCABULARY)
    optimizer = spec.optimize(model, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, given.steps))
    began = time.perf_counter()
    losses = []
    for step, batch in zip(range(given.steps), train.training(seed), strict=False):
        loss = call(**on(given.device, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step == 0 and spec.kind == "actcomp":
            check_active(model)
        if step % 100 == 99:
            print(
                f"{spec.label} seed {seed} step {step + 1}: {torch.stack(losses[-100:]).mean():.4f}",
                file=sys.stderr,
                flush=True,
            )
    model.eval()
    with torch.no_grad():
        found = [model(**on(given.device, batch)).item() for batch in held_out.held_out(given.eval_batches)]
    capture = captured(model, [on(given.device, batch) for batch in held_out.held_out(CAPTURE_BATCHES)])
    trained = torch.stack(losses).tolist()
    result = {
        "row": spec.label, "seed": seed, "lr": lr, "device": given.device, "loss": statistics.fmean(found),
        "training_loss": statistics.fmean(trained[-100:]),
        "finite": all(map(math.isfinite, trained)), "seconds": round(time.perf_counter() - began, 1),
        "saved_bytes": actpass.report(model).saved_bytes if spec.kind == "actcomp" else None,
        "captured_least": min(capture, default=None), "captured_mean": statistics.fmean(capture) if capture else None,
    }  # fmt: skip
    print(json.dumps(result), flush=True)
    return result


def captured(model: LossOnly, batches: Sequence[dict[str, Tensor]]) -> list[float]:
    """Energy of each projected tensor of ``batches`` in the principal directions that the run has learned, as a fraction of
    what the best subspace of as many directions has. Of many more tokens than a tensor is wide: the best subspace of few is
    fitted to their noise, and no subspace learned from others can have its energy."""
    rows, states = actpass.report(model).subspaces, actpass.state_dict(model)["subspaces"]
    grams: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).double()
        grams[name] = grams.get(name, 0) + x.t() @ x

    hooks, learned = [], {}
    for row in rows:
        own = list(states[row.parameter].values())
        if len(own) > 1:  # with ``nonlinear_rank`` a module's output has one as well
            continue
        owner, name = model.get_submodule(row.parameter.rpartition(".")[0]), row.parameter
        learned[name] = own[0]["state"][:-1, : row.principal].double()
        hooks.append(owner.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0])))
    with torch.no_grad():
        for batch in batches if rows else ():
            model.forward(**batch)
    for hook in hooks:
        hook.remove()
    found = []
    for name, q in learned.items():
        best = torch.linalg.eigvalsh(grams[name])[-q.shape[1] :].sum()
        found.append(float((q * (grams[name] @ q)).sum() / best))
    return found


def check_active(model: LossOnly) -> None:
    """A row that is not compressed would compare nothing."""
    inactive = [r.inactive_because for r in actpass.report(model).regions if not r.active]
    if inactive:
        raise SystemExit(f"actpass is not active: {inactive[0]}")


def on(device: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in batch.items()}


def rate(step: int, steps: int) -> float:
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def summary(runs: list[dict[str, Any]], labels: list[str]) -> list[dict[str, Any]]:
    """Mean and spread of each row at its rate, and its gap to the first row: mean and spread of the seeds' own ratios, and what
    the mean gap in loss is in perplexity."""
    rates = {label: tuned(runs, label) for label in labels}
    by = {(r["row"], r["seed"]): r for r in runs if r["lr"] == rates.get(r["row"])}
    rows = []
    for label in labels:
        own = [r for (row, _), r in by.items() if row == label]
        if not own:
            continue
        losses = [r["loss"] for r in own]
        first = {seed: r["loss"] for (row, seed), r in by.items() if row == labels[0]}
        gaps = [r["loss"] / first[r["seed"]] - 1 for r in own if r["seed"] in first]
        above = [r["loss"] - first[r["seed"]] for r in own if r["seed"] in first]
        spread = [statistics.stdev(x) if len(x) > 1 and all(map(math.isfinite, x)) else None for x in (losses, gaps)]
        captures = [(r["captured_least"], r["captured_mean"]) for r in own if r.get("captured_least") is not None]
        rows.append({
            "row": label, "lr": rates[label], "tried": sorted({r["lr"] for r in runs if r["row"] == label}), "seeds": len(own),
            "loss": statistics.fmean(losses), "spread": spread[0],
            "gap": statistics.fmean(gaps) if gaps else None, "gap_spread": spread[1],
            "perplexity": math.expm1(statistics.fmean(above)) if above else None,
            "captured_least": min((least for least, _ in captures), default=None),
            "captured_mean": statistics.fmean(mean for _, mean in captures) if captures else None,
            "devices": sorted({r.get("device", "cpu") for r in own}),
        })  # fmt: skip
    return rows


def tuned(runs: list[dict[str, Any]], label: str) -> float | None:
    """The rate of a row: of least loss on the first seed."""
    own = [r for r in runs if r["row"] == label]
    losses = [(r["loss"] if math.isfinite(r["loss"]) else math.inf, r["lr"]) for r in own if r["seed"] == own[0]["seed"]]
    return min(losses, default=(0.0, None))[1]


def table(rows: list[dict[str, Any]]) -> str:
    def number(x: float | None, form: str) -> str:
        return "-" if x is None else format(x, form)

    def cells(r: dict[str, Any]) -> str:
        forms = {
            "seeds": "d", "loss": ".4f", "spread": ".4f", "gap": "+.2%", "gap_spread": ".2%", "perplexity": "+.1%",
            "captured_least": ".3f", "captured_mean": ".3f",
        }  # fmt: skip
        tried = ", ".join(format(lr, "g") for lr in r["tried"])
        return " | ".join([f"{r['lr']:g} of {tried}", *(number(r[key], form) for key, form in forms.items())])

    lines = ["| | rate | seeds | loss | spread | gap | its spread | perplexity | captured, least | mean | on |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|")
    lines += [f"| `{r['row']}` | {cells(r)} | {', '.join(r['devices'])} |" for r in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
