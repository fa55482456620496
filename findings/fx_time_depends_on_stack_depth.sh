#!/usr/bin/env bash
# CPython 3.11 with torch 2.13.0 (CPU build).
#
# How long torch.fx works on a graph depends on how deep the caller's stack is. CPython keeps Python frames in pieces of 16 KiB and
# gives a piece back to the system as soon as its first frame returns. Where a piece ends right between a loop and the function that
# it calls, every call maps fresh memory and every return unmaps it. torch.fx, AOTAutograd and the partitioner are loops over nodes
# that call small functions, so one and the same graph takes several times as long from some depths as from the next, in system
# time, with a page fault or more a node; which depths depends on the sizes of all frames below.
#
# Seen (Graph.graph_copy of 4,000 nodes from depths 5 to 159, CPython 3.11.7): a median of 752 page faults, at the worst depth
# 92,693. A frame that asks for a large piece (a code object whose co_stacksize is large) around the call removes it at all depths.
#
# Fails if no depth has five times the median's faults, or if such a frame does not help.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 numpy
cat >"$work/run.py" <<'PYTHON'
import resource
import statistics
import sys

import torch
from torch import fx

print(sys.implementation.name, sys.version.split()[0], "torch", torch.__version__)
graph = fx.Graph()
node = graph.placeholder("x")
for _ in range(4000):
    node = graph.call_function(torch.ops.aten.sin.default, (node,))
graph.output(node)


def copy():
    fx.Graph().graph_copy(graph, {})


def at(depth, function):
    return at(depth - 1, function) if depth else function()


def faults(depth, around):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    at(depth, lambda: around(copy))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def plain(function):
    return function()


def roomy(function):
    return function()


roomy.__code__ = roomy.__code__.replace(co_stacksize=1 << 17)
found = {}
for around in (plain, roomy):
    counts = [faults(depth, around) for depth in range(160)][5:]
    found[around] = max(counts), statistics.median(counts)
    print(around.__name__, "page faults: most", found[around][0], "median", found[around][1])
assert found[plain][0] > 5 * found[plain][1] + 3000
assert found[roomy][0] < found[plain][0] / 3
print("as stated")
PYTHON
"$work/env/bin/python" "$work/run.py"
