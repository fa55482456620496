"""Optimizers: each equals its definition, written out, and all keep torch's contract."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import actpass
from actpass.codecs import LEARNED
from actpass.codecs.generator import normals, round_keys, step_seed
from actpass.codecs.projections.learned import first_state
from actpass.low_rank_gradient import Basis, LowRankGradient
from actpass.optim import AdamW, AdaPM, CompActAdamW, LazySubspaceAdamW, OasisAdamW
from actpass.optim.transforms import CarryMoments, Place, momentum_kind
from actpass.runtime.step_counter import STEP_COUNTER
from actpass.runtime.subspaces import STORE

from . import models
from .helpers import eager_actcomp, loss_of

ROWS, WIDTH, RANK = 6, 16, 4
LR, BETA1, BETA2, EPS, DECAY = 0.1, 0.9, 0.95, 1e-8, 0.02
COMMON: dict[str, Any] = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY}
WHOLE, PARTIAL = (partial(AdaPM, momentum=kind) for kind in ("full", "low_rank"))
ALL = (AdamW, CompActAdamW, OasisAdamW, LazySubspaceAdamW, WHOLE)
every = pytest.mark.parametrize("kind", ALL)


def seeded(method: str, draw: int, rank: int = RANK) -> Basis:
    seed = step_seed(0, draw)
    return Basis(method, WIDTH, rank, round_keys(seed), seed)


def learned(draw: int, rank: int = RANK) -> Basis:
    state = first_state(LEARNED["oasis"], round_keys(step_seed(0, draw)), WIDTH, rank)
    return Basis("oasis", WIDTH, rank, round_keys(0), 0, True, state)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through(optimizer: Any, parameter: nn.Parameter, bases: list[Basis], left: bool) -> list[torch.Tensor]:
    """The parameter after each step; coefficients are seeded by the step."""
    found = []
    for i, basis in enumerate(bases):
        shape = (basis.rank, ROWS) if left else (ROWS, basis.rank)
        parameter.grad = LowRankGradient(numbers(i, *shape), basis, left=left)
        optimizer.step()
        found.append(parameter.detach().clone())
    return found


def start(left: bool) -> nn.Parameter:
    return nn.Parameter(numbers(99, *((WIDTH, ROWS) if left else (ROWS, WIDTH))))


def adam(bases: list[Basis], carry: Callable[..., Any], alpha: float = 1.0, *, reset: bool = False) -> list[torch.Tensor]:
    """Written out, in double, for G = C P^T. carry(m, v, t, old, new) -> m, v."""
    w = numbers(99, ROWS, WIDTH).double()
    m = v = torch.zeros(ROWS, bases[0].rank, dtype=torch.float64)
    found, began = [], 0
    for t, basis in enumerate(bases, 1):
        p = basis.matrix().double()
        c = numbers(t - 1, ROWS, basis.rank).double()
        if t > 1 and not bases[t - 2].spans_as(basis):
            m, v = carry(m, v, t, bases[t - 2].matrix().double(), p)
            began = t - 1 if reset else began
        m, v = BETA1 * m + (1 - BETA1) * c, BETA2 * v + (1 - BETA2) * c**2
        k = t - began
        update = (m / (1 - BETA1**k)) / ((v / (1 - BETA2**k)).sqrt() + EPS)
        w = (1 - LR * DECAY) * w - LR * alpha * update @ p.T
        found.append(w.clone())
    return found


def keep(m: Any, v: Any, *_: Any) -> Any:
    return m, v


def nothing(m: Any, v: Any, t: int, old: Any, new: Any) -> Any:
    return torch.zeros(ROWS, new.shape[1], dtype=torch.float64), torch.zeros(ROWS, new.shape[1], dtype=torch.float64)


def ldadam(m: Any, v: Any, t: int, old: Any, new: Any) -> Any:
    lengths = old.square().sum(dim=0)
    q = (old / lengths).T @ new
    missing = (old.shape[1] / old.shape[0] * new.square().sum(dim=0) - lengths @ q**2).clamp(min=0)
    mean, second = m / (1 - BETA1 ** (t - 1)), v / (1 - BETA2 ** (t - 1))
    carried = mean @ q
    spread = (second - mean**2) @ (q**2)
    rest = (second / lengths).mean(dim=1, keepdim=True) * missing
    return carried * (1 - BETA1 ** (t - 1)), (1 - BETA2 ** (t - 1)) * ((spread + carried**2).abs() + rest)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("kind", "more", "carry", "alpha", "reset"),
    [
        (AdamW, {}, keep, 1.0, False),
        (CompActAdamW, {"alpha": 0.25}, keep, 0.25, False),
        (OasisAdamW, {}, ldadam, 1.0, False),
        (WHOLE, {}, ldadam, 1.0, False),
        (LazySubspaceAdamW, {}, nothing, 1.0, True),
    ],
)
@pytest.mark.parametrize("method", ["gaussian", "haar", "oasis"])
def test_in_factors_each_is_its_definition(
    kind: Any, more: Any, carry: Any, alpha: float, reset: bool, method: str, left: bool
):
    draws = [1, 1, 1, 2, 2, 3]
    known = {d: learned(d) if method == "oasis" else seeded(method, d) for d in draws}
    bases = [known[d] for d in draws]
    got = through(kind([parameter := start(left)], **COMMON, **more), parameter, bases, left)
    want = adam(bases, carry, alpha, reset=reset) if not left else None
    if want is None:  # the same problem, transposed
        transposed = []
        parameter = nn.Parameter(start(left).detach().T.contiguous())
        optimizer = kind([parameter], **COMMON, **more)
        for i, basis in enumerate(bases):
            parameter.grad = LowRankGradient(numbers(i, basis.rank, ROWS).T.contiguous(), basis, left=False)
            optimizer.step()
            transposed.append(parameter.detach().T.clone())
        want = transposed
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a.double(), b.double(), atol=2e-5)


@every
def test_another_random_basis_at_each_step_is_worth_a_warning(kind: Any):
    for every_step, expected in ((True, 1), (False, 0)):
        optimizer = kind([parameter := start(False)], lr=0.1)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            through(optimizer, parameter, [seeded("haar", i if every_step else i // 2) for i in range(24)], False)
        assert len(found) == expected, every_step
        assert all("refresh_interval" in str(w.message) for w in found)
    with warnings.catch_warnings():  # one that follows the data may move at each step
        warnings.simplefilter("error")
        through(kind([parameter := start(False)], lr=0.1), parameter, [learned(i) for i in range(24)], False)


@every
def test_dense_gradients_get_adamws_step(kind: Any):
    parameter, want = start(False), start(False)
    ours, theirs = kind([parameter], **COMMON), torch.optim.AdamW([want], **COMMON)
    for i in range(4):
        parameter.grad, want.grad = numbers(i, ROWS, WIDTH), numbers(i, ROWS, WIDTH)
        ours.step()
        theirs.step()
    assert torch.allclose(parameter, want, atol=1e-6)


def test_moments_in_one_full_basis_are_carried_to_another_exactly():
    """At rank N with orthonormal columns nothing is lost of m."""
    bases = [seeded("haar", d, WIDTH) for d in (1, 2)]
    parameter = start(False)
    optimizer = OasisAdamW([parameter], **COMMON)
    dense = numbers(0, ROWS, WIDTH)
    parameter.grad = LowRankGradient(dense @ bases[0].matrix(), bases[0], left=False)
    optimizer.step()
    parameter.grad = LowRankGradient(torch.zeros(ROWS, WIDTH), bases[1], left=False)
    optimizer.step()
    m = optimizer.state[parameter]["exp_avg"] @ bases[1].matrix().T
    assert torch.allclose(m, BETA1 * (1 - BETA1) * dense, atol=1e-6)


@dataclass
class Columns:
    """A basis of some axes, each at its own length."""

    axes: list[int]
    lengths: torch.Tensor

    def matrix(self) -> torch.Tensor:
        return torch.eye(WIDTH)[:, self.axes] * self.lengths


def carried(before: Columns, after: Columns, left: bool) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """The moments of one gradient in another basis, and its coefficients in both."""
    gradient = numbers(0, *((WIDTH, ROWS) if left else (ROWS, WIDTH)))
    old, new = (b.matrix().T @ gradient if left else gradient @ b.matrix() for b in (before, after))
    place = Place(2, {"betas": (BETA1, BETA2)}, after, left, before)  # pyright: ignore[reportArgumentType]
    state = {"exp_avg": old * (1 - BETA1), "exp_avg_sq": old.square() * (1 - BETA2)}
    CarryMoments()(new, state, place)
    return state, old, new


@pytest.mark.parametrize("left", [False, True])
def test_moments_know_the_lengths_of_columns(left: bool):
    """`sampled` weighs what it draws: a direction that was sure and is drawn next gets a longer column."""
    axes = list(range(RANK))
    state, _, new = carried(Columns(axes, torch.linspace(1, 3, RANK)), Columns(axes, torch.linspace(4, 1, RANK)), left)
    assert torch.allclose(state["exp_avg"], new * (1 - BETA1), rtol=1e-5)
    assert torch.allclose(state["exp_avg_sq"], new.square() * (1 - BETA2), rtol=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_directions_that_the_old_basis_has_nothing_of_start_with_what_a_random_one_has(left: bool):
    """From v = 0 their first step would be 1 / sqrt(1 - b2) of one."""
    before, after = Columns([0, 1, 2], torch.tensor([1.0, 2.0, 1.0])), Columns([2, 3], torch.tensor([1.0, 3.0]))
    state, old, _ = carried(before, after, left)
    dim = 0 if left else 1
    mean = (old.square() / (before.lengths.square()[:, None] if left else before.lengths.square())).mean(dim)
    v = state["exp_avg_sq"] / (1 - BETA2)
    assert torch.allclose(v.select(dim, 0), old.select(dim, 2).square(), rtol=1e-5)
    assert torch.allclose(v.select(dim, 1), 9 * mean * 3 / WIDTH, rtol=1e-5)
    assert not state["exp_avg"].select(dim, 1).any()


def of_rank(gradients: list[torch.Tensor], rank: int, *, mini: bool = False) -> list[torch.Tensor]:
    """AdaPM's weights after each of dense ``gradients``, written out in double."""
    w = numbers(99, ROWS, WIDTH).double()
    right = torch.linalg.qr(normals(round_keys(0), WIDTH, WIDTH * rank).view(WIDTH, rank).double()).Q
    m, v, found = torch.zeros(ROWS, WIDTH, dtype=torch.float64), torch.zeros(ROWS, 1, dtype=torch.float64), []
    for t, gradient in enumerate(gradients, 1):
        g = gradient.double()
        y = BETA1 * m + (1 - BETA1) * g
        right = torch.linalg.qr(y.T @ (y @ right)).Q
        m = y @ right @ right.T
        v = BETA2 * v + (1 - BETA2) * (g.square().mean(1, keepdim=True) if mini else g.square())
        first = m / (1 - BETA1**t) + (y - m) / (1 - BETA1)
        w = (1 - LR * DECAY) * w - LR * first / ((v / (1 - BETA2**t)).sqrt() + EPS)
        found.append(w.clone())
    return found


