"""What a training loop does around a compiled model, and the pass along with it.

Interpreted (`eager_actcomp`) wherever the subject is the pass or the runtime; Inductor itself where it has a part in it: the
seed across two pending backwards, donated buffers, modes, caches.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actpass
from actpass.backend import backend
from actpass.backend.partitioner import Partitioner
from actpass.ir.graph_inputs import GraphInputs
from actpass.options import options_for, parse
from actpass.runtime import progress, regions
from actpass.runtime.step_counter import STEP_COUNTER
from actpass.torch_compat import compile_fx, functorch_config, list_mode_options

from . import models
from .helpers import EPS, Grads, assert_close, assert_equal, eager_actcomp, grads_of, interpret, projected, step

RANK = 4
HAAR = {"projection": "haar", "rank": RANK, "skip_unprofitable": False}
FULL = {"projection": "haar", "rank": 1.0, "skip_unprofitable": False}
# At the stock cut linear inputs are saved, so that z crosses in their place: both passes draw the basis. Below it they are
# rebuilt, and z is formed in the backward alone.
CROSSING = {**HAAR, "memory_budget": 1.0}
QUICK = {**CROSSING, "projection": "rademacher"}  # what Inductor compiles quickest

# fp32, one or two layers: as derived in test_models.py.
EXACT = 16 * EPS
FULL_RANK = EXACT + 34 * EPS


def compiled(model: nn.Module, **options: Any) -> Callable[..., torch.Tensor]:
    return torch.compile(model, backend=eager_actcomp(options))


def batches(count: int) -> list[torch.Tensor]:
    return list(torch.randn(count, 32, 24, generator=torch.Generator().manual_seed(2)))


def without(names: set[str], grads: Grads) -> Grads:
    return {n: g for n, g in grads.items() if n not in names}


def forget() -> None:
    """As if nothing had been compiled in this process."""
    torch.compiler.reset()
    regions.clear()
    STEP_COUNTER.steps, STEP_COUNTER.calls = 0, 0


def own_step(optimizer_of: nn.Module | None = None) -> None:
    """An optimizer's step: of the module's parameters, or of a parameter that no compiled graph knows."""
    parameters = [nn.Parameter(torch.zeros(1))] if optimizer_of is None else list(optimizer_of.parameters())
    torch.optim.SGD(parameters, lr=0.1).step()


# ---------------------------------------------------------------------------------------------------------- precision


# bf16: between loss and gradient lie some 30 operators that round to it, each by EPS / sqrt(12) in the mean square; eager's
# fused operators round in other places: sqrt(2 x 30 / 12) = 2.2 EPS.
# At full rank five roundings come on top, of P (used twice), z, the coefficients and dW: sqrt(5 / 12) = 0.65 EPS; three
# times this. Sums run in fp32. In fp32 itself sums round, too: as derived in test_models.py.
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_precision_decides_the_rounding_and_nothing_else(precision: str) -> None:
    model, inputs = models.transformer(layers=1)
    if precision == "bf16":
        model, inputs = model.bfloat16(), {k: v.bfloat16() for k, v in inputs.items()}
    bf16 = torch.finfo(torch.bfloat16).eps
    exact_tolerance, tolerance = (EXACT, FULL_RANK) if precision == "fp32" else (2.2 * bf16, 2 * bf16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        want_loss, want = step(model, model, inputs)
        exact_loss, exact = step(compiled(model, policy="exact"), model, inputs)
        forget()
        loss, grads = step(compiled(model, **FULL), model, inputs)
    touched = projected(actpass.report(model))
    assert len(touched) == 8
    assert float((exact_loss - want_loss).abs() / want_loss) <= exact_tolerance
    assert_close(exact, want, exact_tolerance)
    assert torch.equal(loss, exact_loss)
    assert_equal(without(touched, grads), without(touched, exact))
    assert_close(grads, exact, tolerance)


# ------------------------------------------------------------------------------------------------------ training loops


def test_accumulation_adds_gradients_in_one_subspace() -> None:
    model, _ = models.mlp()
    run = compiled(model, **HAAR)
    total: Grads = {}
    for x in batches(4):
        STEP_COUNTER.steps = 0  # each alone, under the seed of the step that the four belong to
        _, grads = step(run, model, {"x": x})
        total = {n: total[n] + g if total else g for n, g in grads.items()}
    model.zero_grad()
    for x in batches(4):
        run(x).backward()
    accumulated = grads_of(model)
    assert_equal(accumulated, total)
    assert int(torch.linalg.matrix_rank(accumulated["mid.weight"], rtol=1e-4)) == RANK


def test_optimizer_step_changes_the_basis() -> None:
    model, inputs = models.mlp()
    run = compiled(model, **HAAR)
    _, first = step(run, model, inputs)
    _, again = step(run, model, inputs)
    assert_equal(again, first)
    own_step()
    _, second = step(run, model, inputs)
    rows = torch.cat([first["mid.weight"], second["mid.weight"]])
    assert int(torch.linalg.matrix_rank(rows, rtol=1e-4)) == 2 * RANK
    assert_equal({"down.bias": second["down.bias"]}, {"down.bias": first["down.bias"]})


def test_refresh_interval_keeps_a_basis_for_as_many_steps() -> None:
    model, inputs = models.mlp()
    run = compiled(model, **HAAR, refresh_interval=2)
    seen = []
    for _ in range(3):
        seen.append(step(run, model, inputs)[1])
        own_step()
    assert_equal(seen[1], seen[0])
    assert not torch.equal(seen[2]["mid.weight"], seen[0]["mid.weight"])


def test_clipping_scales_the_gradients_to_the_norm() -> None:
    model, inputs = models.mlp()
    _, grads = step(compiled(model, **HAAR), model, inputs)
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    got = nn.utils.clip_grad_norm_(model.parameters(), 0.01, error_if_nonfinite=True)
    # a norm of n <= 1600 squares: sqrt(n) EPS / 2 = 20 EPS; clip_grad_norm_ adds 1e-6 to it
    assert float((got - norm).abs() / norm) <= 20 * EPS
    assert_close(grads_of(model), {n: g * 0.01 / (norm + 1e-6) for n, g in grads.items()}, 22 * EPS)


@pytest.mark.codegen
@pytest.mark.parametrize(("kind", "options"), [("interpreted", HAAR), ("interpreted", CROSSING), ("inductor", QUICK)])
def test_pending_backward_uses_the_seed_of_its_own_forward(kind: str, options: dict[str, Any]) -> None:
    model, _ = models.mlp()
    run = compiled(model, **options) if kind == "interpreted" else torch.compile(model, backend="actcomp", options=options)
    x1, x2 = batches(2)

    def alone(x: torch.Tensor, steps: int) -> Grads:
        STEP_COUNTER.steps = steps
        return step(run, model, {"x": x})[1]

    first, second, wrong = alone(x1, 0), alone(x2, 1), alone(x1, 1)
    assert not torch.equal(first["mid.weight"], wrong["mid.weight"])

    STEP_COUNTER.steps = 0
    model.zero_grad()
    pending = run(x1)
    own_step()
    later = run(x2)
    pending.backward()
    assert_equal(grads_of(model), first)
    model.zero_grad()
    later.backward()
    assert_equal(grads_of(model), second)


def test_two_forwards_before_one_backward_add_up() -> None:
    model, _ = models.mlp()
    run = compiled(model, **HAAR)
    x1, x2 = batches(2)
    (_, first), (_, second) = (step(run, model, {"x": x}) for x in (x1, x2))
    model.zero_grad()
    (run(x1) + run(x2)).backward()
    assert_equal(grads_of(model), {n: first[n] + second[n] for n in first})


@pytest.mark.slow
def test_resumed_run_is_bitwise_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, Callable[..., torch.Tensor], torch.optim.Optimizer]:
        forget()
        model, _ = models.mlp()
        return model, compiled(model, **HAAR, refresh_interval=2, seed=7), torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(run: Callable[..., torch.Tensor], optimizer: torch.optim.Optimizer, data: list[torch.Tensor]) -> None:
        for x in data:
            optimizer.zero_grad()
            run(x).backward()
            optimizer.step()

    model, run, optimizer = start()
    train(run, optimizer, batches(5))
    want = {n: p.detach().clone() for n, p in model.named_parameters()}

    model, run, optimizer = start()
    train(run, optimizer, batches(5)[:3])
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "actpass": actpass.state_dict(model)}
    torch.save(states, tmp_path / "checkpoint.pt")

    def resumed(with_actpass: bool) -> dict[str, torch.Tensor]:
        model, run, optimizer = start()
        loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        if with_actpass:
            actpass.load_state_dict(model, loaded["actpass"])
        train(run, optimizer, batches(5)[3:])
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    assert_equal(resumed(with_actpass=True), want)
    assert not torch.equal(resumed(with_actpass=False)["mid.weight"], want["mid.weight"])  # or this test could not fail


# ----------------------------------------------------------------------------------------------------------- inference


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_inference_is_plain_and_draws_nothing(inference: Callable[[], Any]) -> None:
    model, inputs = models.transformer(layers=1)
    model.eval()
    with inference():
        plain = torch.compile(model, backend=lambda gm, example: compile_fx(gm, example, inner_compile=interpret))
        want = plain(**inputs)
        torch.compiler.reset()
        got = torch.compile(model, backend="actcomp", options=HAAR)(**inputs)
    assert torch.equal(got, want)
    assert not STEP_COUNTER.calls
    assert not actpass.report(model).regions


@pytest.mark.usefixtures("no_codegen")
def test_validation_between_steps_changes_no_gradient() -> None:
    def train(validate: bool) -> Grads:
        forget()
        model, inputs = models.mlp()
        run = torch.compile(model, backend="actcomp", options=HAAR)
        for _ in range(2):
            _, grads = step(run, model, inputs)
            own_step(model)
            if validate:
                with torch.no_grad():
                    run.eval()(**inputs)
                run.train()
                own_step()  # an optimizer without a training forward is not a step of this training
        return grads

    assert_equal(train(validate=True), train(validate=False))


@pytest.mark.parametrize("method", ["exact", "haar"])
def test_frozen_model_runs_with_gradients_enabled(method: str) -> None:
    model, inputs = models.mlp()
    model.requires_grad_(False)
    loss = compiled(model, **options_for(method))(**inputs)
    # a forward of 9 operators: sqrt(9) EPS / 2
    assert float((loss - model(**inputs)).abs() / loss) <= 2 * EPS
    assert not loss.requires_grad
    assert not STEP_COUNTER.calls


# ----------------------------------------------------------------------------------------------- graphs, shapes, modules


class Interrupted(nn.Module):
    """Two linear layers and a loss, with a graph break behind each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = break_graph(nn.functional.gelu(self.first(x)))
        return break_graph(self.second(h)).square().mean()


