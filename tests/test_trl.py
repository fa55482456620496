"""TRL's trainers: packed batches of differing lengths in few graphs and within a budget, and preferences."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import actpass
from actpass.memory.profiler import measure

from .helpers import EPS

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.architectures, pytest.mark.slow]

WORDS = 512
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ARGUMENTS = {
    "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no",
    "disable_tqdm": True, "gradient_checkpointing": False,
}  # fmt: skip


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(i): i for i in range(32, 127)}
    letters = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def sft(folder: Path, steps: int) -> Any:
    """A trainer with the model's own loss: TRL's head runs outside of the graph, in tiles of 32,768 words."""
    from transformers import Trainer

    class Sft(trl.SFTTrainer):
        compute_loss = Trainer.compute_loss

    draw = random.Random(0)
    lengths = [draw.randint(20, 150) for _ in range(8 * steps)]
    rows = [{"input_ids": [draw.randint(3, 40) for _ in range(n)]} for n in lengths]
    args = trl.SFTConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, packing=True, max_length=160,
        shuffle_dataset=False, **ARGUMENTS,
    )  # fmt: skip
    return Sft(
        model=model(), args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer(),
        peft_config=peft.LoraConfig(**LORA),
    )  # fmt: skip


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def lengths_of(trainer: Any) -> set[int]:
    """Fills while it trains."""
    found: set[int] = set()
    step = trainer.training_step

    def noting(module: Any, batch: Any, *more: Any) -> Any:
        found.add(batch["input_ids"].shape[1])
        return step(module, batch, *more)

    trainer.training_step = noting
    return found


@pytest.mark.usefixtures("no_codegen")
def test_packed_batches_of_many_lengths_take_two_graphs_and_train_as_eager_mode(tmp_path: Path):
    want = losses(sft(tmp_path, 12))
    trainer = sft(tmp_path, 12)
    met = lengths_of(trainer)
    counters.clear()
    trainer.model.compile(backend="actcomp", options={"policy": "exact"})
    found = losses(trainer)
    assert len(met) > 4
    assert counters["stats"]["unique_graphs"] == 2  # of the first length, and of all
    notes = " ".join(n for r in actpass.report(trainer.model).regions for n in r.notes)
    assert "chunks" in notes
    assert "deferred" in notes
    # a loss of twelve steps: some 100 operators each that round by EPS / 2, an AdamW step multiplies by its rate over a spread
    assert found == pytest.approx(want, rel=12 * 18 * EPS)
    assert found[-1] < found[0]


def step_bytes(trainer: Any) -> list[int]:
    """What each step takes in all, parameters and optimizer state counted in. Trains."""
    step, taken = trainer.training_step, list[int]()

    def measured(module: Any, batch: Any, *more: Any) -> Any:
        kept: list[Any] = []
        peak = measure(lambda: kept.append(step(module, batch, *more))).peak_bytes
        state = [t for s in trainer.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        held = [*trainer.model.parameters(), *state, *(t for t in batch.values() if isinstance(t, torch.Tensor))]
        taken.append(peak + sum(t.nbytes for t in held))
        return kept[0]

    trainer.training_step = measured
    trainer.train()
    return taken


@pytest.mark.codegen
def test_packed_batches_of_many_lengths_stay_within_a_budget(tmp_path: Path):
    """Whatever the length, also behind the first two, which are compiled. It is 0.65 of what eager mode takes."""
    budget = int(0.65 * max(step_bytes(sft(tmp_path, 8))))
    trainer = sft(tmp_path, 8)
    met = lengths_of(trainer)
    trainer.model.compile(backend="actcomp", options={"memory_budget": budget, "min_tensor_bytes": 0})
    taken = step_bytes(trainer)
    assert len(met) > 4
    assert len(taken) == 8
    assert max(taken[2:]) <= budget


@pytest.mark.usefixtures("no_codegen")
def test_preferences_are_learned_as_in_eager_mode(tmp_path: Path):
    """DPO reads the logits outside of the graph: they are whole, and all else is stored as the policy says."""
    draw = random.Random(1)

    def letters(most: int) -> str:
        return "".join(chr(draw.randint(97, 122)) for _ in range(draw.randint(10, most)))

    rows = [{"prompt": letters(40), "chosen": letters(60), "rejected": letters(60)} for _ in range(32)]

    def trainer() -> Any:
        args = trl.DPOConfig(output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, **ARGUMENTS)
        return trl.DPOTrainer(
            model=model(), args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer(),
            peft_config=peft.LoraConfig(**LORA),
        )  # fmt: skip

    want = losses(trainer())
    compiled = trainer()
    compiled.model.compile(backend="actcomp", options={"policy": "exact"})
    assert losses(compiled) == pytest.approx(want, rel=4 * 18 * 8 * EPS)
    totals = actpass.report(compiled.model).totals
    assert totals.saved_bytes < totals.saved_bytes_default


def grpo(folder: Path, **more: Any) -> Any:
    """Completions are rewarded for the number of different words that they have."""

    def variety(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(c))) for c in completions]

    args = trl.GRPOConfig(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, num_generations=4, max_completion_length=12,
        **{**ARGUMENTS, "learning_rate": 1e-3}, **more,
    )  # fmt: skip
    rows = [{"prompt": f"abc de{chr(97 + i)}"} for i in range(8)]
    lora = peft.LoraConfig(**LORA, init_lora_weights=False)
    return trl.GRPOTrainer(
        model=model(), reward_funcs=variety, args=args, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(), peft_config=lora,
    )  # fmt: skip


@pytest.mark.usefixtures("no_codegen")
def test_policies_are_trained_as_in_eager_mode(tmp_path: Path):
    """GRPO with what it generates itself, each batch twice, so that ratios are not one, and a reference: the model without
    its adapters."""

    def trained(options: dict[str, Any] | None) -> tuple[Any, list[dict[str, float]]]:
        torch.manual_seed(0)
        trainer = grpo(tmp_path, num_iterations=2, beta=0.04)
        if options is not None:
            trainer.model.compile(backend="actcomp", options=options)
        trainer.train()
        return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]

    _, want = trained(None)
    counters.clear()
    trainer, found = trained({"policy": "exact"})
    assert len(found) == len(want) == 4
    for entry, plain in zip(found, want, strict=True):
        # advantages have a mean of 0, and so has the loss but for its terms' size: 1
        assert entry["loss"] == pytest.approx(plain["loss"], abs=4 * 18 * 8 * EPS)
        assert entry["grad_norm"] == pytest.approx(plain["grad_norm"], rel=4 * 18 * 8 * EPS)
        assert entry.get("reward") == plain.get("reward")  # the same words were drawn
    assert "reward" in found[0]
    report = actpass.report(trainer.model)
    assert report.active
    assert report.totals.saved_bytes < report.totals.saved_bytes_default


@pytest.mark.usefixtures("no_codegen")
def test_the_loss_of_a_policy_has_the_gradients_of_eager_mode(tmp_path: Path):
    """Of completions of several lengths, against an older policy. TRL's head breaks the graph (`out=` of a slice), so that its
    products are no part of a plan: two graphs have a backward, the model's and the head's sums."""
    batch, words, lengths = 4, 20, torch.tensor([20, 15, 8, 20])
    draw = torch.Generator().manual_seed(0)
    inputs = {
        "prompt_ids": torch.randint(3, 120, (batch, 6), generator=draw),
        "prompt_mask": torch.ones(batch, 6, dtype=torch.long),
        "completion_ids": torch.randint(3, 120, (batch, words), generator=draw),
        "completion_mask": (torch.arange(words)[None] < lengths[:, None]).long(),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "old_per_token_logps": -6.2 + 0.1 * torch.randn(batch, words, generator=draw),
        "num_items_in_batch": torch.tensor(float(lengths.sum())),
    }

    def step(trainer: Any) -> tuple[float, torch.Tensor]:
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model.train(), inputs)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    trainer = grpo(tmp_path)
    loss, want = step(trainer)
    assert abs(loss) > 0.01
    # of few random tokens a gradient loses what its input does: a twelfth in 4 bits
    for policy, tolerance in (("exact", 128 * EPS), ("auto", 0.12)):
        torch.compiler.reset()
        counters.clear()
        trainer.model.compile(backend="actcomp", options={"policy": policy, "min_tensor_bytes": 0})
        found_loss, found = step(trainer)
        assert found_loss == pytest.approx(loss, rel=128 * EPS)
        assert float((found - want).norm() / want.norm()) <= tolerance
        assert counters["stats"]["unique_graphs"] == 3
        assert [reason.splitlines()[0] for reason in counters["graph_break"]] == [
            "Attempted to call op with non-contiguous `out=` tensor"
        ]
        report = actpass.report(trainer.model)
        assert [r.active for r in report.regions] == [True, True]
        assert report.totals.saved_bytes < (0.8 if policy == "exact" else 0.5) * report.totals.saved_bytes_default
