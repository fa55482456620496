#!/usr/bin/env bash
# torch 2.13.0 (the same on 2.15.0: give the version as first argument): under torch.compile a selective checkpoint's MUST_SAVE does
# nothing for a value that the forward computes for its backward alone.
#
# What no result of the forward depends on is taken for a part of the backward before the marks are looked at, and is computed
# there, from inputs that are saved instead. An autograd.Function that saves a table, or draws its random numbers ahead, is such a
# case: the table is not saved, and not even computed when the forward runs. A value on the way to a result is saved as marked.
#
# Seen (both operators are marked MUST_SAVE; how often each graph computes them):
#   aten.cos.default forward 1 backward 0
#   aten.exp.default forward 0 backward 1
# Fails if a line changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==${1:-2.13.0}" numpy
cat >"$work/look.py" <<'PY'
import functools

import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten


class Scale(torch.autograd.Function):
    """Its backward reads a value that its result does not depend on."""

    @staticmethod
    def forward(ctx, x, w):
        table = torch.exp(x)
        ctx.save_for_backward(table)
        return x * w

    @staticmethod
    def backward(ctx, dy):
        (table,) = ctx.saved_tensors
        return dy * table, (dy * table).sum(0)


def policy(ctx, op, *args, **kwargs):
    is_marked = op in (aten.exp.default, aten.cos.default)
    return CheckpointPolicy.MUST_SAVE if is_marked else CheckpointPolicy.PREFER_RECOMPUTE


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(32))

    def forward(self, x):
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)

        def inner(x):
            return Scale.apply(torch.cos(x * self.w), self.w)

        return checkpoint(inner, x, use_reentrant=False, context_fn=contexts)


graphs = {}


def keep(graph, _, name):
    graphs[name] = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    return make_boxed_func(graph.forward)


backend = aot_autograd(
    fw_compiler=functools.partial(keep, name="forward"),
    bw_compiler=functools.partial(keep, name="backward"),
    partition_fn=min_cut_rematerialization_partition,
)
torch.compile(Model(), backend=backend)(torch.randn(16, 32)).sum().backward()
for op in ("aten.cos.default", "aten.exp.default"):
    print(op, "forward", graphs["forward"].count(op), "backward", graphs["backward"].count(op))
PY
"$work/venv/bin/python" "$work/look.py" 2>"$work/errors" | tee "$work/output" || { cat "$work/errors"; exit 1; }
diff "$work/output" - <<'TXT'
aten.cos.default forward 1 backward 0
aten.exp.default forward 0 backward 1
TXT
