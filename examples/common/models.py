"""Models whose forward returns the loss: from a `transformers` config with random weights, or from a local checkpoint;
nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from . import UsageError


@dataclass(frozen=True, slots=True)
class Size:
    """A model, and the batch that it is usually trained with."""

    model_type: str
    fields: Mapping[str, Any]
    seq_len: int
    batch_size: int
    cuda_batch_size: int
    lr: float


def widths(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    """Fields of a config, by the names that Llama and BERT share; what is 0 is left out."""
    given = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return {name: value for name, value in given.items() if value}


def _llama(hidden: int, intermediate: int, layers: int, heads: int, *usual: Any, kv_heads: int = 0, vocab: int = 32000) -> Size:
    more = {"num_key_value_heads": kv_heads or heads, "vocab_size": vocab, "max_position_embeddings": 2048}
    return Size("llama", widths(hidden, intermediate, layers, heads) | more, *usual)


# The sizes from llama-60m on are those of GaLore (Zhao et al., 2024, arXiv 2403.03507).
LLAMAS = {
    "llama-mini": _llama(256, 688, 4, 8, 128, 8, 16, 1e-3, kv_heads=4, vocab=8192),
    "llama-60m": _llama(512, 1376, 8, 8, 256, 8, 256, 1e-3),
    "llama-130m": _llama(768, 2048, 12, 12, 256, 4, 128, 1e-3),
    "llama-350m": _llama(1024, 2736, 24, 16, 256, 2, 128, 6e-4),
    "llama-1b": _llama(2048, 5461, 24, 32, 256, 1, 128, 4e-4),
}
DEFAULT_LLAMA = "llama-mini"

_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
CLASSIFIERS = {
    "bert-mini": Size("bert", widths(192, 768, 4, 6), 64, 32, 32, 5e-4),
    "roberta-base": Size("roberta", widths(768, 3072, 12, 12) | _ROBERTA, 128, 16, 16, 5e-5),
    "roberta-large": Size("roberta", widths(1024, 4096, 24, 16) | _ROBERTA, 128, 16, 16, 2e-5),
}
DEFAULT_CLASSIFIER = "bert-mini"
PRETRAINED = Size("bert", {}, 64, 32, 32, 1e-4)
"""How a checkpoint is usually trained."""


class LanguageModelLoss(nn.Module):
    """The loss alone: logits that leave a compiled region would be kept through the backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, labels=labels, use_cache=False).loss


class ClassifierLoss(nn.Module):
    """The loss of a classifier of sequences."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss

    def predict(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The most probable label of each row."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits.argmax(-1)


def load_config(model: str, sizes: Mapping[str, Size], seq_len: int, changes: Mapping[str, Any]) -> PretrainedConfig:
    """The config of a named size, or of a JSON file (or a directory with a config.json), with `changes` to its fields."""
    if model in sizes:
        config = _config(f"model {model!r}", sizes[model].model_type, {**sizes[model].fields, **changes})
    elif Path(model).exists():
        fallback = next(iter(sizes.values())).model_type
        config = _config_from_file(Path(model), fallback, changes)
    else:
        raise UsageError(
            f"model {model!r} is unknown: give one of {', '.join(sizes)}, or the path of a transformers config (JSON)"
        )
    return with_room(config, model, seq_len)


def _config_from_file(path: Path, fallback: str, changes: Mapping[str, Any]) -> PretrainedConfig:
    file = path / "config.json" if path.is_dir() else path
    what = f"model config {str(file)!r}"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        model_type = fields.pop("model_type", fallback)
    except (OSError, ValueError, AttributeError, TypeError) as error:  # the last two: JSON, but no object
        raise UsageError(f"{what} cannot be read: {error}") from error
    return _config(what, model_type, {**fields, **changes})


def _config(what: str, model_type: str, fields: Mapping[str, Any]) -> PretrainedConfig:
    try:
        return AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise UsageError(f"{what} cannot be used: {error}") from error


def with_room(config: PretrainedConfig, model: str, seq_len: int) -> PretrainedConfig:
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and "roberta" in config.model_type:
        limit -= (config.pad_token_id or 0) + 1  # its positions start behind the padding token
    if limit is not None and seq_len > limit:
        raise UsageError(
            f"--seq-len {seq_len} is more than the {limit} positions of model {model!r} (max_position_embeddings in its config)"
        )
    return config


def build_language_model(config: PretrainedConfig) -> LanguageModelLoss:
    """The model with random weights, in training mode; seed torch's generator before."""
    return LanguageModelLoss(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).train()


def build_classifier(config: PretrainedConfig, labels: int, dropout: float) -> ClassifierLoss:
    """A classifier with random weights, in training mode; seed torch's generator before."""
    _prepare(config, labels, dropout)
    try:
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise UsageError(f"no classifier can be made of this {config.model_type} config: {error}") from error
    return ClassifierLoss(model).train()


def load_classifier(folder: str, seq_len: int, vocab_size: int, labels: int, dropout: float) -> ClassifierLoss:
    """The classifier of a local checkpoint, in training mode. What it lacks of the head is random: seed torch's generator
    before. vocab_size: how many tokens the text may have."""
    allowed = "give a local directory with a Hugging Face model (config.json and its weights)"
    if not Path(folder).is_dir():
        raise UsageError(f"checkpoint {folder!r} is not a directory: {allowed}")
    try:
        config = with_room(AutoConfig.from_pretrained(folder, local_files_only=True), folder, seq_len)
        _prepare(config, labels, dropout)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"checkpoint {folder!r} cannot be read ({error}): {allowed}") from error
    if config.vocab_size < vocab_size:
        raise UsageError(f"checkpoint {folder!r} has {config.vocab_size} tokens, its tokenizer {vocab_size}")
    return ClassifierLoss(model).train()


def _prepare(config: PretrainedConfig, labels: int, dropout: float) -> None:
    config.num_labels = labels
    config.problem_type = "single_label_classification"  # else the first forward sets it, and the second compiles again
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, dropout)