@torch.compiler.disable
def break_graph(x: torch.Tensor) -> torch.Tensor:
    return x


def test_graph_breaks_make_regions_that_agree() -> None:
    torch.manual_seed(0)
    model, (x,) = Interrupted(), batches(1)
    _, want = step(model, model, {"x": x})
    _, exact = step(compiled(model, policy="exact"), model, {"x": x})
    assert_close(exact, want, EXACT)
    forget()
    _, grads = step(compiled(model, **HAAR), model, {"x": x})
    report = actpass.report(model)
    assert projected(report) == {"first.weight", "second.weight"}
    assert_equal({n: grads[n] for n in want if "bias" in n}, {n: exact[n] for n in want if "bias" in n})
    assert [int(torch.linalg.matrix_rank(grads[n], rtol=1e-4)) for n in sorted(projected(report))] == [RANK, RANK]


def test_graph_breaks_report_every_region() -> None:
    torch.manual_seed(0)
    model, (x,) = Interrupted(), batches(1)
    step(compiled(model, **HAAR), model, {"x": x})
    # the third holds no parameter, only the loss of what the second returned; what it saves counts all the same
    assert len(actpass.report(model).regions) == 3


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, None])
def test_changing_sequence_length_keeps_the_gradients(dynamic: bool | None) -> None:
    model, _ = models.transformer(layers=1)
    run = torch.compile(model, dynamic=dynamic, backend=eager_actcomp(FULL))
    for length in (16, 24, 10):
        inputs = {"x": torch.randn(2, length, 32)}
        _, want = step(model, model, inputs)
        _, got = step(run, model, inputs)
        assert_close(got, want, FULL_RANK)
    assert len(projected(actpass.report(model))) == 8


