"""The models that the tools measure: `transformers` configs with random weights, nothing is downloaded.

Sizes of the Llama family are those of GaLore (Zhao et al., 2024, arXiv 2403.03507); the others are the configs' own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HEADS = ("causal-lm", "masked-lm", "classification", "causal-lm-in-parts")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOSS_TYPES = ("ForCausalLM", "ForMaskedLM", "ForSequenceClassification")
_ARCHITECTURES = {**{name: i for i, name in enumerate(_LOSS_TYPES)}, "LMHeadModel": 0}
_FIRST_PLAIN_TOKEN = 3  # below it some configs have their padding, start and end tokens


class UsageError(Exception):
    """The user asked for something that cannot be: the message names the value and what is allowed."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A model and the (batch, sequence) it usually takes in one step on a CPU and on a GPU."""

    name: str
    model_type: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    head: str = "causal-lm"
    cpu_shape: tuple[int, int] = (2, 128)
    cuda_shape: tuple[int, int] = (2, 128)

    def shape(self, device: str) -> tuple[int, int]:
        return self.cuda_shape if device == "cuda" else self.cpu_shape


def _llama(
    name: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    cpu: tuple[int, int],
    cuda: tuple[int, int],
    **other: int,
) -> Workload:
    fields = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 32000,
        **other,
    }
    return Workload(name, "llama", fields, "causal-lm", cpu, cuda)


def _roberta(name: str, **fields: Any) -> Workload:
    fields |= {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "num_labels": 2}
    return Workload(name, "roberta", fields, "classification", (16, 128), (16, 128))


_MINI = _llama("llama-mini", 256, 688, 4, 8, (16, 128), (16, 128), num_key_value_heads=4, vocab_size=8192)
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
WORKLOADS = {
    w.name: w
    for w in (
        _MINI,
        replace(_MINI, name="llama-mini-in-parts", head="causal-lm-in-parts"),
        _llama("llama-60m", 512, 1376, 8, 8, (8, 256), (256, 256)),
        _llama("llama-130m", 768, 2048, 12, 12, (4, 256), (128, 256)),
        _llama("llama-350m", 1024, 2736, 24, 16, (2, 256), (128, 256)),
        _llama("llama-1b", 2048, 5461, 24, 32, (1, 256), (128, 256)),
        Workload("gpt2-124m", "gpt2", {}, "causal-lm", (2, 256), (64, 1024)),
        _roberta("roberta-base"),
        _roberta("roberta-large", **_LARGE),
    )
}

LARGE = {
    w.name: w
    for w in (
        _llama("llama-7b", 4096, 11008, 32, 32, (1, 4096), (1, 4096), max_position_embeddings=4096),
        _llama("llama-13b", 5120, 13824, 40, 40, (1, 4096), (1, 4096), max_position_embeddings=4096),
        _llama("llama-70b", 8192, 28672, 80, 64, (1, 4096), (1, 4096), num_key_value_heads=8, max_position_embeddings=4096),
    )
}
"""To plan for, not to run here (Touvron et al., "Llama 2", 2023, arXiv 2307.09288)."""


def workload_named(name: str) -> Workload:
    if name not in WORKLOADS:
        raise UsageError(f"{name!r} is no known model. Allowed: {', '.join(WORKLOADS)}, or the path of a config (JSON).")
    return WORKLOADS[name]


