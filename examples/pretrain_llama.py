"""Pre-train a Llama in less memory: torch.compile(model, backend="actcomp").

    python examples/pretrain_llama.py                             # all defaults: minutes on a CPU
    python examples/pretrain_llama.py --projection haar --rank 0.25   # weight gradients by projection
    python examples/pretrain_llama.py --projection oasis --rank 0.25 --weight-gradient-format low_rank --optimizer oasis
    python examples/pretrain_llama.py --model llama-130m --bf16 --steps 10000 \\
        --data texts/ --save run --save-every 500
    python examples/pretrain_llama.py ... --resume                # the same command, after a stop
    python examples/pretrain_llama.py --compare --steps 300       # eager, Inductor and actcomp

The model has random weights, made from a `transformers` config; nothing is downloaded. The default
text is the source code of Python's standard library as found on this machine, read as bytes.
Runs on CUDA where there is a GPU, else on the CPU. Defaults are in parentheses below.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from common import UsageError
from common.data import load_text, load_tokenizer
from common.job import print_metrics, run_job, run_main, write_metrics
from common.models import DEFAULT_LLAMA, LLAMAS, LanguageModelLoss, build_language_model, load_config
from common.options import (
    add_backend_options,
    add_output_options,
    add_text_options,
    add_training_options,
    whole,
)
from common.settings import Settings, complete, defaults_of, parse_settings
from common.train import make_repeatable


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainSettings(Settings):
    """The command line of this job."""

    model: str = DEFAULT_LLAMA
    vocab_size: int = 0
    max_data_bytes: int = 16_000_000
    out: str = "pretrain_llama_compare"


def make_parser() -> argparse.ArgumentParser:
    """All options, with the defaults of `PretrainSettings`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model and text")
    model.add_argument("--model", help=f"{', '.join(LLAMAS)}, or the path of a config JSON ({DEFAULT_LLAMA})")
    model.add_argument("--vocab-size", type=whole(1), metavar="N", help="instead of the model's")
    add_text_options(model)
    add_training_options(parser.add_argument_group("training"))
    add_backend_options(parser.add_argument_group("backend"))
    add_output_options(parser.add_argument_group("checkpoints and output"))
    parser.set_defaults(**defaults_of(PretrainSettings))
    return parser


def load_module(settings: PretrainSettings, tokenizer_vocab_size: int) -> LanguageModelLoss:
    """The model on its device: the same weights for the same seed, on every device and backend."""
    vocabulary = {"vocab_size": settings.vocab_size} if settings.vocab_size else {}
    config = load_config(settings.model, LLAMAS, settings.seq_len, vocabulary)
    if config.vocab_size < tokenizer_vocab_size:
        raise UsageError(
            f"tokenizer {settings.tokenizer!r} has {tokenizer_vocab_size} tokens, model "
            f"{settings.model!r} only {config.vocab_size}: give --vocab-size {tokenizer_vocab_size}"
        )
    torch.manual_seed(settings.seed)
    return build_language_model(config).to(settings.device)


def pretrain(settings: PretrainSettings) -> None:
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
    settings = parse_settings(parser, PretrainSettings)
    usual = LLAMAS.get(settings.model, LLAMAS[DEFAULT_LLAMA])
    run_main(parser, settings, lambda: complete(settings, usual), pretrain)


if __name__ == "__main__":
    main()
