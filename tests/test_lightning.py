"""The callback for Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import actpass
from actpass.runtime.step_counter import STEP_COUNTER

from .helpers import Grads, assert_equal

lightning = pytest.importorskip("lightning.pytorch")
from actpass.integrations.lightning import ActpassCallback  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("no_codegen"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]

OPTIONS = {
    "haar": {"projection": "haar", "rank": 8, "skip_unprofitable": False},
    "pca": {"projection": "pca", "rank": 8, "skip_unprofitable": False, "refresh_interval": 1},
}


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layers(x) - x).square().mean()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Logger(lightning.loggers.logger.DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[dict[str, Any], int]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:  # type: ignore[override]
        self.logged.append((metrics, step))


def fit(options: dict[str, Any], callbacks: list[Any], path: Path | None = None, **more: Any) -> Any:
    """Two epochs of four steps, as in a process of its own."""
    torch.compiler.reset()
    STEP_COUNTER.steps, STEP_COUNTER.calls = 0, 0
    torch.manual_seed(0)
    module = Module()
    module.compile(backend="actcomp", options=options)
    batches = DataLoader(TensorDataset(torch.randn(64, 24, generator=torch.Generator().manual_seed(1))), batch_size=16)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False,
        **{"logger": False, **more},
    )  # fmt: skip
    trainer.fit(module, batches, ckpt_path=None if path is None else str(path))
    return trainer


def weights(trainer: Any) -> Grads:
    return {n: p.detach().clone() for n, p in trainer.lightning_module.named_parameters()}


def each_epoch(folder: Path) -> Any:
    return lightning.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(name: str, tmp_path: Path):
    ours = ActpassCallback(print_report=False)
    whole = weights(fit(OPTIONS[name], [ours, each_epoch(tmp_path)]))
    assert STEP_COUNTER.steps == 8
    resumed = weights(fit(OPTIONS[name], [ours], tmp_path / "epoch=0.ckpt", enable_checkpointing=False))
    assert STEP_COUNTER.steps == 8
    assert_equal(resumed, whole)


def test_a_checkpoint_without_the_state_is_told_so(tmp_path: Path):
    fit(OPTIONS["haar"], [each_epoch(tmp_path)])
    with pytest.warns(actpass.ActpassWarning, match="the checkpoint was saved without ActpassCallback"):
        fit(OPTIONS["haar"], [ActpassCallback(print_report=False), each_epoch(tmp_path)], tmp_path / "epoch=0.ckpt")


def test_the_report_is_printed_once_and_the_bytes_are_logged(capsys: pytest.CaptureFixture[str]):
    logger = Logger()
    trainer = fit({}, [ActpassCallback()], logger=logger, enable_checkpointing=False)
    assert capsys.readouterr().out.count("actpass: active, policy='auto'") == 1
    report = actpass.report(trainer.lightning_module)
    (logged,) = [(m, step) for m, step in logger.logged if "actpass_saved_bytes" in m]
    assert logged == ({"actpass_saved_bytes": report.saved_bytes, "actpass_predicted_peak_bytes": report.totals.peak_bytes}, 1)
