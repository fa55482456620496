"""HF Trainer, by both ways in: a model that was compiled before, and the Trainer's own argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import actpass
from actpass.runtime.clock import CLOCK

from . import models
from .helpers import EPS, projected

pytestmark = pytest.mark.usefixtures("no_codegen")

STEPS = 3
# A loss of three steps: some 100 operators each that round by EPS / 2, twice sqrt(300) / 2.
LOSS = 18 * EPS


class Tokens(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(3, models.VOCAB, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def losses(model: torch.nn.Module, folder: Path, **arguments: Any) -> list[float]:
    """Train three steps of two micro-batches; the loss of each step."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, max_grad_norm=1.0, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, **arguments,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=Tokens())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_takes_a_compiled_model_with_its_options(tmp_path: Path) -> None:
    model, _ = models.llama(layers=1)
    model.compile(backend="actcomp", options={"method": "srht", "rank": 8, "profitable_only": False})
    found = losses(model, tmp_path)
    report = actpass.report(model)
    assert "active, method=srht" in str(report)
    assert len(projected(report)) == 8
    assert CLOCK.steps == STEPS  # once an optimizer step, not once a micro-batch
    assert len(found) == STEPS
    assert found[-1] < found[0]


def test_trainer_takes_the_backend_by_name_after_the_helper(tmp_path: Path) -> None:
    plain, _ = models.llama(layers=1)
    want = losses(plain, tmp_path)
    for _ in range(2):
        actpass.register_with_accelerate()  # more than once is once
    model, _ = models.llama(layers=1)
    found = losses(model, tmp_path, torch_compile=True, torch_compile_backend="actcomp")
    assert "active, method=auto" in str(actpass.report(model))
    assert found == pytest.approx(want, rel=LOSS)
