#!/usr/bin/env bash
# torch 2.13.0 (the same on 2.14.1; not on 2.15.0): where a function is marked with torch.compiler.nested_compile_region, the
# backward of a compiled loss writes over the tensors that it is to return the gradients of. A C++ compiler is needed.
#
# Nobody would guess that loss.backward() changes parameters. A marked function's backward is a graph of its own; Inductor takes
# the positions of the inputs that it may write to (donated buffers) from the whole backward and counts them off in the called
# one's inputs, which are others. torch 2.15.0 says so in a comment and gives a called graph none.
#
# Seen:
#   x      overwritten
#   first  overwritten
#   second overwritten
# Fails if any line changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==${1:-2.13.0}" numpy
cat >"$work/look.py" <<'PY'
import torch


@torch.compiler.nested_compile_region
def layer(scale, x):
    return torch.tanh(scale * x)


def loss(x, first, second):
    return layer(second, layer(first, x)).square().sum()


torch.manual_seed(0)
tensors = {name: torch.randn(8, 8, requires_grad=True) for name in ("x", "first", "second")}
before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
torch.compile(loss)(**tensors).backward()
for name, tensor in tensors.items():
    print(f"{name:6s} {'as before' if torch.equal(tensor, before[name]) else 'overwritten'}")
PY
TORCHINDUCTOR_CACHE_DIR="$work/cache" "$work/venv/bin/python" "$work/look.py" | tee "$work/output"
diff "$work/output" - <<'TXT'
x      overwritten
first  overwritten
second overwritten
TXT
