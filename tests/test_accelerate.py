"""accelerate's FSDP2 over gloo, two processes: LoRA adapters on a Llama train as in one process with the joint batch, ranks
plan alike, and the peak of each is what the report predicts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import actpass
from actpass.memory.optimizer_state import local
from actpass.memory.profiler import measure
from actpass.memory.resident import storage_bytes
from actpass.runtime import regions
from actpass.runtime.step_counter import STEP_COUNTER

from .helpers import EPS, once

pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.distributed, pytest.mark.architectures, pytest.mark.slow]

WORLD, STEPS, LAYERS = 2, 6, 3
VOCAB, BATCH, TOKENS = 32, 8, 64
"""Few words: the head and the loss are not compiled, and what they take is not predicted."""

# A mean over half the batch, averaged over the ranks, adds in another order than a mean over all: log2(T) EPS / 2 = 4.5 EPS for
# T = 512 tokens. Six steps of some 200 operators each carry that on: sqrt(1200) EPS / 2 = 17 EPS more; twice that. Three
# tensors in few bits move the loss by 170 EPS.
LOSS = 43 * EPS
PEAK = 0.05

PLENTY, TIGHT = 1 << 30, 3_600_000
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "exact": (True, {"policy": "exact", "memory_budget": PLENTY}),
    "budget": (False, {"policy": "auto", "memory_budget": TIGHT, "min_tensor_bytes": 1024}),
}
"""Whether layers are compiled before accelerate shards them, or after; options."""


def adapted() -> nn.Module:
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=172, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=TOKENS, use_cache=False,
    )  # fmt: skip
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(LlamaForCausalLM(config), lora).train()


def compile_layers(model: Any, options: dict[str, Any]) -> None:
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="actcomp", options=options)


def train(model: Any, optimizer: Any, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """The losses of six steps, and what a rank then takes, measured and as predicted."""

    def backward(seed: int) -> torch.Tensor:
        tokens = torch.randint(3, VOCAB, (BATCH, TOKENS), generator=torch.Generator().manual_seed(seed)).chunk(world)[rank]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    def begin() -> None:
        backward(0)
        model.zero_grad(set_to_none=True)

    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(backward(step))
        optimizer.step()
    model.zero_grad(set_to_none=True)
    begin()
    peak = measure(lambda: backward(0), before=begin).peak_bytes
    model.zero_grad(set_to_none=True)
    report = actpass.report(model)
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    parameters = storage_bytes(map(local, model.parameters()))
    return {
        "losses": torch.stack(losses),
        "parameters": parameters,
        "measured": parameters + storage_bytes(map(local, state)) + peak,
        "predicted": report.step_bytes,
        "plan_hash": report.plan_hash,
        "modules": report.modules,
        "inactive": [r.inactive_because for r in report.regions if not r.active],
        "in_few_bits": sum(s.codec is not None for r in report.regions for s in r.sites),
    }


def sharding() -> Any:
    """An Accelerator with FSDP2. Of processes on CPUs accelerate (1.15) leaves its FSDP plugin aside and trains with DDP,
    without a word: its state, which other objects of it read anew, is told here that it shards."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.fsdp_plugin = plugin
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP
    return accelerator


def one_process(options: dict[str, Any]) -> dict[str, Any]:
    model = adapted()
    compile_layers(model, options)
    return train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{WORLD}", LOCAL_WORLD_SIZE=f"{WORLD}")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    accelerator = sharding()
    for case, (before, options) in CASES.items():
        torch.compiler.reset()
        regions.clear()
        STEP_COUNTER.steps, STEP_COUNTER.calls = 0, 0
        model: Any = adapted()
        optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if before:
            compile_layers(model, options)
        model, optimizer = accelerator.prepare(model, optimizer)
        assert accelerator.is_fsdp2
        if not before:
            compile_layers(model, options)
        result = train(model, optimizer, rank, WORLD)
        dist.all_reduce(result["losses"])
        torch.save({**result, "losses": result["losses"] / WORLD}, Path(folder, f"{case}-{rank}.pt"))
        accelerator.free_memory()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left their results, ``{case}-{rank}.pt``. They start once for all cases."""
    return once(tmp_path_factory, "fsdp2", lambda folder: torch.multiprocessing.spawn(worker, (str(folder),), nprocs=WORLD))


def ranks(folder: Path, case: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_two_processes_train_as_one_with_the_joint_batch(folder: Path):
    want = one_process(CASES["exact"][1])
    for got in ranks(folder, "exact"):
        assert not got["inactive"]
        assert float(((got["losses"] - want["losses"]) / want["losses"]).abs().max()) <= LOSS
        assert got["parameters"] == want["parameters"] / WORLD  # or it is no FSDP
    rounded = ranks(folder, "budget")[0]["losses"]
    assert float(((rounded - want["losses"]) / want["losses"]).abs().max()) > LOSS  # or it could not fail


@pytest.mark.parametrize("case", CASES)
def test_ranks_plan_alike_and_each_takes_what_is_predicted(case: str, folder: Path):
    first, second = ranks(folder, case)
    assert first["plan_hash"] == second["plan_hash"] != ""
    for got in (first, second):
        assert got["modules"] == (1, LAYERS - 1)  # the layer that takes data, and the others
        assert got["predicted"] == pytest.approx(got["measured"], rel=PEAK)
        assert (got["in_few_bits"] > 0) == (case == "budget")
        assert got["measured"] <= CASES[case][1]["memory_budget"]
