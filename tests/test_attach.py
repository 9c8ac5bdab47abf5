"""A live edit does what an attached edit does, changes in place, leaves alone what is off, and never mixes two versions."""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import remask
from conftest import build_toy
from remask.backbones import Site
from remask.backbones.intervention import add_shift
from remask.editing import EditMemory, SteeringVector, preset
from remask.editing import live as attaching
from remask.editing.live import LiveEdit, attach
from remask.editing.shift import (
    CodebookShift,
    ConstantShift,
    GatedShift,
    KernelShift,
    LinearShift,
    Shift,
    SoftmaxShift,
    TopShift,
)
from remask.errors import RemaskError

D = 8
SITE = Site(1)
IDS = torch.arange(20, 50).view(2, 15)


@dataclass
class Value:
    """The least that can be attached."""

    made: Shift
    site: Site = SITE

    def shift(self) -> Shift:
        return self.made


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def constant(seed: int = 0, width: int = D, layer: int = 1) -> Value:
    return Value(ConstantShift(numbers(width, seed=seed)), Site(layer))


def top(keys: int, count: int, seed: int = 0, width: int = D) -> Value:
    parts = numbers(2, keys, width, seed=seed)
    return Value(TopShift(parts[0], parts[1], count, numbers(width, seed=seed + 1)))


def softmax(keys: int, beta: float = 5.0, seed: int = 0, width: int = D) -> Value:
    parts, weight = numbers(2, keys, width, seed=seed), torch.arange(1.0, keys + 1)
    return Value(SoftmaxShift(parts[0], parts[1], weight, beta, numbers(width, seed=seed + 1)))


def kernel(landmarks: int, beta: float = 2.0, seed: int = 0, width: int = D) -> Value:
    parts = numbers(2, landmarks, width, seed=seed)
    return Value(KernelShift(nn.functional.normalize(parts[0], dim=-1), parts[1], beta, numbers(width, seed=seed + 1)))


def linear(seed: int = 0, width: int = D) -> Value:
    return Value(LinearShift(numbers(width, width, seed=seed) * 0.1, numbers(width, seed=seed + 1)))


def gated(cap: float, seed: int = 0, width: int = D) -> Value:
    return Value(GatedShift(numbers(width, seed=seed), numbers(width, seed=seed + 1), 1e-3, cap))


def codebook(keys: int, seed: int = 0, width: int = D) -> Value:
    """About half of the positions of INPUT are inside a radius."""
    parts = numbers(2, keys, width, seed=seed)
    return Value(CodebookShift(parts[0], parts[1], torch.full((keys,), 3.5)))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in every bit, NaN payloads and signs of zeros included."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


# ------------------------------------------------------------------ somebody else's models
class Block(nn.Module):
    """Puts out its hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(D, D)

    def forward(self, hidden: Tensor) -> Any:
        return hidden + self.mix(hidden).tanh()


class CacheBlock(Block):
    """As LLaDA's own code: the hidden state and a cache."""

    def forward(self, hidden: Tensor) -> Any:
        return super().forward(hidden), (hidden[:, :1], hidden[:, :1])


class PairBlock(Block):
    """As in SGLang and vLLM: the residual is added by whoever comes next."""

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        residual = hidden if residual is None else hidden + residual
        return self.mix(residual).tanh(), residual


class FirstPairBlock(Block):
    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        return super().forward(hidden), None


class DictBlock(Block):
    def forward(self, hidden: Tensor) -> Any:
        return {"hidden": hidden}


