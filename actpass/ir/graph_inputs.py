"""What each of Dynamo's graph inputs is: a parameter (and of which module), or data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from actpass.torch_compat import FakeTensor, storage_key

_PARAMETER = re.compile(r"\._parameters\[|^l_self_(?:modules_\w+_)?parameters_\w+_$")
"""A parameter's source, or its placeholder's name where DDP's graph splitting dropped the source."""
_CONTAINERS = ("__dict__", "_modules", "_parameters", "_buffers")
"""What a module keeps its parts in: Dynamo names them where a class has a ``__getattr__`` of its own (PEFT's models)."""
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """paths: for every positional input its parameter path (``layers.0.mlp.up_proj.weight``), or None if it is not a
    parameter. computed: whether it is a value that another region computed (an activation that a graph break passes on).
    written: whether the graph writes to it. deferred: how many of the results are hidden states in place of logits
    (`actpass.backend.returned_logits`). whole: why logits that are returned are not.
    seed: the position of the step's seed, or None if the region takes none. learned_seed, points, subspaces: those of the
    seed of what is random in learned bases, of the points at which tokens are sampled, and of the learned subspaces.
    coefficients: of what gets the coefficients of a low-rank gradient for its gradient."""

    paths: tuple[str | None, ...]
    computed: tuple[bool, ...]
    written: tuple[bool, ...] = ()
    deferred: int = 0
    whole: str | None = None
    seed: int | None = None
    learned_seed: int | None = None
    points: int | None = None
    subspaces: tuple[int, ...] = ()
    coefficients: tuple[int, ...] = ()

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> GraphInputs:
        placeholders = gm.graph.find_nodes(op="placeholder")
        paths = _unique(parameter_path(n, e) for n, e in zip(placeholders, example_inputs, strict=True))
        return cls(paths, tuple(map(is_computed, example_inputs)), tuple(map(is_written, placeholders)))


def arguments_of(gm: fx.GraphModule, example_inputs: Sequence[Any], inputs: GraphInputs) -> tuple[tuple[str, int], ...]:
    """(path, position) of the leaves that a region without parameters gets gradients of: where `torch.func.functional_call` is
    compiled, the parameters are arguments, and nothing but their paths tells them from inputs."""
    if any(path is not None for path in inputs.paths):
        return ()
    placeholders = gm.graph.find_nodes(op="placeholder")
    return tuple(
        (clean_path(source_name(node)), position)
        for position, (node, e) in enumerate(zip(placeholders, example_inputs, strict=True))
        if isinstance(e, torch.Tensor) and not isinstance(e, FakeTensor) and e.requires_grad and e.is_leaf
    )


_SHOWS = {
    "detach", "_get_data_attr", "getattr", "getitem", "view", "view_as", "reshape", "flatten", "unflatten", "t",
    "transpose", "permute", "movedim", "swapaxes", "unsqueeze", "squeeze", "expand", "expand_as", "narrow", "select",
    "chunk", "split", "unbind", "diagonal", "alias",
}  # fmt: skip
"""Operators of Dynamo's graphs whose result shows the memory of what they are given."""
_WRITES = {
    "setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift",
    "imatmul",
}  # fmt: skip
_NOT_IN_PLACE = {"and_", "or_", "not_", "is_"}
"""Of Python's `operator`: ``a & b`` and the like."""


def is_written(tensor: fx.Node) -> bool:
    """Whether what is in the memory of ``tensor`` is changed in place behind it: by the names of operators (``mul_``,
    ``x[i] = ...``, ``out=``), of it or of whatever shows its memory."""
    for user in tensor.users:
        name, out = operator_name(user), user.kwargs.get("out")
        is_in_place = name.endswith("_") and not name.endswith("__") and name not in _NOT_IN_PLACE
        is_out = out is tensor or (isinstance(out, tuple | list) and tensor in out)
        if name in _WRITES or is_in_place or is_out or user.kwargs.get("inplace") is True:
            return True
        shows = name in _SHOWS or (storage_of(user) is not None and storage_of(user) == storage_of(tensor))
        if shows and is_written(user):
            return True
    return False


def operator_name(node: fx.Node) -> str:
    """The name of what ``node`` calls: a method's, or a function's."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def example_of(node: Any) -> torch.Tensor | None:
    """The fake value of a node of Dynamo's graph, if it is a tensor."""
    made = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return made if isinstance(made, torch.Tensor) else None


def storage_of(node: fx.Node) -> int | None:
    """Equal for nodes of Dynamo's graph that show the same memory. None if that is not known."""
    made = example_of(node)
    return storage_key(made.untyped_storage()) if made is not None else None


def is_computed(example: Any) -> bool:
    """Whether an input is a value that another region computed and wants the gradient of."""
    return isinstance(example, torch.Tensor) and example.requires_grad and not example.is_leaf


def _unique(paths: Iterable[str | None]) -> tuple[str | None, ...]:
    """Two models in one graph may have parameters of one path: those of the second get a number in front."""
    seen: Counter[str] = Counter()
    found: list[str | None] = []
    for path in paths:
        if path is not None:
            seen[path] += 1
            path = path if seen[path] == 1 else f"{seen[path] - 1}.{path}"
        found.append(path)
    return tuple(found)


def parameter_path(node: fx.Node, example: Any) -> str | None:
    source = source_name(node)
    if not (_PARAMETER.search(source) or isinstance(example, torch.nn.Parameter)):
        return None
    return clean_path(source)


def source_name(node: fx.Node) -> str:
    """What a placeholder is to Dynamo: an expression in the locals ``L`` and globals ``G`` of the compiled code."""
    source: Any = getattr(node, "_dynamo_source", None)
    if source is None:
        return str(node.target)
    name = source.name
    return str(name() if callable(name) else name)


def clean_path(path: str) -> str:
    """``L['self'].model.layers.0`` or ``L['self'].__dict__['_modules']['model']`` -> ``model.layers.0`` or ``model``. A
    forward that is decorated takes its module as ``L['args'][0]`` (2.15), a bound method as ``L['fn'].__self__``."""
    path = re.sub(r"^(.*\.cell_contents|[LG]\['[^']*'\](\[\d+\])*)(\.__self__)*\.?", "", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    return ".".join(s for s in path.split(".") if s and s not in (*_WRAPPERS, *_CONTAINERS))
