"""What a region takes in eager mode, without running it: Dynamo's graph goes forward and backward on fake tensors, under a
mode that sees every operator and knows which storages are alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from actpass.errors import GraphUnsupported
from actpass.ir.copying import copy_module
from actpass.ir.graph_inputs import is_computed
from actpass.memory.memory_curve import Curve, thin
from actpass.reporting import Record
from actpass.torch_compat import (
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    checkpointed,
    size_hint,
    storage_key,
    tag_activation_checkpoint,
)


def run_eager(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Curve:
    """The live bytes of ``gm`` if eager mode ran it, parameters, buffers and inputs excluded. Of ``example_inputs`` only shapes
    are read. A scalar that is returned is taken for the loss; if there is none, all that is returned gets a gradient.

    It takes some tenths of a millisecond an operator and allocates nothing. It is to the byte what is measured when the model
    itself runs, unless its code goes another way when it is traced (in transformers a causal mask is then a tensor, and keys
    are repeated for several queries: 2 to 5 % more on small models) or its local variables keep a tensor behind its last use.
    Raises `GraphUnsupported` for what eager mode would run in another way than the graph does, and where the graph does not
    run on fake tensors (an operator without a fake implementation).
    """
    gm = _as_eager_runs_it(gm)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.enable_grad():
        traced = [n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")]
        leaves = [_fake(e, like) for e, like in zip(example_inputs, traced, strict=True)]
        # what another region computed is no leaf, and may be written to
        inputs = [i.clone() if is_computed(e) else i for i, e in zip(leaves, example_inputs, strict=True)]
    live = _LiveBytes([*leaves, *inputs])
    with ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(live)
        outputs = pytree.tree_leaves(_run(gm.forward, *inputs))
        forward, held = live.take(), live.level
        starts = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
        scalars = [o for o in starts if o.dim() == 0]
        if not starts:
            raise GraphUnsupported("nothing that it returns has a gradient")
        starts = scalars or starts
        tangents = sum(map(_nbytes, starts))
        _run(_run(_Root.apply, *starts).backward)
        backward = live.take()
        del outputs, starts, scalars
    passed = sum(_nbytes(i.grad) for i, e in zip(leaves, example_inputs, strict=True) if is_computed(e) and i.grad is not None)
    return Curve(thin(forward), thin(backward), held, live.level - passed, passed, tangents)


def _run(function: Callable[..., Any], *args: Any) -> Any:
    """Call what runs the user's operators: whatever they raise is no bug of ours."""
    try:
        return function(*args)
    except Exception as error:
        raise GraphUnsupported(f"{type(error).__name__}: {error}") from error


def _nbytes(tensor: torch.Tensor) -> int:
    return size_hint(tensor.numel()) * tensor.element_size()


def with_eager_curve(record: Record, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Record:
    """``record`` with eager mode's curve; a note in its place where there is none."""
    if record.curves is None:
        return record
    try:
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):  # not those of a checkpoint around the region
            return replace(record, curves=replace(record.curves, eager=run_eager(gm, example_inputs)))
    except GraphUnsupported as error:
        return replace(record, notes=(*record.notes, f"what eager mode takes is not known: {error}"))


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


class _Root(torch.autograd.Function):
    """A loss of which each argument's gradient is one; made in the backward, so that nobody else holds it."""

    @staticmethod
    def forward(ctx: Any, *outputs: torch.Tensor) -> torch.Tensor:
        ctx.like = [(tuple(o.shape), o.dtype, o.device) for o in outputs]
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return tuple(torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive, after every operator. resident: what is not
    counted."""

    def __init__(self, resident: Sequence[Any]) -> None:
        cast(Any, super()).__init__()
        self.level = 0
        self._levels: list[int] = []
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._resident = [t.untyped_storage() for t in resident if isinstance(t, torch.Tensor)]
        self._never = {storage_key(s) for s in self._resident}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # autograd asks each tensor for its device: nothing runs
            return result
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, FakeTensor):  # what is real is a constant of the graph
                self._note(leaf.untyped_storage())
        self._levels.append(self.level)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage_key(storage), storage.nbytes()
        if key in self._alive or key in self._never:
            return
        self._alive[key] = weakref.ref(storage, lambda _: self._forget(key)), nbytes
        self.level += nbytes

    def _forget(self, key: int) -> None:
        self.level -= self._alive.pop(key)[1]

    def take(self) -> list[int]:
        """The levels since the last call."""
        levels, self._levels = self._levels, []
        return levels


def _fake(example: Any, traced: Any) -> Any:
    """A fresh leaf like ``example``, in the fake mode that is on. traced: what stood for it, whose sizes may be symbolic."""
    if not isinstance(example, torch.Tensor):
        return size_hint(example) if isinstance(example, torch.SymInt) else example
    if type(example) not in (torch.Tensor, torch.nn.Parameter, FakeTensor):
        raise GraphUnsupported(f"an input is a {type(example).__name__}, a tensor of a kind of its own")
    sizes = traced if isinstance(traced, torch.Tensor) else example
    shape, strides = ([size_hint(n) for n in of] for of in (sizes.shape, sizes.stride()))
    new = torch.empty_strided(shape, strides, dtype=example.dtype, device=example.device)
    return new.requires_grad_(example.requires_grad)


def _as_eager_runs_it(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` with activation checkpoints that are run as such: called as it is, the operator only tags."""
    functions = [n for n in gm.graph.nodes if isinstance(n.target, HigherOrderOperator)]
    if not functions:
        return gm
    clone, mapping = copy_module(gm)
    for node in functions:
        if node.target is not tag_activation_checkpoint or "_checkpoint_context_fn" in node.meta:
            raise GraphUnsupported(f"the operator {node.target} takes functions")
        mapping[node].target = _checkpoint
    clone.recompile()
    return clone


def _checkpoint(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
    return checkpointed(function, *args)
