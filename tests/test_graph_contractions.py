"""The dangerous file is the one that says what a weight-gradient matmul is. Negative tests first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from actpass.diagnostics.explain import explain_model
from actpass.reporting import Record

D = 32


def read(model: nn.Module, *inputs: torch.Tensor, **options) -> tuple[set[str], dict[str, str], Record]:
    """(parameters whose gradient is contracted through a projection, reasons of those left alone, record)."""
    options = {"projection": "rademacher", "rank": 0.25, "skip_unprofitable": False, **options}
    (region,) = explain_model(model, inputs, {}, options).regions
    record = region.record
    assert record.active, record.inactive_because
    projected = {p for site in record.sites if site.projection for p in site.parameters}
    return projected, {parameter: reason for _, parameter, reason in record.rejected}, record


class Module(nn.Module):
    """A model from a function of (self, *inputs); parameters as keyword arguments."""

    def __init__(self, function: Callable[..., torch.Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(self, *inputs).square().mean()


def weight(*shape: int, trained: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.1, requires_grad=trained)


# ---- what must not be mistaken for a contraction


def test_contractions_input_gradient_is_none():
    """dX = dy W is a matmul of a backward value with a forward value, too; here it is the only one."""
    model = Module(lambda m, x: F.linear(x.exp(), m.w), w=weight(D, D, trained=False))
    x = torch.randn(8, D, requires_grad=True)
    projected, _, record = read(model, x)
    assert projected == set()
    assert record.plan["decisions"] == []


def test_contractions_attention_products_are_none():
    """Both factors of q k^T and of p v are activations; their gradients are no parameter's."""

    def attention(m, x):
        q, k, v = m.q(x), m.k(x), m.v(x)
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v

    model = Module(attention, q=nn.Linear(D, D), k=nn.Linear(D, D), v=nn.Linear(D, D))
    projected, _, record = read(model, torch.randn(2, 8, D))
    assert projected == {"q.weight", "k.weight", "v.weight"}
    assert len(record.plan["decisions"]) == 1  # one x, shared by the three


def test_contractions_tied_embedding_and_head_are_left_alone():
    def tied(m, tokens):
        return F.linear(m.mid(m.emb(tokens)), m.emb.weight)

    model = Module(tied, emb=nn.Embedding(64, D), mid=nn.Linear(D, D))
    projected, alone, _ = read(model, torch.randint(0, 64, (2, 8)))
    assert projected == {"mid.weight"}
    assert "tied" in alone["emb.weight"]


def test_contractions_embedding_gradient_is_none_and_says_why():
    model = Module(lambda m, t: m.emb(t), emb=nn.Embedding(64, D))
    projected, alone, _ = read(model, torch.randint(0, 64, (2, 8)))
    assert projected == set()
    assert "no matmul" in alone["emb.weight"]


def test_contractions_frozen_weight_is_none():
    model = Module(lambda m, x: m.b(F.gelu(m.a(x))), a=nn.Linear(D, D), b=nn.Linear(D, D))
    model.b.weight.requires_grad_(False)
    projected, _, _ = read(model, torch.randn(8, D))
    assert projected == {"a.weight"}


def test_contractions_product_of_weights_is_no_activation():
    """A forward value made of parameters alone is a weight: d(w1) = (w2^T dy^T x)... contracts with w2, not with data."""
    model = Module(lambda m, x: x @ (m.w1 @ m.w2), w1=weight(D, D), w2=weight(D, D))
    projected, alone, _ = read(model, torch.randn(8, D))
    assert projected == set()
    assert set(alone) == {"w1", "w2"}


def test_contractions_normalised_weight_is_left_alone():
    """The gradient of v in w = v / |v| is no matmul's result: it goes through a product."""
    model = Module(lambda m, x: F.linear(x, m.v / m.v.norm(dim=1, keepdim=True)), v=weight(D, D))
    projected, alone, _ = read(model, torch.randn(8, D))
    assert projected == set()
    assert "v" in alone


def test_contractions_gradient_read_twice_is_left_alone():
    """If anything but a weight gradient reads the product, changing it would change more than weight gradients."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, b):
            ctx.save_for_backward(x, w)
            return x @ w.t() + b

        @staticmethod
        def backward(ctx, dy):
            x, w = ctx.saved_tensors
            dw = dy.t() @ x
            return dy @ w, dw, dw.sum(1) * 2

    model = Module(lambda m, x: Twice.apply(x.exp(), m.w, m.b), w=weight(D, D), b=weight(D))
    projected, alone, _ = read(model, torch.randn(8, D))
    assert projected == set()
    assert "also read by" in alone["w"]


def test_contractions_checkpointed_input_is_left_alone():
    from torch.utils.checkpoint import checkpoint

    def block(m, x):
        return checkpoint(lambda h: m.b(F.gelu(m.a(h.exp()))), m.stem(x), use_reentrant=False)

    model = Module(block, stem=nn.Linear(D, D), a=nn.Linear(D, D), b=nn.Linear(D, D))
    projected, alone, _ = read(model, torch.randn(8, D))
    assert projected == {"stem.weight"}
    assert "activation checkpointing" in alone["b.weight"]


def test_contractions_keep_override_leaves_exact():
    model = Module(lambda m, x: m.b(F.gelu(m.a(x))), a=nn.Linear(D, D), b=nn.Linear(D, D))
    projected, _, _ = read(model, torch.randn(8, D), module_overrides={"b": "save"})
    assert projected == {"a.weight"}


# ---- what must be found


class Conv1D(nn.Module):
    """GPT-2's linear: the weight is (N, M)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = weight(D, 3 * D), weight(3 * D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


