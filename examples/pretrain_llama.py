"""Pre-train a Llama in less memory: torch.compile(model, backend="actcomp").

    python examples/pretrain_llama.py                             # all defaults: minutes on a CPU
    python examples/pretrain_llama.py --method haar --rank 0.25   # weight gradients by projection
    python examples/pretrain_llama.py --method oasis --rank 0.25 --gradients low_rank --optimizer oasis
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
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import UsageError
from common.backend import Backend, parse_override
from common.checkpoint import RunSettings, find_checkpoint, load_checkpoint, require_no_checkpoint, save_checkpoint
from common.compare import Row, compare, to_arguments
from common.data import BYTES, STDLIB, TextBatches, load_text, load_tokenizer
from common.measure import UNKNOWN, format_bytes, resident_bytes
from common.models import DEFAULT_SIZE, SIZES, build_model, load_config
from common.options import (
    add_backend_options,
    add_output_options,
    add_text_options,
    add_training_options,
    whole,
)
from common.train import Run, TrainConfig, make_repeatable, start_run, train
from torch import nn
from tqdm import tqdm


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line. 0 and "auto" stand for what `complete` takes from model and device."""

    model: str = DEFAULT_SIZE
    vocab_size: int = 0
    tokenizer: str = BYTES
    data: str = STDLIB
    max_data_bytes: int = 16_000_000
    steps: int = 300
    batch_size: int = 0
    seq_len: int = 0
    accumulate: int = 1
    lr: float = 0.0
    optimizer: str = "adamw"
    warmup: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    bf16: bool = False
    nondeterministic: bool = False
    seed: int = 0
    device: str = "auto"
    eval_every: int = 50
    eval_batches: int = 4
    backend: str = "actcomp"
    inductor_budget: float | None = None
    method: str | None = None
    rank: int | float | None = None
    scale: str | None = None
    refresh_interval: int | None = None
    gradients: str | None = None
    memory_budget: float | None = None
    override: tuple[str, ...] = ()
    save: str | None = None
    save_every: int = 0
    resume: bool = False
    metrics: str | None = None
    compare: bool = False
    out: str = "pretrain_llama_compare"


COMPRESSION = ("method", "rank", "scale", "refresh_interval", "gradients", "memory_budget", "override")
# What may change between a checkpoint and its continuation: nothing that the weights depend on.
NOT_OF_THE_RUN = {*("save", "save_every", "resume", "metrics", "compare", "out", "eval_every", "eval_batches")}
BASELINE = "Inductor"


