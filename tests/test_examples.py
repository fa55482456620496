"""The examples as programs, on tiny models, a few steps."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ["--hidden-size", "16", "--intermediate-size", "24", "--layers", "1", "--heads", "2"]
SHORT = [
    "--steps",
    "4",
    "--batch-size",
    "8",
    "--seq-len",
    "16",
    "--device",
    "cpu",
    "--nondeterministic",
    "--eval-every",
    "0",
    "--lr",
    "0.01",
]
LOW_RANK = ["--projection", "haar", "--rank", "4", "--weight-gradient-format", "low_rank", "--optimizer", "oasis",
            "--refresh-interval", "20"]  # fmt: skip

Finetune = Callable[..., dict[str, Any]]


def example(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Finetune:
    """The program of that name, to be run with arguments; it returns what it measured."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(*arguments: str) -> dict[str, Any]:
        metrics = tmp_path / "metrics.json"
        script = str(EXAMPLES / name)
        monkeypatch.setattr(sys, "argv", [script, *SHORT, *arguments, "--metrics", str(metrics)])
        runpy.run_path(script, run_name="__main__")
        return json.loads(metrics.read_text())

    return run


@pytest.fixture
def finetune(no_codegen: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Finetune:
    return example("finetune_classifier.py", monkeypatch, tmp_path)


@pytest.fixture
def finetune_lora(no_codegen: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Finetune:
    return example("finetune_lora.py", monkeypatch, tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A label that the first word tells."""
    lines = [f"{('good', 'bad')[i % 2]} film number {i}\t{1 - i % 2}" for i in range(400)]
    path = tmp_path / "data.tsv"
    path.write_text("\n".join(["sentence\tlabel", *lines, ""]))
    return str(path)


def test_finetuning_learns_in_the_subspace(finetune: Finetune, data: str):
    found = finetune(*TINY, *LOW_RANK, "--data", data, "--steps", "40")
    assert found["accuracy"] == 1.0
    assert found["report"]["regions"][0]["active"]
    assert found["final_train_loss"] < found["train_loss"][0]


def test_the_default_task_is_there_and_balanced(finetune: Finetune, capsys: pytest.CaptureFixture[str]):
    found = finetune(*TINY, "--backend", "eager")
    assert 0 < found["accuracy"] < 1
    assert "(50." in capsys.readouterr().out


def test_a_seed_among_several_is_the_seed_alone(finetune: Finetune, data: str):
    several = finetune(*TINY, *LOW_RANK, "--data", data, "--seeds", "1", "2")
    alone = finetune(*TINY, *LOW_RANK, "--data", data, "--seed", "2")
    first, second = several["runs"]
    assert second["seed"] == 2
    assert all(second[name] == alone[name] for name in ("accuracy", "final_train_loss", "held_out_loss"))
    assert first["final_train_loss"] != second["final_train_loss"]


@pytest.mark.architectures
def test_a_checkpoint_brings_weights_and_tokenizer(finetune: Finetune, data: str, tmp_path: Path):
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path / "tiny-bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "number"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(5)
    sizes: dict[str, Any] = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 24}
    model = BertModel(BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(folder)

    found = finetune("--checkpoint", str(folder), "--data", data)
    assert found["settings"]["tokenizer"] == str(folder)
    from common.models import load_classifier  # pyright: ignore[reportMissingImports]: on the path by the fixture

    loaded = load_classifier(str(folder), 16, len(words), labels=3, dropout=0.0)
    assert torch.equal(loaded.model.bert.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)
    assert loaded.model.classifier.out_features == 3


@pytest.mark.architectures
@pytest.mark.parametrize("model", ["bert-mini", "roberta-base"])  # one has a pooler, the other's head has two layers
def test_a_classifier_trains_adapters_on_all_linear_layers_and_its_head(finetune: Finetune, model: str):
    from common.sentences import ByteRows  # pyright: ignore[reportMissingImports]: on the path by the fixture

    names = runpy.run_path(str(EXAMPLES / "finetune_classifier.py"))

    def load(**more: Any) -> torch.nn.Module:
        settings = names["FinetuneSettings"](model=model, hidden_size=16, intermediate_size=24, layers=1, heads=2, **more)
        return names["load_module"](names["complete_here"](settings), ByteRows(), 2).model

    plain = load()
    linear = {name for name, layer in plain.named_modules() if isinstance(layer, torch.nn.Linear) and "classifier" not in name}
    trained = [name for name, parameter in load(lora_rank=4).named_parameters() if parameter.requires_grad]
    adapted = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trained if ".lora_" in name}
    assert adapted == linear
    assert {name.removeprefix("base_model.model.") for name in trained if ".lora_" not in name} == {
        f"classifier.modules_to_save.default.{name}" for name, _ in plain.classifier.named_parameters()
    }


@pytest.mark.architectures
def test_a_classifier_with_adapters_learns_as_in_eager_mode_in_fewer_bytes(finetune: Finetune, data: str):
    wide = ["--hidden-size", "64", "--intermediate-size", "128", "--layers", "2", "--heads", "2"]
    arguments = [*wide, "--data", data, "--steps", "20", "--lora-rank", "4"]
    ours = finetune(*arguments)
    eager = finetune(*arguments, "--backend", "eager")
    assert ours["report"]["regions"][0]["active"]
    assert ours["accuracy"] == eager["accuracy"] == 1.0
    assert ours["final_train_loss"] == pytest.approx(eager["final_train_loss"], rel=5e-3)
    assert ours["saved_bytes"] < 0.5 * eager["saved_bytes"]


@pytest.mark.parametrize("option", ["--lora-dropout", "--lora-alpha"])
def test_options_of_adapters_need_a_rank(finetune: Finetune, capsys: pytest.CaptureFixture[str], option: str):
    with pytest.raises(SystemExit):
        finetune(*TINY, option, "0.5")
    assert "go with --lora-rank" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "line", "allowed"),
    [
        ("sentence\tlabel\ngood\t1\nno label\n", 3, "one tab and a label, an integer from 0 to 999"),
        ("sentence\tlabel\ngood\t-1\n", 2, "one tab and a label, an integer from 0 to 999"),
        ("sentence\tlabel\n\t1\n", 2, "a sentence, one tab"),
        ("sentence\tlabel\ngood\tfilm\t1\n", 2, "one tab"),
        ("text\tlabel\ngood\t1\n", 1, r"the header 'sentence\tlabel'"),
    ],
)
def test_a_malformed_line_is_named(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, line: int, allowed: str
):
    path = tmp_path / "bad.tsv"
    path.write_text(text)
    with pytest.raises(SystemExit):
        finetune(*TINY, "--data", str(path))
    message = capsys.readouterr().err
    assert f"{path}, line {line}: " in message
    assert allowed in message


def test_the_rows_of_a_comparison_are_commands(finetune: Finetune, data: str):
    """With a low-rank optimizer the others still step with AdamW."""
    from common.job import comparison_rows  # pyright: ignore[reportMissingImports]: on the path by the fixture

    names = runpy.run_path(str(EXAMPLES / "finetune_classifier.py"))
    settings = names["FinetuneSettings"](
        projection="haar", rank=4, weight_gradient_format="low_rank", optimizer="oasis", data=data, seeds=(0, 1), compare=True,
        hidden_size=16, intermediate_size=24, layers=1, heads=2,
    )  # fmt: skip
    rows = {row.label: row.arguments for row in comparison_rows(settings)}
    assert len(rows) == 6
    assert finetune(*rows["eager"])["settings"]["optimizer"] == "adamw"
    found = finetune(*rows["actcomp haar 4"])
    assert found["settings"]["optimizer"] == "oasis"
    assert [run["seed"] for run in found["runs"]] == [0, 1]


@pytest.fixture
def tiny_llama(tmp_path: Path) -> str:
    """A config that takes bytes."""
    fields = {"model_type": "llama", "vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(fields))
    return str(path)


@pytest.mark.architectures
@pytest.mark.parametrize("more", [[], ["--quantize", "nf4"], ["--checkpointing"]], ids=" ".join)
def test_adapters_learn_as_in_eager_mode_in_fewer_bytes(finetune_lora: Finetune, tiny_llama: str, more: list[str]):
    arguments = ["--model", tiny_llama, "--max-data-bytes", "200000", "--lora-rank", "4", "--steps", "12", *more]
    ours = finetune_lora(*arguments)
    eager = finetune_lora(*arguments, "--backend", "eager")
    assert ours["report"]["regions"][0]["active"]
    assert ours["final_train_loss"] < ours["train_loss"][0]
    assert ours["final_train_loss"] == pytest.approx(eager["final_train_loss"], rel=3e-3)
    assert ours["saved_bytes"] < 0.5 * eager["saved_bytes"]


@pytest.mark.architectures
def test_the_rows_of_a_comparison_with_adapters(finetune_lora: Finetune, tiny_llama: str):
    from common.job import comparison_rows  # pyright: ignore[reportMissingImports]: on the path by the fixture

    names = runpy.run_path(str(EXAMPLES / "finetune_lora.py"))
    settings = names["LoraSettings"](model=tiny_llama, lora_rank=4, codec="int4", compare=True)
    rows = {row.label: row.arguments for row in comparison_rows(settings, names["variants"])}
    assert [label for label in rows if "checkpointing" in label] == [
        "eager, checkpointing", "Inductor, checkpointing", "actcomp, checkpointing",
    ]  # fmt: skip
    found = finetune_lora(*rows["actcomp, checkpointing"], "--max-data-bytes", "100000")["settings"]
    assert found["codec"] == "int4"
    assert found["checkpointing"]