def test_dynamic_batch_is_projected_like_a_static_one() -> None:
    model, _ = models.mlp()
    run = torch.compile(model, dynamic=True, backend=eager_actcomp(CROSSING))
    for tokens in (32, 20):
        inputs = {"x": torch.randn(tokens, 24)}
        _, want = step(compiled(model, **CROSSING), model, inputs)
        _, got = step(run, model, inputs)
        assert_close(got, want, FULL_RANK)
    (region,) = actpass.report(model).regions  # the one that ran last: the dynamic one
    assert sum(site.form == "project" for site in region.sites) == 2  # which, too, saves z in place of x


def test_recompiled_graph_is_counted_once() -> None:
    model, _ = models.mlp()
    step(compiled(model, **HAAR), model, {"x": torch.randn(48, 24)})
    once = actpass.report(model).saved_bytes
    forget()
    run = compiled(model, **HAAR)
    for tokens in (32, 48):  # the second batch is compiled anew, and runs in place of the first
        step(run, model, {"x": torch.randn(tokens, 24)})
    assert actpass.report(model).saved_bytes == once


@pytest.mark.slow
def test_checkpointed_layers_stay_exact_and_say_so() -> None:
    model, inputs = models.transformer(checkpoint=True)
    _, exact = step(compiled(model, policy="exact"), model, inputs)
    forget()
    _, grads = step(compiled(model, **HAAR), model, inputs)
    report = actpass.report(model)
    alone = {path for r in report.regions for _, path, why in r.rejected if "inside activation checkpointing" in why}
    linears = {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert alone == linears
    assert projected(report) == {"head.weight"}
    assert_equal(without({"head.weight"}, grads), without({"head.weight"}, exact))
    assert "inside activation checkpointing" in str(report)


@pytest.mark.architectures
def test_hugging_face_checkpointing_stays_exact() -> None:
    model, inputs = models.llama(layers=1)
    _, want = step(model, model, inputs)
    model.activation_checkpointing_enable()
    _, grads = step(compiled(model, **HAAR), model, inputs)
    report = actpass.report(model)
    assert projected(report) == {"lm_head.weight"}
    assert sum("checkpointing" in why for r in report.regions for *_, why in r.rejected) == 7
    assert_close(without({"lm_head.weight"}, grads), without({"lm_head.weight"}, want), EXACT)


def regional(**options: Any) -> tuple[nn.Module, dict[str, Any], list[int]]:
    """Three layers, each compiled by itself; the list counts the graphs."""
    model, inputs = models.transformer(layers=3)
    inputs["x"].requires_grad_()  # as every later layer's input does, so that one graph serves all
    graphs: list[int] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(len(example_inputs))
        return eager_actcomp(options)(gm, example_inputs)

    for block in model.blocks:
        block.compile(backend=backend)
    return model, inputs, graphs


@pytest.mark.parametrize(("options", "tolerance"), [({"policy": "exact"}, EXACT), (FULL, FULL_RANK)])
def test_regional_compile_gives_every_module_its_own_gradients(options: dict[str, Any], tolerance: float) -> None:
    plain, _ = models.transformer(layers=3)
    model, inputs, graphs = regional(**options)
    for _ in range(2):  # in the second step the first layer comes again, after the third
        _, want = step(plain, plain, inputs)
        _, got = step(model, model, inputs)
        assert_close(got, want, tolerance)
        own_step()
    assert len(graphs) == 1
    assert len(actpass.report(model).regions) == 1
    assert all(len(actpass.report(block).regions) == 1 for block in model.blocks)


@pytest.mark.slow
def test_regional_compile_draws_the_bases_of_the_whole_model() -> None:
    whole, _ = models.transformer(layers=3)
    model, inputs, _ = regional(**CROSSING)
    _, want = step(compiled(whole, **CROSSING, module_overrides={"head": "save"}), whole, inputs)
    _, got = step(model, model, inputs)
    # both project onto the same subspaces: rounding, as at full rank, relative to a gradient that the projection made larger
    assert_close(got, want, FULL_RANK)


# ------------------------------------------------------------------------------------------------------------- Inductor


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options that reach Inductor, which then is not run."""
    seen: dict[str, Any] = {}

    def spy(gm: Any, example_inputs: Any, *, config_patches: dict[str, Any], **more: Any) -> Any:
        seen.update(config_patches)
        return compile_fx(gm, example_inputs, inner_compile=interpret, config_patches=config_patches, **more)

    monkeypatch.setattr(backend, "compile_fx", spy)
    return seen


@pytest.mark.codegen
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_mode_reaches_inductor(mode: str, reached: dict[str, Any]) -> None:
    model, inputs = models.mlp()
    with functorch_config.patch(enable_autograd_cache=False):
        step(torch.compile(model, backend="actcomp", mode=mode), model, inputs)
    assert list_mode_options(mode)
    assert list_mode_options(mode).items() <= reached.items()


@pytest.mark.codegen
def test_inductor_options_reach_inductor_and_win_over_the_mode(reached: dict[str, Any]) -> None:
    model, inputs = models.mlp()
    options = {**HAAR, "mode": "max-autotune", "inductor_options": {"max_autotune": False, "epilogue_fusion": False}}
    with functorch_config.patch(enable_autograd_cache=False):
        step(torch.compile(model, backend="actcomp", options=options), model, inputs)
    assert reached["coordinate_descent_tuning"] is True
    assert (reached["max_autotune"], reached["epilogue_fusion"]) == (False, False)


@pytest.mark.codegen
def test_reduce_overhead_trains() -> None:
    model, inputs = models.mlp()
    _, want = step(model, model, inputs)
    _, got = step(torch.compile(model, backend="actcomp", mode="reduce-overhead"), model, inputs)
    assert_close(got, want, EXACT)


@pytest.mark.codegen
def test_retained_graph_error_names_the_remedy_and_the_remedy_works() -> None:
    model, inputs = models.mlp()

    def run() -> torch.Tensor:
        torch.compiler.reset()
        model.zero_grad()
        return torch.compile(model, backend="actcomp")(**inputs)

    run().backward()  # now Inductor's cache holds a backward that overwrites its inputs
    once = grads_of(model)
    with pytest.raises(RuntimeError, match=r"retain_graph=False.*donated_buffer=False"):
        run().backward(retain_graph=True)
    with functorch_config.patch(donated_buffer=False):
        loss = run()
        loss.backward(retain_graph=True)
        assert_equal(grads_of(model), once)
        loss.backward()
    assert_equal(grads_of(model), {n: g + g for n, g in once.items()})


CACHED = """
import json, sys, torch, actpass
from actpass.torch_compat import dynamo

def run(rank):
    dynamo.utils.counters.clear()
    torch.compiler.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 8))
    scalar = {"cpp.simdlen": 1}  # with VEC_ISA_OK: else a cold cache first tries out this CPU, for ten seconds
    options = {"projection": "rademacher", "rank": rank, "skip_unprofitable": False, "inductor_options": scalar}
    options |= {"codec": "int4", "min_tensor_bytes": 0}  # both graphs then hold functions that they call
    torch.compile(model, backend="actcomp", options=options)(torch.randn(20, 16)).sum().backward()
    counters = dynamo.utils.counters["aot_autograd"]
    hits, misses = counters["autograd_cache_hit"], counters["autograd_cache_miss"]
    gradient = model[2].weight.grad.double().norm().item()
    print(json.dumps([hits, misses, actpass.report(model).to_dict(), gradient]))