FOUND: dict[str, tuple[nn.Module, tuple[int, ...], set[str]]] = {
    "linear_2d": (Module(lambda m, x: m.a(x), a=nn.Linear(D, D)), (8, D), {"a.weight"}),
    "linear_3d": (Module(lambda m, x: m.a(x), a=nn.Linear(D, D)), (2, 8, D), {"a.weight"}),
    "linear_4d": (Module(lambda m, x: m.a(x), a=nn.Linear(D, D)), (2, 2, 8, D), {"a.weight"}),
    "linear_without_bias": (Module(lambda m, x: m.a(x), a=nn.Linear(D, 12, bias=False)), (8, D), {"a.weight"}),
    "conv1d": (Module(lambda m, x: m.a(x), a=Conv1D()), (2, 8, D), {"a.weight"}),
    "mm": (Module(lambda m, x: torch.mm(x, m.w), w=weight(D, 16)), (8, D), {"w"}),
    "mm_weight_left": (Module(lambda m, x: torch.mm(m.w, x), w=weight(16, D)), (D, 8), {"w"}),
    "addmm": (Module(lambda m, x: torch.addmm(m.b, x, m.w), w=weight(D, 16), b=weight(16)), (8, D), {"w"}),
    "bmm_experts": (Module(lambda m, x: torch.bmm(x, m.w), w=weight(4, D, 16)), (4, 8, D), {"w"}),
    "bmm_experts_transposed": (
        Module(lambda m, x: torch.bmm(x, m.w.transpose(1, 2)), w=weight(4, 16, D)),
        (4, 8, D),
        {"w"},
    ),
    "baddbmm": (
        Module(lambda m, x: torch.baddbmm(m.b, x, m.w), w=weight(4, D, 16), b=weight(4, 1, 16)),
        (4, 8, D),
        {"w"},
    ),
    "einsum": (Module(lambda m, x: torch.einsum("btn,mn->btm", x, m.w), w=weight(16, D)), (2, 8, D), {"w"}),
    "einsum_heads": (Module(lambda m, x: torch.einsum("btn,nhd->bthd", x, m.w), w=weight(D, 4, 8)), (2, 8, D), {"w"}),
    "einsum_experts": (Module(lambda m, x: torch.einsum("etn,enm->etm", x, m.w), w=weight(4, D, 16)), (4, 8, D), {"w"}),
    "permuted_input": (Module(lambda m, x: m.a(x.transpose(0, 1)), a=nn.Linear(D, D)), (2, 8, D), {"a.weight"}),
    "chunked_input": (Module(lambda m, x: m.a(x.chunk(2, -1)[1]), a=nn.Linear(D, D)), (8, 2 * D), {"a.weight"}),
    "weight_used_twice": (
        Module(lambda m, x: m.a(F.gelu(m.a(x))), a=nn.Linear(D, D)),
        (8, D),
        {"a.weight"},
    ),
    "fused_qkv_weight": (
        Module(lambda m, x: sum(F.linear(x, w) for w in m.w.chunk(3)), w=weight(3 * D, D)),
        (8, D),
        {"w"},
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_contractions_finds(name: str):
    model, shape, expected = FOUND[name]
    projected, alone, _ = read(model, torch.randn(*shape))
    assert projected == expected, alone


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_contractions_finds_in_half_precision(dtype: torch.dtype):
    model = Module(lambda m, x: m.b(F.gelu(m.a(x))), a=nn.Linear(D, D), b=nn.Linear(D, D)).to(dtype)
    projected, _, _ = read(model, torch.randn(8, D, dtype=dtype))
    assert projected == {"a.weight", "b.weight"}


def test_contractions_finds_one_site_for_qkv_under_autocast():
    """Each projection carries its own cast of x; they are one tensor, one basis, one z."""

    def qkv(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            h = F.layer_norm(x, (D,))
            return m.q(h) + m.k(h) + m.v(h)

    model = Module(qkv, q=nn.Linear(D, D), k=nn.Linear(D, D), v=nn.Linear(D, D))
    projected, _, record = read(model, torch.randn(2, 8, D))
    assert projected == {"q.weight", "k.weight", "v.weight"}
    assert len(record.plan["decisions"]) == 1


def test_contractions_finds_lora_on_frozen_weight():
    """x is kept only for dA (peft#2468): a site whose bytes are freed."""

    def lora(m, x):
        h = m.stem(x)  # a matmul output: can't be rebuilt for free
        return m.w(h) + m.b(m.a(h))

    model = Module(lora, stem=nn.Linear(D, D), w=nn.Linear(D, D), a=nn.Linear(D, 4), b=nn.Linear(4, D))
    model.w.requires_grad_(False)
    model.stem.requires_grad_(False)
    projected, _, record = read(model, torch.randn(64, D), module_overrides={"b": "save"})
    assert projected == {"a.weight"}
    (site,) = [s for s in record.sites if s.projection]
    assert site.form == "project"
    assert site.bytes_after == 64 * (D // 4) * 4


def test_contractions_grouped_mm_rounds_rank_to_its_kernel():
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, D, 16, dtype=torch.bfloat16))

        def forward(self, x, offsets):
            return F.grouped_mm(x, self.w, offs=offsets).float().square().mean()

    offsets = torch.tensor([4, 8, 12, 16], dtype=torch.int32)
    projected, alone, record = read(Experts(), torch.randn(16, D, dtype=torch.bfloat16), offsets, rank=3)
    assert projected == {"w"}, alone
    (decision,) = record.plan["decisions"]
    assert decision["rank"] == 8  # rows of 16 bytes