class Foreign(nn.Module):
    """Two blocks in a list under names of its own."""

    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.body = nn.ModuleDict({"pile": nn.ModuleList([block(), block()])})
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.body["pile"]:
            hidden = block(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden


class ForeignPairs(Foreign):
    def __init__(self) -> None:
        super().__init__(PairBlock)

    def forward(self, hidden: Tensor) -> Tensor:
        residual = None
        for block in self.body["pile"]:
            hidden, residual = block(hidden, residual)
        return hidden + residual


INPUT = numbers(3, 4, D, seed=9)


def twice(model: nn.Module, shift: Callable[[Tensor], Tensor], layer: int = 1) -> Tensor:
    """What `Foreign` computes on INPUT with the shift after block `layer`, written out."""
    hidden = INPUT
    for index in range(2):
        mix = model.get_submodule(f"body.pile.{index}.mix")
        hidden = hidden + (hidden @ mix.weight.T + mix.bias).tanh()
        if index == layer:
            hidden = hidden + shift(hidden)
    return hidden


# ------------------------------------------------------------------ what it computes
@pytest.mark.parametrize("module", ["resid", "attn", "mlp"])
@pytest.mark.parametrize("make", [constant, linear, kernel, softmax, top, gated], ids=lambda make: make.__name__)
def test_equals_an_attached_edit_bit_for_bit(toy, make, module) -> None:
    sizes = {"kernel": (5,), "softmax": (5,), "top": (5, 2), "gated": (0.5,)}.get(make.__name__, ())
    edit = replace(make(*sizes, width=32), site=Site(1, module))
    base = toy.logits(IDS)
    undo = add_shift(toy, edit.site, edit.shift())
    expected = toy.logits(IDS)
    undo()
    live = attach(toy.model, edit)
    assert same_bits(toy.logits(IDS), expected) and not torch.equal(base, expected)
    live.detach()
    assert same_bits(toy.logits(IDS), base) and not toy.attached


def test_real_edits_are_values_that_can_be_attached(toy) -> None:
    vector = SteeringVector(numbers(32), Site(1), alpha=3.0)
    with vector.attached(toy):
        expected = toy.logits(IDS)
    attach(toy.model, vector)
    assert same_bits(toy.logits(IDS), expected)


@pytest.mark.parametrize(("block", "layer"), [(Block, 0), (Block, 1), (CacheBlock, 0)])
def test_foreign_blocks(block, layer) -> None:
    model = Foreign(block)
    edit = replace(linear(), site=Site(layer))
    live = attach(model, edit)
    assert live.where == f"body.pile.{layer}"
    torch.testing.assert_close(model(INPUT), twice(model, edit.shift(), layer))


def test_a_cache_passes_untouched() -> None:
    model = Foreign(CacheBlock)
    cache = model.body["pile"][1](INPUT)[1]
    attach(model, constant())
    edited = model.body["pile"][1](INPUT)[1]
    assert all(same_bits(one, other) for one, other in zip(cache, edited, strict=True))


def test_pairs_are_shifted_by_their_sum() -> None:
    model, edit = ForeignPairs(), linear()
    residual = model.body["pile"][1](*model.body["pile"][0](INPUT))[1]
    attach(model, edit, residual_pair=True)
    torch.testing.assert_close(model(INPUT), twice(model, edit.shift()))
    assert same_bits(model.body["pile"][1](*model.body["pile"][0](INPUT))[1], residual)


def test_a_pair_without_residual() -> None:
    model, edit = Foreign(FirstPairBlock), linear()
    attach(model, edit, residual_pair=True)
    torch.testing.assert_close(model(INPUT), twice(model, edit.shift()))
    assert model.body["pile"][1](INPUT)[1] is None


def test_computed_in_fp32_under_autocast() -> None:
    """One product of an fp32 shift in bf16 would be off by about 1e-2."""
    model, edit = Foreign().bfloat16(), linear()
    hidden = INPUT.bfloat16()
    model.body["pile"][1] = nn.Identity()
    attach(model, edit, module="body.pile.1")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = model.body["pile"][0](hidden)
        edited = model(hidden)
    expected = base.double() + (base.double() - edit.made.centre.double()) @ edit.made.matrix.double()
    assert edited.dtype == torch.bfloat16 and torch.equal(edited, expected.bfloat16())


def test_fp64_stays_fp64() -> None:
    model, edit = Foreign().double(), constant()
    base = model(INPUT.double())
    attach(model, edit)
    assert torch.equal(model(INPUT.double()), base + edit.made.vector.double())


# ------------------------------------------------------------------ changes in place
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (constant(), constant(5)),
        (linear(), linear(5)),
        (gated(0.1), gated(0.4, seed=5)),
        (softmax(3), softmax(6, beta=2.0, seed=5)),
        (kernel(3), kernel(6, beta=5.0, seed=5)),
        (kernel(8), kernel(1, seed=5)),
        (top(3, 1), top(6, 2, seed=5)),
        (top(6, 2), top(2, 1, seed=5)),
        (top(1, 1), top(5, 1, seed=5)),
        (top(3, 3), top(8, 8, seed=5)),
        (codebook(3), codebook(6, seed=5)),
    ],
)
def test_update_in_place(first, second) -> None:
    model = Foreign()
    live = attach(model, first, capacity=8)
    before = {name: b.data_ptr() for name, b in live._acting.named_buffers()}
    torch.testing.assert_close(model(INPUT), twice(model, first.shift()))
    version = live.version
    live.update(second)
    torch.testing.assert_close(model(INPUT), twice(model, second.shift()))
    assert live.version == version + 1
    assert {name: b.data_ptr() for name, b in live._acting.named_buffers()} == before


