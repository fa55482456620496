#!/usr/bin/env bash
# torch 2.13.0: nn.Linear(...).compile() and nn.Sequential(...).compile() compile nothing and say nothing; torch.compile(module)
# of the same module compiles, and so does .compile() of a class of one's own. (2.14.1 and 2.15.0 compile all of them.)
#
# The documentation of Module.compile says that it is equal to torch.compile of the module's call. Whoever wraps layers in a
# Sequential and calls its compile() trains in eager mode, at eager mode's memory.
#
# Seen (how often the backend is called in one forward):
#   Linear      .compile() 0   torch.compile 1
#   Sequential  .compile() 0   torch.compile 1
#   Own         .compile() 1   torch.compile 1
# Fails if any line changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy
cat >"$work/look.py" <<'PY'
import torch
from torch import nn

calls = 0


def backend(graph, inputs):
    global calls
    calls += 1
    return graph.forward


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x)


def count(run):
    global calls
    torch.compiler.reset()
    calls = 0
    run(torch.randn(2, 4))
    return calls


for make in (lambda: nn.Linear(4, 4), lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()), Own):
    module = make()
    module.compile(backend=backend)
    by_method = count(module)
    print(f"{type(module).__name__:11s} .compile() {by_method}   torch.compile {count(torch.compile(make(), backend=backend))}")
PY
"$work/venv/bin/python" "$work/look.py" | tee "$work/output"
diff "$work/output" - <<'TXT'
Linear      .compile() 0   torch.compile 1
Sequential  .compile() 0   torch.compile 1
Own         .compile() 1   torch.compile 1
TXT
