"""The training loop of the examples: any module whose forward returns the loss.

`Run` is everything that changes while training, and everything that a checkpoint holds.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from .measure import Meter, StepMemory, format_bytes, make_meter

METERED_STEP = 2  # counted from the first step of this process: after compiling and one warm step
FINAL_STEPS = 20  # the final training loss is the mean over these


class Batches(Protocol):
    """Batches as tuples of tensors, the positional arguments of the module's forward."""

    @property
    def tokens_per_batch(self) -> int: ...

    @property
    def train_tokens(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def train(self, number: int) -> tuple[Tensor, ...]: ...

    def held_out(self, count: int) -> Iterable[tuple[Tensor, ...]]: ...


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train. `eval_every` and `save_every` count optimizer steps, 0 is "only at the end"."""

    steps: int
    accumulate: int
    lr: float
    optimizer: str
    warmup: int
    weight_decay: float
    clip: float
    eval_every: int
    eval_batches: int
    bf16: bool
    device: torch.device
    save_every: int | None  # None: no checkpoints at all


@dataclass(slots=True)
class History:
    """What was measured. The losses survive a checkpoint, the times are of this process alone."""

    train_loss: list[float] = field(default_factory=list)
    held_out_loss: list[tuple[int, float]] = field(default_factory=list)
    first_step_s: float | None = None
    step_s: list[float] = field(default_factory=list)  # first and metered step left out
    memory: StepMemory | None = None

    @property
    def median_step_s(self) -> float | None:
        return statistics.median(self.step_s) if self.step_s else None

    @property
    def final_train_loss(self) -> float:
        return statistics.fmean(self.train_loss[-FINAL_STEPS:])


@dataclass(slots=True)
class Run:
    """A training run: `module` returns the loss; `forward` is it, or its compiled form."""

    module: nn.Module
    forward: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    step: int = 0  # optimizer steps done
    position: int = 0  # training batches read
    history: History = field(default_factory=History)


def make_repeatable() -> None:
    """Have torch sum in a fixed order, so that the same run gives the same bits.

    Without it the embedding's gradient is summed by atomic additions, in Inductor's CPU code too.
    Where CUDA has no such kernel torch warns and uses the other. (Filling new memory, which the mode
    also does, changes no result.)
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def start_run(module: nn.Module, forward: nn.Module, config: TrainConfig) -> Run:
    """A run at step 0, with its optimizer and a cosine schedule that ends at a tenth of the rate."""
    optimizer = make_optimizer(config.optimizer, _parameter_groups(module, config), config.lr)
    schedule = LambdaLR(optimizer, lambda step: cosine_factor(step, config.warmup, config.steps))
    return Run(module, forward, optimizer, schedule)


def make_optimizer(name: str, groups: list[dict[str, object]], lr: float) -> Optimizer:
    """AdamW, or one of `actpass.optim`."""
    if name == "adamw":
        return AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    from actpass.optim import OPTIMIZERS

    return OPTIMIZERS[name](groups, lr=lr, betas=(0.9, 0.95))


def _parameter_groups(module: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    matrices = [named for named in trained if named[1].ndim >= 2]
    vectors = [named for named in trained if named[1].ndim < 2]
    groups: list[dict[str, object]] = []
    for members, weight_decay in ((matrices, config.weight_decay), (vectors, 0.0)):
        if members:  # adapters have no vectors
            groups.append({"params": members, "weight_decay": weight_decay})
    return groups


def cosine_factor(step: int, warmup: int, steps: int, floor: float = 0.1) -> float:
    """The factor on the learning rate: up from 0 over `warmup` steps, then a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def train(
    run: Run,
    batches: Batches,
    config: TrainConfig,
    after_first_step: Callable[[], None],
    save: Callable[[], object],
) -> None:
    """Train from `run.step` to `config.steps`, with progress bar, validation and checkpoints.

    The bar begins behind the first step, which compiles: its minutes say nothing of the steps to come.
    """
    first = run.step
    if run.step < config.steps:
        _measured_step(run, batches, config, since_first=0)
        after_first_step()
        _evaluate_and_save(run, batches, config, save)
    every_s = 0.5 if sys.stderr.isatty() else 20.0  # a log file needs no motion
    with tqdm(total=config.steps, initial=run.step, unit="step", mininterval=every_s) as bar:
        while run.step < config.steps:
            seconds = _measured_step(run, batches, config, since_first=run.step - first)
            _show(bar, run.history, batches.tokens_per_batch * config.accumulate / seconds)
            _evaluate_and_save(run, batches, config, save)


def _measured_step(run: Run, batches: Batches, config: TrainConfig, since_first: int) -> float:
    """One step, and how long it took."""
    meter = make_meter(config.device) if since_first == METERED_STEP else None
    seconds = _timed_step(run, batches, config, meter)
    _note_time(run.history, seconds, since_first, meter)
    return seconds


def _timed_step(run: Run, batches: Batches, config: TrainConfig, meter: Meter | None) -> float:
    start = time.perf_counter()
    if meter is None:
        loss = train_step(run, batches, config, forward_context=nullcontext)
    else:
        with meter:
            loss = train_step(run, batches, config, forward_context=meter.forward)
    _synchronize(config.device)
    run.history.train_loss.append(loss)
    return time.perf_counter() - start


def train_step(
    run: Run,
    batches: Batches,
    config: TrainConfig,
    forward_context: Callable[[], AbstractContextManager[object]],
) -> float:
    """One optimizer step over `config.accumulate` batches; returns their mean loss."""
    total = 0.0
    for _ in range(config.accumulate):
        batch = to_device(batches.train(run.position), config.device)
        with forward_context(), autocast(config):
            loss = run.forward(*batch)
        (loss / config.accumulate).backward()
        total += loss.item()
        run.position += 1
    if config.clip > 0:
        nn.utils.clip_grad_norm_(run.module.parameters(), config.clip)
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return total / config.accumulate


@torch.no_grad()
def evaluate(run: Run, batches: Batches, config: TrainConfig) -> float:
    """Mean loss on held-out batches, by the module as it is, so that nothing more is compiled."""
    run.module.eval()
    losses = []
    for batch in batches.held_out(config.eval_batches):
        with autocast(config):
            losses.append(run.module(*to_device(batch, config.device)).item())
    run.module.train()
    return statistics.fmean(losses)


def _evaluate_and_save(run: Run, batches: Batches, config: TrainConfig, save: Callable[[], object]) -> None:
    if _is_due(run.step, config.eval_every, config.steps):
        loss = evaluate(run, batches, config)
        run.history.held_out_loss.append((run.step, loss))
        train_loss = run.history.train_loss[-1]
        tqdm.write(f"step {run.step}: training loss {train_loss:.4f}, validation loss {loss:.4f}")
    if config.save_every is not None and _is_due(run.step, config.save_every, config.steps):
        save()


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _note_time(history: History, seconds: float, since_first: int, meter: Meter | None) -> None:
    if since_first == 0:
        history.first_step_s = seconds
    elif meter is None:
        history.step_s.append(seconds)
    else:
        history.memory = meter.memory


def _show(bar: tqdm, history: History, tokens_per_s: float) -> None:
    peak = format_bytes(None if history.memory is None else history.memory.peak_bytes)
    loss = history.train_loss[-1]
    bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s, peak {peak}", refresh=False)
    bar.update()


def to_device(batch: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The batch where the model is."""
    return tuple(tensor.to(device) for tensor in batch)


def autocast(config: TrainConfig) -> torch.autocast:
    """To be entered around forwards."""
    return torch.autocast(config.device.type, torch.bfloat16, enabled=config.bf16)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