def test_free_rows_are_inert_and_leave_nothing_behind() -> None:
    """After an update to fewer keys nothing of the others is left."""
    for make in (softmax, kernel, lambda keys, seed=0: top(keys, keys, seed)):
        model = Foreign()
        live = attach(model, make(8))
        live.update(make(2, seed=4))
        torch.testing.assert_close(model(INPUT), twice(model, make(2, seed=4).shift()))
        assert not live._acting.shift.values[2:].any()


def test_an_update_leaves_both_values_alone() -> None:
    first, second = constant(), constant(5)
    vector = first.made.vector.clone()
    attach(Foreign(), first).update(second)
    assert torch.equal(first.made.vector, vector)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (top(3, 1), top(7, 1), "7 keys.*room for 4"),
        (softmax(3), softmax(7), "7 keys.*room for 4"),
        (kernel(3), kernel(7), "7 keys.*room for 4"),
        (kernel(3), softmax(3), "SoftmaxShift.*KernelShift"),
        (top(4, 1), top(4, 3), "keeps 3 .*selects 1"),
        (constant(), linear(), "LinearShift.*ConstantShift"),
        (constant(), constant(width=4), "4 dim.*over 8"),
        (constant(), constant(layer=0), "layer=0.*layer=1"),
    ],
)
def test_refused_updates_change_nothing(first, second, message) -> None:
    model = Foreign()
    live = attach(model, first, capacity=4)
    before, version = model(INPUT), live.version
    with pytest.raises(RemaskError, match=message):
        live.update(second)
    assert same_bits(model(INPUT), before) and live.version == version


def test_strength_and_versions() -> None:
    model, edit = Foreign(), constant()
    live = attach(model, edit)
    versions = [live.version]
    for change in (
        lambda: setattr(live, "strength", 0.5),
        lambda: live.update(edit),
        lambda: setattr(live, "enabled", False),
        lambda: setattr(live, "enabled", True),
    ):
        change()
        versions.append(live.version)
    assert all(one < two for one, two in itertools.pairwise(versions))
    assert live.strength == 0.5 and live.enabled
    torch.testing.assert_close(model(INPUT), twice(model, lambda h: 0.5 * edit.made(h)))
    live.detach()
    assert attach(model, edit).version > versions[-1]
    with pytest.raises(RemaskError, match="finite"):
        live.strength = float("nan")


