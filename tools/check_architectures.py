"""Must show: architectures of `transformers` that no test names, each with a small random model in train mode.

    python tools/check_architectures.py [NAME ...] [--inductor] [--json FILE]

Of each: whether `exact`, `auto` and `haar` are active, the largest relative error of a gradient under `exact` against eager's
(of all gradients together, and of the worst parameter relative to its module's largest), whether loss and outputs are
bit-equal to the same graphs without the pass, and the bytes saved for the backward. Graphs are interpreted, or compiled with
``--inductor``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import actpass
from actpass.backend import backend
from actpass.diagnostics.interpreter import interpret
from actpass.torch_compat import compile_fx, functorch_config

VOCAB, LENGTH = 256, 32
TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = {**TOKENS, **WIDE, "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA = {**PLAIN, "head_dim": 16}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {"vocab_size": VOCAB, **WIDE, "max_position_embeddings": 64, "pad_token_id": 0}
VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "num_labels": 5}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}


def random_tokens(batch: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def causal() -> dict[str, torch.Tensor]:
    tokens = random_tokens()
    return {"input_ids": tokens, "labels": tokens.clone()}


def sentences() -> dict[str, torch.Tensor]:
    return {"input_ids": random_tokens(), "labels": torch.tensor([0, 1])}


def images() -> dict[str, torch.Tensor]:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 3])}


def speech() -> dict[str, torch.Tensor]:
    features = torch.randn(2, 16, 2 * LENGTH, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "labels": random_tokens()[:, :16]}


Build = tuple[str, str, Mapping[str, Any], Callable[[], dict[str, torch.Tensor]]]
ARCHITECTURES: dict[str, Build] = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, "query_pre_attn_scalar": 16, "sliding_window": 16}, causal),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, "query_pre_attn_scalar": 16, "sliding_window": 16}, causal),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": 16}, causal),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", PLAIN, causal),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**LLAMA, **EXPERTS, "num_experts": 4}, causal),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", PLAIN, causal),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", PLAIN, causal),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**PLAIN, "num_experts": 4, "num_experts_per_tok": 2}, causal),
    "granite": ("GraniteForCausalLM", "GraniteConfig", PLAIN, causal),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", {**LLAMA, "sliding_window": 16, "layer_types": None}, causal),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", PLAIN, causal),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", PLAIN, causal),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", PLAIN, causal),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", LLAMA, causal),
    "helium": ("HeliumForCausalLM", "HeliumConfig", LLAMA, causal),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", LLAMA, causal),
    "ernie4_5": ("Ernie4_5ForCausalLM", "Ernie4_5Config", LLAMA, causal),
    "diffllama": ("DiffLlamaForCausalLM", "DiffLlamaConfig", LLAMA, causal),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**TOKENS, **WIDE, "max_position_embeddings": 64}, causal),
    "opt": ("OPTForCausalLM", "OPTConfig", {**TOKENS, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2,
                                            "num_attention_heads": 4, "word_embed_proj_dim": 64, "dropout": 0.0,
                                            "max_position_embeddings": 64}, causal),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2,
                                                     "num_attention_heads": 4}, causal),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4,
                                                  "hidden_dropout": 0.0}, causal),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {**PLAIN,
                                               "layer_types": ["conv", "full_attention"]}, causal),
    "modernbert": ("ModernBertForSequenceClassification", "ModernBertConfig", {**BERT, "attn_implementation": "sdpa",
                   "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}, sentences),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", {
        "vocab_size": VOCAB, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "dropout": 0.0,
        "attention_dropout": 0.0, "seq_classif_dropout": 0.0}, sentences),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**BERT, "embedding_size": 32,
        "classifier_dropout_prob": 0.0}, sentences),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**BERT, **NO_DROPOUT, "embedding_size": 32}, sentences),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**TOKENS, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
             "dropout": 0.0, "max_position_embeddings": 64}, causal),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {**TOKENS, "d_model": 64, "encoder_layers": 2,
                "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128,
                "decoder_ffn_dim": 128, "dropout": 0.0, "num_mel_bins": 16, "max_source_positions": LENGTH,
                "max_target_positions": 64, "decoder_start_token_id": 1}, speech),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", VIT, images),
    "deit": ("DeiTForImageClassification", "DeiTConfig", {**VIT, "intermediate_size": 128, "hidden_dropout_prob": 0.0}, images),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", {"hidden_sizes": [16, 32], "depths": [1, 1],
                 "num_stages": 2, "num_labels": 5}, images),
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "exact": {"policy": "exact", "min_tensor_bytes": 0},
    "auto": {"policy": "auto", "min_tensor_bytes": 0},
    "haar": {"projection": "haar", "rank": 0.5, "min_tensor_bytes": 0},
}
Run = Callable[..., Any]


@contextlib.contextmanager
def interpreted(*, inductor: bool) -> Iterator[Callable[[nn.Module], Run]]:
    """Within, "actcomp" is interpreted, or not; yields what compiles a model without the pass, in the same way."""
    if inductor:
        yield lambda model: torch.compile(model)
        return
    original = backend.compile_fx

    def compiler(gm: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return original(gm, inputs, *args, **{"inner_compile": interpret, **kwargs})

    backend.compile_fx = compiler
    try:
        with functorch_config.patch(enable_autograd_cache=False):
            plain = functools.partial(compile_fx, inner_compile=interpret)
            yield lambda model: torch.compile(model, backend=plain)
    finally:
        backend.compile_fx = original


def step(run: Run, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs and gradients of one forward and backward."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    out = run(**inputs)
    outputs = {k: v.detach().clone() for k, v in out.items() if isinstance(v, torch.Tensor)}
    out["loss"].backward()
    return outputs, {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def errors(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """The relative error of all gradients together, and the largest of one relative to the largest of its module."""
    assert got.keys() == want.keys(), f"gradients of {set(got) ^ set(want)} in one of both only"
    differences = {n: float((got[n].double() - want[n].double()).norm()) for n in want}
    norms = {n: float(want[n].double().norm()) for n in want}
    modules: dict[str, float] = {}
    for name, norm in norms.items():
        module = name.rpartition(".")[0]
        modules[module] = max(modules.get(module, 0.0), norm)
    worst = max((differences[n] / modules[n.rpartition(".")[0]] for n in want if modules[n.rpartition(".")[0]]), default=0.0)
    total = sum(d * d for d in differences.values()) ** 0.5 / sum(n * n for n in norms.values()) ** 0.5
    return total, worst


def check(name: str, *, inductor: bool) -> dict[str, Any]:
    cls, config, options, inputs_of = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**options)).train()
    inputs, row = inputs_of(), {"name": name}
    with interpreted(inductor=inductor) as stock:
        eager = step(model, model, inputs)[1]
        torch.compiler.reset()
        reference = step(stock(model), model, inputs)[0]
        for method, chosen in METHODS.items():
            torch.compiler.reset()
            outputs, gradients = step(torch.compile(model, backend="actcomp", options=chosen), model, inputs)
            report = actpass.report(model)
            equal = all(torch.equal(outputs[k], reference[k]) for k in reference)
            row[method] = {
                "active": report.active,
                "why": None if report.active else str(report).splitlines()[0],
                "forward_equal": equal,
                "error": errors(gradients, eager),
                "saved_bytes": report.totals.saved_bytes,
                "saved_bytes_default": report.totals.saved_bytes_default,
            }
    return row


def line(row: Mapping[str, Any]) -> str:
    cells = [f"{row['name']:12s}"]
    for method in METHODS:
        found = row[method]
        share = found["saved_bytes"] / max(found["saved_bytes_default"], 1)
        state = ("active" if found["active"] else "OFF") + ("" if found["forward_equal"] else " FORWARD DIFFERS")
        cells.append(f"{method} {state} {share:.2f} {found['error'][0]:.1e}/{found['error'][1]:.1e}")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ARCHITECTURES)}; default: all")
    parser.add_argument("--inductor", action="store_true", help="compile the graphs in place of interpreting them")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows, failed = [], []
    for name in args.names or ARCHITECTURES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows.append(check(name, inductor=args.inductor))
            print(line(rows[-1]), flush=True)
        except Exception as error:  # one that fails is a row of the table, and the exit status
            failed.append(name)
            print(f"{name:12s} | FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
    if args.json is not None:
        args.json.write_text(
            json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "rows": rows}, indent=1)
        )
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
