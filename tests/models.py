"""Tiny models. Each function returns (model, inputs); ``model(**inputs)`` is a loss, or has one as ``.loss``.

Sizes are the smallest at which every kind of site is there; widths differ, so that a mistaken axis fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Made = tuple[nn.Module, dict[str, Any]]


class MLP(nn.Module):
    """Three linear layers; the loss is a mean of squares."""

    def __init__(self, width: int = 24, hidden: int = 40, out: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.mid = nn.Linear(hidden, hidden)
        self.down = nn.Linear(hidden, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.mid(F.gelu(self.up(x))))).square().mean()


class Block(nn.Module):
    """A pre-norm transformer layer with SDPA and SwiGLU."""

    def __init__(self, width: int = 32, heads: int = 4, hidden: int = 48) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class UnfusedBlock(Block):
    """The same with scores that exist, under a causal mask or without any."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if self.masked:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        return scores.softmax(-1) @ v


class Transformer(nn.Module):
    """Blocks, a norm and a head with a mean-square loss. checkpoint: each block inside activation checkpointing."""

    def __init__(self, layers: int = 2, checkpoint: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 20)
        self.checkpoint = checkpoint

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.checkpoint else block(x)
        return self.head(self.norm(x)).square().mean()


def mlp() -> Made:
    torch.manual_seed(0)
    return MLP(), {"x": torch.randn(32, 24)}


def transformer(layers: int = 2, checkpoint: bool = False) -> Made:
    torch.manual_seed(0)
    return Transformer(layers, checkpoint), {"x": torch.randn(2, 16, 32)}


def block() -> Made:
    """One layer alone."""
    return transformer(1)


class Classifier(nn.Module):
    """A linear layer and a head whose logits weigh, with cross entropy."""

    def __init__(self, width: int = 16, classes: int = 512) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(width, width), nn.Linear(width, classes, bias=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(F.gelu(self.layer(x))), labels)


def classifier() -> Made:
    torch.manual_seed(0)
    return Classifier(), {"x": torch.randn(64, 16), "labels": torch.arange(64)}


def unfused(masked: bool = False, layers: int = 3) -> Made:
    """Scores are what weighs."""
    torch.manual_seed(0)
    model = Transformer(layers)
    model.blocks = nn.ModuleList(UnfusedBlock(masked) for _ in range(layers))
    return model, {"x": torch.randn(4, 64, 32)}


def unfused_masked() -> Made:
    return unfused(masked=True)


VOCAB = 61
_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def llama(layers: int = 2) -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    widths = {**_WIDTHS, "num_hidden_layers": layers}
    config = LlamaConfig(**_TOKENS, **widths, num_key_value_heads=2, max_position_embeddings=64, use_cache=False)
    return _build(LlamaForCausalLM, config, _causal())


def qwen3() -> Made:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**_TOKENS, **_WIDTHS, num_key_value_heads=2, head_dim=12, max_position_embeddings=64, use_cache=False)
    return _build(Qwen3ForCausalLM, config, _causal())


def mixtral() -> Made:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **_TOKENS,
        **_WIDTHS,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    return _build(MixtralForCausalLM, config, _causal())


def gpt2() -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        **_TOKENS, n_embd=32, n_layer=1, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False, loss_type="ForCausalLM",
    )  # fmt: skip
    return _build(GPT2LMHeadModel, config, _causal())


def bert() -> Made:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        **_TOKENS, **_WIDTHS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64
    )
    inputs = _causal()
    return _build(BertForMaskedLM, config, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])})


def vit() -> Made:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        **_WIDTHS, image_size=16, patch_size=4, num_channels=3, num_labels=5, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(4, 3, 16, 16, generator=_generator()), "labels": torch.tensor([0, 3, 1, 4])}
    return _build(ViTForImageClassification, config, inputs)


def t5() -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, d_model=32, d_kv=8, d_ff=48,
        num_layers=1, num_decoder_layers=1, num_heads=4, dropout_rate=0.0, feed_forward_proj="gated-gelu",
        use_cache=False,
    )  # fmt: skip
    inputs = {"input_ids": _tokens(16), "labels": _tokens(12)}
    return _build(T5ForConditionalGeneration, config, inputs)


HUGGING_FACE: dict[str, Callable[[], Made]] = {f.__name__: f for f in (llama, gpt2, bert, qwen3, mixtral, vit, t5)}


def _causal() -> dict[str, Any]:
    tokens = _tokens(16)
    return {"input_ids": tokens, "labels": tokens}


def _tokens(length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, length), generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _build(cls: type[nn.Module], config: Any, inputs: dict[str, Any]) -> Made:
    torch.manual_seed(0)
    return cls(config).train(), inputs
