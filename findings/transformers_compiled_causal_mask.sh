#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: a compiled causal language model attends through a mask of T x T numbers and with
# is_causal=False; the same model run eagerly, on the same batch without padding, has no mask and is_causal=True.
#
# A guess would be that compiling changes how the model runs, not what it asks of attention. It costs a tensor of T x T (268 MB of
# booleans or more at 16,384 tokens), and rules out kernels that take no mask.
#
# Seen:
#   eager    mask None             is_causal True
#   compiled mask (1, 1, 32, 32)   is_causal False
# Fails if either line changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cat >"$work/look.py" <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, use_cache=False,
    )
)
tokens = torch.randint(0, 64, (1, 32))
found = []
attention = torch.nn.functional.scaled_dot_product_attention


def watched(query, key, value, attn_mask=None, **options):
    found.append((None if attn_mask is None else tuple(attn_mask.shape), options["is_causal"]))
    return attention(query, key, value, attn_mask=attn_mask, **options)


torch.nn.functional.scaled_dot_product_attention = watched
model(input_ids=tokens, labels=tokens)
torch.nn.functional.scaled_dot_product_attention = attention


def backend(graph, inputs):
    for node in graph.graph.nodes:
        if node.target is attention:
            mask = node.kwargs["attn_mask"]
            shape = None if mask is None else tuple(mask.meta["example_value"].shape)
            found.append((shape, node.kwargs["is_causal"]))
    return graph


torch.compile(model, backend=backend)(input_ids=tokens, labels=tokens)
for name, (shape, is_causal) in zip(("eager", "compiled"), found, strict=True):
    print(f"{name:8s} mask {shape!s:16s} is_causal {is_causal}")
PY
"$work/venv/bin/python" "$work/look.py" | tee "$work/output"
diff "$work/output" - <<'TXT'
eager    mask None             is_causal True
compiled mask (1, 1, 32, 32)   is_causal False
TXT
