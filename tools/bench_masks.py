"""What attention masks cost: a model of transformers over a long sequence, with the mask that it makes when it is compiled and
without (`actpass.backend.attention_masks`).

    python tools/bench_masks.py --tokens 4096 --layers 4 --width 512

Rows: plain Inductor; Inductor on the same model told to make no mask, which is what eager mode does; ``exact`` with the mask
(``infer_masks=False``) and without. Steps of all rows are timed in turn, and the median of the ratios to the first row counts.
Columns: peak above what is there before the step, what the report predicts of it, a step's time, the loss, and how many tensors
of tokens x tokens are in the two graphs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from arguments import positive_int
from torch import nn
from workloads import LossOnly

import actpass
from actpass.diagnostics.explain import explain_model
from actpass.memory.profiler import measure
from actpass.options import options_for

ROWS = ("inductor", "inductor:no-mask", "masks", "actcomp")


def build(layers: int, width: int, tokens: int, vocab: int, window: int | None, *, told: bool) -> nn.Module:
    """A Llama, or a Mistral with a ``window``. told: whether its attention is told that it is causal, and makes no mask."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": width, "intermediate_size": width * 8 // 3 // 32 * 32, "use_cache": False,
        "num_hidden_layers": layers, "num_attention_heads": width // 64, "num_key_value_heads": width // 64,
        "max_position_embeddings": tokens,
    }  # fmt: skip
    if window is not None:
        mistral = transformers.MistralConfig(**fields, sliding_window=window)
        return LossOnly(transformers.MistralForCausalLM(mistral).train())
    config = transformers.LlamaConfig(**fields)
    if told:
        transformers.AttentionInterface.register("causal_sdpa", transformers.AttentionInterface()["sdpa"])
        transformers.AttentionMaskInterface.register("causal_sdpa", lambda *_, **__: None)
        config._attn_implementation = "causal_sdpa"
    return LossOnly(transformers.LlamaForCausalLM(config).train())


def squares(model: nn.Module, batch: dict[str, torch.Tensor], tokens: int, options: dict[str, Any]) -> int:
    """Tensors of tokens x tokens in the two graphs."""
    graphs = [g for c in explain_model(model, (), batch, options).regions for g in (c.forward, c.backward)]
    values = [n.meta.get("val") for g in graphs for n in g.graph.nodes]
    return sum(isinstance(v, torch.Tensor) and tuple(v.shape[-2:]) == (tokens, tokens) for v in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive_int, default=4096)
    parser.add_argument("--layers", type=positive_int, default=4)
    parser.add_argument("--width", type=positive_int, default=512)
    parser.add_argument("--window", type=positive_int, help="of keys that a query sees (a Mistral)")
    parser.add_argument("--vocab", type=positive_int, default=1024)
    parser.add_argument("--format", default="exact", metavar="NAME", help="of a policy, a codec or a projection")
    parser.add_argument("--steps", type=positive_int, default=3, help="timed steps of each row")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    given = parser.parse_args()
    if given.window and "inductor:no-mask" in given.rows:
        parser.error("--window: eager mode makes a mask for a window, too. Leave inductor:no-mask out of --rows.")

    tokens = torch.randint(given.vocab, (1, given.tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "labels": tokens}
    steps: dict[str, Callable[[], torch.Tensor]] = {}
    models: dict[str, nn.Module] = {}
    for row in given.rows:
        told = row == "inductor:no-mask"
        model = models[row] = build(given.layers, given.width, given.tokens, given.vocab, given.window, told=told)
        steps[row] = _step(model, _compiled(model, row, given.format), batch)
        steps[row]()
    seconds: dict[str, list[float]] = {row: [] for row in given.rows}
    for _ in range(given.steps):
        for row, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[row].append(time.perf_counter() - start)
    kind = f"Mistral, window {given.window}" if given.window else "Llama"
    print(
        f"{kind}, {given.layers} layers of width {given.width}, 1 x {given.tokens}, {given.format}, torch {torch.__version__}"
    )
    print("| row | peak | to the first | predicted / measured | s a step | to the first | loss | tokens x tokens |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    first = given.rows[0]
    peaks: dict[str, int] = {}
    for row, step in steps.items():
        memory = measure(step, before=lambda row=row, step=step: (step(), models[row].zero_grad(set_to_none=True)))
        peaks[row] = memory.peak_bytes
        predicted, graphs = "-", "-"
        if not row.startswith("inductor"):
            (region,) = actpass.report(models[row]).regions
            assert region.footprint is not None
            predicted = f"{max(region.footprint.forward, region.footprint.backward) / memory.peak_bytes:.3f}"
            graphs = str(squares(models[row], batch, given.tokens, _options(row, given.format)))
        ratio = statistics.median(a / b for a, b in zip(seconds[row], seconds[first], strict=True))
        print(
            f"| {row} | {memory.peak_bytes / 1e6:.1f} MB | {memory.peak_bytes / peaks[first]:.3f} | {predicted} "
            f"| {statistics.median(seconds[row]):.2f} | {ratio:.3f} | {float(memory.result):.9f} | {graphs} |",
            flush=True,
        )


def _options(row: str, name: str) -> dict[str, Any]:
    return {**options_for(name), "infer_masks": row != "masks"}


def _compiled(model: nn.Module, row: str, name: str) -> Any:
    given: dict[str, Any] = {} if row.startswith("inductor") else {"backend": "actcomp", "options": _options(row, name)}
    return torch.compile(model, **given)


def _step(model: nn.Module, function: Any, batch: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = function(**batch)
        loss.backward()
        return loss.detach()

    return step


if __name__ == "__main__":
    main()