def test_attached_in_inference_mode_and_changed_outside() -> None:
    model = Foreign()
    with torch.inference_mode():
        live = attach(model, top(3, 2), capacity=4, batch_capacity=3)
    live.update(top(4, 2, seed=2))
    live.strength = 2.0
    torch.testing.assert_close(model(INPUT), twice(model, lambda h: 2 * top(4, 2, seed=2).made(h)))


# ------------------------------------------------------------------ off is off
class Given(nn.Module):
    """Puts out what it is given."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.clone()


def awkward(dtype: torch.dtype) -> Tensor:
    """[3, 2, D] with infinities, both NaNs, -0 and a subnormal in every row."""
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), -float("nan"), -0.0, 0.0, 1e-40, 1.5])
    return values.to(dtype).expand(3, 2, D).clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_disabled_keeps_every_bit(dtype) -> None:
    model, hidden = Given(), awkward(dtype)
    live = attach(model, linear(), module=model)
    assert not same_bits(model(hidden), hidden)
    live.enabled = False
    assert same_bits(model(hidden), hidden)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_are_off_keep_every_bit(packed) -> None:
    """[B, L, d] and packed [T, d] alike; the rows that are on get what they get alone."""
    model, hidden = Given(), awkward(torch.float32)
    hidden[:2] = numbers(2, 2, D)
    hidden = hidden[:, 0] if packed else hidden
    edit = top(4, 2)
    live = attach(model, edit, module=model, batch_capacity=5)
    mask, version = torch.tensor([True, False, False]), live.version
    with live.rows(mask):
        out = model(hidden)
        with live.rows(~mask):
            inverse = model(hidden)
        assert same_bits(model(hidden), out)
    torch.testing.assert_close(out[0], hidden[0] + edit.made(hidden[0]))
    assert same_bits(out[1:], hidden[1:]) and same_bits(inverse[0], hidden[0])
    torch.testing.assert_close(inverse[1], hidden[1] + edit.made(hidden[1]))
    assert same_bits(model(hidden)[0], out[0]) and not torch.equal(model(hidden)[1], hidden[1])
    assert live.version == version


def test_rows_in_a_model(toy) -> None:
    """Blocks never mix rows, so the logits of a row that is off are the base model's and the others' the edited model's."""
    base = toy.logits(IDS)
    live = attach(toy.model, constant(width=32), batch_capacity=2)
    edited = toy.logits(IDS)
    with live.rows(torch.tensor([False, True])):
        mixed = toy.logits(IDS)
    assert same_bits(mixed[0], base[0]) and same_bits(mixed[1], edited[1]) and not torch.equal(base[1], edited[1])


def test_rows_are_refused_where_they_would_be_wrong() -> None:
    model = Foreign()
    with pytest.raises(RemaskError, match="batch_capacity"), attach(model, constant()).rows(torch.tensor([True])):
        pass
    live = attach(model, constant(), batch_capacity=3)
    for mask in (torch.ones(4, dtype=torch.bool), torch.ones(3), torch.ones(1, 3, dtype=torch.bool)):
        with pytest.raises(RemaskError, match=r"B = 1\.\.3"), live.rows(mask):
            pass
    with live.rows(torch.tensor([True, False])), pytest.raises(RemaskError, match=r"batch of 2.*sees 3"):
        model(INPUT)
    with pytest.raises(RemaskError, match=r"batch of 6.*batch_capacity=3"):
        model(INPUT.repeat(2, 1, 1))
    with pytest.raises(RemaskError, match="at least 1"):
        attach(model, constant(), batch_capacity=0)


# ------------------------------------------------------------------ several edits, detach
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_detached_in_any_order(order) -> None:
    """Two at one site (the second sees the first's output) and one below."""
    edits = [linear(), linear(5), constant(7, layer=0)]
    model = Foreign()
    base = model(INPUT)
    lives = [attach(model, edit) for edit in edits]
    one, two, below = (edit.made for edit in edits)
    hidden = twice(model, below, layer=0)
    torch.testing.assert_close(model(INPUT), (hidden + one(hidden)) + two(hidden + one(hidden)))
    for index in order:
        lives[index].detach()
    assert same_bits(model(INPUT), base) and not any(module._forward_hooks for module in model.modules())


