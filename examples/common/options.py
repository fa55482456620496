"""Command-line options that the examples share, and the types that check them."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from actpass.optim import OPTIMIZERS

from .backend import BACKENDS, CODECS, POLICIES, PROJECTIONS

Group = argparse._ArgumentGroup


def whole(least: int) -> Callable[[str], int]:
    """argparse type: an integer of at least `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
        return int(text)

    return parse


def number(least: float, most: float = float("inf")) -> Callable[[str], float]:
    """argparse type: a number from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
        return value

    return parse


def rank(text: str) -> int | float:
    """argparse type: a rank as an integer, or as a fraction of the features."""
    try:
        value = int(text) if text.isdecimal() else float(text)
    except ValueError:
        value = 0
    if value <= 0 or (isinstance(value, float) and not value <= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer of at least 1 nor a fraction in (0, 1]")
    return value


def add_text_options(group: Group) -> None:
    """Which text to train on, and how it becomes tokens."""
    add = group.add_argument
    add("--tokenizer", metavar="PATH", help="bytes, or a Hugging Face tokenizer's directory (bytes)")
    add("--data", metavar="PATH", help="stdlib, a text file, or a directory of text (stdlib)")
    add("--max-data-bytes", type=whole(1), metavar="N", help="read at most this much (16 MB)")


def add_adapter_options(group: Group, rank: str) -> None:
    """Low-rank adapters. rank: the help of that option."""
    add = group.add_argument
    add("--lora-rank", type=whole(1), metavar="R", help=rank)
    add("--lora-alpha", type=number(0), metavar="X", help="an adapter counts alpha / rank (twice the rank)")
    add("--lora-dropout", type=number(0, 1), metavar="X", help="in front of the adapters (0)")


def add_training_options(group: Group) -> None:
    """Steps, batches, optimizer, device, validation."""
    add = group.add_argument
    add("--steps", type=whole(1), metavar="N", help="optimizer steps (300)")
    add("--batch-size", type=whole(1), metavar="N", help="sequences (by the model and device)")
    add("--seq-len", type=whole(2), metavar="N", help="tokens of a sequence (by the model)")
    add("--accumulate", type=whole(1), metavar="N", help="batches for one optimizer step (1)")
    add("--lr", type=number(0), metavar="X", help="AdamW's peak learning rate (by the model)")
    add(
        "--optimizer",
        choices=tuple(OPTIMIZERS),
        help="adamw: torch's; all others: those of actpass.optim, by their names in its registry (adamw)",
    )
    add("--warmup", type=number(0, 1), metavar="X", help="fraction of the steps (0.1)")
    add("--weight-decay", type=number(0), metavar="X", help="of matrices, not of norms (0.1)")
    add("--clip", type=number(0), metavar="X", help="largest gradient norm, 0 for none (1.0)")
    add("--bf16", action="store_true", help="autocast to bfloat16; the weights stay float32")
    add(
        "--nondeterministic",
        action="store_true",
        help="allow kernels that sum in varying order: faster on CUDA, but the same run gives "
        "other bits, and --resume is no longer bitwise",
    )
    add("--seed", type=whole(0), metavar="N", help="of weights, data order and bases (0)")
    add("--device", help="cpu, cuda, cuda:1, ... (cuda where there is a GPU, else cpu)")
    add("--eval-every", type=whole(0), metavar="N", help="steps; 0: at the end only (50)")
    add("--eval-batches", type=whole(1), metavar="N", help="held-out batches a validation (4)")


def add_backend_options(group: Group) -> None:
    """What runs the step, and the options of actcomp."""
    add = group.add_argument
    add("--backend", choices=BACKENDS, help="what runs the training step (actcomp)")
    add(
        "--inductor-budget",
        type=number(0, 1),
        metavar="X",
        help="inductor: its activation_memory_budget, from 0 (recompute all) to 1",
    )
    add("--policy", choices=POLICIES, help="actcomp: who chooses the storage formats (auto without codec and projection)")
    add("--codec", choices=CODECS, help="actcomp: low-bit format of all that is saved for backward")
    add("--projection", choices=PROJECTIONS, help="actcomp: what weight gradients are formed through")
    add("--rank", type=rank, help="actcomp: of a projection, integer or fraction of the width")
    add("--projection-scaling", choices=("unbiased", "orthonormal"), help="actcomp: of a projection")
    add(
        "--refresh-interval",
        type=whole(1),
        metavar="N",
        help="actcomp: optimizer steps for which a basis stays",
    )
    add(
        "--weight-gradient-format",
        choices=("dense", "low_rank"),
        help="actcomp: low_rank keeps weight gradients in their factors (dense)",
    )
    add(
        "--memory-budget",
        type=number(0, 1),
        metavar="X",
        help="actcomp: fraction of the bytes that Inductor's default would save",
    )
    add(
        "--override",
        action="append",
        metavar="PATTERN=FORMAT",
        help="actcomp: for modules whose path matches: save, a codec, projection or policy, or JSON such as "
        '{"projection": "haar", "rank": 64}; may be given several times',
    )


def add_output_options(group: Group) -> None:
    """Checkpoints, measurements, and the comparison of backends."""
    add = group.add_argument
    add("--save", metavar="DIR", help="write a checkpoint there at the end")
    add("--save-every", type=whole(0), metavar="N", help="and every N steps")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --save DIR")
    add("--metrics", metavar="FILE", help="write all that was measured as JSON")
    add(
        "--compare",
        action="store_true",
        help="run eager, Inductor, Inductor with full recompute, actcomp exact and auto, and actcomp with "
        "--codec, --projection and --rank (haar, 0.25), each from the same weights on the same batches",
    )
    add("--out", metavar="DIR", help="--compare: where its table and picture go")
