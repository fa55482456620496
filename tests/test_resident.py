"""What is resident beside a step, whichever optimizer comes and when; and budgets that hold as sizes grow. Graphs are
interpreted, but for those whose peak is measured."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import actpass
from actpass.errors import BudgetError
from actpass.memory import optimizer_state as optimizers
from actpass.memory.profiler import measure
from actpass.memory.resident import resident, storage_bytes
from actpass.runtime import regions

from .helpers import eager_actcomp
from .test_budget import Stage

WIDTH = 64


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4)))


def nbytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def loss_of(run: Callable[..., torch.Tensor], rows: int = 128) -> torch.Tensor:
    return run(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows))).square().mean()


def resident_bytes(model: nn.Module) -> int | None:
    return actpass.report(model).totals.resident_bytes


def inner_bytes(optimizer: torch.optim.Optimizer) -> int:
    return storage_bytes(optimizers.state_tensors(optimizer))


def first_step_of(make: Callable[..., torch.optim.Optimizer]) -> tuple[int, int]:
    """(bytes that are foreseen, bytes that a step has made)."""
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((64, 96), (128, 64))]
    optimizer = make(weights)
    foreseen = inner_bytes(optimizer) + optimizers.state_to_come(optimizer)
    for p in weights:
        p.grad = torch.randn_like(p)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its steps
        optimizer.step()
    return foreseen, inner_bytes(optimizer)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adam", {}), ("AdamW", {"amsgrad": True}), ("SGD", {"lr": 0.1}), ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("RMSprop", {}), ("RMSprop", {"momentum": 0.9, "centered": True}), ("Adagrad", {}), ("Adamax", {}), ("NAdam", {}),
        ("RAdam", {}), ("Rprop", {}), ("Adadelta", {}), ("ASGD", {}), ("Adafactor", {}), ("Muon", {}),
    ],
)  # fmt: skip
def test_state_to_come_is_known_by_the_class(name: str, options: dict[str, Any]):
    foreseen, made = first_step_of(lambda weights: getattr(torch.optim, name)(weights, **options))
    assert foreseen == made


def test_what_lbfgs_keeps_for_all_with_its_first_parameter_counts_once():
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((64, 96), (128, 64))]
    optimizer = torch.optim.LBFGS(weights, lr=0.1, max_iter=2, history_size=5)

    def loss() -> float:
        optimizer.zero_grad()
        total = sum((w.cos() + w.square() * 0.1).sum() for w in weights)
        assert isinstance(total, torch.Tensor)
        total.backward()
        return total.item()

    foreseen = optimizers.state_to_come(optimizer)
    for _ in range(6):
        optimizer.step(loss)
        held = inner_bytes(optimizer)
        assert 0 < held <= foreseen
        assert held + optimizers.state_to_come(optimizer) == foreseen


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_state_in_few_bits_counts_as_what_it_takes(name: str):
    torchao = pytest.importorskip("torchao.optim")
    foreseen, made = first_step_of(getattr(torchao, name))
    assert foreseen == made
    assert made < 0.6 * 2 * 4 * (64 * 96 + 128 * 64)


def test_a_budget_needs_as_much_less_as_state_in_few_bits_takes_less():
    torchao = pytest.importorskip("torchao.optim")
    least, states = [], []
    for make in (torch.optim.AdamW, torchao.AdamW8bit):
        model = Mean()
        optimizer = make(model.parameters())
        actpass.set_optimizer(optimizer)
        least.append(least_of(model, torch.randn(256, WIDTH)))
        states.append(inner_bytes(optimizer) + optimizers.state_to_come(optimizer))
    assert states[1] < 0.4 * states[0]
    assert least[0] - least[1] == states[0] - states[1]


class Codes(torch.Tensor):
    """Looks like float32 and holds a byte an element."""

    codes: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> Codes:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
        made.codes = codes
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], *_: Any) -> Codes:
        return cls(inner["codes"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(func)


def test_a_tensor_subclass_counts_as_what_is_inside():
    codes = torch.zeros(8, 16, dtype=torch.uint8)
    weight = nn.Parameter(Codes(codes), requires_grad=False)
    assert resident([weight, torch.zeros(4)]).inputs == 8 * 16 + 16
    assert resident([Codes(codes.view(-1)), weight]).inputs == 8 * 16  # one memory


class Counting(torch.optim.Optimizer):
    """A user's own, with a quarter of a copy for each parameter."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.log: list[int] = []

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for p in self.param_groups[0]["params"]:
            self.log.append(p.numel())
            self.state[p]["kept"] = torch.zeros(p.numel() // 4)


def test_no_code_of_an_optimizer_is_run_and_its_first_step_shows_what_it_holds():
    model = net()
    optimizer = Counting(model.parameters())
    run = torch.compile(model, backend=eager_actcomp(memory_budget=4_000_000))
    loss_of(run).backward()
    assert not optimizer.log
    assert not optimizer.state
    before = resident_bytes(model)
    assert before is not None
    assert "assumed to be AdamW's" in str(actpass.report(model))
    optimizer.step()
    assert len(optimizer.log) == 8
    assert resident_bytes(model) == before - 2 * nbytes(model) - 4 * 8 + nbytes(model) // 4
    assert "assumed" not in str(actpass.report(model))


def test_the_heap_is_not_searched_for_optimizers(monkeypatch: pytest.MonkeyPatch):
    def refused(*_: Any) -> Any:
        raise AssertionError("the heap was searched")

    for name in ("get_objects", "get_referrers", "get_referents"):
        monkeypatch.setattr(gc, name, refused)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(torch.compile(model, backend=eager_actcomp(memory_budget=4_000_000))).backward()
    assert resident(list(model.parameters())).assumed
    optimizer.step()
    assert resident(list(model.parameters())).optimizer_state == inner_bytes(optimizer)
    assert "assumed" not in str(actpass.report(model))


def test_what_the_user_says_of_an_unknown_optimizer_is_taken():
    assumed, said = (net() for _ in range(2))
    for model, options in ((assumed, {}), (said, {"optimizer_state_bytes": 1234})):
        loss_of(torch.compile(model, backend=eager_actcomp({"memory_budget": 4_000_000, **options}))).backward()
    more, less = resident_bytes(assumed), resident_bytes(said)
    assert more is not None
    assert less == more - 2 * nbytes(assumed) - 4 * 8 + 1234
    assert "assumed" not in str(actpass.report(said))


@pytest.mark.slow
def test_an_optimizer_is_named_before_the_first_step():
    model = net()
    actpass.set_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))  # it is not kept alive
    gc.collect()
    assert resident(list(model.parameters())).assumed
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    actpass.set_optimizer(optimizer)
    there = resident(list(model.parameters()))
    assert there.optimizer_state == nbytes(model)
    assert not there.assumed
    with pytest.raises(TypeError, match=r"takes torch optimizers, not str.*optimizer_state_bytes"):
        actpass.set_optimizer("adamw")  # pyright: ignore[reportArgumentType]