@pytest.mark.parametrize("mini", [False, True])
def test_partial_momentum_is_its_definition(mini: bool):
    parameter, gradients = start(False), [numbers(i, ROWS, WIDTH) for i in range(6)]
    optimizer = PARTIAL([parameter], momentum_rank=3, second_moment="row" if mini else "full", **COMMON)
    for gradient, want in zip(gradients, of_rank(gradients, 3, mini=mini), strict=True):
        parameter.grad = gradient
        optimizer.step()
        assert torch.allclose(parameter.double(), want, atol=5e-5)
    state = {k: t for k, t in optimizer.state[parameter].items() if isinstance(t, torch.Tensor) and k != "step"}
    held = {k: tuple(t.shape) for k, t in state.items()}
    second = (ROWS, 1) if mini else (ROWS, WIDTH)
    assert held == {"momentum_left": (ROWS, 3), "momentum_right": (WIDTH, 3), "exp_avg_sq": second}


def test_partial_momentum_of_full_rank_is_adams_and_none_is_the_gradient():
    whole, none, want, plain = (start(False) for _ in range(4))
    ours = [PARTIAL([whole], momentum_rank=1.0, **COMMON), AdaPM([none], momentum="none", **COMMON)]
    theirs = [torch.optim.AdamW([p], **{**COMMON, "betas": (b, BETA2)}) for p, b in ((want, BETA1), (plain, 0.0))]
    for i in range(5):
        for p in (whole, none, want, plain):
            p.grad = numbers(i, ROWS, WIDTH)
        for optimizer in (*ours, *theirs):
            optimizer.step()
    assert torch.allclose(whole, want, atol=1e-5)
    assert torch.allclose(none, plain, atol=1e-6)
    assert "exp_avg" not in ours[1].state[none]


