"""Attention masks that say no more than ``is_causal=True`` are left out; all others are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import transformers
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import actpass
from actpass.analysis.allowed_keys import Allowed, MaskReader, allowed
from actpass.backend import attention_masks
from actpass.backend.attention_masks import infer_masks
from actpass.diagnostics.explain import explain_model
from actpass.torch_compat import FakeTensorMode

from .helpers import EPS, assert_close, assert_equal, eager_actcomp, error, step

QUERIES = 12
WORDS = 64


# ----------------------------------------------------------------------------------------------------------------- reading


def read(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Allowed | None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        graph = make_fx(function)(*[mode.from_tensor(x) for x in inputs])
    return allowed(MaskReader(graph).run(*inputs))


def dense(found: Allowed, shape: torch.Size) -> torch.Tensor:
    """``found`` as a mask of truth values."""
    key = torch.arange(found.keys)
    return ((found.lo[..., None] <= key) & (key < found.hi[..., None])).expand(shape)


def as_truth(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def positions(n: int = QUERIES) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(n)[:, None], torch.arange(n)[None, :]


def packed(documents: torch.Tensor) -> torch.Tensor:
    q, k = positions()
    return (k <= q) & (documents[:, :, None] == documents[:, None, :])


def padded(keep: torch.Tensor) -> torch.Tensor:
    q, k = positions()
    return (k <= q) & keep.bool()[:, None, None, :]


LOWEST = torch.finfo(torch.float32).min
ONES = torch.ones(QUERIES, QUERIES)
CAUSAL: dict[str, Callable[[], torch.Tensor]] = {
    "comparison": lambda: positions()[1] <= positions()[0],
    "turned": lambda: positions()[0] >= positions()[1],
    "strict": lambda: positions()[1] < positions()[0] + 1,
    "negated": lambda: ~(positions()[1] > positions()[0]),
    "difference": lambda: positions()[0] - positions()[1] >= 0,
    "difference of keys": lambda: positions()[1] - positions()[0] < 1,
    "tril": lambda: torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril(),
    "triu of -inf": lambda: torch.full((QUERIES, QUERIES), float("-inf")).triu(1),
    "additive": lambda: torch.where(positions()[1] <= positions()[0], 0.0, LOWEST),
    "filled": lambda: torch.zeros(QUERIES, QUERIES).masked_fill(positions()[1] > positions()[0], float("-inf")),
    "product": lambda: (1.0 - torch.ones(QUERIES, QUERIES).tril()) * LOWEST,
    "wide window": lambda: (positions()[1] <= positions()[0]) & (positions()[1] > positions()[0] - QUERIES),
    "heads": lambda: (positions()[1] <= positions()[0])[None, None].expand(2, 3, -1, -1).clone(),
    "cast": lambda: (positions()[1] <= positions()[0]).to(torch.int64).bool(),
}
OTHERS: dict[str, Callable[[], torch.Tensor]] = {
    "window": lambda: (positions()[1] <= positions()[0]) & (positions()[1] > positions()[0] - 3),
    "one more": lambda: positions()[1] <= positions()[0] + 1,
    "one fewer": lambda: positions()[1] < positions()[0],
    "anticausal": lambda: positions()[1] >= positions()[0],
    "even blocks": lambda: positions()[1] // 4 <= positions()[0] // 4,
    "two documents": lambda: packed((torch.arange(QUERIES) // 5)[None]),
}
UNKNOWN: dict[str, Callable[[], torch.Tensor]] = {
    "prefix or causal": lambda: (positions()[1] <= positions()[0]) | (positions()[1] < 4),
    "unsorted": lambda: (positions()[1] * 5) % 7 <= positions()[0],
    "sloped": lambda: torch.where(positions()[1] <= positions()[0], 0.0, -3.0),
    "prefix": lambda: positions()[1] < 5 + 0 * positions()[0],
    "strided": lambda: (positions()[1] <= positions()[0]) & (positions()[1] % 2 == 0),
    "biased": lambda: (positions()[1] - positions()[0]) * 0.5,
    "turned": lambda: (positions()[1] <= positions()[0]).t(),
    "wraps around": lambda: positions()[0].to(torch.uint8) - positions()[1].to(torch.uint8) >= 0,
    "not a number": lambda: positions()[1].float() <= torch.where(positions()[0] == QUERIES - 1, float("nan"), positions()[0]),
    "a product": lambda: positions()[1].float() <= positions()[0].float() @ torch.ones(1, 1),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_what_is_causal_is_seen(name: str) -> None:
    found = read(CAUSAL[name])
    assert found is not None
    assert found.is_causal
    assert not found.is_all
    mask = as_truth(CAUSAL[name]())
    assert torch.equal(dense(found, mask.shape), mask)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_causal_is_not_taken_for_it(name: str) -> None:
    found = read(OTHERS[name])
    assert found is not None
    assert not found.is_causal
    assert not found.is_all
    mask = as_truth(OTHERS[name]())
    assert torch.equal(dense(found, mask.shape), mask)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_no_interval_is_unknown(name: str) -> None:
    assert read(UNKNOWN[name]) is None


def test_padding_is_read_from_values() -> None:
    keep = torch.ones(2, QUERIES, dtype=torch.int64)
    found = read(padded, keep)
    assert found is not None
    assert found.is_causal
    keep[1, 7:] = 0
    assert read(padded, keep) is None
    every = read(lambda keep: keep.bool()[:, None, None, :].expand(2, 1, QUERIES, QUERIES), torch.ones(2, QUERIES))
    assert every is not None
    assert every.is_all
    assert not every.is_causal


def test_documents_are_read_from_values() -> None:
    one = read(packed, torch.zeros(1, QUERIES, dtype=torch.int64))
    assert one is not None
    assert one.is_causal
    several = read(packed, torch.tensor([[0] * 5 + [1] * 4 + [2] * 3]))
    assert several is not None
    assert not several.is_causal
    assert several.longest == 5
    assert read(packed, torch.tensor([[0, 1, 0] * 4])) is None


def test_a_random_mask_is_unknown() -> None:
    assert read(lambda: torch.rand(QUERIES, QUERIES) < 0.5) is None
    assert read(lambda: (torch.rand(QUERIES)[:, None] < 2) & (positions()[1] <= positions()[0])) is None


def test_no_tensor_of_queries_by_keys_is_made() -> None:
    n = 100_000  # 10 GB of truth values

    def mask() -> torch.Tensor:
        q, k = positions(n)
        return torch.where((k <= q) & (k > q - n) & torch.ones(n, n, dtype=torch.bool), 0.0, float("-inf"))

    found = read(mask)
    assert found is not None
    assert found.is_causal


ATOMS = st.sampled_from(["<=", "<", ">=", ">", "==", "!="])


@st.composite
def masks(draw: st.DrawFn) -> Callable[[], torch.Tensor]:
    """Random formulas of comparisons of vectors along queries with vectors along keys."""
    atoms = []
    for _ in range(draw(st.integers(1, 3))):
        q, k = (draw(st.lists(st.integers(-2, 6), min_size=6, max_size=6)) for _ in range(2))
        k = sorted(k) if draw(st.integers(0, 4)) else k
        atoms.append(
            (torch.tensor(q)[:, None], torch.tensor(k)[None, :], draw(ATOMS), draw(st.booleans()), draw(st.booleans()))
        )
    joints = [draw(st.sampled_from(["and", "or", "where", "add"])) for _ in atoms]

    def mask() -> torch.Tensor:
        made: Any = None
        for (q, k, sign, turned, negated), joint in zip(atoms, joints, strict=True):
            one = _compared(k, q, sign) if turned else _compared(q, k, sign)
            one = ~one if negated else one
            if made is None:
                made = one
            elif joint == "and":
                made = made & one
            elif joint == "or":
                made = made | one
            elif joint == "where":
                made = torch.where(one, made, torch.zeros((), dtype=torch.bool))
            else:
                made = (made.long() + one.long()) > 1
        return torch.where(made, 0.0, float("-inf"))

    return mask


def _compared(a: torch.Tensor, b: torch.Tensor, sign: str) -> torch.Tensor:
    return {"<=": a <= b, "<": a < b, ">=": a >= b, ">": a > b, "==": a == b, "!=": a != b}[sign]


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(masks())
def test_what_is_read_is_what_the_mask_says(mask: Callable[[], torch.Tensor]) -> None:
    found = read(mask)
    truth = as_truth(mask())
    if found is not None:
        assert torch.equal(dense(found, truth.shape), truth)
        assert found.is_all == bool(truth.all())
        assert found.is_causal == torch.equal(truth, torch.ones_like(truth).tril())


# ------------------------------------------------------------------------------------------------------------------ models


def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, max_position_embeddings=256, pad_token_id=0, **fields,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def told() -> Any:
    """The same, told that its attention is causal: it makes no mask, as in eager mode."""
    transformers.AttentionInterface.register("causal_sdpa", transformers.AttentionInterface()["sdpa"])
    transformers.AttentionMaskInterface.register("causal_sdpa", lambda *_, **__: None)
    return llama(attn_implementation="causal_sdpa")


def windowed(window: int, kind: str = "mistral") -> Any:
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "use_cache": False, "sliding_window": window, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(num_hidden_layers=2, **fields)).train()
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(num_hidden_layers=3, layer_types=layers, **fields)
    ).train()


def batch(n: int = 48, rows: int = 2, **more: Any) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, WORDS, (rows, n), generator=torch.Generator().manual_seed(n))
    return {"input_ids": tokens, "labels": tokens.clone(), **more}


class Counting:
    """The pass, interpreted, which counts the graphs with attention that it is given."""

    def __init__(self, **options: Any) -> None:
        self.backend = eager_actcomp({"policy": "exact", "chunked_loss": False, **options})
        self.graphs = 0

    def __call__(self, gm: Any, *args: Any, **more: Any) -> Any:
        compiled = self.backend(gm, *args, **more)  # raises where Dynamo starts again
        self.graphs += any(n.target is F.scaled_dot_product_attention for n in gm.graph.nodes)
        return compiled


def notes(model: nn.Module) -> list[str]:
    return [n for r in actpass.report(model).regions for n in r.notes if "the mask of" in n]


def squares(model: nn.Module, inputs: dict[str, torch.Tensor], n: int, **options: Any) -> list[str]:
    """Tensors of queries x keys in the two graphs."""
    graphs = [g for c in explain_model(model, (), inputs, options).regions for g in (c.forward, c.backward)]
    nodes = [(node, node.meta.get("val")) for g in graphs for node in g.graph.nodes]
    return [node.name for node, v in nodes if isinstance(v, torch.Tensor) and tuple(v.shape[-2:]) == (n, n)]


def assert_as_eager(run: Any, model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    want, wanted = step(model, model, inputs)
    got, gradients = step(run, model, inputs)
    assert error(got, want) < 8 * EPS
    assert_close(gradients, wanted, 2e-5)


def test_a_llama_does_what_its_eager_mode_does() -> None:
    losses, gradients = [], []
    for model in (llama(), told()):
        loss, grads = step(torch.compile(model, backend=Counting()), model, batch())
        losses.append(loss)
        gradients.append(grads)
        (note,) = notes(model) or ["none"]
        assert note == (
            "the mask of 2x1x48x48 of 2 attentions is left out: they are told is_causal=True" if len(losses) == 1 else "none"
        )
    assert torch.equal(*losses)
    assert_equal(*gradients)
    assert not squares(llama(), batch(), 48, policy="exact")
    assert squares(llama(), batch(), 48, policy="exact", infer_masks=False)


def test_inductors_own_step_keeps_its_mask() -> None:
    assert squares(llama(), batch(), 48, policy="exact", memory_budget=1.0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_a_graph_of_its_own(side: str) -> None:
    model, backend = llama(), Counting()
    run = torch.compile(model, backend=backend)
    ones = torch.ones(2, 48, dtype=torch.int64)
    short = ones.clone()
    short[1, slice(0, 9) if side == "left" else slice(-9, None)] = 0
    full, padded = batch(attention_mask=ones), batch(attention_mask=short)
    padded["labels"] = padded["labels"].masked_fill(short == 0, -100)
    assert_as_eager(run, model, full)
    assert notes(model)[0].endswith("['attention_mask'] say so, which is checked at each call")
    for inputs in (full, padded, full, padded):
        assert_as_eager(run, model, inputs)
    assert backend.graphs == 2
    less = {**padded, "attention_mask": short.clone()}
    less["attention_mask"][0, slice(0, 2) if side == "left" else slice(-2, None)] = 0
    assert_as_eager(run, model, less)
    assert backend.graphs == 2


def test_the_first_batch_may_be_padded() -> None:
    model, backend = llama(), Counting()
    run = torch.compile(model, backend=backend)
    short = torch.ones(2, 48, dtype=torch.int64)
    short[1, 40:] = 0
    assert_as_eager(run, model, batch(attention_mask=short))
    assert "stays" in notes(model)[0]
    assert_as_eager(run, model, batch(attention_mask=torch.ones(2, 48, dtype=torch.int64)))
    assert backend.graphs == 2


def test_an_encoder_without_padding_needs_no_mask() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model, backend = transformers.BertForMaskedLM(config).train(), Counting()
    run = torch.compile(model, backend=backend)
    ones = torch.ones(2, 48, dtype=torch.int64)
    short = ones.clone()
    short[0, 30:] = 0
    for mask in (ones, short, ones):
        assert_as_eager(run, model, batch(attention_mask=mask))
    assert backend.graphs == 2
    assert "it allows every key" in " ".join(notes(model))


def test_packed_sequences_keep_their_mask() -> None:
    model, backend = llama(), Counting()
    run = torch.compile(model, backend=backend)
    packed = torch.cat([torch.arange(20), torch.arange(28)])[None]
    other = torch.cat([torch.arange(9), torch.arange(39)])[None]
    plain = torch.arange(48)[None]
    for given in (packed, plain, other, packed):
        assert_as_eager(run, model, batch(rows=1, position_ids=given))
    assert backend.graphs == 2


@pytest.mark.parametrize("kind", ["mistral", "gemma"])
def test_windows(kind: str) -> None:
    model = windowed(16, kind)
    assert_as_eager(torch.compile(model, backend=Counting()), model, batch())
    about = notes(model)
    assert any("stays: it allows each query up to 16 of 48 keys" in n for n in about)
    assert any("left out" in n for n in about) == (kind == "gemma")
    model = windowed(48, kind)
    assert_as_eager(torch.compile(model, backend=Counting()), model, batch())
    assert all("left out" in n for n in notes(model))


def test_a_length_beyond_the_window_takes_a_graph_of_its_own() -> None:
    model, backend = windowed(32), Counting()
    run = torch.compile(model, backend=backend, dynamic=True)
    for n in (16, 24, 40, 56, 20, 32, 33):
        assert_as_eager(run, model, batch(n))
    assert backend.graphs == 2


def test_lengths_share_a_graph() -> None:
    model, backend = llama(), Counting()
    run = torch.compile(model, backend=backend, dynamic=True)
    for n, rows in ((16, 2), (24, 3), (100, 2)):
        assert_as_eager(run, model, batch(n, rows))
    assert backend.graphs == 1
    assert "left out" in notes(model)[0]


def test_checkpointed_layers() -> None:
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_as_eager(torch.compile(model, backend=Counting()), model, batch())
    assert "left out" in notes(model)[0]
    assert not squares(model, batch(), 48, policy="exact")


class Attention(nn.Module):
    """One attention whose mask ``make`` makes."""

    def __init__(self, make: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.qkv, self.make = nn.Linear(32, 96), make
        self.register_buffer("causal", torch.ones(16, 16, dtype=torch.bool).tril())

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (t.view(2, 16, 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = self.make(self, x) if mask is None else mask
        return F.scaled_dot_product_attention(q, k, v, mask).square().mean()


def written(_: Attention, __: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[:, 8:] = False
    mask[0] = True
    return mask


def _written_through(view: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    view(mask)[:, 0] = True
    return mask


def of_activations(_: Attention, x: torch.Tensor) -> torch.Tensor:
    q, k = positions(16)
    return (k <= q) & ((x[:, None, :, :1] < 100) | (k == 0))


KEPT: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "trained": (lambda m, _: torch.full((16, 16), float("-inf")).triu(1) + m.qkv.bias[:16], "which is trained"),
    "written": (written, "is written in place"),
    "written through a view": (lambda m, x: _written_through(lambda mask: mask.unfold(1, 4, 4)), "is written in place"),
    "written through what copies nothing": (
        lambda m, x: _written_through(lambda mask: mask.contiguous()),
        "is written in place",
    ),
    "buffer": (lambda m, _: m.causal, "it is an input"),
    "view of a buffer": (lambda m, _: m.causal[None, None], "not known to be an interval"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_stays_has_a_reason(name: str) -> None:
    make, why = KEPT[name]
    torch.manual_seed(0)
    model = Attention(make)
    inputs = {"x": torch.randn(2, 16, 32)}
    assert_as_eager(torch.compile(model, backend=Counting()), model, inputs)
    (note,) = notes(model)
    assert why in note
    assert "stays" in note


def test_a_large_input_is_not_compared_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_masks, "_MOST_GIVEN", 1023)
    torch.manual_seed(0)
    model = Attention(of_activations)
    assert_as_eager(torch.compile(model, backend=Counting()), model, {"x": torch.randn(2, 16, 32)})
    (note,) = notes(model)
    assert "too large to be compared" in note


def test_a_mask_of_data_is_read_again_at_each_call() -> None:
    torch.manual_seed(0)
    model, backend = Attention(of_activations), Counting()
    run = torch.compile(model, backend=backend)
    x = torch.randn(2, 16, 32)
    large = x.clone()
    large[1, 5, 0] = 200.0
    for given in (x, large, x):
        assert_as_eager(run, model, {"x": given})
    assert backend.graphs == 2


class Ends(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, x + 1, x + 2, x + 3)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        x, *_ = ctx.saved_tensors
        return a * x.cos() - b * x.sin()


class Calls(nn.Module):
    """Calls graphs that are no checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = Ends.apply(self.layer(x))
        return (a * b).square().mean()


