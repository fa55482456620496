#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0, peft 0.21.2: activation checkpointing of a model with adapters breaks its graph at the embedding,
# also with use_reentrant=False, which does not need what breaks it.
#
# Reentrant checkpoints need an input that takes a gradient, and a frozen embedding's output takes none. So transformers, asked to
# checkpoint a model that has PEFT's adapters, puts a hook on the embedding that calls requires_grad_() on its output. It does so
# whatever use_reentrant is. Dynamo can't trace that call where the tensor is returned, and the break lies inside context managers
# that it can't leave: the forwards of the whole model and of its wrappers run as plain Python, and only what they call is compiled.
# The head and the loss become a graph apart from the layers. Non-reentrant checkpoints, which are what
# compiles, take their gradient from the adapters: without the hook the model is one graph, and has the same gradients.
#
# Seen (graphs that are compiled for one training step of a two-layer Llama with LoRA on all linear layers):
#   adapters: 1
#   adapters and checkpointing, not reentrant: 3
#   and disable_input_require_grads(): 1
#   gradients are equal: True
# Fails if a line changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2 numpy
cat >"$work/look.py" <<'PY'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

warnings.simplefilter("ignore")
logging.set_verbosity_error()
TOKENS = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear")).train()


def step(of):
    torch.compiler.reset()
    graphs = []

    def backend(gm, _):
        graphs.append(gm)
        return gm

    torch.compile(of, backend=backend)(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return len(graphs), [p.grad for p in of.parameters() if p.grad is not None]


plain, checkpointed, without_hook = model(), model(), model()
for of in (checkpointed, without_hook):
    of.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
without_hook.disable_input_require_grads()
(one, _), (several, hooked), (again, ours) = map(step, (plain, checkpointed, without_hook))
print(f"adapters: {one}")
print(f"adapters and checkpointing, not reentrant: {several}")
print(f"and disable_input_require_grads(): {again}")
print(f"gradients are equal: {all(torch.equal(a, b) for a, b in zip(hooked, ours, strict=True))}")
PY
cd "$work"
"$work/venv/bin/python" look.py 2>/dev/null | tee seen
diff seen - <<'SEEN'
adapters: 1
adapters and checkpointing, not reentrant: 3
and disable_input_require_grads(): 1
gradients are equal: True
SEEN
