"""Low-rank adapters on a frozen model (PEFT's LoRA); a language model may be stored in 4 bits (QLoRA)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from . import UsageError
from .models import ClassifierLoss, LanguageModelLoss, with_room

QUANTIZERS = ("none", "nf4", "bnb4")
NF4_BLOCK, NF4_BLOCKS_OF_A_SCALE = 64, 256
"""torchao's: numbers that share a scale, and at most so many scales that share one of their own."""


def load_language_model(folder: str, seq_len: int) -> LanguageModelLoss:
    """The language model of a local Hugging Face checkpoint, in float32 and in training mode."""
    allowed = "give a local directory with a Hugging Face model (config.json and its weights)"
    if not Path(folder).is_dir():
        raise UsageError(f"checkpoint {folder!r} is not a directory: {allowed}")
    try:
        config = with_room(AutoConfig.from_pretrained(folder, local_files_only=True), folder, seq_len)
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"checkpoint {folder!r} cannot be read ({error}): {allowed}") from error
    return LanguageModelLoss(model).train()


def quantize_base(module: LanguageModelLoss, how: str) -> None:
    """Store the weights of all linear layers but the head in 4 bits: torchao's NF4, or
    bitsandbytes'."""
    if how == "none":
        return
    head = module.model.get_output_embeddings()
    for parent in list(module.model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear) and layer is not head:
                setattr(parent, name, _quantized(layer, how))


def _quantized(layer: nn.Linear, how: str) -> nn.Module:
    if how == "nf4":
        from torchao.quantization import to_nf4

        blocks, left = divmod(layer.weight.numel(), NF4_BLOCK)
        if left:
            raise UsageError(f"nf4 stores blocks of {NF4_BLOCK} numbers, and a weight has {layer.weight.numel()}: give bnb4")
        weight = to_nf4(layer.weight.detach(), NF4_BLOCK, math.gcd(blocks, NF4_BLOCKS_OF_A_SCALE))
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer
    from bitsandbytes.nn import Linear4bit, Params4bit

    made = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4", device="meta")
    made.weight = Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4", module=made)
    made.bias = layer.bias
    return made.to(layer.weight.device)


def add_adapters(module: LanguageModelLoss | ClassifierLoss, rank: int, alpha: float, dropout: float) -> None:
    """Freeze the model, and put adapters on all its linear layers but the head; seed torch's generator before. The head of a
    classifier is trained as it is. alpha: 0 is twice the rank."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError("adapters are made by peft, which is not installed: pip install peft") from error
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or 2 * rank,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="SEQ_CLS" if isinstance(module, ClassifierLoss) else "CAUSAL_LM",  # the first leaves the head trainable
    )
    module.model = get_peft_model(module.model, config)
    module.train()


def checkpoint_layers(module: LanguageModelLoss) -> None:
    """Turn transformers' activation checkpointing of every layer on. Without what it does to a PEFT model's embedding for
    reentrant checkpoints, which these are not: it breaks the graph there."""
    inner: Any = module.model
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    inner.disable_input_require_grads()
