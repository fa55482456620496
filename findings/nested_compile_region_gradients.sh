#!/usr/bin/env bash
# torch 2.13.0 (the same on 2.14.1 and 2.15.0: give the version as first argument): where a function is marked with
# torch.compiler.nested_compile_region, torch.compile gives wrong gradients, without a word. A C++ compiler is needed.
#
# The documentation says "Using it is therefore safe: correctness is always preserved". Here, with two calls of one region, the
# gradients of x and w are wrong by their own size and by half of it. The forward of a region returns what its backward will
# need, among it its own input; behind the call Inductor takes that input's memory for something else. With
# allow_buffer_reuse=False, or without the mark, all is right.
#
# Seen (whether the relative error of each gradient against eager's is below 1e-5):
#   not marked            x right  w right  v right
#   marked                x wrong  w wrong  v right
#   marked, no reuse      x right  w right  v right
# Fails if any line changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==${1:-2.13.0}" numpy
cat >"$work/look.py" <<'PY'
import torch
import torch._inductor.config as inductor


def layer(x, w):
    return x.square() @ w


marked = torch.compiler.nested_compile_region(layer)


def loss(call, x, w, v):
    h = call(torch.sin(x), w)
    h = call(h, w)
    return (torch.tanh(h) @ v + h).square().mean()


def gradients(run, call):
    torch.manual_seed(0)
    x, w, v = (torch.randn(64, 64, requires_grad=True) for _ in range(3))
    w.data *= 0.1
    run(call, x, w, v).backward()
    return x.grad, w.grad, v.grad


wanted = gradients(loss, layer)
for name, call, reuse in (("not marked", layer, True), ("marked", marked, True), ("marked, no reuse", marked, False)):
    torch.compiler.reset()
    with inductor.patch(allow_buffer_reuse=reuse):
        got = gradients(torch.compile(loss), call)
    right = [float((g - w).norm() / w.norm()) < 1e-5 for g, w in zip(got, wanted)]
    print(f"{name:18s}", *(f"  {n} {'right' if r else 'wrong'}" for n, r in zip("xwv", right)), sep="")
PY
TORCHINDUCTOR_CACHE_DIR="$work/cache" "$work/venv/bin/python" "$work/look.py" | tee "$work/output"
diff "$work/output" - <<'TXT'
not marked          x right  w right  v right
marked              x wrong  w wrong  v right
marked, no reuse    x right  w right  v right
TXT
