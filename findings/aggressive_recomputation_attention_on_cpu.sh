#!/usr/bin/env bash
# torch 2.13.0 (the same on 2.15.0: give the version as first argument): torch._functorch.config.aggressive_recomputation runs every
# fused attention of a CPU model again in the backward, while it leaves every matmul alone.
#
# The min-cut partitioner never recomputes what is on its list of compute-intensive operators. The fused attentions of CUDA are on
# it, that of the CPU is not, so the option takes it for something cheap. By default it is not recomputed either way.
#
# Seen (operators in the backward of three blocks):
#   default                  attention 0, matmuls 11
#   aggressive_recomputation attention 3, matmuls 11
# Fails if a line changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==${1:-2.13.0}" numpy
cat >"$work/look.py" <<'PY'
import functools

import torch
import torch._functorch.config as config
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = (t.view(2, 128, 4, 16).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(2, 128, 64))


def run_again(**changed):
    torch.compiler.reset()
    counts = {}

    def keep(graph, _, name):
        targets = [str(n.target) for n in graph.graph.nodes]
        counts[name] = (
            sum("flash_attention_for_cpu.default" in t for t in targets),
            sum(t in ("aten.mm.default", "aten.addmm.default") for t in targets),
        )
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=functools.partial(keep, name="forward"),
        bw_compiler=functools.partial(keep, name="backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    model = nn.Sequential(*(Block() for _ in range(3)))
    with config.patch(**changed):
        torch.compile(model, backend=backend)(torch.randn(2, 128, 64)).sum().backward()
    attention, matmuls = counts["backward"]
    return f"attention {attention}, matmuls {matmuls}"


print("default                 ", run_again())
print("aggressive_recomputation", run_again(aggressive_recomputation=True))
PY
"$work/venv/bin/python" "$work/look.py" | tee "$work/output"
diff "$work/output" - <<'TXT'
default                  attention 0, matmuls 11
aggressive_recomputation attention 3, matmuls 11
TXT
