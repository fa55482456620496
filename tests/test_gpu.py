"""What only a CUDA device can show. Skipped without one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import actpass
from actpass.codecs import LEARNED, PROJECTIONS, QUANTIZERS
from actpass.codecs.generator import bits32, normals, round_keys, signs, step_seed
from actpass.low_rank_gradient import Basis
from actpass.memory.footprint import MARGIN
from actpass.memory.profiler import measure
from actpass.optim import AdamW, AdaPM, CompActAdamW, LazySubspaceAdamW, OasisAdamW
from actpass.options import options_for
from actpass.runtime.regions import clear
from actpass.runtime.step_counter import STEP_COUNTER
from actpass.runtime.subspaces import STORE

from . import models
from .helpers import Grads, assert_close, loss_of, projected, step
from .test_fp8_gradients import FP8, net
from .test_liveness import PLANS, llama
from .test_quantizers import round_trip

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


MODES = pytest.mark.parametrize("mode", [None, "reduce-overhead"])
LARGEST_ERROR = {"auto": 0.05, "int8": 0.05, "int4": 0.5}
"""Of a gradient, relative: a lost factor or a wrong order is 1 and more."""


def on_cuda(made: models.Made) -> models.Made:
    model, inputs = made
    return model.cuda(), {k: v.cuda() for k, v in inputs.items()}


def both(
    made: models.Made, autocast: torch.dtype | None = None, loss_error: float = 0.0, **options: Any
) -> list[tuple[torch.Tensor, Grads]]:
    """Loss and gradients of the exact form and of ``options``. CUDA graphs replay from the third step."""
    model, inputs = on_cuda(made)
    results = []
    chosen: dict[str, Any]
    for chosen in ({"policy": "exact"}, options):
        torch.compiler.reset()
        clear()
        compiled = torch.compile(model, backend="actcomp", options=chosen)
        with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
            results.append([step(compiled, model, inputs) for _ in range(4)][-1])
    assert torch.isfinite(results[0][0])
    assert torch.allclose(results[0][0], results[1][0], rtol=loss_error, atol=0.0)
    return results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_narrow_factors_are_added_up_in_float32(dtype: torch.dtype):
    """By the matmul itself: a sum of products that were rounded before would be off by a thousand times as much."""
    torch.manual_seed(0)
    total = torch.randn(96, 64, device="cuda")
    left, right = (torch.randn(512, width, device="cuda").to(dtype) for width in (96, 64))
    want = total.double() + left.double().t() @ right.double()
    torch.ops.actpass.add_product_(total, left, right)
    assert float((total.double() - want).norm() / want.norm()) < 1e-5


def test_on_a_gpu_codes_are_made_and_read_in_line_and_attention_keeps_its_own():
    """SwiGLU's two factors are coded in the kernel that multiplies them; v and the output of attention, which only library
    kernels touch, stay as they are."""
    model, inputs = on_cuda(llama())
    compiled = torch.compile(model, backend="actcomp", options={"min_tensor_bytes": 0})
    with torch.autocast("cuda", dtype=torch.bfloat16):
        step(compiled, model, inputs)
    (region,) = actpass.report(model).regions
    forms = {(s.kind, s.module.rpartition(".")[2]): s.stored_as for s in region.sites}
    assert forms["matmul output", "gate_proj"] == "quantize int8"
    assert forms["matmul output", "up_proj"] == "quantize int8"
    assert forms["attention", "v_proj"] == "save"
    totals = actpass.report(model).totals
    assert totals.traffic_bytes < 1.2 * totals.traffic_bytes_default


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no matmul in fp8")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_weight_gradients_in_fp8_are_near_the_exact_ones_and_change_nothing_else(autocast: torch.dtype | None):
    """A scale for each tensor and float32 products, and under autocast one for each feature and bfloat16 ones; x that crosses
    as codes and x that is cast in the backward. Within 0.15: e4m3 has 3 bits behind the point."""
    made = net()
    (_, want), (_, got) = both(made, autocast=autocast, **FP8)
    (region,) = actpass.report(made[0]).regions
    taken = {p for s in region.sites if s.wgrad for p in s.parameters}
    assert any(s.codec == "float8_e4m3" for s in region.sites)
    assert taken == {"a.weight", "b.weight", "c.weight", "d.weight"}
    others = want.keys() - taken
    assert_close({n: got[n] for n in others}, {n: want[n] for n in others}, 2**-7 if autocast else 1e-5)
    assert all(0 < float((got[n] - want[n]).norm() / want[n].norm()) < 0.15 for n in taken)


@MODES
@pytest.mark.parametrize("method", LEARNED)
def test_learned_subspaces_change_only_their_own_gradients_on_cuda(method: str, mode: str | None):
    made = models.transformer()
    options = {**options_for(method), "rank": 0.25, "refresh_interval": 2, "skip_unprofitable": False, "mode": mode}
    more = {"activation_rank": None} if method == "prac" else {}
    (_, want), (_, got) = both(made, loss_error=1e-6, **options, **more)  # with a sketch Inductor's sums are split otherwise
    touched = projected(actpass.report(made[0]))
    assert touched
    others = want.keys() - touched
    assert others
    assert_close({n: got[n] for n in others}, {n: want[n] for n in others}, 1e-5)
    assert any(not torch.equal(got[n], want[n]) for n in touched)


@MODES
@pytest.mark.parametrize("method", ["haar", "gaussian", "oasis", "prac"])
def test_low_rank_gradients_are_the_dense_ones_on_cuda(method: str, mode: str | None):
    """Four times in one subspace, refreshed never; accumulated where no CUDA graph writes to its own gradients again. The dense
    run sums in another order. Copied: what a CUDA graph returned goes with it."""
    model, inputs = on_cuda(models.transformer())
    options: dict[str, Any] = {**options_for(method), "rank": 0.25, "refresh_interval": 100, "mode": mode}
    if method == "prac":
        options |= {"activation_rank": None, "resample": "every_refresh"}
    found = []
    for gradients in ("dense", "low_rank"):
        torch.compiler.reset()
        clear()
        STORE.clear()
        STEP_COUNTER.steps = 0
        run = torch.compile(
            model, backend="actcomp", options={**options, "skip_unprofitable": False, "weight_gradient_format": gradients}
        )
        model.zero_grad()
        for _ in range(4):
            if mode is not None:
                model.zero_grad()
            loss_of(run(**inputs)).backward()
        found.append({n: copy.deepcopy(p.grad) for n, p in model.named_parameters() if p.grad is not None})
    dense, low = found
    kept = [n for n, g in low.items() if isinstance(g, actpass.LowRankGradient)]
    assert kept
    assert_close({n: low[n].dense() for n in kept}, {n: dense[n] for n in kept}, 1e-4)


@pytest.mark.parametrize("kind", [AdamW, CompActAdamW, OasisAdamW, LazySubspaceAdamW, AdaPM])
def test_optimizers_step_alike_on_cuda(kind: Any):
    """Three steps through two bases, against the CPU's."""
    ends = []
    for device in ("cpu", "cuda"):
        parameter = nn.Parameter(torch.linspace(-1, 1, 64 * 128).view(64, 128).to(device))
        optimizer = kind([("mlp.weight", parameter)], lr=0.1)
        for i, draw in enumerate((1, 1, 2)):
            seed = step_seed(0, draw)
            numbers = torch.randn(64, 16, generator=torch.Generator().manual_seed(i))
            basis = Basis("haar", 128, 16, round_keys(seed, torch.device(device)), seed)
            parameter.grad = actpass.LowRankGradient(numbers.to(device), basis, left=False)
            optimizer.step()
        ends.append(parameter.detach().cpu())
    assert torch.allclose(*ends, atol=1e-3)


