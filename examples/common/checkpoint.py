"""Checkpoints from which a run goes on bitwise as if it had not stopped.

One file a checkpoint, plain tensors and numbers: `torch.load(path, weights_only=True)` reads it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import UsageError
from .backend import Backend
from .train import Run

FORMAT = 1
RunSettings = Mapping[str, str | int | float | bool | None]


def save_checkpoint(folder: Path, run: Run, backend: Backend, settings: RunSettings) -> Path:
    """Write `folder/step-00000100.pt`; `settings` are what tells this run from another."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{run.step:08d}.pt"
    part = path.with_suffix(".part")
    torch.save(_state(run, backend, settings), part)
    os.replace(part, path)  # a run killed while it writes leaves the last checkpoint whole
    tqdm.write(f"saved {path}")
    return path


def _state(run: Run, backend: Backend, settings: RunSettings) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "settings": dict(settings),
        "step": run.step,
        "position": run.position,
        "model": run.module.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "compression": backend.state_dict(run.forward),
        "train_loss": run.history.train_loss,
        "held_out_loss": run.history.held_out_loss,
        "cpu_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def find_checkpoint(folder: Path) -> Path:
    """The newest checkpoint in a directory."""
    found = sorted(folder.glob("step-*.pt"))
    if not found:
        raise UsageError(f"no checkpoint (step-*.pt) in {str(folder)!r} to resume from")
    return found[-1]


def require_no_checkpoint(folder: Path) -> None:
    """Refuse to mix the checkpoints of a new run with those of an old one."""
    found = sorted(folder.glob("step-*.pt"))
    if found:
        raise UsageError(
            f"{str(folder)!r} has checkpoints already (up to {found[-1].name}): add --resume to go "
            "on from there, or give another --save directory"
        )


def load_checkpoint(path: Path, run: Run, backend: Backend, settings: RunSettings) -> None:
    """Put a new `run` where the checkpoint left off; it must have the checkpoint's settings."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    _require_same_run(path, state, settings)
    run.module.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    backend.load_state_dict(run.forward, state["compression"])
    run.step, run.position = state["step"], state["position"]
    run.history.train_loss = list(state["train_loss"])
    run.history.held_out_loss = list(state["held_out_loss"])
    torch.set_rng_state(state["cpu_rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])


def _require_same_run(path: Path, state: dict[str, Any], settings: RunSettings) -> None:
    if state.get("format") != FORMAT:
        raise UsageError(f"{path} has checkpoint format {state.get('format')!r}, not {FORMAT}")
    saved = state["settings"]
    differ = [
        f"{name} was {saved.get(name)!r}, is {settings.get(name)!r}"
        for name in sorted({*saved, *settings})
        if saved.get(name) != settings.get(name)
    ]
    if differ:
        raise UsageError(
            f"{path} belongs to a run with other settings: {'; '.join(differ)}. Resume it with "
            "the same ones, or start anew in another --save directory"
        )
