"""What runs the training step: the module as it is, Inductor, or actpass (only here)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from . import UsageError

BACKENDS = ("eager", "inductor", "actcomp")
POLICIES = ("auto", "exact")
CODECS = ("int16", "int8", "int4", "int2", "float8_e4m3", "float8_e5m2")
PROJECTIONS = ("gaussian", "rademacher", "sparse", "haar", "srht", "pca", "prac", "oasis", "sampled")


@dataclass(frozen=True, slots=True)
class Backend:
    """`options` are actcomp's; `inductor_budget` is Inductor's `activation_memory_budget`."""

    name: str
    inductor_budget: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compresses(self) -> bool:
        return self.name == "actcomp"

    def compile(self, module: nn.Module) -> nn.Module:
        """What to call instead of `module` to train it from step 0, whatever this process trained before."""
        if self.name == "eager":
            return module
        torch.compiler.reset()
        if self.name == "inductor":
            return cast(nn.Module, torch.compile(module, dynamic=False))
        import actpass

        actpass.show_progress()  # the first step takes minutes
        self.load_state_dict(module, self.state_dict(module) | {"steps": 0, "calls": 0})
        options = dict(self.options)
        return cast(nn.Module, torch.compile(module, backend="actcomp", options=options, dynamic=False))

    @contextmanager
    def configured(self) -> Iterator[None]:
        """To be entered around training: compilers read their settings at the first step."""
        with self._inductor_budget():
            try:
                yield
            except Exception as error:
                cause = getattr(error, "inner_exception", error)  # Dynamo wraps a backend's errors
                if self.compresses and _is_option_error(cause):
                    raise UsageError(str(cause)) from error
                raise

    def _inductor_budget(self) -> AbstractContextManager[object]:
        if self.inductor_budget is None:
            return nullcontext()
        import torch._functorch.config as functorch_config

        return functorch_config.patch(activation_memory_budget=self.inductor_budget)

    def report(self, forward: nn.Module) -> Any:
        """What is saved for backward, in which form and why; None for the other backends."""
        if not self.compresses:
            return None
        import actpass

        return actpass.report(forward)

    def state_dict(self, forward: nn.Module) -> dict[str, Any]:
        """What a checkpoint keeps of the compression: its clock and seeds."""
        if not self.compresses:
            return {}
        import actpass

        return actpass.state_dict(forward)

    def load_state_dict(self, forward: nn.Module, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        if self.compresses:
            import actpass

            actpass.load_state_dict(forward, state)


def _is_option_error(error: BaseException) -> bool:
    import actpass

    return isinstance(error, actpass.OptionError | actpass.BudgetError)


def parse_override(text: str) -> tuple[str, str | dict[str, Any]]:
    """`lm_head=save`, `*.mlp=haar`, or `*.mlp={"projection": "haar", "rank": 64}`."""
    pattern, equals, form = text.partition("=")
    if not (pattern and equals and form):
        raise UsageError(f"--override {text!r} is not PATTERN=FORM, e.g. lm_head=save")
    if not form.startswith("{"):
        return pattern, form
    try:
        return pattern, json.loads(form)
    except json.JSONDecodeError as error:
        raise UsageError(f"--override {text!r}: {form!r} is not JSON: {error}") from error
