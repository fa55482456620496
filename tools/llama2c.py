"""Models and tokenizers in llama2.c's version-0 files: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size,
seq_len; a negative vocab_size: an own output matrix), then float32 weights. https://github.com/karpathy/llama2.c, `export.py`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from workloads import UsageError

_FIRST_BYTE = 3  # ids 3..258 are the bytes 0..255
_BEGIN = 1


def load_model(path: Path) -> Any:
    """A `transformers` LlamaForCausalLM (float32) with the file's weights. Raises `UsageError` if it cannot be read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    try:
        data = path.read_bytes()
        dim, hidden, layers, heads, kv_heads, vocab, seq = struct.unpack("7i", data[:28])
    except (OSError, struct.error) as error:
        raise UsageError(f"model {str(path)!r} is not a version-0 file of llama2.c: {error}.") from error
    config = LlamaConfig(
        hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=abs(vocab), max_position_embeddings=seq, rms_norm_eps=1e-5,
        tie_word_embeddings=vocab > 0, use_cache=False,
    )  # fmt: skip
    weights = _Reader(np.frombuffer(data, np.float32, offset=28))
    model = LlamaForCausalLM(config)
    kv = dim * kv_heads // heads
    state = {"model.embed_tokens.weight": weights.take(abs(vocab), dim)}
    stacks = {
        "input_layernorm": (dim,), "self_attn.q_proj": (dim, dim), "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim), "self_attn.o_proj": (dim, dim), "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim), "mlp.down_proj": (dim, hidden), "mlp.up_proj": (hidden, dim),
    }  # fmt: skip
    for name, shape in stacks.items():
        for layer, weight in enumerate(weights.take(layers, *shape)):
            rotated = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            state[f"model.layers.{layer}.{name}.weight"] = weight if rotated is None else _halves(weight, rotated)
    state["model.norm.weight"] = weights.take(dim)
    weights.take(seq, dim // heads)  # tables of cosines and sines
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if vocab > 0 else weights.take(-vocab, dim)
    model.load_state_dict(state)
    return model


class _Reader:
    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = torch.from_numpy(data.copy()), 0

    def take(self, *shape: int) -> Tensor:
        count = int(np.prod(shape))
        self.at += count
        return self.data[self.at - count : self.at].view(shape)


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs (llama2.c rotates neighbours) to halves (transformers rotates halves)."""
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


@dataclass(frozen=True)
class Tokenizer:
    """Byte-pair merging by score, within words. pieces: of each id."""

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        data, at = path.read_bytes(), 4
        pieces, scores = [], []
        while at < len(data):
            score, length = struct.unpack_from("fi", data, at)
            pieces.append(data[at + 8 : at + 8 + length])
            scores.append(score)
            at += 8 + length
        return cls(tuple(pieces), tuple(scores))

    def encode(self, text: str) -> list[int]:
        ids = {piece: i for i, piece in enumerate(self.pieces) if i >= 3 and not piece.startswith(b"<0x")}

        @cache
        def word(text: str) -> tuple[int, ...]:
            tokens: list[int] = []
            for character in text:
                piece = character.encode()
                tokens.extend([ids[piece]] if piece in ids else [b + _FIRST_BYTE for b in piece])
            while True:
                merged = [ids.get(self.pieces[a] + self.pieces[b], -1) for a, b in pairwise(tokens)]
                best = max((i for i, m in enumerate(merged) if m >= 0), key=lambda i: self.scores[merged[i]], default=None)
                if best is None:
                    return tuple(tokens)
                tokens[best : best + 2] = [merged[best]]

        words = (" " + text).replace(" ", "\0 ").split("\0")
        return [_BEGIN, *(token for w in words if w for token in word(w))]

    def decode(self, ids: list[int]) -> str:
        pieces = [bytes([i - _FIRST_BYTE]) if _FIRST_BYTE <= i < 259 else self.pieces[i] for i in ids if i > 2]
        return b"".join(pieces).decode(errors="replace").lstrip()
