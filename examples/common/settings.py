"""The options that the jobs share, as values: checked together, completed, and made into what the other modules take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import torch

from actpass.optim import OPTIMIZERS

from . import UsageError
from .backend import Backend, parse_override
from .data import BYTES, STDLIB
from .train import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The command line. 0 and "auto" stand for what `complete` takes from model and device."""

    model: str
    tokenizer: str = BYTES
    data: str = STDLIB
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
    policy: str | None = None
    codec: str | None = None
    projection: str | None = None
    rank: int | float | None = None
    projection_scaling: str | None = None
    refresh_interval: int | None = None
    weight_gradient_format: str | None = None
    memory_budget: float | None = None
    override: tuple[str, ...] = ()
    save: str | None = None
    save_every: int = 0
    resume: bool = False
    metrics: str | None = None
    compare: bool = False
    out: str

    @property
    def title(self) -> str:
        """What is trained, for people."""
        return self.model


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings(Settings):
    """The command line of a job with low-rank adapters. A rank of 0: without, an alpha of 0: twice the rank."""

    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_dropout: float = 0.0


SettingsT = TypeVar("SettingsT", bound=Settings)


class Usual(Protocol):
    """How a model is usually trained."""

    @property
    def seq_len(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def cuda_batch_size(self) -> int: ...
    @property
    def lr(self) -> float: ...


COMPRESSION = (
    *("policy", "codec", "projection", "rank", "projection_scaling", "refresh_interval", "weight_gradient_format"),
    *("memory_budget", "override"),
)
# What may change between a checkpoint and its continuation: nothing that the weights depend on.
NOT_OF_THE_RUN = {*("save", "save_every", "resume", "metrics", "compare", "out", "eval_every", "eval_batches")}


def defaults_of(kind: type[Settings]) -> dict[str, Any]:
    """For `ArgumentParser.set_defaults`. None: an option that may be given several times."""
    return {field.name: None if isinstance(field.default, tuple) else field.default for field in fields(kind)}


def parse_settings(
    parser: argparse.ArgumentParser, kind: type[SettingsT], find_more: Callable[[SettingsT], str | None] = lambda _: None
) -> SettingsT:
    """The command line as given; options that do not go together are refused. find_more: what is wrong with a job's own."""
    values: dict[str, Any] = vars(parser.parse_args())
    several = [field.name for field in fields(kind) if isinstance(field.default, tuple)]
    values.update({name: tuple(values[name] or ()) for name in several})
    settings = kind(**values)
    problem = find_problem(settings) or find_more(settings)
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
    if getattr(OPTIMIZERS[settings.optimizer], "for_low_rank", False) and settings.weight_gradient_format != "low_rank":
        return f"--optimizer {settings.optimizer} goes with --weight-gradient-format low_rank"
    if (settings.save_every or settings.resume) and not settings.save:
        return "--save-every and --resume need --save DIR"
    if settings.compare and (settings.save or settings.metrics or settings.backend != "actcomp"):
        return "--compare runs all backends itself: leave out --backend, --save and --metrics"
    return None


def complete(settings: SettingsT, usual: Usual) -> SettingsT:
    """Fill in what depends on the model and the device."""
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
        batch_size=settings.batch_size or (usual.cuda_batch_size if on_cuda else usual.batch_size),
        seq_len=settings.seq_len or usual.seq_len,
        lr=settings.lr or usual.lr,
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
        "module_overrides": dict(map(parse_override, settings.override)) or None,
        "seed": settings.seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return Backend(settings.backend, settings.inductor_budget, given)