for rank in map(int, sys.argv[1:]):
    run(rank)
"""


@pytest.mark.codegen
@pytest.mark.slow
@pytest.mark.short_tier
def test_second_process_hits_the_cache_with_its_report_and_another_option_misses(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_VEC_ISA_OK": "1"}

    def process(*ranks: int) -> list[Any]:
        command = [sys.executable, "-c", CACHED, *map(str, ranks)]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True).stdout
        return [json.loads(line) for line in out.splitlines()]

    ((*counts, report, gradient),) = process(4)
    assert counts == [0, 1]
    assert report["active"]
    assert len(report["regions"][0]["sites"]) > 1
    assert "int4" in {s["codec"] for s in report["regions"][0]["sites"]}
    hit, miss = process(4, 5)
    assert hit == [1, 0, report, gradient]
    assert miss[:2] == [0, 1]
    assert {s["rank"] for s in miss[2]["regions"][0]["sites"] if s["projection"]} == {5}


@pytest.mark.parametrize("method", ["auto", "haar"])
def test_a_checkpoint_around_a_compiled_model(method: str):
    model, inputs = models.mlp()
    _, want = step(torch.compile(model, backend=eager_actcomp(**options_for(method))), model, inputs)
    torch.compiler.reset()
    run = torch.compile(model, backend=eager_actcomp(**options_for(method)))
    _, got = step(lambda x: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False), model, inputs)
    assert_equal(got, want)


# --------------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.usefixtures("no_codegen")
def test_a_region_may_be_partitioned_on_another_thread(monkeypatch: pytest.MonkeyPatch):
    """As where a compiler works in the background: what the pass did is there for the thread that asked."""
    on_this_thread = Partitioner.__call__

    def on_another(self: Partitioner, *args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(on_this_thread, self, *args, **kwargs).result()

    model, inputs = models.mlp()
    _, want = step(torch.compile(model, backend="actcomp"), model, inputs)
    saved = actpass.report(model).saved_bytes
    forget()
    monkeypatch.setattr(Partitioner, "__call__", on_another)
    _, got = step(torch.compile(model, backend="actcomp"), model, inputs)
    assert_equal(got, want)
    assert actpass.report(model).active
    assert actpass.report(model).saved_bytes == saved


def test_what_the_pass_did_is_no_part_of_a_caches_key():
    partitioner = Partitioner(parse(None), GraphInputs((), ()), "nonce")
    before = pickle.dumps(partitioner), partitioner.uuid()
    partitioner.done.append(object())  # pyright: ignore[reportArgumentType]
    assert (pickle.dumps(partitioner), partitioner.uuid()) == before


# --------------------------------------------------------------------------------------------------------------------- progress


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = models.MLP(), nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        torch._dynamo.graph_break()
        return self.second(h.view(1, 1)).sum()


@pytest.mark.parametrize("options", [{}, {"projection": "pca", "rank": 4, "skip_unprofitable": False}], ids=str)
def test_progress_is_a_line_for_each_stage_of_each_region(options: dict[str, Any], caplog: pytest.LogCaptureFixture):
    def said() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == "actpass"]

    compiled(Parts(), **options)(batches(1)[0]).backward()
    assert not said()  # nobody asked
    forget()
    actpass.show_progress()
    try:
        compiled(Parts(), **options)(batches(1)[0]).backward()
    finally:
        progress.log.setLevel(logging.NOTSET)
    lines = [re.sub(r"\d+\.\d", "T", re.sub(r"region \d+", "region", line)) for line in said()]
    assert lines == 2 * ["region: planning", "region: planned in T s; Inductor compiles it", "region: compiled, T s in all"]


@pytest.mark.slow
def test_progress_goes_to_standard_error_where_nothing_else_is_set_up():
    script = "import actpass; actpass.show_progress(); actpass.show_progress(); from actpass.runtime import progress; "
    script += "list(map(lambda _: None, [progress.compiling().__enter__()]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "actpass: region 1: planning\n"


# ---- models that compute in fp8


class InFp8(nn.Module):
    """The input of ``b`` is a matmul's result that nothing else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(n, m, bias=False) for n, m in ((64, 128), (128, 128), (128, 64)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(nn.functional.gelu(self.b(self.a(x)))).square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("options", [{"policy": "exact"}, {"policy": "auto"}, {"policy": "exact", "wgrad": "fp8"}], ids=str)
