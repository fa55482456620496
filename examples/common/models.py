"""Llama models with random weights, from a `transformers` config; nothing is downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from . import UsageError


@dataclass(frozen=True, slots=True)
class Size:
    """A model of the Llama family, and the batch that it is usually trained with."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    seq_len: int
    batch_size: int
    cuda_batch_size: int
    lr: float


# The sizes from llama-60m on are those of GaLore (Zhao et al., 2024, arXiv 2403.03507).
SIZES = {
    "llama-mini": Size(256, 688, 4, 8, 4, 8192, 128, 8, 16, 1e-3),
    "llama-60m": Size(512, 1376, 8, 8, 8, 32000, 256, 8, 256, 1e-3),
    "llama-130m": Size(768, 2048, 12, 12, 12, 32000, 256, 4, 128, 1e-3),
    "llama-350m": Size(1024, 2736, 24, 16, 16, 32000, 256, 2, 128, 6e-4),
    "llama-1b": Size(2048, 5461, 24, 32, 32, 32000, 256, 1, 128, 4e-4),
}
DEFAULT_SIZE = "llama-mini"


class LanguageModelLoss(nn.Module):
    """The loss alone: logits that leave a compiled region would be kept through the backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, labels=labels, use_cache=False).loss


def load_config(model: str, seq_len: int, vocab_size: int = 0) -> PretrainedConfig:
    """The config of a named size, or of a JSON file (or a directory with a config.json).

    `vocab_size` replaces the config's own unless it is 0.
    """
    if model in SIZES:
        config = _named_config(SIZES[model])
    elif Path(model).exists():
        config = _config_from_file(Path(model))
    else:
        raise UsageError(
            f"model {model!r} is unknown: give one of {', '.join(SIZES)}, or the path of a transformers config (JSON)"
        )
    config.vocab_size = vocab_size or config.vocab_size
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise UsageError(
            f"--seq-len {seq_len} is more than the {limit} positions of model {model!r} (max_position_embeddings in its config)"
        )
    return config


def _named_config(size: Size) -> PretrainedConfig:
    return AutoConfig.for_model(
        "llama",
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocab_size,
        max_position_embeddings=2048,
    )


def _config_from_file(path: Path) -> PretrainedConfig:
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
    except (OSError, ValueError) as error:
        raise UsageError(f"model config {str(file)!r} cannot be read: {error}") from error


def build_model(config: PretrainedConfig) -> LanguageModelLoss:
    """The model with random weights, in training mode; seed torch's generator before."""
    return LanguageModelLoss(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).train()
