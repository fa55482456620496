"""One training job from its first step to its measurements, and the same job on all backends."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from . import UsageError
from .backend import Backend
from .checkpoint import RunSettings, find_checkpoint, load_checkpoint, require_no_checkpoint, save_checkpoint
from .compare import Metrics, Row, compare, to_arguments
from .measure import UNKNOWN, format_bytes, resident_bytes
from .settings import COMPRESSION, NOT_OF_THE_RUN, Settings, SettingsT, make_backend, make_train_config
from .train import Batches, Run, start_run, train

BASELINE = "Inductor"
Variants = Callable[[SettingsT], dict[str, SettingsT]]


def run_job(settings: Settings, module: nn.Module, batches: Batches) -> tuple[Run, Metrics]:
    """Train `module` as the settings say, to the last checkpoint; the run, and all that was measured as plain data."""
    backend, config = make_backend(settings), make_train_config(settings)
    run = start_run(module, backend.compile(module), config)
    saved_settings = _run_settings(settings, batches)
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
    return run, _collect_metrics(run, backend, settings, batches)


def _run_settings(settings: Settings, batches: Batches) -> RunSettings:
    """What a checkpoint remembers, to tell that it belongs to this run."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in NOT_OF_THE_RUN}
    plain = {name: " ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()}
    return plain | {"text_fingerprint": batches.fingerprint}


def _print_start(run: Run, settings: Settings, batches: Batches) -> None:
    parameters = sum(parameter.numel() for parameter in run.module.parameters())
    print(
        f"{settings.title}: {parameters / 1e6:.1f} M parameters on {settings.device}, backend "
        f"{settings.backend}; {settings.accumulate} x {settings.batch_size} x {settings.seq_len} "
        f"tokens a step, of {batches.train_tokens / 1e6:.1f} M; steps {run.step} to "
        f"{settings.steps}",
        flush=True,
    )


def _print_report(run: Run, backend: Backend) -> None:
    report = backend.report(run.forward)
    if report is not None:
        tqdm.write(f"\n{report}\n")


def _collect_metrics(run: Run, backend: Backend, settings: Settings, batches: Batches) -> Metrics:
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


def print_metrics(metrics: Metrics) -> None:
    """The figures of a run in one line."""
    step_s = metrics["median_step_s"]
    print(
        f"training loss {metrics['final_train_loss']:.4f}, "
        f"validation loss {metrics['held_out_loss'][-1][1]:.4f}; "
        f"median step {UNKNOWN if step_s is None else f'{step_s:.3f} s'}; "
        f"saved for backward {format_bytes(metrics['saved_bytes'])}, "
        f"peak {format_bytes(metrics['peak_bytes'])} above the "
        f"{format_bytes(metrics['resident_bytes'])} of parameters and optimizer state"
    )


def write_metrics(metrics: Metrics, file: str | None) -> None:
    """As JSON, where a file is asked for."""
    if file is not None:
        Path(file).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def run_main(
    parser: argparse.ArgumentParser,
    settings: SettingsT,
    full: Callable[[], Settings],
    run: Callable[[Any], None],
    variants: Variants[SettingsT] | None = None,
) -> None:
    """`run` the completed settings (`full`), or compare; what the user gave wrongly ends the program with its message."""
    try:
        if not settings.compare:
            run(full())
        elif not _run_comparison(comparison_rows(settings, variants), settings, full()):
            raise SystemExit(1)
    except UsageError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def comparison_rows(settings: SettingsT, variants: Variants[SettingsT] | None = None) -> list[Row]:
    """The rows of `--compare`: the same run in other ways. variants: these by their labels, if not `backend_variants`."""
    defaults: Any = type(settings)  # each job's own has a default for every option
    settings = replace(settings, compare=False, out=defaults().out)
    return [Row(label, to_arguments(row, defaults())) for label, row in (variants or backend_variants)(settings).items()]


def uncompressed(settings: SettingsT) -> SettingsT:
    """The run on any backend: gradients are dense and go to AdamW."""
    changes: dict[str, Any] = dict.fromkeys(COMPRESSION) | {"override": (), "optimizer": "adamw"}
    return replace(settings, **changes)


def backend_variants(settings: SettingsT) -> dict[str, SettingsT]:
    """The run on other backends."""
    plain = uncompressed(settings)
    last = settings if settings.codec or settings.projection else replace(settings, policy=None, projection="haar")
    last = replace(last, rank=settings.rank or 0.25) if last.projection else last
    formats = " ".join(str(name) for name in (last.projection, last.rank, last.codec) if name)
    return {
        "eager": replace(plain, backend="eager"),
        BASELINE: replace(plain, backend="inductor"),
        "Inductor, full recompute": replace(plain, backend="inductor", inductor_budget=0.0),
        "actcomp exact": replace(plain, policy="exact"),
        "actcomp auto": replace(plain, policy="auto"),
        f"actcomp {formats}": last,
    }


def _run_comparison(rows: list[Row], settings: Settings, full: Settings) -> bool:
    """`--compare`; False if a row failed."""
    on_cuda = full.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if on_cuda else f"{torch.get_num_threads()} CPU threads"
    title = (
        f"{full.title}, {full.accumulate} x {full.batch_size} x {full.seq_len} tokens a step, "
        f"{full.steps} steps, {'bf16 autocast' if full.bf16 else 'fp32'}; {machine}, "
        f"torch {torch.__version__}"
    )
    script = Path(os.path.relpath(sys.argv[0]))
    return compare(script, rows, BASELINE, title, Path(settings.out))
