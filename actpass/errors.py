"""The exceptions of actpass. Every message says what failed, the value, what is allowed, and what to do."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent


class ActpassError(Exception):
    """Base of every error that actpass raises."""


class OptionError(ActpassError, ValueError):
    """A value in ``options=`` is not usable."""


class BudgetError(ActpassError, ValueError):
    """A memory budget is malformed or can't be met. least: the least that can, in the unit that was asked for (a fraction, or
    bytes of peak), where it is known."""

    def __init__(self, message: str, least: float | int | None = None) -> None:
        super().__init__(message)
        self.least = least


class RegistryError(ActpassError, KeyError):
    """A codec, projection, policy or optimizer has an unknown name, or one that is taken."""

    __str__ = Exception.__str__  # and not KeyError's, which quotes the message


class PluginError(ActpassError, ImportError):
    """Another package's codec, projection, policy or optimizer can't be loaded."""


class PlanError(ActpassError, ValueError):
    """A plan is malformed, the graph does not allow it, or ranks have different ones."""


class StateError(ActpassError, ValueError):
    """A state dict does not fit."""


class ReportError(ActpassError, LookupError):
    """There is no compiled region to report on."""


class PictureError(ActpassError):
    """A picture can't be drawn: matplotlib is missing, or the file's name says no kind of picture."""


class InternalError(ActpassError, RuntimeError):
    """A bug of actpass: the pass failed on a graph in a way that it does not foresee. The cause is chained. The message says
    what to report, and how to train on without the pass."""

    @classmethod
    def of(cls, cause: Exception) -> InternalError:
        """The error for a ``cause`` that was raised in this package."""
        import torch  # not at the top: `actpass.plan` runs without it

        frames = [f for f in traceback.extract_tb(cause.__traceback__) if Path(f.filename).is_relative_to(_PACKAGE)]
        at = f" at actpass/{Path(frames[-1].filename).relative_to(_PACKAGE).as_posix()}:{frames[-1].lineno}" if frames else ""
        return cls(
            f"the pass failed on a region: {type(cause).__name__}: {cause}{at}. This is a bug of actpass, not of the model. "
            f"Please report it: this message with its traceback, torch {torch.__version__}, the options and a model that shows "
            "it. To train on meanwhile, give options={'fallback': 'warn'}: such a region is left to Inductor, with a warning, "
            "and takes the memory that it takes without actpass."
        )


class GraphUnsupported(ActpassError):
    """The pass can't read or rewrite this graph. Caught by the pipeline: the region falls back to Inductor's own cut
    and the report carries the message. Users never see it raised."""


class LogitsReturned(ActpassError):
    """The loss of a graph whose logits would be deferred can't be formed in pieces. Caught by the backend, which compiles the
    region with its logits whole; the report carries the message. Users never see it raised."""


class SubspacesDiffer(ActpassError):
    """A region projects onto other subspaces than it was given. Caught by the backend, which compiles it again with those that
    ``plan`` asks for. Users never see it raised."""

    def __init__(self, given: int, plan: Mapping[str, Any]) -> None:
        super().__init__(f"{given} subspaces were given to a region that asks for others beside them")
        self.plan = plan


class DeferredError(ActpassError, RuntimeError):
    """Deferred logits are read when they can't be computed any more."""


class ActpassWarning(UserWarning):
    """A region was left to Inductor, or the torch version is untested."""
