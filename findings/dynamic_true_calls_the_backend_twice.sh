#!/usr/bin/env bash
# torch 2.13.0 (2.15.0 alike): under dynamic=True one call of a compiled model calls its backend twice where a Python float of the
# model is the scale of attention or the rate of dropout. What the first call made is thrown away.
#
# Dynamo makes a float attribute an input of the graph. compile_fx finds that no tensor can stand for it there (it becomes a
# constant of an operator), tells Dynamo to start again with the float as a constant, and the backend gets the second graph. A
# float that is only multiplied with stays an input, and is one call. So a backend that counts its graphs, keeps what it made of
# them, or installs something for each, sees one that never runs. Without dynamic=True the float is a constant from the start.
#
# Seen (calls of a backend that calls compile_fx, for one training step on a CPU):
#   multiplied: None 1, True 1
#   dropout rate: None 1, True 2
#   attention scale: None 1, True 2
# Fails if a line changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy
cat >"$work/look.py" <<'PY'
import torch
from torch._inductor.compile_fx import compile_fx
from torch.nn import functional as F


class Model(torch.nn.Module):
    def __init__(self, use):
        super().__init__()
        self.layer, self.number, self.use = torch.nn.Linear(8, 8), 0.25, use

    def forward(self, x):
        return self.use(self.layer(x), self.number).sum()


USES = {
    "multiplied": lambda h, n: h * n,
    "dropout rate": lambda h, n: F.dropout(h, n),
    "attention scale": lambda h, n: F.scaled_dot_product_attention(h[None], h[None], h[None], scale=n),
}
for name, use in USES.items():
    seen = []
    for dynamic in (None, True):
        torch._dynamo.reset()
        calls = []

        def backend(graph, inputs):
            calls.append(graph)
            return compile_fx(graph, inputs)

        torch.compile(Model(use), backend=backend, dynamic=dynamic)(torch.randn(5, 8)).backward()
        seen.append(f"{dynamic} {len(calls)}")
    print(f"{name}: {', '.join(seen)}")
PY
"$work/venv/bin/python" "$work/look.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'EOF'
multiplied: None 1, True 1
dropout rate: None 1, True 2
attention scale: None 1, True 2
EOF