def test_nothing_after_detach() -> None:
    model = Foreign()
    live = attach(model, constant(), batch_capacity=3)
    live.detach()
    for call in (
        live.detach,
        lambda: live.update(constant()),
        lambda: setattr(live, "strength", 2.0),
        lambda: setattr(live, "enabled", True),
        lambda: live.check(lambda: model(INPUT)),
        lambda: live.rows(torch.tensor([True])).__enter__(),
    ):
        with pytest.raises(RemaskError, match=r"body\.pile\.1 any more"):
            call()


def test_a_hooked_model_can_be_copied_and_saved() -> None:
    model = Foreign()
    names = list(model.state_dict())
    live = attach(model, constant())
    twin = copy.deepcopy(model)
    live.enabled = False
    assert list(model.state_dict()) == names
    torch.testing.assert_close(twin(INPUT), twice(model, constant().made))


# ------------------------------------------------------------------ where it goes
class Lists(nn.Module):
    def __init__(self, **lists: nn.Module) -> None:
        super().__init__()
        for name, modules in lists.items():
            setattr(self, name, modules)


def blocks(n: int) -> nn.ModuleList:
    return nn.ModuleList([Block() for _ in range(n)])


def test_the_list_of_blocks() -> None:
    """The longest; experts inside a block do not count, however many."""
    layers = blocks(3)
    for block in layers:
        block.experts = blocks(7)
    model = Lists(layers=layers, heads=blocks(2), odd=nn.ModuleList([Block(), nn.Identity(), Block(), Block()]))
    assert attach(model, constant(layer=2)).where == "layers.2"
    groups = nn.ModuleList([blocks(1), blocks(1), blocks(1)])
    with pytest.raises(RemaskError, match=r"groups \(3\), groups\.0 \(1\)"):
        attach(Lists(groups=groups), constant())
    with pytest.raises(RemaskError, match=r"encoder \(2\), decoder \(2\).*module="):
        attach(Lists(encoder=blocks(2), decoder=blocks(2)), constant())
    with pytest.raises(RemaskError, match="none; pass module="):
        attach(nn.Sequential(Block()), constant())


def test_named_modules() -> None:
    model = nn.Sequential(Block(), Block())
    assert attach(model, constant(), module="1").where == attach(model, constant(), module=model[1]).where == "1"
    attn = Value(constant().made, Site(1, "attn"))
    assert attach(model, attn, module="0.mix").where == "0.mix"
    for module, message in (("nowhere", "no module 'nowhere'"), (Block(), "not a part")):
        with pytest.raises(RemaskError, match=message):
            attach(model, constant(), module=module)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site(2), r"layer 2 .*0\.\.1"),
        (Site(-1), r"0\.\.1"),
        (Site(0, "attn"), "attn is not known.*module="),
        (Site(0, "mlp"), "mlp is not known.*module="),
        (Site(0, steps=(1,)), "clock"),
    ],
)
def test_places_that_do_not_exist(site, message) -> None:
    with pytest.raises(RemaskError, match=message):
        attach(Foreign(), Value(constant().made, site))


def test_what_cannot_be_attached(toy) -> None:
    model = Foreign()
    with pytest.raises(RemaskError, match="attached to body"):
        attach(model, attach(model, constant()))
    with pytest.raises(RemaskError, match=r"pass its \.model"):
        attach(toy, constant())
    with pytest.raises(RemaskError, match="8 dimensions and the model 32"):
        attach(toy.model, constant())
    with pytest.raises(RemaskError, match=r"3 keys.*room for 2"):
        attach(model, top(3, 1), capacity=2)
    with pytest.raises(RemaskError, match="meta"):
        attach(Foreign().to("meta"), constant())
    wide = Foreign()
    attach(wide, constant(width=4))
    with pytest.raises(RemaskError, match="puts out 8 dimensions and the edit has 4"):
        wide(INPUT)