def least_of(model: nn.Module, x: torch.Tensor) -> int:
    with pytest.raises(Exception, match="can't be met") as raised:  # Dynamo wraps what a backend raises
        actpass.explain(model, x, options={"memory_budget": 2, "min_tensor_bytes": 0})
    least: Any = getattr(raised.value, "inner_exception", raised.value)
    assert isinstance(least.least, int)
    return least.least


class Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stage = Stage(WIDTH, 4 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stage(x)


class Mean(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*(blocks or [net()]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).square().mean()


@pytest.mark.slow
def test_a_plan_is_made_anew_where_the_optimizer_changes():
    """SGD holds less than was assumed, which leaves room; AdamW in its place takes it back."""
    model, x = Mean(Block(0), Block(1)), torch.randn(256, WIDTH)
    budget = least_of(model, x)
    run = torch.compile(model, backend=eager_actcomp(memory_budget=budget, min_tensor_bytes=0))
    saved: list[int] = []

    def train(optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            run(x).backward()
            optimizer.step()
            optimizer.zero_grad()
            report = actpass.report(model)
            assert report.step_bytes is not None
            saved.append(report.saved_bytes)

    train(torch.optim.SGD(model.parameters(), lr=0.0), 3)
    assert saved[-1] > saved[0]
    adamw = torch.optim.AdamW(model.parameters(), lr=0.0)
    train(adamw, 2)
    assert saved[-1] == saved[0]
    report = actpass.report(model)
    assert report.step_bytes is not None
    assert report.step_bytes <= budget
    assert report.totals.resident_bytes == nbytes(model) + x.nbytes + inner_bytes(adamw)


def test_an_optimizer_that_does_not_fit_is_refused_before_its_first_step():
    model, x = Mean(), torch.randn(8, WIDTH)
    budget = 7 * nbytes(model)  # parameters, gradients, AdamW's two and a little; not a hundred copies
    run = torch.compile(model, backend=eager_actcomp(memory_budget=budget))
    run(x).backward()
    before = [p.detach().clone() for p in model.parameters()]
    large = torch.optim.LBFGS(model.parameters(), history_size=50)
    for _ in range(2):
        with pytest.raises(BudgetError, match=r"can't be met beside this optimizer.*Use memory_budget="):
            large.step(lambda: run(x))
    assert not large.state
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = net(0), net(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x).square().mean()


def test_a_budget_that_parts_cannot_meet_is_an_error_of_their_own_optimizer_before_the_weights_move():
    other: nn.Module = nn.Linear(4, 4)
    model, x = Parts(), torch.randn(256, WIDTH)
    mine, theirs = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1)
    run = torch.compile(model, backend=eager_actcomp(memory_budget=5 * nbytes(model)))
    before = [p.detach().clone() for p in model.parameters()]
    run(x).backward()
    other(torch.randn(2, 4)).sum().backward()
    theirs.step()
    with pytest.raises(BudgetError, match="can't be met by the 2 regions of this step together") as raised:
        mine.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert raised.value.least is not None
    assert raised.value.least > 5 * nbytes(model)


def test_an_optimizer_that_was_deleted_does_not_count():
    """A scheduler makes a cycle of it, which lives on."""
    model = net()
    run = torch.compile(model, backend=eager_actcomp(memory_budget=4_000_000))

    def train() -> None:
        optimizer = torch.optim.AdamW(model.parameters())
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        loss_of(run).backward()
        optimizer.step()
        assert resident(list(model.parameters())).optimizer_state == inner_bytes(optimizer)

    gc.disable()
    try:
        train()
        train()
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_block_that_was_planned_as_all_there_is_is_planned_again_as_a_part():
    """Who does not know the optimizer can't know of a second block when the first one is compiled, which takes data. That it
    has taken too much is an error, and from then on both are parts of a step."""
    blocks, x = nn.ModuleList([Block(0), Block(1)]), torch.randn(256, WIDTH)
    for block in blocks:
        block.compile(backend=eager_actcomp(memory_budget=3 * nbytes(blocks) + 22 * x.nbytes, min_tensor_bytes=0))

    def train() -> None:
        blocks[1](blocks[0](x)).square().mean().backward()

    with pytest.raises(Exception, match=r"no room for another compiled part.*set_optimizer"):
        train()
    train()
    assert all(r.peak is not None and r.peak.part for r in regions.regions_of(blocks))


class Layers(nn.Module):
    """With a frozen embedding and head that no region takes, and layers that share a graph. frozen: so are
    all but their biases."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList(Block(seed) for seed in range(3))
        self.head = nn.Linear(WIDTH, 16).requires_grad_(False)
        for name, p in self.layers.named_parameters():
            p.requires_grad_(not frozen or name.endswith("bias"))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.loss(tokens)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("in_forward", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_all_layers_that_share_a_graph_are_resident_and_what_is_frozen_around_them(frozen: bool, in_forward: bool):
    model, tokens = Layers(frozen=frozen), torch.arange(128) % 16
    for layer in model.layers:
        layer.compile(backend=eager_actcomp(memory_budget=16_000_000))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    found = []
    for _ in range(3):
        (model if in_forward else model.loss)(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(resident_bytes(model))
    seen = model if in_forward else model.layers  # of no module's forward, only what its regions take is known
    held = storage_bytes(seen.parameters())
    assert found == [held + inner_bytes(optimizer) + 128 * WIDTH * 4] * 3


@pytest.mark.slow
@pytest.mark.codegen
@pytest.mark.architectures
@pytest.mark.parametrize(("adapted", "layers", "budget"), [(True, 8, 7_300_000), (False, 4, 6_000_000)])
def test_a_llama_whose_layers_are_compiled_one_by_one_holds_its_budget(adapted: bool, layers: int, budget: int):
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=172, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    base: Any = LlamaForCausalLM(config).train()
    lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model: nn.Module = peft.get_peft_model(base, lora) if adapted else base
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    actpass.set_optimizer(optimizer)  # else the first layer, which takes data, is planned as all there is
    for layer in base.model.layers:
        layer.compile(backend="actcomp", options={"memory_budget": budget, "min_tensor_bytes": 1024})
    tokens = torch.randint(32, (8, 64), generator=torch.Generator().manual_seed(0))

    def backward() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()

    def begin() -> None:
        backward()
        model.zero_grad()

    for _ in range(3):
        begin()
        backward()
        optimizer.step()
        optimizer.zero_grad()
    there = storage_bytes([*model.parameters(), *model.buffers()]) + inner_bytes(optimizer)
    taken = there + measure(backward, before=begin).peak_bytes
    assert taken <= budget
    assert actpass.report(model).step_bytes == pytest.approx(taken, rel=0.05)


def test_sizes_that_grow_take_few_graphs_and_no_budget_is_exceeded():
    model = Mean()
    budget = 1_500_000
    run = torch.compile(model, backend=eager_actcomp(memory_budget=budget, min_tensor_bytes=0))
    counters.clear()
    planned = []
    for rows in (48, 96, 128, 160, 192, 256, 320, 384, 448, 512):
        run(torch.randn(rows, WIDTH)).backward()
        model.zero_grad()
        report = actpass.report(model)
        assert report.step_bytes is not None
        assert report.step_bytes <= budget
        (region,) = report.regions
        planned.append(dict(region.sizes).popitem()[1] if region.sizes else rows)
    assert planned == [48, 128, 128, 256, 256, 256, 512, 512, 512, 512]
    assert counters["stats"]["unique_graphs"] == 4


def test_where_the_next_power_of_two_does_not_fit_less_is_planned_for():
    model = Mean()
    run = torch.compile(model, backend=eager_actcomp(memory_budget=1_000_000, policy="exact"), dynamic=True)
    sizes = []
    for rows in (48, 300):
        run(torch.randn(rows, WIDTH)).backward()
        model.zero_grad()
        sizes.append(dict(actpass.report(model).regions[0].sizes).popitem()[1])
    assert sizes[0] == 48
    assert 300 <= sizes[1] < 512


@pytest.mark.parametrize("budget", [None, 4_000_000])
def test_where_dynamo_makes_no_more_graphs_the_report_says_so_and_a_budget_is_an_error(budget: int | None):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options: dict[str, Any] = {} if budget is None else {"memory_budget": budget}
    run = torch.compile(model, backend=eager_actcomp(**options), dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in (8, 16):
            loss_of(run, rows).backward()
            optimizer.step()
            assert actpass.report(model).active
        optimizer.zero_grad()
        loss_of(run, 24).backward()
        if budget is None:
            optimizer.step()
        else:
            with pytest.raises(BudgetError, match=r"is not held, because .*as many graphs of .* as its limit allows"):
                optimizer.step()
        report = actpass.report(model)
        assert not report.active
        assert "inactive, because the last step ran outside of what was compiled: Dynamo has as many graphs" in str(report)
        loss_of(run, 8).backward()
        optimizer.step()
        assert actpass.report(model).active


def test_a_step_outside_of_what_was_compiled_is_told_once_where_a_budget_is_not_held():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = torch.compile(model, backend=eager_actcomp(memory_budget=4_000_000))
    loss_of(run).backward()
    optimizer.step()

    def outside() -> None:
        loss_of(model).backward()
        optimizer.step()

    with pytest.warns(actpass.ActpassWarning, match="the last step ran outside of what was compiled"):
        outside()
    outside()  # warnings are errors here: it is said once