def test_of_a_model_that_computes_in_fp8_its_own_operand_is_saved(recipe: str, options: dict[str, Any]):
    """torchao's: the forward's cast is of the same numbers as the backward's, and its codes cross, a byte an element. What our
    8 bits move over a rounding boundary of the model's own e4m3 is off by 2^-4."""
    float8 = pytest.importorskip("torchao.float8")
    torch.manual_seed(0)
    model = float8.convert_to_float8_training(InFp8(), config=float8.Float8LinearConfig.from_recipe_name(recipe))
    inputs = {"x": torch.randn(4, 64, 64)}
    want = step(compiled(model, policy="exact", memory_budget=1.0), model, inputs)
    torch.compiler.reset()
    got = step(compiled(model, min_tensor_bytes=0, **options), model, inputs)
    assert torch.equal(got[0], want[0])
    assert_close(got[1], want[1], 2**-4 if options["policy"] == "auto" else EXACT)
    (region,) = actpass.report(model).regions
    codes = {(s.op, s.shape, s.bytes_after) for s in region.sites if s.dtype == "float8_e4m3fn" and s.bytes_after}
    assert ("aten.clone.default", (128, 256), 128 * 256) in codes
    assert not any(s.shape[-1:] == (128,) and s.module == "a" and s.form in ("save", "quantize") for s in region.sites)
    assert {"a.weight", "b.weight", "c.weight"} <= {parameter for _, parameter, _ in region.rejected}