def make_parser() -> argparse.ArgumentParser:
    """All options, with the defaults of `Settings`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model and text")
    names = ", ".join(SIZES)
    model.add_argument("--model", help=f"{names}, or the path of a config JSON ({DEFAULT_SIZE})")
    model.add_argument("--vocab-size", type=whole(1), metavar="N", help="instead of the model's")
    add_text_options(model)
    add_training_options(parser.add_argument_group("training"))
    add_backend_options(parser.add_argument_group("backend"))
    add_output_options(parser.add_argument_group("checkpoints and output"))
    parser.set_defaults(**asdict(Settings()) | {"override": None})
    return parser


def parse_settings(parser: argparse.ArgumentParser) -> Settings:
    """The command line as given; options that do not go together are refused."""
    values: dict[str, Any] = vars(parser.parse_args())
    values["override"] = tuple(values["override"] or ())
    settings = Settings(**values)
    problem = find_problem(settings)
    if problem is not None:
        parser.error(problem)
    return settings


def find_problem(settings: Settings) -> str | None:
    """What is wrong with the options taken together, or None."""
    if settings.inductor_budget is not None and settings.backend != "inductor":
        return "--inductor-budget goes with --backend inductor"
    given = [name for name in COMPRESSION if getattr(settings, name)]
    if given and settings.backend != "actcomp":
        return f"--{given[0].replace('_', '-')} goes with --backend actcomp"
    if settings.optimizer != "adamw" and settings.gradients != "low_rank":
        return f"--optimizer {settings.optimizer} goes with --gradients low_rank"
    if (settings.save_every or settings.resume) and not settings.save:
        return "--save-every and --resume need --save DIR"
    if settings.compare and (settings.save or settings.metrics or settings.backend != "actcomp"):
        return "--compare runs all backends itself: leave out --backend, --save and --metrics"
    return None


def complete(settings: Settings) -> Settings:
    """Fill in what depends on the model and the device."""
    size = SIZES.get(settings.model, SIZES[DEFAULT_SIZE])
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_cuda = device.split(":")[0] == "cuda"
    if device != "cpu" and not on_cuda:
        raise UsageError(f"--device {device!r} is not supported: use cpu, cuda or cuda:N")
    if on_cuda and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: this torch finds no CUDA device, use --device cpu")
    return replace(
        settings,
        device=device,
        batch_size=settings.batch_size or (size.cuda_batch_size if on_cuda else size.batch_size),
        seq_len=settings.seq_len or size.seq_len,
        lr=settings.lr or size.lr,
    )


def make_train_config(settings: Settings) -> TrainConfig:
    """What the training loop needs of completed settings."""
    return TrainConfig(
        steps=settings.steps,
        accumulate=settings.accumulate,
        lr=settings.lr,
        optimizer=settings.optimizer,
        warmup=int(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        eval_every=settings.eval_every,
        eval_batches=settings.eval_batches,
        bf16=settings.bf16,
        device=torch.device(settings.device),
        save_every=settings.save_every if settings.save else None,
    )


def make_backend(settings: Settings) -> Backend:
    """The backend with the options that were given; actcomp's own defaults for the others."""
    options = {name: getattr(settings, name) for name in COMPRESSION if name != "override"}
    options |= {
        "method": settings.method,
        "overrides": dict(map(parse_override, settings.override)) or None,
        "seed": settings.seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return Backend(settings.backend, settings.inductor_budget, given)


def load_module(settings: Settings, tokenizer_vocab_size: int) -> nn.Module:
    """The model on its device: the same weights for the same seed, on every device and backend."""
    config = load_config(settings.model, settings.seq_len, settings.vocab_size)
    if config.vocab_size < tokenizer_vocab_size:
        raise UsageError(
            f"tokenizer {settings.tokenizer!r} has {tokenizer_vocab_size} tokens, model "
            f"{settings.model!r} only {config.vocab_size}: give --vocab-size {tokenizer_vocab_size}"
        )
    torch.manual_seed(settings.seed)
    return build_model(config).to(settings.device)


def run_settings(settings: Settings, batches: TextBatches) -> RunSettings:
    """What a checkpoint remembers, to tell that it belongs to this run."""
    names = (field.name for field in fields(settings) if field.name not in NOT_OF_THE_RUN)
    values = {name: getattr(settings, name) for name in names}
    return values | {
        "override": " ".join(settings.override),
        "text_fingerprint": batches.fingerprint,
    }


def pretrain(settings: Settings) -> None:
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
    module = load_module(settings, tokenizer.vocab_size)
    backend, config = make_backend(settings), make_train_config(settings)
    run = start_run(module, backend.compile(module), config)
    saved_settings = run_settings(settings, batches)
    folder = Path(settings.save or ".")
    if settings.save and not settings.resume:
        require_no_checkpoint(folder)
    if settings.resume:
        load_checkpoint(find_checkpoint(folder), run, backend, saved_settings)
    _print_start(run, settings, batches)
    with backend.configured():
        train(
            run,
            batches,
            config,
            after_first_step=partial(_print_report, run, backend),
            save=partial(save_checkpoint, folder, run, backend, saved_settings),
        )
    _finish(collect_metrics(run, backend, settings, batches), settings.metrics)


def _print_start(run: Run, settings: Settings, batches: TextBatches) -> None:
    parameters = sum(parameter.numel() for parameter in run.module.parameters())
    print(
        f"{settings.model}: {parameters / 1e6:.1f} M parameters on {settings.device}, backend "
        f"{settings.backend}; {settings.accumulate} x {settings.batch_size} x {settings.seq_len} "
        f"tokens a step, of {batches.train_windows.numel() / 1e6:.1f} M; steps {run.step} to "
        f"{settings.steps}",
        flush=True,
    )


def _print_report(run: Run, backend: Backend) -> None:
    report = backend.report(run.forward)
    if report is not None:
        tqdm.write(f"\n{report}\n")


def collect_metrics(run: Run, backend: Backend, settings: Settings, batches: TextBatches) -> dict[str, Any]:
    """All that was measured, as plain data."""
    history, report = run.history, backend.report(run.forward)
    return {
        "settings": asdict(settings),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "tokens_per_step": batches.tokens_per_batch * settings.accumulate,
        "resident_bytes": resident_bytes(run.module, run.optimizer),
        "saved_bytes": history.memory.saved_bytes if history.memory else None,
        "peak_bytes": history.memory.peak_bytes if history.memory else None,
        "first_step_s": history.first_step_s,
        "median_step_s": history.median_step_s,
        "train_loss": history.train_loss,
        "final_train_loss": history.final_train_loss,
        "held_out_loss": history.held_out_loss,
        "report": report.to_dict() if report is not None else None,
    }


def _finish(metrics: dict[str, Any], file: str | None) -> None:
    step_s = metrics["median_step_s"]
    print(
        f"training loss {metrics['final_train_loss']:.4f}, "
        f"validation loss {metrics['held_out_loss'][-1][1]:.4f}; "
        f"median step {UNKNOWN if step_s is None else f'{step_s:.3f} s'}; "
        f"saved for backward {format_bytes(metrics['saved_bytes'])}, "
        f"peak {format_bytes(metrics['peak_bytes'])} above the "
        f"{format_bytes(metrics['resident_bytes'])} of parameters and optimizer state"
    )
    if file is not None:
        Path(file).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def comparison_rows(settings: Settings) -> list[Row]:
    """The rows of `--compare`: the same run on other backends."""
    uncompressed: dict[str, Any] = dict.fromkeys(COMPRESSION) | {"override": ()}
    settings = replace(settings, compare=False, out=Settings().out)
    plain = replace(settings, **uncompressed)
    method = "haar" if settings.method in (None, "auto", "exact") else settings.method
    rank = settings.rank or 0.25
    variants = {
        "eager": replace(plain, backend="eager"),
        BASELINE: replace(plain, backend="inductor"),
        "Inductor, full recompute": replace(plain, backend="inductor", inductor_budget=0.0),
        "actcomp exact": replace(plain, method="exact"),
        "actcomp auto": replace(plain, method="auto"),
        f"actcomp {method} {rank}": replace(settings, method=method, rank=rank),
    }
    return [Row(label, to_arguments(row, Settings())) for label, row in variants.items()]


def run_comparison(settings: Settings) -> bool:
    """`--compare`; False if a row failed."""
    full = complete(settings)
    on_cuda = full.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if on_cuda else f"{torch.get_num_threads()} CPU threads"
    title = (
        f"{full.model}, {full.accumulate} x {full.batch_size} x {full.seq_len} tokens a step, "
        f"{full.steps} steps, {'bf16 autocast' if full.bf16 else 'fp32'}; {machine}, "
        f"torch {torch.__version__}"
    )
    script = Path(os.path.relpath(__file__))
    return compare(script, comparison_rows(settings), BASELINE, title, Path(settings.out))


def main() -> None:
    """Entry point."""
    parser = make_parser()
    settings = parse_settings(parser)
    try:
        if not settings.compare:
            pretrain(complete(settings))
        elif not run_comparison(settings):
            raise SystemExit(1)
    except UsageError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
