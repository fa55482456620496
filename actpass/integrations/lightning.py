"""For Lightning (``lightning`` or ``pytorch_lightning``)::

from actpass.integrations.lightning import ActpassCallback

module.compile(backend="actcomp", options={...})  # or torch.compile of what the LightningModule holds
Trainer(..., callbacks=[ActpassCallback()]).fit(module, ckpt_path=...)
"""

from __future__ import annotations

import warnings
from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "actpass.integrations.lightning needs Lightning, which can't be imported: pip install lightning"
        ) from error

import actpass
from actpass.errors import ActpassWarning
from actpass.integrations.common import UNKNOWN, as_text, figures_of
from actpass.runtime.progress import log

KEY = "actpass"
"""Of what `actpass.state_dict` returned, in a checkpoint."""


class ActpassCallback(Callback):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
    """Saves actpass' state in every checkpoint (under the key ``actpass``) and restores it on resume, so that the resumed run
    is bitwise the run that was not stopped; prints the report behind the first optimizer step; logs saved bytes and peak.

    The state is restored when the fit starts, behind model and optimizers. print_report: whether the first process prints it.
    The bytes (see `figures_of`) go to the module's loggers once, and to the logger ``actpass``.

    A checkpoint that was saved without this callback gives an `ActpassWarning`: bases and rounding begin anew then.
    """

    def __init__(self, *, print_report: bool = True) -> None:
        self.print_report = print_report
        self._found: Any = None
        self._is_resumed = False
        self._reported = False

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = actpass.state_dict(pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._is_resumed, self._found = True, checkpoint.get(KEY)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        is_resumed, found = self._is_resumed, self._found
        self._is_resumed, self._found = False, None
        if found is not None:
            actpass.load_state_dict(pl_module, found)
        elif is_resumed:
            warnings.warn(f"actpass: {UNKNOWN}", ActpassWarning, stacklevel=2)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self._reported or not trainer.global_step or not trainer.is_global_zero:
            return
        self._reported = True
        report = actpass.report(pl_module)
        if self.print_report:
            print(report)
        if figures := figures_of(report):
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)
            log.info(as_text(figures))