@pytest.mark.parametrize("draw", [bits32, signs, normals])
def test_generator_gives_the_same_bits_on_cuda(draw):
    key = round_keys(step_seed(1, 2))
    want = draw(key, 3, 100_000)
    assert torch.equal(draw(key.cuda(), 3, 100_000).cpu(), want)
    assert torch.equal(torch.compile(draw)(key.cuda(), 3, 100_000).cpu(), want)


@MODES
@pytest.mark.parametrize("method", PROJECTIONS)
def test_projection_changes_only_its_own_gradients_on_cuda(method: str, mode: str | None):
    made = models.transformer()
    (_, want), (_, got) = both(made, **options_for(method), rank=0.25, skip_unprofitable=False, mode=mode)
    touched = projected(actpass.report(made[0]))
    assert touched
    others = want.keys() - touched
    assert others
    assert_close({n: got[n] for n in others}, {n: want[n] for n in others}, 1e-5)  # other kernels sum in another order


@MODES
@pytest.mark.parametrize("method", LARGEST_ERROR)
def test_low_bits_leave_the_forward_and_nearly_the_gradients_on_cuda(method: str, mode: str | None):
    (_, want), (_, got) = both(models.transformer(), **options_for(method), min_tensor_bytes=0, mode=mode)
    assert_close(got, want, LARGEST_ERROR[method])
    assert any(not torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", models.HUGGING_FACE)
def test_architectures_under_autocast_on_cuda(name: str, dtype: torch.dtype):
    (_, want), (_, got) = both(models.HUGGING_FACE[name](), dtype, policy="auto", min_tensor_bytes=0)
    assert_close(got, want, 0.25)  # 4 bits where only a weight's gradient reads it


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_round_alike_on_cuda(name: str):
    """But for a few on the edge: a product may be fused into the sum behind it on one device, and not on the other."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    here = round_trip(name, x, None)
    for there in (round_trip(name, x.cuda(), None), torch.compile(round_trip)(name, x.cuda(), None)):
        assert (here != there.cpu()).double().mean() < 0.01


@pytest.mark.parametrize("plan", PLANS)
def test_predicted_peak_is_within_the_margin_of_the_measured_on_cuda(plan: str):
    model, inputs = on_cuda(llama())
    compiled = torch.compile(model, backend="actcomp", options=PLANS[plan])

    def whole_step() -> None:
        compiled(**inputs).backward()

    for _ in range(2):
        whole_step()
        model.zero_grad(set_to_none=True)
    measured = measure(whole_step, "cuda").peak_bytes
    predicted = actpass.report(model).totals.peak_bytes
    assert predicted is not None
    print(f"{plan}: predicted {predicted}, measured {measured}, {predicted / measured:.3f}")
    assert measured / (1 + MARGIN) <= predicted <= 1.1 * measured


def test_report_saved_bytes_agree_with_the_allocator():
    model, inputs = on_cuda(models.transformer())
    compiled = torch.compile(model, backend="actcomp", options=dict[str, Any](projection="rademacher", rank=0.25))
    compiled(**inputs).backward()
    alive = measure(lambda: compiled(**inputs), "cuda")
    sites = [s for r in actpass.report(model).regions for s in r.sites if s.bytes_after]
    sites = [s for s in sites if s.shape]  # the state of attention's random numbers is on the CPU
    rounded = sum(-(-s.bytes_after // 512) * 512 for s in sites)
    assert alive.kept_bytes == rounded + 512  # the loss
