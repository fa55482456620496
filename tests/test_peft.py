"""PEFT's adapters on a Llama: rebuilt with dropout as without, and found by the paths that PEFT gives them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import actpass
from actpass.reporting import Report

from .helpers import EPS, eager_actcomp, step

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.architectures

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def explained(dropout: float, **options: Any) -> tuple[torch.nn.Module, Report]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    lora = peft.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=dropout, target_modules=PROJECTIONS, task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = peft.get_peft_model(LlamaForCausalLM(config), lora).train()
    tokens = torch.randint(3, 256, (4, 128), generator=torch.Generator().manual_seed(1))
    return model, actpass.explain(model, input_ids=tokens, labels=tokens, advise=False, options=options)


def test_what_dropout_makes_is_rebuilt():
    """What dropout's outputs would take, four bytes an element, is not stored: 7.67 MB of 11.34 are."""
    totals = explained(0.1, policy="exact")[1].totals
    assert totals.saved_bytes <= 0.68 * totals.saved_bytes_default
    assert totals.extra_matmuls == 0


def test_overrides_match_the_paths_that_modules_have():
    path = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default"
    model, report = explained(0.0, codec="int8", min_tensor_bytes=0, module_overrides={path: "save", "no.such": "save"})
    assert path in dict(model.named_modules())
    notes = " ".join(n for r in report.regions for n in r.notes)
    assert "override 'no.such' decided no site" in notes
    assert path not in notes
    stored = [s for r in report.regions for s in r.sites if s.bytes_after and s.module.endswith("lora_A.default")]
    codecs = {s.module: s.codec for s in stored}
    assert codecs[path] is None
    assert codecs[path.replace("layers.1", "layers.0")] == "int8"


@pytest.mark.parametrize("how", ["nf4", "bnb4"])
def test_weights_in_four_bits_are_no_part_of_what_is_stored(how: str, monkeypatch: pytest.MonkeyPatch):
    """QLoRA stores what LoRA does: nothing of the frozen weights, looked up or dequantised, crosses."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    from common import adapters, models  # pyright: ignore[reportMissingImports]

    def explained_with(how: str) -> Report:
        torch.manual_seed(0)
        config = models.load_config("llama-mini", models.LLAMAS, 64, {"num_hidden_layers": 2, "vocab_size": 512})
        module = models.build_language_model(config)
        adapters.quantize_base(module, how)
        adapters.add_adapters(module, 8, 16, 0.0)
        tokens = torch.randint(3, 512, (2, 64))
        return actpass.explain(module, tokens, tokens)

    report, plain = explained_with(how), explained_with("none")
    assert report.active
    assert report.totals.saved_bytes <= plain.totals.saved_bytes + 1024
    assert len(report.regions) == 1


def _several(model: Any) -> Any:
    """Two adapters on the same layers, both active and trained."""
    made = peft.get_peft_model(model, _lora())
    made.add_adapter("second", _lora(r=8))
    made.base_model.set_adapter(["default", "second"])
    return made


def _fixed_first_factors(model: Any) -> Any:
    """LoRA-FA (Zhang et al., 2023, arXiv 2308.03303): only the second factors are trained."""
    made = peft.get_peft_model(model, _lora())
    for name, parameter in made.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return made


def _merged_below(model: Any) -> Any:
    """An adapter that was merged into the weights, and a new one."""
    return peft.get_peft_model(peft.get_peft_model(model, _lora()).merge_and_unload(), _lora(r=8))


def _lora(**more: Any) -> Any:
    given = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM", **more}
    return peft.LoraConfig(**given)


KINDS: dict[str, Callable[[Any], Any]] = {
    "LoRA": lambda m: peft.get_peft_model(m, _lora()),
    "DoRA": lambda m: peft.get_peft_model(m, _lora(use_dora=True)),
    "rsLoRA": lambda m: peft.get_peft_model(m, _lora(use_rslora=True)),
    "embedding and head": lambda m: peft.get_peft_model(m, _lora(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "modules to save": lambda m: peft.get_peft_model(m, _lora(modules_to_save=["lm_head"])),
    "VeRA": lambda m: peft.get_peft_model(
        m, peft.VeraConfig(r=16, target_modules=["q_proj", "o_proj"], init_weights=False, task_type="CAUSAL_LM")
    ),
    "IA3": lambda m: peft.get_peft_model(
        m,
        peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
            task_type="CAUSAL_LM",
        ),
    ),
    "several": _several,
    "LoRA-FA": _fixed_first_factors,
    "merged": _merged_below,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_every_kind_of_adapter(name: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = KINDS[name](LlamaForCausalLM(config)).train()
    tokens = torch.randint(3, 256, (4, 64), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "labels": tokens}
    loss, want = step(lambda **given: model(**given).loss, model, batch)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(want) == trained
    assert len(trained) < len(list(model.named_parameters()))
    for policy in ("exact", "auto"):
        torch.compiler.reset()
        compiled = torch.compile(model, backend=eager_actcomp({"policy": policy, "min_tensor_bytes": 0}))
        found_loss, found = step(lambda **given: compiled(**given).loss, model, batch)  # noqa: B023
        report = actpass.report(model)
        assert report.active
        assert len(report.regions) == 1
        assert report.totals.saved_bytes < (0.9 if policy == "exact" else 0.6) * report.totals.saved_bytes_default
        torch.testing.assert_close(found_loss, loss, rtol=64 * EPS, atol=0)
        assert set(found) == trained
        lost = sum(float((found[n] - want[n]).square().sum()) for n in want) ** 0.5
        whole = sum(float(want[n].square().sum()) for n in want) ** 0.5
        # of 256 random tokens a gradient loses what its input does: a twelfth in 4 bits, and in 8 bits what is small
        assert lost < (128 * EPS if policy == "exact" else 0.03 if name == "LoRA-FA" else 0.12) * whole, policy
