"""Which joint graph this is: a plan names nodes, and their names mean nothing in another graph."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from actpass.ir.joint_graph import Joint
from actpass.torch_compat import OpOverload


def fingerprint(joint: Joint) -> str:
    """A hash of all nodes, what they compute of which others, and their shapes and dtypes; of the parameters also the paths.

    Not of seed and subspaces, which some plans need and others do not, nor of devices: another card of the same kind runs the
    same graph. The same in every process and on every rank.
    """
    lines = (_line(n, joint.parameter_path.get(n, ""), joint.state) for n in joint.gm.graph.nodes if n not in joint.state)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def plain_inputs(joint: Joint) -> tuple[tuple[str, str], ...]:
    """(name, dtype and shape) of every input that is neither parameter nor of this package."""
    own = (n for n in joint.primals if n not in joint.parameter_path and n not in joint.state)
    return tuple((n.name, _value(n.meta.get("val"))) for n in own)


def _line(node: fx.Node, path: str, own: frozenset[fx.Node]) -> str:
    target: Any = node.target
    named = isinstance(target, str | OpOverload)
    operator = str(node.target) if named else getattr(target, "__name__", type(target).__name__)
    return " ".join((node.name, node.op, operator, *_arguments(node, own), _value(node.meta.get("val")), path))


def _arguments(node: fx.Node, own: frozenset[fx.Node]) -> Iterator[str]:
    keywords = {k: v for k, v in node.kwargs.items() if k != "device"}
    yield from keywords
    for argument in pytree.tree_leaves((node.args, keywords)):
        if node.op == "output" and (argument is None or argument in own):  # no gradient of the seed, no sketch
            continue
        yield argument.name if isinstance(argument, fx.Node) else "" if isinstance(argument, torch.device) else repr(argument)


def _value(val: Any) -> str:
    if isinstance(val, torch.Tensor):
        return f"{str(val.dtype).removeprefix('torch.')}[{', '.join(map(str, val.shape))}]"
    if isinstance(val, tuple | list):
        return " ".join(map(_value, cast(Sequence[Any], val)))
    return str(val)