def test_partial_momentum_survives_gradients_without_rank():
    """Zero, of rank one, and zero again: the basis keeps all its columns, and takes up what comes."""
    parameter = start(False)
    optimizer = PARTIAL([parameter], momentum_rank=4, **COMMON)
    flat = numbers(0, ROWS, 1) @ numbers(1, 1, WIDTH)
    for gradient in (torch.zeros(ROWS, WIDTH), flat, flat, torch.zeros(ROWS, WIDTH), numbers(2, ROWS, WIDTH)):
        parameter.grad = gradient.clone()
        optimizer.step()
        right = optimizer.state[parameter]["momentum_right"]
        assert torch.allclose(right.T @ right, torch.eye(4), atol=1e-5)
        assert parameter.isfinite().all()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("ranks", [(2, 2, 2, 2, 2), (8, 3, 8, 1, 4)])
def test_partial_momentum_survives_bases_that_share_nothing(left: bool, ranks: tuple[int, ...]):
    for repeat in range(8):
        parameter = start(left)
        optimizer = PARTIAL([parameter], momentum_rank=4, **COMMON)
        through(optimizer, parameter, [seeded("srht", 10 * repeat + i, r) for i, r in enumerate(ranks)], left)
        assert parameter.isfinite().all()


def test_partial_momentum_keeps_its_accuracy_in_bfloat16_and_at_any_scale():
    """A gradient that stays is its own average, whatever is dropped."""
    gradient = numbers(0, ROWS, 1) @ numbers(1, 1, WIDTH)
    narrow, large = (nn.Parameter(torch.zeros(ROWS, WIDTH, dtype=d)) for d in (torch.bfloat16, torch.float32))
    options: dict[str, Any] = {"betas": (0.99, 0.99), "momentum_rank": 4, "lr": 1.0}
    optimizers = [PARTIAL([narrow], **options), PARTIAL([large], **options)]
    for _ in range(40):
        narrow.grad, large.grad = gradient.bfloat16(), gradient * 1e18
        for p, optimizer in zip((narrow, large), optimizers, strict=True):
            p.data.zero_()
            optimizer.step()
    for p in (narrow, large):
        assert torch.allclose(p.float(), -gradient.sign(), atol=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["gaussian", "sparse", "rademacher"])
