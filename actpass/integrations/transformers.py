"""For the Trainer of Hugging Face transformers (and those of TRL, which are built on it)::

from actpass.integrations.transformers import ActpassCallback

model.compile(backend="actcomp", options={...})
Trainer(model=model, ..., callbacks=[ActpassCallback()]).train(resume_from_checkpoint=...)
"""

from __future__ import annotations

import os
import secrets
import warnings
from typing import Any, cast

import torch

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(
        "actpass.integrations.transformers needs Hugging Face transformers, which can't be imported: pip install transformers "
        "accelerate"
    ) from error

import actpass
from actpass.errors import ActpassWarning, StateError
from actpass.integrations.common import UNKNOWN, as_text, figures_of
from actpass.runtime.progress import log

FILE = "actpass.pt"
"""What `actpass.state_dict` returned, beside the other files of a checkpoint."""


class ActpassCallback(TrainerCallback, ExportableState):
    """Saves actpass' state with every checkpoint and restores it on resume, so that the resumed run is bitwise the run that was
    not stopped; prints the report behind the first optimizer step; logs saved bytes and peak.

    The state is the file ``actpass.pt`` in each checkpoint's folder. On resume, when Trainer has loaded model and optimizer, it
    is looked for in ``checkpoint`` (if it is given), in ``TrainingArguments.resume_from_checkpoint``, where it was saved, and
    in ``output_dir/checkpoint-N``; that it is the checkpoint's own is checked. print_report: whether the first process prints
    the report.

    The bytes (see `figures_of`) are the first entry of ``trainer.state.log_history`` behind the first step, and so stand in
    ``trainer_state.json``, and a line of the logger ``actpass``.

    Raises `StateError` on resume if the file of the checkpoint is nowhere. A checkpoint that was saved without this callback
    gives an `ActpassWarning`: bases and rounding begin anew then.
    """

    def __init__(self, *, print_report: bool = True, checkpoint: str | os.PathLike[str] | None = None) -> None:
        self.print_report = print_report
        self.checkpoint = None if checkpoint is None else os.fspath(checkpoint)
        self.number = ""
        self._folder = ""
        self._reported = False

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``, when a checkpoint is all but complete: which file belongs to it, and where it will be."""
        self.number = secrets.token_hex(8)
        arguments = {"print_report": self.print_report, "checkpoint": self.checkpoint}
        return {"args": arguments, "attributes": {"number": self.number}, "folder": self._folder}

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._folder = _checkpoint(args, state.global_step + 1)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = _checkpoint(args, state.global_step)
        if not cast(Any, args).should_save:
            return
        if not os.path.isdir(folder):
            warnings.warn(f"actpass: no state is saved, for there is no {folder}", ActpassWarning, stacklevel=2)
            return
        torch.save({"number": self.number, "state": actpass.state_dict(kwargs["model"])}, os.path.join(folder, FILE))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        known = cast(dict[str, Any], state.stateful_callbacks)
        mine = known.get(type(self).__name__)
        known.setdefault(type(self).__name__, self.state())  # Trainer writes to it at each checkpoint
        if state.global_step == 0:
            return
        if mine is None and self.checkpoint is None:
            warnings.warn(f"actpass: {UNKNOWN}", ActpassWarning, stacklevel=2)
            return
        saved: dict[str, Any] = cast(list[Any], mine)[0] if isinstance(mine, list) else mine or {}
        here = _checkpoint(args, state.global_step)
        folders: list[Any] = [self.checkpoint, args.resume_from_checkpoint, saved.get("folder"), here]
        number = saved.get("attributes", {}).get("number")
        actpass.load_state_dict(kwargs["model"], _load([f for f in folders if isinstance(f, str) and f], number))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._reported or not state.is_world_process_zero:
            return
        self._reported = True
        report = actpass.report(kwargs["model"])
        if self.print_report:
            print(report)
        if figures := figures_of(report):
            state.log_history.append({**figures, "step": state.global_step})
            log.info(as_text(figures))


def _checkpoint(args: TrainingArguments, step: int) -> str:
    return os.path.abspath(os.path.join(args.output_dir or "", f"{PREFIX_CHECKPOINT_DIR}-{step}"))


def _load(folders: list[str], number: str | None) -> dict[str, Any]:
    """The state with that number (None: any), from the first of ``folders`` that has it."""
    for folder in folders:
        path = os.path.join(folder, FILE)
        if os.path.isfile(path):
            found = torch.load(path, map_location="cpu", weights_only=True)
            if number in (None, found["number"]):
                return found["state"]
    raise StateError(
        f"the checkpoint was saved with ActpassCallback, but its {FILE} is in none of {', '.join(dict.fromkeys(folders))}. "
        "Give its folder: ActpassCallback(checkpoint=...)."
    )