@pytest.mark.parametrize(
    ("block", "pair", "message"),
    [
        (PairBlock, False, "residual_pair=True"),
        (DictBlock, False, "puts out a dict"),
        (Block, True, "without residual_pair"),
        (CacheBlock, True, "without residual_pair"),
    ],
)
def test_outputs_that_are_not_understood(block, pair, message) -> None:
    model = Foreign(block)
    attach(model, constant(), residual_pair=pair)
    with pytest.raises(RemaskError, match=message):
        model.body["pile"][1](INPUT)


def test_sharded_models_are_refused() -> None:
    sharded = type("FullyShardedDataParallel", (Block,), {})
    inside = Foreign()
    inside.body["pile"] = nn.ModuleList([sharded(), sharded()])
    for model, name in ((nn.DataParallel(Foreign()), "DataParallel"), (inside, "FullyShardedDataParallel")):
        with pytest.raises(RemaskError, match=f"wrapped in {name}"):
            attach(model, constant())


# ------------------------------------------------------------------ compiled
@pytest.fixture
def graphs() -> Iterator[list[int]]:
    """Graphs that `count_graphs` was given; compilation starts and ends fresh."""
    torch._dynamo.reset()
    seen: list[int] = []
    yield seen
    torch._dynamo.reset()


def compiled(model: nn.Module, graphs: list[int]) -> nn.Module:
    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    return torch.compile(model, fullgraph=True, backend=backend)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (top(2, 1), top(4, 1, 5)),
        (softmax(2), softmax(4, 2.0, 5)),
        (kernel(2), kernel(4, 5.0, 5)),
        (linear(), linear(5)),
        (gated(0.1), gated(1.0)),
        (codebook(2), codebook(4, 5)),
    ],
)
def test_changes_without_compiling_again(graphs, first, second) -> None:
    model = Foreign()
    base = model(INPUT)
    live = attach(model, first, capacity=4, batch_capacity=3)
    run = compiled(model, graphs)
    torch.testing.assert_close(run(INPUT), twice(model, first.made))
    live.update(second)
    torch.testing.assert_close(run(INPUT), twice(model, second.made))
    live.strength = 0.5
    torch.testing.assert_close(run(INPUT), twice(model, lambda h: 0.5 * second.made(h)))
    with live.rows(torch.tensor([True, False, True])):
        out = run(INPUT)
    assert same_bits(out[1], base[1]) and not torch.equal(out[0], base[0])
    live.check(lambda: run(INPUT))
    live.enabled = False
    assert same_bits(run(INPUT), base)
    live.enabled = True
    assert len(graphs) == 1
    live.detach()  # the hook is gone: what is compiled may be compiled again
    assert same_bits(run(INPUT), base)


def test_a_compiled_model_is_refused(graphs) -> None:
    whole, inner, in_place, forward = Foreign(), Foreign(), Foreign(), Foreign()
    inner.body["pile"] = nn.ModuleList([torch.compile(block, backend="eager") for block in inner.body["pile"]])
    in_place.compile(backend="eager")
    forward.forward = torch.compile(forward.forward, backend="eager")
    for model in (compiled(whole, graphs), inner, in_place, forward):
        with pytest.raises(RemaskError, match="attach first, then compile"):
            attach(model, constant())


def test_a_compiled_part_elsewhere_does_no_harm() -> None:
    model = Foreign()
    model.body["pile"][0].compile(backend="eager")
    model.body["pile"][1].mix.compile(backend="eager")
    attach(model, constant())
    torch.testing.assert_close(model(INPUT), twice(model, constant().made))