def test_error_feedback_takes_any_basis(method: str, dtype: torch.dtype):
    for repeat in range(4):
        parameter = nn.Parameter(numbers(99, 6, 8).to(dtype))
        optimizer = OasisAdamW([parameter], **COMMON, error_feedback=True)
        for i in range(4):
            seed = step_seed(repeat, i)
            basis = Basis(method, 8, 8, round_keys(seed), seed)
            parameter.grad = LowRankGradient(numbers(i, 6, 8).to(dtype), basis, left=False)
            optimizer.step()
        assert parameter.isfinite().all()


def test_options_that_change_begin_anew():
    parameter = start(False)
    optimizer = AdaPM([parameter], momentum="none", lr=0.1)
    gradient = numbers(0, ROWS, WIDTH)
    for momentum, second in (("none", "full"), ("full", "row"), ("low_rank", "full"), ("full", "full")):
        optimizer.param_groups[0].update(momentum=momentum, second_moment=second)
        for i in range(3):
            before = parameter.detach().clone()
            parameter.grad = gradient.clone()
            optimizer.step()
            if second == "full" and (momentum != "low_rank" or i == 0):
                assert torch.allclose(parameter, before - 0.1 * gradient.sign(), atol=1e-4), (momentum, i)


def test_states_of_other_methods_and_of_before_an_option_load():
    parameter = start(False)
    optimizer = OasisAdamW([parameter], **COMMON)
    through(optimizer, parameter, [learned(1), seeded("gaussian", 2)], False)
    old = optimizer.state_dict()
    del old["param_groups"][0]["error_feedback"]
    again = OasisAdamW([parameter], **COMMON)
    again.load_state_dict(old)
    through(again, parameter, [seeded("gaussian", 3)], False)
    theirs = torch.optim.AdamW([parameter])
    AdaPM([parameter], momentum="full").load_state_dict(theirs.state_dict())


