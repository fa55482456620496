"""Logits that are computed when they are first read.

A region that forms its loss in pieces of rows (`actpass.passes.chunked_loss`) has no logits to return. It returns the hidden
state that they are made of, and what calls it puts a `DeferredLogits` in their place, which holds that state and the way from
it to the logits (head, bias, casts, soft cap, scale). To everything else it is the tensor of logits::

    outputs.logits.detach().float()         # not read yet: casts, copies and aliases are deferred, too
    outputs.logits.argmax(-1)               # read: head and all behind it run once, and the result is kept
    outputs.logits[:, -1] = 0               # read, and written to
    (loss + f(outputs.logits)).backward()   # f's gradient enters the model's backward through the hidden state

Memory: one hidden state while it is not read, the logits from then on. What reads it to differentiate does not keep it: the
backward is where memory is short, and autograd keeps what it needs; another read runs the head again. Time: the head at each
such read, and its backward.

The way's weights are those of the call. An optimizer that steps before the logits are read changes them: each one that still
waits then copies the weights of its way, or is computed where that takes fewer bytes. Any other change in place (loading a
checkpoint) is noticed by torch's version counters, and reading is an error that says what to do. What writes behind their back
(``weight.data.copy_()`` outside of an optimizer) can't be noticed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch
from torch import fx
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from actpass.errors import DeferredError
from actpass.torch_compat import FakeTensor, in_backward, size_hint

aten = torch.ops.aten
Layouts = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
"""The shape and strides of each of some tensors."""
_MOST_SHAPES = 256
"""Of which the way to the logits is known: each takes some 0.3 MB once they are read."""


@dataclass(frozen=True, eq=False)
class TracedWay:
    """From a hidden state and inputs of one shape to logits. shape, strides, dtype: of the logits. differentiated: whether they
    want a gradient. trace_forward, trace_backward: make what is below, when it is first run."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    differentiated: bool
    trace_forward: Callable[[], fx.GraphModule]
    trace_backward: Callable[[], fx.GraphModule]

    @cached_property
    def forward(self) -> fx.GraphModule:
        """``f(hidden, *inputs) -> logits``."""
        return self.trace_forward()

    @cached_property
    def backward(self) -> fx.GraphModule:
        """``g(gradient, hidden, *inputs) -> gradients`` of those that want one, None for the others."""
        return self.trace_backward()


@dataclass(frozen=True, eq=False)
class Way:
    """From a hidden state to logits.

    hidden: which of the compiled graph's results the state is; None if it is one of the inputs. inputs: which of the region's
    inputs are read on the way. at: the way for a state and inputs of these shapes and strides. traced: those of the shapes
    that were met last.
    """

    hidden: int | None
    inputs: tuple[int, ...]
    at: Callable[[Layouts], TracedWay]
    traced: dict[Layouts, TracedWay]

    def of(self, leaves: Sequence[torch.Tensor]) -> TracedWay:
        """The way for the shapes of ``leaves``."""
        layouts = layouts_of(leaves)
        way = self.traced.pop(layouts, None) or self.at(layouts)
        if len(self.traced) >= _MOST_SHAPES:
            del self.traced[next(iter(self.traced))]
        self.traced[layouts] = way  # behind all others: the first is the one that was met longest ago
        return way

    def start(self, results: Sequence[Any], args: Sequence[Any]) -> torch.Tensor:
        """The logits of one call, deferred; of a call with fake tensors as they are."""
        hidden = () if self.hidden is None else (results[self.hidden],)
        leaves = (*hidden, *(args[i] for i in self.inputs))
        way = self.of(leaves)
        if any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return way.forward(*leaves)
        if not way.differentiated:
            return _deferred(way, leaves, len(self.inputs))
        return _Deferred.apply(way, len(self.inputs), *leaves)  # pyright: ignore[reportReturnType]


def layouts_of(tensors: Sequence[torch.Tensor]) -> Layouts:
    """The shapes and strides of ``tensors``, symbolic ones as they were traced."""
    return tuple((tuple(map(size_hint, t.shape)), tuple(map(size_hint, t.stride()))) for t in tensors)


def _deferred(way: TracedWay, leaves: Sequence[torch.Tensor], inputs: int) -> DeferredLogits:
    return DeferredLogits(_Logits(way, leaves, inputs), way.shape, way.strides, way.dtype, leaves[0].device)


