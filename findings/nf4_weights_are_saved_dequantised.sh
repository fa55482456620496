#!/usr/bin/env bash
# torch 2.13.0 (2.15.0 alike), torchao 0.18.0: torch.compile of a layer with a frozen weight in torchao's NF4 saves the weight in float32 for the
# backward, 8 times its 4 bits. Eager mode saves the NF4 tensor.
#
# torchao's linear_nf4 is an autograd function that dequantises the weight in the forward and again in the backward, and saves the
# weight as it is. Compiled, both are one graph: the two dequantisations are one computation, and the partitioner of AOTAutograd
# decides what of it crosses. What it never makes again is a concatenation (aten.cat), and torchao's dequantisation ends in one: it
# stacks what both halves of each byte stand for. So the finished weight in float32 crosses, for every frozen layer of the model at
# once: compiled QLoRA holds its base in full from the forward to the backward, where eager QLoRA never does. Nothing warns, and
# results are right.
#
# Seen (bytes that are saved for the backward, but parameters; a batch of 8 rows, weights of 512 x 512):
#   eager, 1 frozen layer: 32768
#   compiled, 1 frozen layer: 1081344
#   eager, 4 frozen layers: 81920
#   compiled, 4 frozen layers: 4276224
# Fails if a line changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==${1:-2.13.0}" torchao==0.18.0 numpy setuptools
cat >"$work/look.py" <<'PY'
import torch
from torch import nn
from torchao.quantization import to_nf4


class Model(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.first = nn.Linear(512, 512)
        self.frozen = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(layers))
        for layer in self.frozen:
            layer.weight = nn.Parameter(to_nf4(layer.weight.detach()), requires_grad=False)

    def forward(self, x):
        x = self.first(x)
        for layer in self.frozen:
            x = layer(x).tanh()
        return x


def saved_bytes(call, model, x):
    own = {p.untyped_storage().data_ptr() for p in model.parameters() if type(p.data) is torch.Tensor}
    found = {}

    def pack(t):
        if type(t) is torch.Tensor and t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call(x)
    out.sum().backward()
    return sum(found.values())


for layers in (1, 4):
    torch.manual_seed(0)
    model, x = Model(layers), torch.randn(8, 512)
    grads = []
    for name, call in (("eager", model), ("compiled", torch.compile(model))):
        model.zero_grad()
        nbytes = saved_bytes(call, model, x)
        grads.append(model.first.weight.grad.clone())
        print(f"{name}, {layers} frozen layer{'s' * (layers > 1)}: {nbytes}")
    torch.testing.assert_close(*grads)
PY
cd "$work"
TORCHINDUCTOR_CACHE_DIR="$work/cache" OMP_NUM_THREADS=1 "$work/venv/bin/python" look.py 2>/dev/null | tee seen
diff seen - <<'SEEN'
eager, 1 frozen layer: 32768
compiled, 1 frozen layer: 1081344
eager, 4 frozen layers: 81920
compiled, 4 frozen layers: 4276224
SEEN