def test_a_group_that_is_refused_is_not_there():
    optimizer = AdaPM([start(False)], momentum="full")
    other = start(False)
    with pytest.raises(ValueError, match="named_parameters"):
        optimizer.add_param_group({"params": [other], "momentum": "auto"})
    optimizer.add_param_group({"params": [other], "momentum": "none"})
    with pytest.raises(ValueError, match="lr="):
        AdamW([start(False)], lr=torch.tensor(-1.0))  # pyright: ignore[reportArgumentType]


def test_a_parameter_moved_to_another_group_has_its_options():
    one, two = start(False), start(False)
    optimizer = OasisAdamW([("one", one), ("two", two)], lr=0.0)
    optimizer.add_param_group({"params": [("three", start(False))], "lr": 0.1})
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    before = two.detach().clone()
    two.grad = numbers(0, ROWS, WIDTH)
    optimizer.step()
    assert torch.allclose(two, before - 0.1 * two.grad.sign(), atol=1e-5)
    by_names = AdaPM([("one", one), ("two", two)])
    by_names.param_groups[0]["params"].pop()
    one.grad = numbers(0, ROWS, WIDTH)
    with pytest.raises(ValueError, match="'param_names' along"):
        by_names.step()


@every
@pytest.mark.parametrize("theirs", [partial(torch.optim.SGD, momentum=0.9), torch.optim.RMSprop, torch.optim.AdamW])
def test_a_state_of_another_optimizer_is_taken_as_far_as_it_goes(kind: Any, theirs: Any):
    parameter = start(False)
    other = theirs([parameter], lr=0.3)
    parameter.grad = numbers(0, ROWS, WIDTH)
    other.step()
    optimizer = kind([parameter], lr=0.1)
    if kind is WHOLE and "momentum" in other.param_groups[0]:
        with pytest.raises(ValueError, match=r"momentum=.*Allowed: 'auto'"):
            optimizer.load_state_dict(other.state_dict())
        assert optimizer.param_groups[0]["lr"] == 0.1  # nothing is taken of what is refused
        return
    optimizer.load_state_dict(other.state_dict())
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert parameter.isfinite().all()