def delivering(fn: Callable[..., Any], outputs: Sequence[int | Way]) -> Callable[..., Any]:
    """``fn``, which returns hidden states, as the user's graph, which returns logits. outputs: where each of the user's results
    is among those of ``fn``, or the way to it. What ``fn`` returns beside them stays behind them."""
    own = 1 + max((o for o in outputs if isinstance(o, int)), default=-1)
    own = max([own, *(1 + o.hidden for o in outputs if isinstance(o, Way) and o.hidden is not None)])

    def run(*args: Any) -> Any:
        results = fn(*args)
        found = [results[o] if isinstance(o, int) else o.start(results, args) for o in outputs]
        return (*found, *results[own:])

    return run


def taking_ordinary(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, compiled for ordinary tensors, for arguments that may be deferred logits."""

    def run(*args: Any) -> Any:
        return fn(*(_ordinary(a) if isinstance(a, DeferredLogits) else a for a in args))

    return run


class _Deferred(torch.autograd.Function):
    """The step from a hidden state and weights to logits, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, way: TracedWay, inputs: int, *leaves: torch.Tensor) -> torch.Tensor:
        ctx.way = way
        ctx.save_for_backward(*leaves)
        return _deferred(way, leaves, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        way, gradient = ctx.way, gradients[0]
        with _as_traced(gradient.device):
            return None, None, *way.backward(_laid_out(gradient, way.strides), *ctx.saved_tensors)


def _laid_out(x: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


@contextmanager
def _as_traced(device: torch.device) -> Generator[None, None, None]:
    """Run a traced graph: its casts are its own, and what it makes may be saved for a backward."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class _Value:
    """A tensor that is computed when it is first asked for. All that show the same memory share one. copies: of it, not
    computed yet."""

    def __init__(self) -> None:
        self.made: torch.Tensor | None = None
        self.copies: WeakSet[_After] = WeakSet()

    def compute(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        raise NotImplementedError

    def get(self) -> torch.Tensor:
        """The tensor, kept from now on."""
        if self.made is None:
            self.keep(self.compute())
        return self.made  # pyright: ignore[reportReturnType]

    def keep(self, made: torch.Tensor) -> None:
        self.made = made

    def show(self) -> torch.Tensor:
        """The tensor, to whoever may write to it: its copies are computed first, of what it is now."""
        made = self.get()
        for other in list(self.copies):
            other.get()
        return made


class _Logits(_Value):
    """Those of one call. leaves: what they are computed from, the hidden state first, of which the last ``inputs`` are the
    region's."""

    def __init__(self, way: TracedWay, leaves: Sequence[torch.Tensor], inputs: int) -> None:
        super().__init__()
        self.way, self.inputs, self.leaves = way, inputs, [leaf.detach() for leaf in leaves]
        self.versions = [leaf._version for leaf in self.leaves]
        self.is_settled = False
        _start()
        _waiting.add(self)

    def compute(self) -> torch.Tensor:
        self._check()
        with _as_traced(self.leaves[0].device):
            return _laid_out(self.way.forward(*self.leaves), self.way.strides)

    def _check(self) -> None:
        for leaf, version in zip(self.leaves, self.versions, strict=True):
            freed = leaf.numel() > 0 and leaf.untyped_storage().nbytes() == 0
            if freed or leaf._version != version:
                raise DeferredError(
                    f"logits of {self.way.shape} were not read while they could be computed: a tensor of {tuple(leaf.shape)} "
                    f"that they are made of was {'freed' if freed else 'changed in place'} since the forward. Read them before "
                    'that (logits.detach() + 0, say), or let the forward compute them: options={"defer_logits": False}.'
                )

    def settle(self, copies: dict[Any, torch.Tensor]) -> None:
        """An optimizer is about to step: keep what it may change, or the logits, whichever takes less. copies: those made for
        others before this step."""
        if self.is_settled or self.made is not None:
            return
        own = len(self.leaves) - self.inputs
        if sum(leaf.nbytes for leaf in self.leaves[own:]) >= math.prod(self.way.shape) * self.way.dtype.itemsize:
            self.get()
            return
        self._check()
        for i, leaf in enumerate(self.leaves[own:], own):
            key = (leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype)
            if key not in copies:
                copies[key] = leaf.clone()
            self.leaves[i], self.versions[i] = copies[key], copies[key]._version
        self.is_settled = True


class _After(_Value):
    """What an operator that is deferred, too, makes of another value."""

    def __init__(self, before: _Value, operator: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.before: _Value | None = before
        self.operator = operator
        before.copies.add(self)

    def compute(self) -> torch.Tensor:
        before = self.before
        assert before is not None
        made: Any = before.made if before.made is not None else before.compute()
        with torch.inference_mode(False), torch.no_grad():
            return self.operator(made)

    def keep(self, made: torch.Tensor) -> None:
        super().keep(made)
        if self.before is not None:
            self.before.copies.discard(self)
        self.before = None


class DeferredLogits(torch.Tensor):
    """Logits that are computed when they are first read, by whatever reads them, and kept then.

    Shape, strides, dtype, device and gradient are those of the tensor that it stands for. Aliases (``detach``), copies and
    casts of one that was not read are not read either; ``.numpy()``, printing, pickling and copies of the object read it and
    work on an ordinary tensor. Raises `DeferredError` if it is read when what it is made of has changed.
    """

    _of: _Value

    @staticmethod
    def __new__(
        cls: type[DeferredLogits],
        of: _Value,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> DeferredLogits:
        made: Any = torch.Tensor._make_wrapper_subclass
        tensor = made(cls, tuple(shape), strides=tuple(strides), dtype=dtype, device=device)
        tensor._of = of
        return tensor

    def __init__(self, *_: Any, **__: Any) -> None: ...

    @property
    def is_read(self) -> bool:
        """Whether it was computed and kept."""
        return self._of.made is not None

    @property
    def read(self) -> torch.Tensor:
        """What it stands for, without its history: an ordinary tensor that shares this one's memory."""
        return self._of.show()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ALIASES:
            return args[0]._showing(args[0]._of)
        if func in _COPIES and not args[0].is_read and kwargs.get("memory_format") in (None, torch.preserve_format):
            x: DeferredLogits = args[0]
            after = _After(x._of, lambda made: func(made, *args[1:], **kwargs))
            return x._showing(after, kwargs.get("dtype"), kwargs.get("device"))
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, DeferredLogits)]
        for x in given if _shows_or_writes(func) else ():
            x._of.show()
        values = {id(x._of): x._of.made if x._of.made is not None else x._of.compute() for x in given}
        args, kwargs = pytree.tree_map_only(DeferredLogits, lambda x: values[id(x._of)], (args, kwargs))
        result = func(*args, **kwargs)
        for x in given if not _is_differentiated(given, result) else ():
            if x._of.made is None:
                x._of.keep(values[id(x._of)])
        same = {id(values[id(x._of)]): x for x in given}  # what is written in place is returned
        return pytree.tree_map_only(torch.Tensor, lambda made: same.get(id(made), made), result)

    def _showing(self, of: _Value, dtype: torch.dtype | None = None, device: torch.device | None = None) -> DeferredLogits:
        return DeferredLogits(of, self.shape, self.stride(), dtype or self.dtype, device or self.device)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """How Dynamo takes it into a compiled function: read, as an ordinary tensor."""
        return ["read"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, torch.Tensor], _: Any, shape: Any, strides: Any) -> DeferredLogits:
        made, value = inner["read"], _Value()
        value.made = made
        return DeferredLogits(value, made.shape, made.stride(), made.dtype, made.device)

    def _stable_hash_for_caching(self) -> str:
        return f"{type(self).__module__}.{type(self).__name__}"

    def __repr__(self, **given: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return repr(_ordinary(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        read: Any = self.read.detach().requires_grad_(self.requires_grad)
        return read.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(_ordinary(self), memo)


_ALIASES = (aten.detach.default, aten.alias.default)
_COPIES = (aten._to_copy.default, aten.clone.default)


def _shows_or_writes(func: Any) -> bool:
    """Whether an operator returns memory that it is given, or writes to it."""
    schema = func._schema
    return any(a.alias_info is not None for a in (*schema.arguments, *schema.returns))


def _is_differentiated(given: Sequence[torch.Tensor], result: Any) -> bool:
    """Whether an operator runs in a backward, or autograd records it."""
    if in_backward():
        return True
    differentiable = any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in pytree.tree_leaves(result))
    return differentiable and torch.is_grad_enabled() and any(x.requires_grad for x in given)


def _ordinary(x: torch.Tensor) -> torch.Tensor:
    """A view of ``x`` that is no `DeferredLogits`."""
    return x.view(x.shape)


def _reads_memory(name: str) -> Callable[..., Any]:
    def method(self: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
        return getattr(_ordinary(self), name)(*args, **kwargs)

    return method


for _name in ("numpy", "tolist", "data_ptr", "__array__", "__dlpack__", "share_memory_"):
    setattr(DeferredLogits, _name, _reads_memory(_name))


_waiting: WeakSet[_Logits] = WeakSet()
"""Those that may still be read."""
_hook: Any = None


def _start() -> None:
    """Look after deferred logits whenever a torch optimizer is about to step (once a process)."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before_step)


def _before_step(*_: Any) -> None:
    if torch.compiler.is_compiling():
        return  # a compiled step is noticed by the version counters
    copies: dict[Any, torch.Tensor] = {}
    for logits in list(_waiting):
        logits.settle(copies)