def test_a_graph_may_call_others() -> None:
    torch.manual_seed(0)
    model = Calls()
    assert_as_eager(torch.compile(model, backend=Counting()), model, {"x": torch.randn(4, 32)})


def test_a_number_that_changes() -> None:
    class Window(Attention):
        def forward(self, x: torch.Tensor, n: float = 4.0) -> torch.Tensor:
            q, k = positions(16)
            return super().forward(x, (k <= q) & (k > q - n))

    torch.manual_seed(0)
    model, x = Window(written), torch.randn(2, 16, 32)
    run = torch.compile(model, backend=Counting())
    for n in (12.0, 13.0, 16.0, 3.5):
        assert_as_eager(run, model, {"x": x, "n": n})  # pyright: ignore[reportArgumentType]


def test_values_of_the_meta_device_are_not_known() -> None:
    with torch.device("meta"):
        model = llama()
        mask = torch.ones(2, 48, dtype=torch.int64)
        tokens = torch.zeros(2, 48, dtype=torch.int64)
    report = actpass.explain(model, input_ids=tokens, labels=tokens, attention_mask=mask, advise=False)
    assert any("are not known when this is compiled" in n for n in report.regions[0].notes)
    report = actpass.explain(model, input_ids=tokens, labels=tokens, advise=False)
    assert any("left out" in n for n in report.regions[0].notes)