def test_a_state_that_is_refused_changes_nothing():
    parameter = start(False)
    optimizer = AdamW([parameter], lr=0.1)
    parameter.grad = numbers(0, ROWS, WIDTH)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    theirs = torch.optim.Adafactor([parameter])  # its eps are two
    with pytest.raises(ValueError, match=r"eps=.*Allowed: a number"):
        optimizer.load_state_dict(theirs.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


@every
def test_steps_are_counted_whatever_the_default_dtype_and_device(kind: Any):
    optimizer = kind([parameter := start(False)], lr=0.1)
    parameter.grad = numbers(0, ROWS, WIDTH)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    step = optimizer.state[parameter]["step"]
    assert (step.dtype, step.device.type, int(step)) == (torch.float32, "cpu", 1)


def test_a_step_inside_a_compiled_function_is_the_step_outside():
    """Of several parameters of one shape, which Dynamo takes for one."""
    found = []
    for wrap in (lambda f: f, partial(torch.compile, backend="eager")):
        parameters = [start(False) for _ in range(3)]
        optimizer = CompActAdamW(parameters, lr=0.1)
        step = wrap(lambda optimizer=optimizer: optimizer.step())
        for i in range(3):
            for j, p in enumerate(parameters):
                p.grad = numbers(10 * i + j, ROWS, WIDTH)
            step()
        found.append([p.detach().clone() for p in parameters])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_kinds_of_blocks_go_by_their_names():
    matrix = torch.zeros(2, 2)
    named = {
        "none": ("model.embed_tokens.weight", "layers.0.self_attn.o_proj.weight", "h.0.attn.c_proj.weight", "wte.weight",
                 "encoder.layer.0.attention.output.dense.weight", "embeddings.word_embeddings.weight", "shared.weight",
                 "block.0.layer.0.SelfAttention.o.weight", "attention.out_lin.weight", "self_attn.dense.weight",
                 "attn.Wo.weight", "blocks.0.attn.proj.weight", "attn1.to_out.0.weight"),
        "full": ("layer.0.SelfAttention.v.weight", "attention.v_lin.weight", "attn.Wqkv.weight",
                 "layers.0.self_attn.v_proj.weight", "attention.self.value.weight", "h.0.attn.c_attn.weight",
                 "attention.self.value_proj.weight", "attention.self.value_global.weight", "attn1.to_v.weight"),
        "low_rank": ("layers.0.self_attn.q_proj.weight", "mlp.down_proj.weight", "h.0.mlp.c_proj.weight",
                     "encoder.layer.0.output.dense.weight", "encoder.layer.0.attention.self.key.weight", "lm_head.weight",
                     "text_embedder.layers.0.q_proj.weight", "layer.1.DenseReluDense.wo.weight", "embed_out.weight",
                     "electra.embeddings_project.weight", "albert.encoder.embedding_hidden_mapping_in.weight"),
    }  # fmt: skip
    for kind, names in named.items():
        for name in names:
            assert momentum_kind("auto", name, matrix) == kind, name
    assert momentum_kind("auto", "norm.weight", torch.zeros(2)) == "full"
    with pytest.raises(ValueError, match="named_parameters"):
        AdaPM([start(False)])


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("method", ["gaussian", "haar"])
def test_with_error_feedback_nothing_of_the_moment_is_lost(method: str, left: bool):
    """The moment, lifted, plus what waits is the moving average of all gradients, whatever bases they lie in."""
    parameter = start(left)
    optimizer = OasisAdamW([parameter], **COMMON, error_feedback=True)
    bases = [seeded(method, d) for d in (1, 1, 2, 3, 3, 4)]
    average = torch.zeros_like(parameter)
    for i, basis in enumerate(bases):
        through(optimizer, parameter, [basis], left)
        gradient = parameter.grad.dense()  # pyright: ignore[reportOptionalMemberAccess]
        average = BETA1 * average + (1 - BETA1) * gradient
        state, p = optimizer.state[parameter], basis.matrix()
        moment = p @ state["exp_avg"] if left else state["exp_avg"] @ p.T
        if i > 1:
            assert not torch.allclose(moment, average, atol=1e-3)
            moment = moment + state["error"]
        assert torch.allclose(moment, average, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_state_takes_the_bytes_of_the_coefficients(kind: Any):
    parameter = start(False)
    optimizer = kind([parameter], **COMMON)
    through(optimizer, parameter, [seeded("haar", 1)], False)
    state = optimizer.state[parameter]
    held = sum(t.numel() for k, t in state.items() if isinstance(t, torch.Tensor) and k != "step")
    assert held == 2 * ROWS * RANK


@pytest.mark.parametrize("kind", [*ALL, PARTIAL])
@pytest.mark.parametrize("ranks", [(4, 4), (4, 6), (6, 4)])
@pytest.mark.parametrize("method", ["haar", "oasis"])
def test_resume_is_bitwise_across_a_refresh_and_a_change_of_rank(kind: Any, ranks: tuple[int, int], method: str):
    def basis(draw: int, rank: int) -> Basis:
        return learned(draw, rank) if method == "oasis" else seeded(method, draw, rank)

    first, second = basis(1, ranks[0]), basis(2, ranks[1])
    bases = [first, first, second, second]
    for stop in (1, 2, 3):
        parameter = start(False)
        optimizer = kind([parameter], **COMMON)
        want = through(optimizer, parameter, bases, False)[-1]

        parameter = start(False)
        optimizer = kind([parameter], **COMMON)
        through(optimizer, parameter, bases[:stop], False)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed = nn.Parameter(parameter.detach().clone())
        optimizer = kind([resumed], lr=1.0)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
        loaded: dict[int, Basis] = {}  # as they come from a file
        for i in range(stop, len(bases)):
            b = bases[i]
            if b.state is not None:
                again = Basis(b.projection, b.width, b.rank, b.key.clone(), b.draw, b.unbiased, b.state.clone())
                b = loaded.setdefault(id(b), again)
            resumed.grad = LowRankGradient(numbers(i, ROWS, b.rank), b, left=False)
            optimizer.step()
        assert torch.equal(resumed, want), stop


@pytest.mark.parametrize("kind", [*ALL, PARTIAL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_that_are_not_float32_resume_bitwise(kind: Any, dtype: torch.dtype):
    """Torch casts what it loads to the weight's dtype, and a subspace is float32."""

    def train(parameter: nn.Parameter, optimizer: Any, draws: list[int]) -> None:
        for draw in draws:
            parameter.grad = LowRankGradient(numbers(draw, ROWS, RANK).to(dtype), learned(draw), left=False)
            optimizer.step()

    parameter = nn.Parameter(start(False).detach().to(dtype))
    optimizer = kind([parameter], **COMMON)
    train(parameter, optimizer, [1, 2])
    resumed = nn.Parameter(parameter.detach().clone())
    other = kind([resumed], **COMMON)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(parameter, optimizer, [3, 4])
    train(resumed, other, [3, 4])
    assert torch.equal(resumed, parameter)


@pytest.mark.parametrize("kind", [*ALL, PARTIAL])
def test_a_step_inside_autocast_is_the_step_outside(kind: Any):
    found = []
    for enabled in (False, True):
        parameter = start(False)
        optimizer = kind([parameter], **COMMON)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            through(optimizer, parameter, [learned(1), learned(2), seeded("haar", 3)], False)
            assert isinstance(parameter.grad, LowRankGradient)
            found.append((parameter.detach(), parameter.grad.dense(), parameter.grad.squared_norm()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [*ALL, PARTIAL])
def test_moments_of_the_other_side_of_a_weight_are_forgotten(kind: Any):
    """One graph reads it as x W^T, another as x W."""
    square = nn.Parameter(numbers(99, WIDTH, WIDTH))
    optimizer = kind([square], lr=0.1, weight_decay=0.0)
    for i, left in enumerate((False, True)):
        basis, before = seeded("haar", i), square.detach().clone()
        square.grad = LowRankGradient(numbers(i, *((RANK, WIDTH) if left else (WIDTH, RANK))), basis, left=left)
        optimizer.step()
    moved = basis.matrix().t() @ (square.detach() - before) / (WIDTH / RANK)
    size = 0.1 * (0.25 if kind is CompActAdamW else 1.0)
    assert torch.allclose(moved.abs(), torch.full_like(moved, size), atol=1e-5)  # Adam's first step


@every
def test_the_contract_of_torch_optimizers(kind: Any):
    a, b = start(False), nn.Parameter(torch.ones(3))
    optimizer = kind([{"params": [a], "lr": 0.5}, {"params": [b], "weight_decay": 0.0}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = a.square().sum() + b.square().sum()
        loss.backward()
        return loss

    before = float(closure())
    for _ in range(3):
        assert float(optimizer.step(closure)) <= before
        schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.0625, 0.0125]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.3})
    assert len(optimizer.param_groups) == 3
    twin = copy.deepcopy(optimizer)
    assert torch.equal(next(iter(twin.state.values()))["exp_avg"], optimizer.state[a]["exp_avg"])
    optimizer.zero_grad(set_to_none=False)
    assert float(a.grad.norm()) == 0.0  # pyright: ignore[reportOptionalMemberAccess]
    optimizer.zero_grad()
    assert a.grad is None
    at = a.detach().clone()
    optimizer.step()  # nothing to do
    assert torch.equal(a, at)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": -1.0}, "lr"), ({"betas": (1.0, 0.9)}, "betas"), ({"eps": -1.0}, "eps"), ({"weight_decay": -1.0}, "weight_decay")],
)
@every
def test_options_out_of_range_are_refused(kind: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"{message}=.*Allowed"):
        kind([start(False)], **options)


METHODS: list[Any] = [
    (CompActAdamW, {"projection": "gaussian", "refresh_interval": 5, "rank": 0.5}),
    (OasisAdamW, {"projection": "oasis", "rank": 0.5}),
    (LazySubspaceAdamW, {"projection": "haar", "refresh_interval": 5, "rank": 0.5}),
    (AdaPM, {"projection": "haar", "refresh_interval": 5, "rank": 0.5}),
    (AdamW, {"projection": "haar", "refresh_interval": 5, "rank": 0.5}),
    (AdamW, {"policy": "exact", "weight_gradient_format": "dense"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), METHODS)
def test_a_model_learns_and_resumes_bitwise(kind: Any, options: dict[str, Any], tmp_path: Any):
    """One optimizer for all parameters; clipping and a schedule; stopped in the middle, across a refresh."""
    options = {"weight_gradient_format": "low_rank", **options}

    def begin() -> Any:
        torch.compiler.reset()
        model, inputs = models.transformer(layers=1)
        optimizer = kind(model.named_parameters() if kind is AdaPM else model.parameters(), lr=3e-3)
        return model, inputs, optimizer, torch.compile(model, backend=eager_actcomp(options))

    def train(model: Any, inputs: Any, optimizer: Any, run: Any, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(run(**inputs))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        return losses

    STEP_COUNTER.steps = 0
    STORE.clear()
    parts = begin()
    losses = train(*parts, 12)
    assert losses[-1] < 0.8 * losses[0]
    want = copy.deepcopy(parts[0].state_dict())

    STEP_COUNTER.steps = 0
    STORE.clear()
    parts = begin()
    train(*parts, 7)
    model, _, optimizer, _ = parts
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "actpass": actpass.state_dict(model)}
    torch.save(saved, tmp_path / "run.pt")
    STEP_COUNTER.steps = 99
    STORE.clear()
    parts = begin()
    model, _, optimizer, _ = parts
    data = torch.load(tmp_path / "run.pt", weights_only=True)
    model.load_state_dict(data["model"])
    optimizer.load_state_dict(data["optimizer"])
    actpass.load_state_dict(model, data["actpass"])
    train(*parts, 5)
    for n, t in model.state_dict().items():
        assert torch.equal(t, want[n]), n


def test_nothing_waits_once_error_feedback_is_off():
    optimizer = OasisAdamW([parameter := start(False)], **COMMON, error_feedback=True)
    through(optimizer, parameter, [seeded("haar", i) for i in range(3)], False)
    assert "error" in optimizer.state[parameter]
    optimizer.param_groups[0]["error_feedback"] = False
    through(optimizer, parameter, [seeded("haar", 2)], False)
    assert "error" not in optimizer.state[parameter]


@every
@pytest.mark.parametrize("kinds", ["DL", "LDL", "DDLL", "LLDD"])
def test_dense_steps_between_others_begin_anew(kind: Any, kinds: str):
    """D: a dense gradient, L: one in factors. Of the update's size nothing is left of moments of another kind."""
    parameter = start(False)
    optimizer = kind([parameter], lr=0.1, weight_decay=0.0)
    for i, letter in enumerate(kinds):
        dense = letter == "D"
        basis = seeded("haar", i)
        parameter.grad = numbers(i, ROWS, WIDTH) if dense else LowRankGradient(numbers(i, ROWS, RANK), basis, left=False)
        before = parameter.detach().clone()
        optimizer.step()
        changed = i == 0 or letter != kinds[i - 1]
        moved = (parameter.detach() - before) if dense else (parameter.detach() - before) @ basis.matrix() / (WIDTH / RANK)
        if changed:  # Adam's first step: lr in every coordinate, times alpha
            size = 0.1 * (1.0 if dense or kind is not CompActAdamW else 0.25)
            assert torch.allclose(moved.abs(), torch.full_like(moved, size), atol=1e-5)
