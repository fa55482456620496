"""Fine-tune a BERT or RoBERTa to classify sentences, in less memory: torch.compile(model, backend="actcomp").

    python examples/finetune_classifier.py                         # all defaults: a minute or two on a CPU
    python examples/finetune_classifier.py --checkpoint FOLDER --data SST-2/ --steps 2000
    python examples/finetune_classifier.py --projection oasis --rank 0.25 --weight-gradient-format low_rank --optimizer oasis
    python examples/finetune_classifier.py --backend inductor --seeds 0 1 2 --metrics adamw.json
    python examples/finetune_classifier.py --checkpoint FOLDER --data SST-2/ --lora-rank 16 --lora-dropout 0.05
    python examples/finetune_classifier.py --compare               # eager, Inductor and actcomp

The model is a Hugging Face checkpoint in a local directory, or has random weights, made from a `transformers` config; nothing
is downloaded. Data are a TSV in the format of SST-2 (`sentence<TAB>label`; the last 5 % are held out) or a directory with
train.tsv and dev.tsv. The default task is to tell prose (comments, docstrings) from code in lines of Python's standard library
as found on this machine. All weights are trained, or with --lora-rank PEFT's adapters on all linear layers and the head.
There is no dropout unless asked for, so that all backends compute the same.
Runs on CUDA where there is a GPU, else on the CPU. Defaults are in parentheses below.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common.adapters import add_adapters
from common.data import BYTES
from common.job import print_metrics, run_job, run_main, write_metrics
from common.models import (
    CLASSIFIERS,
    DEFAULT_CLASSIFIER,
    PRETRAINED,
    ClassifierLoss,
    build_classifier,
    load_classifier,
    load_config,
    widths,
)
from common.options import (
    add_adapter_options,
    add_backend_options,
    add_output_options,
    add_training_options,
    number,
    whole,
)
from common.sentences import RowTokenizer, SentenceBatches, load_row_tokenizer, load_sentences
from common.settings import AdapterSettings, complete, defaults_of, make_train_config, parse_settings
from common.train import TrainConfig, autocast, make_repeatable, to_device

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
OF_EACH_SEED = ("accuracy", "final_train_loss", "held_out_loss", "median_step_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings(AdapterSettings):
    """The command line of this job."""

    model: str = DEFAULT_CLASSIFIER
    checkpoint: str | None = None
    hidden_size: int = 0
    intermediate_size: int = 0
    layers: int = 0
    heads: int = 0
    dropout: float = 0.0
    tokenizer: str = "auto"
    seeds: tuple[int, ...] = ()
    out: str = "finetune_classifier_compare"

    @property
    def title(self) -> str:
        name = Path(self.checkpoint).name if self.checkpoint else self.model
        return f"{name} with LoRA of rank {self.lora_rank}" if self.lora_rank else name

    @property
    def own_widths(self) -> dict[str, int]:
        """What was given in place of the model's own."""
        return widths(self.hidden_size, self.intermediate_size, self.layers, self.heads)


def make_parser() -> argparse.ArgumentParser:
    """All options, with the defaults of `FinetuneSettings`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model and data")
    add = model.add_argument
    add("--checkpoint", metavar="DIR", help="a Hugging Face model; its head is used if it has as many labels as the data")
    add("--model", help=f"{', '.join(CLASSIFIERS)}, or the path of a config JSON: random weights ({DEFAULT_CLASSIFIER})")
    for name in ("hidden-size", "intermediate-size", "layers", "heads"):
        add(f"--{name}", type=whole(1), metavar="N", help="instead of the model's")
    add("--dropout", type=number(0, 1), metavar="X", help="of the whole model (0)")
    add("--tokenizer", metavar="PATH", help="bytes, or a Hugging Face tokenizer's directory (the checkpoint's, else bytes)")
    add("--data", metavar="PATH", help="stdlib, a TSV, or a directory with train.tsv and dev.tsv (stdlib)")
    add_adapter_options(parser.add_argument_group("adapters"), rank="train adapters and the head alone (all is trained)")
    training = parser.add_argument_group("training")
    add_training_options(training)
    training.add_argument(
        "--seeds", type=whole(0), nargs="+", action="extend", metavar="N", help="a run for each, in place of --seed"
    )
    add_backend_options(parser.add_argument_group("backend"))
    add_output_options(parser.add_argument_group("checkpoints and output"))
    parser.set_defaults(**defaults_of(FinetuneSettings))
    return parser


def find_problem(settings: FinetuneSettings) -> str | None:
    """What is wrong with this job's own options taken together, or None."""
    if settings.checkpoint and (settings.own_widths or settings.model != DEFAULT_CLASSIFIER):
        return "--checkpoint brings its model: leave out --model, --hidden-size, --intermediate-size, --layers and --heads"
    if (settings.lora_alpha or settings.lora_dropout) and not settings.lora_rank:
        return "--lora-alpha and --lora-dropout go with --lora-rank"
    if settings.seeds and settings.save:
        return "--save keeps one run: give --seed in place of --seeds"
    return None


