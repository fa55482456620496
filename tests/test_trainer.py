"""HF Trainer, by both ways in (a model that was compiled before, and the Trainer's own argument), and the callback."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import actpass
from actpass import optim
from actpass.integrations.transformers import ActpassCallback
from actpass.runtime.step_counter import STEP_COUNTER

from . import models
from .helpers import EPS, Grads, assert_equal, projected

pytestmark = [pytest.mark.usefixtures("no_codegen"), pytest.mark.architectures]

STEPS = 3
# A loss of three steps: some 100 operators each that round by EPS / 2, twice sqrt(300) / 2.
LOSS = 18 * EPS
CLIP = 0.05


class Tokens(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(3, models.VOCAB, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def logged(model: torch.nn.Module, folder: Path, optimizer: Any = None, **arguments: Any) -> list[dict[str, float]]:
    """Train three steps of two micro-batches; what Trainer logs of each step. optimizer: None is Trainer's own."""
    from transformers import Trainer, TrainingArguments

    given: dict[str, Any] = {"max_grad_norm": 1.0} | arguments
    args = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, **given,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=Tokens(), optimizers=(optimizer, None))
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def losses(model: torch.nn.Module, folder: Path, **arguments: Any) -> list[float]:
    return [entry["loss"] for entry in logged(model, folder, **arguments)]


@pytest.mark.short_tier
def test_trainer_takes_a_compiled_model_with_its_options(tmp_path: Path) -> None:
    model, _ = models.llama(layers=1)
    model.compile(backend="actcomp", options={"projection": "srht", "rank": 8, "skip_unprofitable": False})
    found = losses(model, tmp_path)
    report = actpass.report(model)
    assert "active, projection='srht'" in str(report)
    assert len(projected(report)) == 8
    assert STEP_COUNTER.steps == STEPS  # once an optimizer step, not once a micro-batch
    assert len(found) == STEPS
    assert found[-1] < found[0]


def test_trainer_takes_the_backend_by_name_after_the_helper(tmp_path: Path) -> None:
    plain, _ = models.llama(layers=1)
    want = losses(plain, tmp_path)
    for _ in range(2):
        actpass.register_with_accelerate()  # more than once is once
    model, _ = models.llama(layers=1)
    found = losses(model, tmp_path, torch_compile=True, torch_compile_backend="actcomp")
    assert "active, policy='auto'" in str(actpass.report(model))
    assert found == pytest.approx(want, rel=LOSS)


# -------------------------------------------------------------------------------------------------- gradients in their factors


def projected_llama(gradients: str) -> torch.nn.Module:
    """The same weights and, from here on, the same bases."""
    torch.compiler.reset()
    STEP_COUNTER.steps = 0
    model, _ = models.llama(layers=1)
    model.compile(
        backend="actcomp",
        options={"projection": "haar", "rank": 8, "skip_unprofitable": False, "weight_gradient_format": gradients},
    )
    return model


def clipped_norms(entries: list[dict[str, float]]) -> list[float]:
    """The gradient norm of each step, all of them above what they are clipped to."""
    norms = [float(entry["grad_norm"]) for entry in entries]
    assert min(norms) > 2 * CLIP
    return norms


def test_trainer_logs_the_gradient_norm_of_the_dense_gradients(tmp_path: Path) -> None:
    """SGD: it steps alike with both, where Adam makes a full step of a gradient that is rounding alone (a key's)."""
    found: dict[str, list[float]] = {}
    for gradients in ("dense", "low_rank"):
        model = projected_llama(gradients)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        found[gradients] = clipped_norms(logged(model, tmp_path, sgd, max_grad_norm=CLIP))
        assert len(found[gradients]) == STEPS
    assert found["low_rank"] == pytest.approx(found["dense"], rel=1e-5)
    assert len(set(found["dense"])) == STEPS  # that the norms agree says something at each step


@pytest.mark.parametrize("kind", [optim.AdamW, optim.CompActAdamW, optim.OasisAdamW, optim.LazySubspaceAdamW])
def test_trainer_takes_an_optimizer_that_steps_in_the_subspace(kind: Any, tmp_path: Path) -> None:
    dense = projected_llama("dense")
    want = clipped_norms(logged(dense, tmp_path, torch.optim.SGD(dense.parameters(), lr=1.0), max_grad_norm=CLIP))
    model = projected_llama("low_rank")
    optimizer = kind(model.parameters(), lr=1e-2)
    entries = logged(model, tmp_path, optimizer, max_grad_norm=CLIP)
    assert clipped_norms(entries)[0] == pytest.approx(want[0], rel=1e-5)  # then the weights differ
    assert entries[-1]["loss"] < entries[0]["loss"]
    assert STEP_COUNTER.steps == STEPS
    factored = projected(actpass.report(model))
    assert len(factored) == 8
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]["exp_avg"]
        assert (moments.numel() < parameter.numel()) == (name in factored), name


