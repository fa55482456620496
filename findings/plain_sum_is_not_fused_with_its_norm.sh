#!/usr/bin/env bash
# torch 2.13.0 (the same on 2.15.0: give the version as first argument): on a CPU Inductor does not fuse x + y with a sum over the
# rows of it, but it does once x + y is multiplied by a weight of one row's width.
#
# Whatever reads and writes whole tensors in the order in which they lie becomes one loop over all elements before anything is
# fused; a sum over rows is a loop over rows with one inside. A loop over all elements is made one over rows again only for loops
# without sums. So the residual stream of a transformer, a plain sum, is a loop of its own, whose result its norm reads back from
# memory; what is broadcast (a weight, an embedding, a scale) keeps the two axes apart, and all of it is one kernel. It decides
# memory as well: with anything but loops between the two, both inputs of the sum are freed before the norm runs.
#
# Seen (lengths of the outer loops in the code that Inductor makes, of 1024 rows of 128):
#   x + y, and its mean of squares: 131072 1024 1024
#   (x + y) * weight, and its mean of squares: 1024 1024
# Fails if a line changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==${1:-2.13.0}" numpy setuptools
cat >"$work/look.py" <<'PY'
import re

import torch
from torch._inductor.utils import run_and_get_code

OUTER = re.compile(r"for\(int64_t x0=static_cast<int64_t>\(0LL?\); x0<static_cast<int64_t>\((\d+)LL?\)")


def plain(x, y, weight):
    total = x + y
    return total, total.square().mean(-1)


def weighted(x, y, weight):
    total = (x + y) * weight
    return total, total.square().mean(-1)


inputs = torch.randn(1024, 128), torch.randn(1024, 128), torch.randn(128)
for name, function in (("x + y", plain), ("(x + y) * weight", weighted)):
    torch.compiler.reset()
    found, (code,) = run_and_get_code(torch.compile(function), *inputs)
    torch.testing.assert_close(found, function(*inputs))
    print(f"{name}, and its mean of squares: {' '.join(OUTER.findall(code))}")
PY
cd "$work"
TORCHINDUCTOR_CACHE_DIR="$work/cache" OMP_NUM_THREADS=1 "$work/venv/bin/python" look.py 2>/dev/null | tee seen
diff seen - <<'SEEN'
x + y, and its mean of squares: 131072 1024 1024
(x + y) * weight, and its mean of squares: 1024 1024
SEEN