def complete_here(settings: FinetuneSettings) -> FinetuneSettings:
    """Fill in what depends on the model and the device."""
    usual = PRETRAINED if settings.checkpoint else CLASSIFIERS.get(settings.model, CLASSIFIERS[DEFAULT_CLASSIFIER])
    tokenizer = settings.tokenizer
    if tokenizer == "auto":
        folder = settings.checkpoint
        has_own = folder is not None and any(Path(folder, name).exists() for name in TOKENIZER_FILES)
        tokenizer = folder if folder is not None and has_own else BYTES
    return replace(complete(settings, usual), tokenizer=tokenizer)


def load_module(settings: FinetuneSettings, tokenizer: RowTokenizer, labels: int) -> ClassifierLoss:
    """The model on its device: the same weights for the same seed, on every device and backend."""
    torch.manual_seed(settings.seed)
    if settings.checkpoint:
        module = load_classifier(settings.checkpoint, settings.seq_len, tokenizer.vocab_size, labels, settings.dropout)
    else:
        changes = settings.own_widths | {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
        config = load_config(settings.model, CLASSIFIERS, settings.seq_len, changes)
        module = build_classifier(config, labels, settings.dropout)
    if settings.lora_rank:
        add_adapters(module, settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
    return module.to(settings.device)


@torch.no_grad()
def accuracy(module: ClassifierLoss, batches: SentenceBatches, config: TrainConfig) -> float:
    """The fraction of all held-out sentences whose label is predicted, by the module as it is."""
    module.eval()
    right = 0
    for batch in batches.all_held_out():
        ids, mask, labels = to_device(batch, config.device)
        with autocast(config):
            right += int((module.predict(ids, mask) == labels).sum())
    module.train()
    return right / len(batches.held_out_examples)


def finetune_once(settings: FinetuneSettings, tokenizer: RowTokenizer, batches: SentenceBatches) -> dict[str, Any]:
    """One run; what was measured, the accuracy with it."""
    module = load_module(settings, tokenizer, batches.labels)
    _, metrics = run_job(settings, module, batches)
    metrics["accuracy"] = accuracy(module, batches, make_train_config(settings))
    print_metrics(metrics)
    most = batches.held_out_examples.labels.bincount().max().item() / len(batches.held_out_examples)
    print(
        f"seed {settings.seed}: accuracy {metrics['accuracy']:.2%} of {len(batches.held_out_examples)} held-out sentences "
        f"({most:.2%} have the most frequent label)",
        flush=True,
    )
    return metrics


def finetune(settings: FinetuneSettings) -> None:
    """A run for each seed, from the data to the measurements."""
    tokenizer = load_row_tokenizer(settings.tokenizer)
    batches = load_sentences(settings.data, tokenizer, settings.batch_size, settings.seq_len, settings.seed)
    if not settings.nondeterministic:
        make_repeatable()
    seeds = settings.seeds or (settings.seed,)
    runs = [finetune_once(replace(settings, seed=seed), tokenizer, replace(batches, seed=seed)) for seed in seeds]
    write_metrics(runs[0] if len(runs) == 1 else _over_seeds(runs), settings.metrics)


def _over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The first run's measurements, but the accuracy of all: its mean and spread; and what each run came to."""
    found = [run["accuracy"] for run in runs]
    mean, spread = statistics.fmean(found), statistics.stdev(found)
    print(f"accuracy {mean:.2%}, spread over {len(found)} seeds {spread:.2%}")
    each = [{"seed": run["settings"]["seed"]} | {name: run[name] for name in OF_EACH_SEED} for run in runs]
    return runs[0] | {"accuracy": mean, "accuracy_spread": spread, "runs": each}


def main() -> None:
    """Entry point."""
    parser = make_parser()
    settings = parse_settings(parser, FinetuneSettings, find_problem)
    run_main(parser, settings, lambda: complete_here(settings), finetune)


if __name__ == "__main__":
    main()
