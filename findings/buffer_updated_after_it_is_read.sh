#!/usr/bin/env bash
# torch 2.13.0 (the same on 2.15.0: give the version as first argument): where a forward reads a buffer and updates it afterwards,
# torch.compile gives the gradient that the *updated* buffer would have given, without a word. A C++ compiler is needed.
#
# Eager mode refuses such a model ("modified by an inplace operation") or, where what was read is not saved by autograd (here a
# factor that needs no gradient is, behind a cast), gives the gradient of what was read. Compiled, the backward rebuilds from the
# buffer itself, which has its new value by then. Routers with a bias that balances load, queues and running maxima do this.
#
# Seen (whether the relative error of the gradient against eager's is below 1e-5):
#   eager    right
#   compiled wrong
# Fails if either line changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==${1:-2.13.0}" numpy
cat >"$work/look.py" <<'PY'
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.linspace(0.5, 2.0, 8))

    def forward(self, x):
        y = (self.linear(x) * (self.scale + 0.0)).sin().sum()
        with torch.no_grad():
            self.scale.add_(1.0)
        return y


def gradient(compiled):
    torch.manual_seed(0)
    model = Model()
    run = torch.compile(model) if compiled else model
    run(torch.randn(16, 8)).backward()
    return model.linear.weight.grad


def closed_form():
    torch.manual_seed(0)
    model = Model()
    scale = model.scale.clone()
    (model.linear(torch.randn(16, 8)) * scale).sin().sum().backward()
    return model.linear.weight.grad


want = closed_form()
for name, compiled in (("eager", False), ("compiled", True)):
    error = (gradient(compiled) - want).norm() / want.norm()
    print(f"{name:8s} {'right' if error < 1e-5 else 'wrong'}")
PY
"$work/venv/bin/python" "$work/look.py" | tee "$work/output"
diff "$work/output" - <<'TXT'
eager    right
compiled wrong
TXT