# ----------------------------------------------------------------------------------------------------------------- the callback


RESUMED = {
    "haar": {"projection": "haar", "rank": 8, "skip_unprofitable": False},
    "pca": {"projection": "pca", "rank": 8, "skip_unprofitable": False, "refresh_interval": 1},
    "low_rank": {"projection": "haar", "rank": 8, "weight_gradient_format": "low_rank", "refresh_interval": 20},
    "int4": {"codec": "int4", "min_tensor_bytes": 0},
}


def run(folder: Path, options: dict[str, Any], callbacks: list[Any], resume: Any = None) -> Any:
    """Four steps with a checkpoint after two, as a process of its own would make them."""
    from transformers import Trainer, TrainingArguments

    torch.compiler.reset()
    STEP_COUNTER.steps, STEP_COUNTER.calls = 0, 0
    model, _ = models.llama(layers=1)
    model.compile(backend="actcomp", options=options)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=Tokens(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Any) -> Grads:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(name: str, tmp_path: Path) -> None:
    whole = weights(run(tmp_path / "a", RESUMED[name], [ActpassCallback(print_report=False)]))
    resumed = run(tmp_path / "b", RESUMED[name], [ActpassCallback(print_report=False)], str(tmp_path / "a/checkpoint-2"))
    assert_equal(weights(resumed), whole)


def test_a_checkpoint_that_moved_is_resumed_from_where_it_is_said_to_be(tmp_path: Path) -> None:
    whole = weights(run(tmp_path / "a", RESUMED["haar"], [ActpassCallback(print_report=False)]))
    moved = (tmp_path / "a/checkpoint-2").rename(tmp_path / "moved")
    callback = ActpassCallback(print_report=False, checkpoint=moved)
    assert_equal(weights(run(tmp_path / "b", RESUMED["haar"], [callback], str(moved))), whole)
    for other in (None, tmp_path / "b/checkpoint-4"):  # another checkpoint's file is no help
        with pytest.raises(actpass.StateError, match=r"actpass\.pt is in none of .*ActpassCallback\(checkpoint="):
            run(tmp_path / "c", RESUMED["haar"], [ActpassCallback(checkpoint=other)], str(moved))


def test_a_checkpoint_without_the_state_is_told_so(tmp_path: Path) -> None:
    run(tmp_path, RESUMED["haar"], [])
    with pytest.warns(actpass.ActpassWarning, match="the checkpoint was saved without ActpassCallback"):
        run(tmp_path, RESUMED["haar"], [ActpassCallback(print_report=False)], str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "checkpoint-4/actpass.pt").exists()


def test_the_report_is_printed_once_and_the_bytes_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = run(tmp_path, {}, [ActpassCallback()])
    assert capsys.readouterr().out.count("actpass: active, policy='auto'") == 1
    report = actpass.report(trainer.model)
    (logged,) = [entry for entry in trainer.state.log_history if "actpass_saved_bytes" in entry]
    assert logged["step"] == 1
    assert logged["actpass_saved_bytes"] == report.saved_bytes
    assert logged["actpass_predicted_peak_bytes"] == report.totals.peak_bytes


def test_without_transformers_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "actpass.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs Hugging Face transformers.*pip install transformers"):
        importlib.import_module("actpass.integrations.transformers")


# ------------------------------------------------------------------------------------------------------------ returned logits


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_reads_no_logits_while_it_trains_and_all_while_it_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    """Under bf16 accelerate casts what the model returns to float32: a cast is not a read."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from actpass.runtime import deferred_logits as deferred

    widths: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=512, use_cache=False, **widths)

    read: list[Any] = []
    compute = deferred._Logits.compute
    monkeypatch.setattr(deferred._Logits, "compute", lambda self: read.append(self) or compute(self))
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, logging_steps=1, bf16=bf16,
    )  # fmt: skip
    found: dict[bool, list[float]] = {}
    for defer in (True, False):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        model.compile(backend="actcomp", options={"policy": "exact", "defer_logits": defer, "chunked_loss": 16})
        trainer = Trainer(model, args, train_dataset=Tokens(), eval_dataset=Tokens(), compute_metrics=accuracy)
        trainer.train()
        notes = " ".join(note for region in actpass.report(model).regions for note in region.notes)
        assert ("returned deferred" in notes) == defer, notes
        evaluated = trainer.evaluate()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found[defer] = [*losses, evaluated["eval_loss"], evaluated["eval_accuracy"]]
    assert not read
    assert found[True] == pytest.approx(found[False], rel=2**-8 if bf16 else LOSS)
