#!/usr/bin/env bash
# torch 2.13.0 (the same on 2.15.0: give the version as first argument): the compiled backward of cross entropy runs once over
# rows x words for a sum whose value is one number that each row has anyway.
#
# The gradient is softmax less a one-hot, which needs no sum. But log-softmax's backward is written for any gradient, and sums the
# one it is given, here the one-hot that nll_loss's backward makes. Inductor fuses the one-hot away, so that no tensor shows, and
# keeps the loop: per element a comparison of 64-bit numbers, a choice and an addition of a zero, of nothing that is read. The
# gradient written out by hand has no such loop and is equal to the bit. 32768 rows of 32000 words are 10^9 such elements a step.
#
# Seen (sums over the words in the code that Inductor makes):
#   forward: 1, backward: 1
#   written out: 0, bit-equal: True
# Fails if a line changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==${1:-2.13.0}" numpy setuptools
cat >"$work/look.py" <<'PY'
import re

import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code

WORDS = 1000


def sums(code):
    """Accumulators of a sum, which begin at 0, in loops over all words."""
    loops = re.split(r"#pragma omp (?:for|single)", code)
    return sum("tmp_acc0 = 0;" in loop and f"<static_cast<int64_t>({WORDS}L)" in loop for loop in loops)


def loss(logits, labels):
    return F.cross_entropy(logits, labels)


def by_hand(logits, labels):
    hot = labels[:, None] == torch.arange(WORDS)
    softmax = torch.exp(logits - logits.logsumexp(1, keepdim=True))
    return softmax, hot


def gradient(softmax, hot):
    return (softmax - hot.float()) / softmax.shape[0]


torch.manual_seed(0)
logits, labels = torch.randn(256, WORDS, requires_grad=True), torch.randint(0, WORDS, (256,))
_, (forward, backward) = run_and_get_code(lambda: torch.compile(loss)(logits, labels).backward())
print(f"forward: {sums(forward)}, backward: {sums(backward)}")
with torch.no_grad():
    softmax, hot = by_hand(logits, labels)
    written, (code,) = run_and_get_code(torch.compile(gradient), softmax, hot)
log_softmax = torch.log_softmax(logits.detach(), 1)
one_hot = torch.where(hot, -1.0 / 256, 0.0)
plain = one_hot - torch.exp(log_softmax) * one_hot.sum(1, keepdim=True)
number = one_hot - torch.exp(log_softmax) * torch.full((256, 1), -1.0 / 256)
print(f"written out: {sums(code)}, bit-equal: {torch.equal(plain, number)}")
PY
"$work/venv/bin/python" "$work/look.py" 2>"$work/errors" | tee "$work/output" || { cat "$work/errors"; exit 1; }
diff "$work/output" - <<'TXT'
forward: 1, backward: 1
written out: 0, bit-equal: True
TXT