def test_dropout_and_scale_are_kept() -> None:
    class Scaled(Attention):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            q, k, v = (t.view(2, 16, 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            causal = torch.ones(16, 16, dtype=torch.bool).tril()
            return F.scaled_dot_product_attention(q, k, v, causal, 0.0, scale=0.7).square().mean()

    torch.manual_seed(0)
    model = Scaled(written)
    assert_as_eager(torch.compile(model, backend=Counting()), model, {"x": torch.randn(2, 16, 32)})
    assert "left out" in notes(model)[0]


@pytest.mark.parametrize("spelling", ["expand", "repeat_interleave", "unequal"])
def test_heads_of_keys_are_not_repeated_without_a_mask(spelling: str) -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.q(x).view(2, 16, 4, 8).transpose(1, 2)
            k, v = (t.view(2, 16, 2, 8).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
            if spelling == "expand":
                k, v = (t[:, :, None].expand(2, 2, 2, 16, 8).reshape(2, 4, 16, 8) for t in (k, v))
            elif spelling == "repeat_interleave":
                k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
            else:  # whole groups in turn: not what fused kernels do with fewer heads
                k, v = (t[:, None].expand(2, 2, 2, 16, 8).reshape(2, 4, 16, 8) for t in (k, v))
            i = torch.arange(16)
            return F.scaled_dot_product_attention(q, k, v, i[None, :] <= i[:, None]).square().mean()

    torch.manual_seed(0)
    model = Grouped()
    seen: list[bool] = []

    def backend(gm: Any, examples: Any) -> Any:
        prepared_gm, _ = infer_masks(gm, examples)
        (call,) = [n for n in prepared_gm.graph.nodes if n.target is F.scaled_dot_product_attention]
        seen.append(bool(call.kwargs.get("enable_gqa")))
        return prepared_gm.forward

    assert_as_eager(torch.compile(model, backend=backend), model, {"x": torch.randn(2, 16, 32)})
    assert seen == [spelling != "unequal"]


def test_the_option_takes_a_truth_value() -> None:
    with pytest.raises(actpass.OptionError, match="infer_masks"):
        eager_actcomp({"infer_masks": "no"})