@pytest.mark.parametrize(("first", "second"), [(top(2, 1), top(4, 1, seed=5)), (kernel(2), kernel(4, 5.0, seed=5))])
def test_code_that_was_recorded_follows_every_change(first, second) -> None:
    """Recorded operations run without any Python, as a captured graph does; they outlive the hook."""
    model = Foreign()
    base = model(INPUT)
    live = attach(model, first, capacity=4, batch_capacity=3)
    run = make_fx(model)(INPUT)
    for edit in (first, second):
        live.update(edit)
        torch.testing.assert_close(run(INPUT), twice(model, edit.made))
    live.check(lambda: run(INPUT))
    with live.rows(torch.tensor([True, False])):
        out = run(INPUT)
    assert same_bits(out[1:], base[1:]) and not torch.equal(out[0], base[0])
    live.detach()
    assert same_bits(run(INPUT), base)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize(("first", "second"), [(top(2, 1), top(4, 1, seed=5)), (kernel(2), kernel(4, 5.0, seed=5))])
def test_changes_without_capturing_again(first, second) -> None:
    model, hidden = Foreign().cuda(), INPUT.cuda()
    base = model(hidden)
    live = attach(model, first, capacity=4, batch_capacity=3)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(hidden)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(hidden)

    def replay() -> Tensor:
        graph.replay()
        return out

    live.check(replay)
    for edit in (first, second):
        live.update(edit)
        torch.testing.assert_close(replay().cpu(), twice(Foreign(), edit.made), atol=1e-3, rtol=1e-3)
    with live.rows(torch.tensor([True, False, True])):
        assert torch.equal(replay()[1], base[1])
    live.detach()
    assert torch.equal(replay(), base)


# ------------------------------------------------------------------ alive
def test_a_live_edit_passes_its_check() -> None:
    model = Foreign()
    live = attach(model, constant(), probe=lambda: model(INPUT))
    live.enabled = False
    live.check(lambda: model(INPUT))
    assert not live.enabled


def test_results_that_share_their_memory_are_told_apart() -> None:
    """As the output of a captured graph."""
    model, shared = Foreign(), torch.empty_like(INPUT)
    attach(model, constant(), probe=lambda: shared.copy_(model(INPUT)))


def test_a_dead_edit_is_found_and_taken_away(graphs) -> None:
    """A function that was compiled before the edit came goes on without it, as does code that calls forward()."""
    model = Foreign()
    whole = torch.compile(lambda hidden: model(hidden), fullgraph=True, backend="eager")
    base = whole(INPUT)

    def direct() -> Tensor:
        return model.body["pile"][1].forward(INPUT)

    for run in (lambda: whole(INPUT), direct):
        with pytest.raises(RemaskError, match=r"body\.pile\.1 never acted.*attach first"):
            attach(model, constant(), probe=run)
    assert same_bits(model(INPUT), base)


def test_an_edit_that_changes_nothing_here() -> None:
    model = Foreign()
    with pytest.raises(RemaskError, match="runs but changes nothing"):
        attach(model, Value(ConstantShift(torch.zeros(D))), probe=lambda: model(INPUT))


def test_chance_is_not_taken_for_life() -> None:
    model, calls = Foreign(), itertools.count()
    with pytest.raises(RemaskError, match="seed it"):
        attach(model, constant(), probe=lambda: INPUT + next(calls))