def workload_from_file(path: Path, head: str | None = None) -> Workload:
    """A `transformers` config in JSON (a file, or a directory with a config.json). head: None takes it from the
    config's ``architectures``."""
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        model_type = fields.pop("model_type")
    except OSError as error:
        raise UsageError(f"config {str(file)!r} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"config {str(file)!r} is not a JSON object with a 'model_type': {error}.") from error
    return Workload(file.stem, model_type, fields, head or _head_of(fields, file))


def _head_of(fields: Mapping[str, Any], file: Path) -> str:
    for architecture in fields.get("architectures") or ():
        for suffix, index in _ARCHITECTURES.items():
            if architecture.endswith(suffix):
                return HEADS[index]
    raise UsageError(f"config {str(file)!r} does not name its task (architectures). Give --head: {', '.join(HEADS)}.")


def build_config(workload: Workload, seq: int, dropout: float | None = None, attention: str = "sdpa") -> Any:
    """The workload's config. dropout: replaces every dropout probability of it; None leaves them. attention: transformers'
    implementation."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(workload.model_type, attn_implementation=attention, **workload.fields)
    except ValueError as error:
        raise UsageError(f"transformers cannot make the config of {workload.name!r}: {error}") from error
    config.use_cache = False
    if workload.head == "classification":
        config.problem_type = "single_label_classification"  # else the first forward sets it, and the second recompiles
    if dropout is not None:
        for name in _dropouts(config):
            setattr(config, name, dropout)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and workload.model_type == "roberta":
        limit -= 2  # its positions start behind the padding token
    if limit is not None and seq > limit:
        raise UsageError(f"--seq {seq} is more than the {limit} positions of {workload.name!r} (max_position_embeddings).")
    return config


def drops(config: Any) -> bool:
    """Whether training draws dropout masks: then two backends see different ones, and gradients can't be compared."""
    return any(getattr(config, name) for name in _dropouts(config))


def _dropouts(config: Any) -> list[str]:
    return [k for k, v in config.to_dict().items() if "drop" in k and isinstance(v, float)]


class LossOnly(nn.Module):
    """The loss alone: logits that leave a compiled region stay allocated through the backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, labels=labels).loss


class InParts(nn.Module):
    """A language model with two graph breaks: half of its layers, the other half, and head and loss are regions."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        from transformers import AutoModel

        super().__init__()
        half = type(config).from_dict({**config.to_dict(), "num_hidden_layers": config.num_hidden_layers // 2})
        self.first, self.second = (AutoModel.from_config(half, dtype=dtype) for _ in range(2))
        self.second.embed_tokens = None
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        h = self.first(input_ids=input_ids).last_hidden_state
        torch._dynamo.graph_break()
        h = self.second(inputs_embeds=h).last_hidden_state
        torch._dynamo.graph_break()
        logits = self.head(h[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())


def build_model(config: Any, head: str, dtype: torch.dtype) -> nn.Module:
    """The model with random weights, in training mode, on torch's default device; seed torch's generator before."""
    if head == "causal-lm-in-parts":
        return InParts(config, dtype).train()
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

    classes = (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification)
    try:
        model = classes[HEADS.index(head)].from_config(config, dtype=dtype)
    except ValueError as error:
        raise UsageError(f"transformers has no {head} model for {config.model_type!r}: {error}") from error
    if getattr(model, "loss_type", None) is None:  # GPT-2: transformers would guess and log it, which is a graph break
        model.loss_type = _LOSS_TYPES[HEADS.index(head)]
    return LossOnly(model).train()


def with_adapters(model: nn.Module, rank: int, dropout: float) -> nn.Module:
    """``model`` with PEFT's LoRA of ``rank`` on all linear layers but the head; all else is frozen."""
    if not isinstance(model, LossOnly):
        raise UsageError("--lora-rank is for models in one part. Give another --workload.")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules="all-linear")
    model.model = get_peft_model(model.model, config)
    return model.train()


def checkpoint_layers(model: nn.Module) -> None:
    """Turn transformers' activation checkpointing of every layer on. Without what it does to a PEFT model's embedding for
    reentrant checkpoints, which these are not: it breaks the graph there."""
    if not isinstance(model, LossOnly):
        raise UsageError("checkpointing=true is for models in one part. Give another --workload.")
    inner: Any = model.model
    if hasattr(inner, "activation_checkpointing_enable"):  # its name from transformers 5.24 on
        inner.activation_checkpointing_enable({"use_reentrant": False})
    else:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    inner.disable_input_require_grads()


def make_batch(config: Any, head: str, shape: tuple[int, int], device: str, seed: int) -> dict[str, Tensor]:
    """Random tokens; the labels are the tokens themselves, or random classes."""
    draw = torch.Generator().manual_seed(seed)
    low = min(_FIRST_PLAIN_TOKEN, config.vocab_size - 1)
    tokens = torch.randint(low, config.vocab_size, shape, generator=draw, device="cpu")
    labels = tokens
    if head == "classification":
        labels = torch.randint(0, config.num_labels, shape[:1], generator=draw, device="cpu")
    return {"input_ids": tokens.to(device), "labels": labels.to(device)}
