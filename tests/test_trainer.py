"""HF Trainer, both ways in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

import actpass

from . import models
from .helpers import eager_actcomp, projected


class Tokens(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(3, models.VOCAB, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def arguments(folder: Path, **changes):
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1, **changes,
    )  # fmt: skip


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_takes_a_model_compiled_with_options(tmp_path: Path):
    from transformers import Trainer

    model, _ = models.llama(layers=1)
    model.compile(backend=eager_actcomp(method="srht", rank=8, profitable_only=False))
    found = losses(Trainer(model=model, args=arguments(tmp_path), train_dataset=Tokens()))
    assert len(found) == 3
    report = actpass.report(model)
    assert report.active
    assert projected(report)


def test_trainer_takes_the_backend_by_name_after_the_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import Trainer

    actpass.register_with_accelerate()
    monkeypatch.setattr("actpass.backend.compile_fx", _interpreted)
    model, _ = models.llama(layers=1)
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="actcomp")
    assert len(losses(Trainer(model=model, args=args, train_dataset=Tokens()))) == 3
    assert actpass.report(model).active


def _interpreted(gm, example_inputs, **options):
    """Inductor without its code generation: the subject is the way in."""
    from actpass._torch import compile_fx, functorch_config

    from .helpers import interpret

    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(gm, example_inputs, **{**options, "inner_compile": interpret})
