"""Fine-tune a language model with LoRA, or QLoRA, in less memory: torch.compile(model, backend="actcomp").

    python examples/finetune_lora.py                              # all defaults: minutes on a CPU
    python examples/finetune_lora.py --checkpoint FOLDER --tokenizer FOLDER --data texts/ --bf16
    python examples/finetune_lora.py --quantize nf4               # QLoRA: the frozen weights in 4 bits
    python examples/finetune_lora.py --checkpointing              # of activations, every layer
    python examples/finetune_lora.py --compare --steps 20         # eager, Inductor and actcomp, with checkpointing and without

The model is a Hugging Face checkpoint in a local directory, or has random weights, made from a `transformers` config; nothing
is downloaded. Its weights are frozen; PEFT's adapters on all linear layers but the head are trained. The default text is the
source code of Python's standard library as found on this machine, read as bytes.
Runs on CUDA where there is a GPU, else on the CPU. Defaults are in parentheses below.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import UsageError
from common.adapters import QUANTIZERS, add_adapters, checkpoint_layers, load_language_model, quantize_base
from common.data import load_text, load_tokenizer
from common.job import BASELINE, print_metrics, run_job, run_main, uncompressed, write_metrics
from common.models import DEFAULT_LLAMA, LLAMAS, LanguageModelLoss, build_language_model, load_config
from common.options import (
    add_adapter_options,
    add_backend_options,
    add_output_options,
    add_text_options,
    add_training_options,
)
from common.settings import AdapterSettings, complete, defaults_of, parse_settings
from common.train import make_repeatable


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings(AdapterSettings):
    """The command line of this job."""

    model: str = DEFAULT_LLAMA
    checkpoint: str | None = None
    max_data_bytes: int = 16_000_000
    lora_rank: int = 16
    quantize: str = "none"
    checkpointing: bool = False
    out: str = "finetune_lora_compare"

    @property
    def title(self) -> str:
        name = Path(self.checkpoint).name if self.checkpoint else self.model
        return f"{name} with {'QLoRA' if self.quantize != 'none' else 'LoRA'} of rank {self.lora_rank}"


def make_parser() -> argparse.ArgumentParser:
    """All options, with the defaults of `LoraSettings`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model and text")
    add = model.add_argument
    add("--checkpoint", metavar="DIR", help="a Hugging Face model")
    add("--model", help=f"{', '.join(LLAMAS)}, or the path of a config JSON: random weights ({DEFAULT_LLAMA})")
    add_text_options(model)
    adapters = parser.add_argument_group("adapters")
    add_adapter_options(adapters, rank="of each adapter (16)")
    add = adapters.add_argument
    add("--quantize", choices=QUANTIZERS, help="how the frozen weights are stored: nf4 is torchao's, bnb4 bitsandbytes' (none)")
    add("--checkpointing", action="store_true", help="of activations, every layer: transformers' gradient checkpointing")
    add_training_options(parser.add_argument_group("training"))
    add_backend_options(parser.add_argument_group("backend"))
    add_output_options(parser.add_argument_group("checkpoints and output"))
    parser.set_defaults(**defaults_of(LoraSettings))
    return parser


def find_problem(settings: LoraSettings) -> str | None:
    """What is wrong with this job's own options taken together, or None."""
    if settings.checkpoint and settings.model != DEFAULT_LLAMA:
        return "--checkpoint brings its model: leave out --model"
    return None


def load_module(settings: LoraSettings, vocab_size: int) -> LanguageModelLoss:
    """The model with its adapters, on its device: the same weights for the same seed, on every device and backend."""
    torch.manual_seed(settings.seed)
    if settings.checkpoint:
        module = load_language_model(settings.checkpoint, settings.seq_len)
    else:
        module = build_language_model(load_config(settings.model, LLAMAS, settings.seq_len, {}))
    if module.model.config.vocab_size < vocab_size:
        raise UsageError(
            f"tokenizer {settings.tokenizer!r} has {vocab_size} tokens, the model only {module.model.config.vocab_size}: "
            "give --tokenizer"
        )
    quantize_base(module, settings.quantize)
    add_adapters(module, settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
    if settings.checkpointing:
        checkpoint_layers(module)
    return module.to(settings.device)


def variants(settings: LoraSettings) -> dict[str, LoraSettings]:
    """The rows of `--compare`."""
    plain = replace(uncompressed(settings), checkpointing=False)
    given = replace(settings, checkpointing=False)
    return {
        "eager": replace(plain, backend="eager"),
        "eager, checkpointing": replace(plain, backend="eager", checkpointing=True),
        BASELINE: replace(plain, backend="inductor"),
        "Inductor, checkpointing": replace(plain, backend="inductor", checkpointing=True),
        "actcomp exact": replace(plain, policy="exact"),
        "actcomp": given,
        "actcomp, checkpointing": replace(given, checkpointing=True),
    }


def finetune(settings: LoraSettings) -> None:
    """One training run, from the text to the last checkpoint and the measurements."""
    tokenizer = load_tokenizer(settings.tokenizer)
    batches = load_text(
        settings.data,
        tokenizer,
        settings.batch_size,
        settings.seq_len,
        seed=settings.seed,
        max_bytes=settings.max_data_bytes,
    )
    if not settings.nondeterministic:
        make_repeatable()
    _, metrics = run_job(settings, load_module(settings, tokenizer.vocab_size), batches)
    print_metrics(metrics)
    write_metrics(metrics, settings.metrics)


def main() -> None:
    """Entry point."""
    parser = make_parser()
    settings = parse_settings(parser, LoraSettings, find_problem)
    usual = LLAMAS.get(settings.model, LLAMAS[DEFAULT_LLAMA])
    run_main(parser, settings, lambda: complete(settings, usual), finetune, variants)


if __name__ == "__main__":
    main()
