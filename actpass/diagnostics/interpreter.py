"""Running a model through the pass without generating code, for what asks questions and does not train: `explain`, `audit`."""

from __future__ import annotations

import types
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from actpass.errors import ActpassError
from actpass.torch_compat import BackendCompilerFailed, forked_rng


def interpret(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[[list[Any]], Any]:
    """An inner compiler that generates no code: runs the partitioned graph node by node. Boxed: it empties its argument
    list, as Inductor's code does."""

    def run(args: list[Any]) -> Any:
        return fx.Interpreter(gm).boxed_run(args)

    run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
    return run


@contextmanager
def preserve_buffers_and_rng(model: torch.nn.Module) -> Generator[None, None, None]:
    """Put buffers (running statistics) and random state back as they were."""
    before = {name: b.detach().clone() for name, b in model.named_buffers()}
    with forked_rng():
        yield
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in before:
                buffer.copy_(before[name])


@contextmanager
def own_gradients(model: torch.nn.Module) -> Generator[None, None, None]:
    """Start without gradients, and put those back that were there."""
    before = {p: p.grad for p in model.parameters()}
    for p in before:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in before.items():
            p.grad = gradient


@contextmanager
def own_errors() -> Generator[None, None, None]:
    """Errors of this package as they were raised, and not inside Dynamo's, which becomes the cause of one that has none."""
    try:
        yield
    except BackendCompilerFailed as failed:
        inner = failed.inner_exception
        if not isinstance(inner, ActpassError):
            raise
        raise inner from inner.__cause__ or failed


def isolated_forward(model: torch.nn.Module) -> Callable[..., Any]:
    """``model.forward`` with a code object of its own. Dynamo keeps what it compiled with the code, and after 8 compilations of
    one code it silently runs it in eager mode: traced through this, nothing is left behind on the user's."""
    forward = model.forward
    function = getattr(forward, "__func__", None)
    if not isinstance(function, types.FunctionType):
        return forward
    code, defaults, closure = function.__code__.replace(), function.__defaults__, function.__closure__
    copy = types.FunctionType(code, function.__globals__, function.__name__, defaults, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return types.MethodType(copy, model)