# ------------------------------------------------------------------ threads
@pytest.fixture
def blocked(monkeypatch) -> threading.Event:
    """Set as soon as a thread has to wait for another one's hold or change."""
    event = threading.Event()

    class Condition(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            event.set()
            return super().wait(timeout)

    monkeypatch.setattr(attaching, "threading", SimpleNamespace(Condition=Condition, get_ident=threading.get_ident))
    return event


@contextlib.contextmanager
def thread(work: Callable[[], object]) -> Iterator[None]:
    """Runs `work` beside the block, which must let it finish; an error in it is raised here."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=body, daemon=True)
    worker.start()
    yield
    worker.join(30)
    assert not worker.is_alive() and not errors, errors


CHANGES: dict[str, Callable[[LiveEdit], object]] = {
    "update": lambda live: live.update(constant(5)),
    "strength": lambda live: setattr(live, "strength", 3.0),
    "enabled": lambda live: setattr(live, "enabled", False),
    "detach": lambda live: live.detach(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_generation_runs_under_one_version(blocked, change) -> None:
    model = Foreign()
    live = attach(model, constant())
    version, expected = live.version, model(INPUT)
    with contextlib.ExitStack() as end, live.hold():
        end.enter_context(thread(lambda: CHANGES[change](live)))
        assert blocked.wait(30)
        with live.hold():  # a generation inside a generation goes on
            assert same_bits(model(INPUT), expected) and live.version == version
    assert not torch.equal(model(INPUT), expected) and live.version == version + 1


def test_several_generations_at_once() -> None:
    """Both are inside before either leaves."""
    live, meeting = attach(Foreign(), constant()), threading.Barrier(2, timeout=30)

    def generate() -> None:
        with live.hold():
            meeting.wait()

    with thread(generate):
        generate()


def test_a_waiting_change_goes_before_new_generations(blocked) -> None:
    live = attach(Foreign(), constant())
    version, seen = live.version, []

    def generate() -> None:
        with live.hold():
            seen.append(live.version)

    with contextlib.ExitStack() as end, live.hold():
        end.enter_context(thread(lambda: live.update(constant(5))))
        assert blocked.wait(30)
        blocked.clear()
        end.enter_context(thread(generate))
        assert blocked.wait(30) and not seen
    assert seen == [version + 1]


def test_generations_wait_for_rows(blocked) -> None:
    """Another thread's generation does not run under this one's rows; its own does."""
    model = Foreign()
    live, results = attach(model, constant(), batch_capacity=3), []
    expected = model(INPUT)

    def generate() -> None:
        with live.hold():
            results.append(model(INPUT))

    with contextlib.ExitStack() as end, live.rows(torch.tensor([False, True, True])):
        end.enter_context(thread(generate))
        assert blocked.wait(30) and not results
        with live.hold():
            own = model(INPUT)
    assert same_bits(results[0], expected)
    assert not torch.equal(own[0], expected[0]) and torch.equal(own[1], expected[1])


def test_a_thread_cannot_change_what_it_holds() -> None:
    """It would wait for itself for ever."""
    live = attach(Foreign(), constant(), batch_capacity=3)

    def generate() -> None:
        with live.hold():
            for call in (*CHANGES.values(), lambda live: live.rows(torch.tensor([True])).__enter__()):
                with pytest.raises(RemaskError, match=r"inside hold\(\)"):
                    call(live)

    with thread(generate):
        pass
    live.update(constant(5))


@pytest.mark.parametrize("name", ["default", "ridge", "paper"])
def test_a_file_is_attached_by_its_path_and_only_to_its_model(toy, facts, tmp_path, name) -> None:
    memory = EditMemory.build(toy, facts[:2], Site(1), retain=facts[4:], config=preset(name), alpha=2.0)
    memory.save(tmp_path / "m.safetensors")
    ids = torch.tensor([toy.encode(facts[0]).ids])
    with torch.inference_mode():
        before = toy.logits(ids)
        with memory.attached(toy):
            expected = toy.logits(ids)
        live = remask.attach(toy.model, tmp_path / "m.safetensors")
        assert torch.equal(toy.logits(ids), expected)
        live.detach()
        assert torch.equal(toy.logits(ids), before)
    other = build_toy(seed=9)
    with pytest.raises(RemaskError, match=f"built on model {toy.fingerprint()}, this one is {other.fingerprint()}"):
        remask.attach(other.model, memory)
    remask.attach(other.model, memory, same_model=False).detach()
