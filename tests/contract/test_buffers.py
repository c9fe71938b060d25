"""With ``model=`` every buffer of the model is after a step what the first pass left; ``frozen_buffers`` alone."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from methods import METHODS, SGD, Method, every_by_hand, every_deciding, every_later_call, every_method
from models import assert_same_bits, weights
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from torch.testing._internal.two_tensor import TwoTensor

import sharpkern as sk

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
SAM = METHODS["sam"]


class Layer(nn.Module):
    """A layer that passes its input on, and changes its buffers in every pass."""

    def __init__(self, change: Callable[[Any, Tensor], object], **buffers: Tensor | None) -> None:
        super().__init__()
        self.change = change
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        self.change(self, x.detach())
        return x


def ema(layer: Any, x: Tensor) -> None:
    layer.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)


def count(layer: Any, x: Tensor) -> None:
    layer.passes += 1
    layer.seen |= x[0] > 0
    layer.spectrum.add_(torch.complex(x[0], x[1]))


def codebook(layer: Any, x: Tensor) -> None:
    """A vector quantizer as most are written: through ``.data``, which no version tells of."""
    nearest = torch.cdist(x, layer.codes).argmin(1)
    hits = nn.functional.one_hot(nearest, layer.codes.shape[0]).to(x.dtype)
    layer.hits.data.mul_(0.9).add_(hits.sum(0), alpha=0.1)
    layer.sums.data.mul_(0.9).add_(hits.t() @ x, alpha=0.1)
    layer.codes.data.copy_(layer.sums / (layer.hits.unsqueeze(1) + 1e-3))


def anew(layer: Any, x: Tensor) -> None:
    layer.mean = 0.9 * layer.mean + 0.1 * x.mean(0)


def with_graph(layer: Any, x: Tensor) -> None:
    layer.mean = layer.mean.detach() + (layer.scale * x).mean(0)


def longer(layer: Any, x: Tensor) -> None:
    """In place, where there is room, and anew."""
    layer.history.resize_(layer.history.numel() + 1)
    layer.history[-1] = x.mean()
    layer.other = torch.cat([layer.other, x.mean().view(1)])


def other_memory(layer: Any, x: Tensor) -> None:
    layer.mean.data = x.mean(0).repeat(2)[::2]
    layer.square.add_(torch.outer(x[0], x[1])).t_()


def now_and_then(layer: Any, x: Tensor) -> None:
    layer.cache = None if layer.cache is not None else x.mean(0)


def gone(layer: Any, x: Tensor) -> None:
    layer.passes += 1
    if layer.passes == 2:
        del layer.mean


def shared(layer: Any, x: Tensor) -> None:
    ema(layer, x)
    layer.view[0] += 1
    layer.outside.add_(x.mean())


def repeated(layer: Any, x: Tensor) -> None:
    layer.row.data[0] += x[0]
    layer.gaps += x.mean()
    layer.conj += torch.complex(x[0], x[1])


def of_inference(layer: Any, x: Tensor) -> None:
    with torch.inference_mode():
        layer.mean.add_(x.mean(0))


def sparse(layer: Any, x: Tensor) -> None:
    layer.links.copy_((layer.links.to_dense() + torch.diag(x[0].relu())).to_sparse())


class OwnNorm(nn.BatchNorm1d):
    """Batch norm that updates its statistics whatever it tracks, as some synchronized ones do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.running_mean += 0.1 * (x.mean(0) - self.running_mean)  # type: ignore[has-type]
        return (x - x.mean(0)) / x.std(0)


def broadcasting() -> nn.Module:
    """As under DDP, whose forward begins with the buffers of another process."""

    def receive(norm: Any, _: Any) -> None:
        norm.running_mean.data += 1

    norm = nn.BatchNorm1d(8)
    norm.register_forward_pre_hook(receive)
    return norm


def of_shared() -> nn.Module:
    layer = Layer(shared, mean=torch.zeros(8))
    layer.register_buffer("view", layer.mean[2:4])
    layer.register_buffer("twin", layer.mean)
    layer.outside = layer.mean.view(2, 4)
    return nn.Sequential(layer, Layer(ema, mean=layer.mean))


def of_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Layer(of_inference, mean=torch.zeros(8))


def hidden() -> nn.Module:
    layer = Layer(ema)
    layer.register_buffer("mean", torch.zeros(8), persistent=False)
    return layer


def repeats() -> nn.Module:
    return Layer(
        repeated,
        row=torch.zeros(8).expand(3, 8),
        gaps=torch.zeros(4, 6)[:, ::2],
        conj=torch.zeros(8, dtype=torch.complex64).conj(),
    )


def graph() -> nn.Module:
    layer = Layer(with_graph, mean=torch.zeros(8))
    layer.scale = nn.Parameter(torch.ones(8))
    return layer


def quantize(observer: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: FakeQuantize(observer, quant_min=0, quant_max=255, **options)


PER_CHANNEL = dict(dtype=torch.quint8, qscheme=torch.per_channel_affine, ch_axis=1)
KINDS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(8),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
    "batch norm of its own": lambda: OwnNorm(8),
    "broadcast": broadcasting,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "spectral norm, older": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "fake quantization": quantize(MovingAverageMinMaxObserver),
    "fake quantization of channels": quantize(MovingAveragePerChannelMinMaxObserver, **PER_CHANNEL),
    "ema": lambda: Layer(ema, mean=torch.zeros(8)),
    "not persistent": hidden,
    "codebook": lambda: Layer(codebook, codes=torch.randn(4, 8), hits=torch.ones(4), sums=torch.zeros(4, 8)),
    "counters": lambda: Layer(
        count,
        passes=torch.tensor(0),
        seen=torch.zeros(8, dtype=torch.bool),
        spectrum=torch.zeros(8, dtype=torch.complex64),
    ),
    "anew": lambda: Layer(anew, mean=torch.zeros(8)),
    "with a graph": graph,
    "longer": lambda: Layer(longer, history=torch.zeros(4096)[:3], other=torch.zeros(2)),
    "other memory": lambda: Layer(other_memory, mean=torch.zeros(8), square=torch.zeros(8, 8)),
    "now and then": lambda: Layer(now_and_then, cache=None),
    "gone": lambda: Layer(gone, mean=torch.zeros(8), passes=torch.tensor(0)),
    "shared": of_shared,
    "repeats": repeats,
    "inference mode": of_inference_mode,
    "scripted": lambda: torch.jit.script(nn.BatchNorm1d(8)),
    "sparse": lambda: Layer(sparse, links=torch.eye(8).to_sparse()),
}


def make_model(*kinds: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *(KINDS[kind]() for kind in kinds), nn.Linear(8, 3))


def data(n: int) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(1)
    device = torch.get_default_device()
    return [torch.randn(16, 8, generator=generator, device="cpu").to(device) for _ in range(n)]


def buffers(model: nn.Module) -> dict[str, Tensor | None]:
    named = ((f"{at}.{name}", b) for at, m in model.named_modules() for name, b in m._buffers.items())
    return dict(named)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Of every buffer, and which are None."""
    kept = {}
    for name, b in buffers(model).items():
        if b is None:
            kept[f"{name} (none)"] = torch.zeros(0)
        else:
            dense = b.detach().to_dense() if b.layout != torch.strided else b.detach()
            kept[name] = torch.view_as_real(dense.resolve_conj()).clone() if dense.is_complex() else dense.clone()
    return kept


def homes(model: nn.Module) -> dict[str, Any]:
    """The objects, and where they lie."""
    return {
        name: (id(b), b.data_ptr(), b.size(), b.stride())
        for name, b in buffers(model).items()
        if b is not None and b.layout == torch.strided
    }


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() != b.keys() or any(a[n].size() != b[n].size() or not torch.equal(a[n], b[n]) for n in a)


class Closure:
    """A closure that looks at the buffers before and after each pass.

    Args:
        act: called after a pass, with its number.
    """

    def __init__(self, model: nn.Module, x: Tensor, act: Callable[[int], object] = lambda call: None) -> None:
        self.model, self.x, self.act = model, x, act
        self.entered: list[dict[str, Tensor]] = []
        self.left: list[dict[str, Tensor]] = []
        self.homes: dict[str, Any] | None = None
        self.held: list[Any] = []  # no object is made anew where another one was

    def __call__(self) -> Tensor:
        self.entered.append(bits(self.model))
        loss = self.model(self.x).square().mean()
        loss.backward()
        self.left.append(bits(self.model))
        self.homes = homes(self.model) if self.homes is None else self.homes
        self.held.append(buffers(self.model))
        self.act(len(self.left) - 1)
        return loss

    def check(self, calls: int) -> None:
        """Later passes began with what the first one left, and that is there now: the same objects, memory and bits."""
        assert len(self.left) == calls
        for seen in [*self.entered[1:], bits(self.model)]:
            assert_same_bits(seen, self.left[0])
        assert homes(self.model) == self.homes


def step_by_hand(opt: Any, closure: Closure) -> None:
    opt.zero_grad()
    closure()
    if opt.first_step(zero_grad=True):
        closure()
    opt.second_step()


@pytest.mark.parametrize("by_hand", [False, True], ids=["closure", "by hand"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_buffer_is_what_the_first_pass_left(kind: str, by_hand: bool) -> None:
    model, twin = make_model(kind), make_model(kind)
    opt = SAM.make(model.named_parameters(), SGD, lr=0.0, model=model)
    changed = False
    for x in data(4):
        closure = Closure(model, x)
        step_by_hand(opt, closure) if by_hand else opt.step(closure)
        closure.check(calls=2)
        changed |= differ(*closure.left)
        twin(x)
        assert_same_bits(bits(model), bits(twin))
    assert changed  # or there was nothing to keep


@every_method
def test_every_class_keeps_every_buffer(method: Method) -> None:
    model = make_model(*KINDS)
    opt = method.make(model.named_parameters(), "momentum", model=model, **method.every)
    for x in data(4):
        closure = Closure(model, x)
        opt.step(closure)
        closure.check(method.calls)
        assert all(differ(closure.left[0], other) for other in closure.left[1:])


@every_by_hand
def test_every_class_by_hand_keeps_every_buffer(method: Method) -> None:
    model = make_model(*KINDS)
    opt = method.make(model.named_parameters(), "momentum", model=model, **method.every)
    for x in data(4):
        closure = Closure(model, x)
        step_by_hand(opt, closure)
        closure.check(calls=2)


@pytest.mark.parametrize("end", ["exception", "interrupt", "restore"])
@every_later_call
def test_a_step_that_is_given_up_keeps_every_buffer(method: Method, call: int, end: str) -> None:
    model = make_model(*KINDS)
    opt = method.make(model.named_parameters(), "momentum", model=model, **method.every)
    opt.step(Closure(model, data(1)[0]))

    def act(calls: int) -> None:
        if calls == call:
            if end == "restore":
                opt.restore()
            else:
                raise {"exception": ValueError, "interrupt": KeyboardInterrupt}[end]

    closure = Closure(model, data(2)[1], act)
    before = weights(model)
    try:
        opt.step(closure)
    except (ValueError, KeyboardInterrupt):
        assert end != "restore"
    closure.check(call + 1)
    assert_same_bits(weights(model), before)
    after = Closure(model, data(3)[2])
    opt.step(after)
    after.check(method.calls)


@every_by_hand
def test_a_step_by_hand_that_is_given_up_keeps_every_buffer(method: Method) -> None:
    model = make_model(*KINDS)
    opt = method.make(model.named_parameters(), "momentum", model=model, **method.every)
    closure = Closure(model, data(1)[0])
    closure()
    opt.first_step(zero_grad=True)
    closure()
    opt.restore()
    closure.check(calls=2)


@every_deciding
def test_a_step_of_one_pass_leaves_buffers_to_the_user(method: Method) -> None:
    model = make_model("ema", "batch norm")
    opt = method.make(model.named_parameters(), "momentum", model=model, **(method.never or {"k": 9}))
    opt.step(Closure(model, data(1)[0]))
    closure = Closure(model, data(2)[1])
    closure()
    assert not opt.first_step()
    model(data(3)[2])
    seen = bits(model)
    assert differ(seen, closure.left[0])
    opt.second_step()
    assert_same_bits(bits(model), seen)


# The context manager.


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_buffers(kind: str) -> None:
    """Nested, and through exceptions."""
    model = make_model(kind)
    x, y, z = data(3)
    model(x)
    held = buffers(model)
    before, places = bits(model), homes(model)
    with pytest.raises(ValueError, match="inside"), sk.frozen_buffers(model):
        model(y)
        inner, inner_places = bits(model), homes(model)
        with sk.frozen_buffers(model):
            model(z)
            model(x)
        assert_same_bits(bits(model), inner)
        assert homes(model) == inner_places
        raise ValueError("inside")
    assert_same_bits(bits(model), before)
    assert homes(model) == places
    assert held.keys() == buffers(model).keys()


def test_what_frozen_buffers_leaves_alone() -> None:
    """Parameters, tensors that are no buffers, and what comes up within the block."""
    model = make_model("ema")
    model.tensor = torch.zeros(2)
    with sk.frozen_buffers(model):
        model.register_buffer("more", torch.ones(2))
        model.tensor += 1
        model[0].weight.data.fill_(2.0)
        model.extend([nn.BatchNorm1d(3)])
        model[-1](torch.ones(4, 3))
    assert torch.equal(model.more, torch.ones(2))
    assert torch.equal(model.tensor, torch.ones(2))
    assert torch.equal(model[0].weight, torch.full((8, 8), 2.0))
    assert model[-1].num_batches_tracked == 1


def test_memory_that_a_pass_frees_or_outgrows() -> None:
    """There is other memory then, with the values."""
    model = Layer(ema, cache=torch.arange(4.0), history=torch.ones(2), empty=torch.zeros(0))
    held, before = buffers(model), bits(model)
    with sk.frozen_buffers(model):
        model.cache.untyped_storage().resize_(0)
        model.history.resize_(1000)
        model.empty.resize_(3)
    assert all(b is held[name] for name, b in buffers(model).items())
    assert_same_bits(bits(model), before)


def test_frozen_buffers_without_memory_or_values() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.BatchNorm1d(2, device="meta"))
    with sk.frozen_buffers(model):
        model[0](torch.randn(4, 3))
    assert model[0].running_mean.shape == (3,)  # it has its shape from the first pass that it sees
    assert model[1].running_mean.is_meta


def test_a_buffer_whose_elements_are_another_tensors() -> None:
    model = nn.Module()
    model.register_buffer("pair", TwoTensor(torch.zeros(2), torch.ones(2)))
    pair, first = model.pair, model.pair.a
    with sk.frozen_buffers(model):
        model.pair.add_(1)
    assert model.pair is pair
    assert pair.a is first
    assert torch.equal(pair.a, torch.zeros(2))
    assert torch.equal(pair.b, torch.ones(2))


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(layout: torch.layout) -> None:
    """They have no one size, nor strides."""
    rows = [torch.ones(2), torch.arange(3.0)]
    model = Layer(ema, rows=torch.nested.nested_tensor(rows, layout=layout))
    held = model.rows
    with sk.frozen_buffers(model):
        model.rows.mul_(2)
        model.rows = model.rows * 2
    assert model.rows is held
    assert all(map(torch.equal, held.unbind(), rows))


def test_held_tensors_are_the_models() -> None:
    """functional_call, captured forwards and wrappers write to tensors that they hold."""
    model = make_model("ema", "batch norm", "shared")
    held = {**dict(model.named_parameters()), **dict(model.named_buffers(remove_duplicate=False))}
    before = bits(model)
    with sk.frozen_buffers(model):
        torch.func.functional_call(model, held, data(1)[0])
        assert differ(bits(model), before)
    assert_same_bits(bits(model), before)


@contextmanager
def interrupted(at: int, files: tuple[str, ...]) -> Iterator[list[bool]]:
    """A KeyboardInterrupt before the line with this number that runs in such files; whether it came."""
    came, lines = [], itertools.count()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line" and next(lines) == at:
            came.append(True)
            raise KeyboardInterrupt
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        yield came
    finally:
        sys.settrace(old)


def each_interrupt(*files: str) -> Iterator[Callable[[], AbstractContextManager[list[bool]]]]:
    """An interrupt at the first line, the second and so on, until there are no more."""
    for at in itertools.count():
        seen: list[list[bool]] = []

        @contextmanager
        def interrupt(at: int = at, seen: list[list[bool]] = seen) -> Iterator[list[bool]]:
            with interrupted(at, files) as came:
                seen.append(came)
                yield came

        yield interrupt
        if not seen[-1]:
            assert at > 10
            return


@pytest.mark.parametrize("frozen", [sk.frozen_batch_stats, sk.frozen_buffers], ids=lambda f: f.__name__)
def test_an_interrupt_between_any_two_lines(frozen: Any) -> None:
    model = make_model("batch norm", "instance norm")
    norms = [m for m in model.modules() if hasattr(m, "track_running_stats")]
    x = data(1)[0]
    model(x)
    before, places = bits(model), homes(model)
    for interrupt in each_interrupt("batch_stats.py"):
        try:
            with interrupt(), frozen(model):
                model(x)
        except KeyboardInterrupt:
            pass
        assert all(norm.track_running_stats for norm in norms)
        assert_same_bits(bits(model), before)
        assert homes(model) == places


def test_an_interrupt_between_any_two_lines_of_a_step() -> None:
    model = make_model("batch norm", "ema", "anew", "longer")
    opt = SAM.make(model.named_parameters(), "momentum", model=model)
    for interrupt in each_interrupt("batch_stats.py"):
        closure = Closure(model, data(1)[0])
        before = weights(model)
        try:
            with interrupt() as came:
                opt.step(closure)
        except KeyboardInterrupt:
            pass
        assert not opt.is_perturbed
        closure.check(len(closure.left))
        if came and len(closure.left) < 2:
            assert_same_bits(weights(model), before)


# Around it.


def test_a_buffer_in_memory_that_is_trained_is_trained() -> None:
    ends = []
    for given in (False, True):
        model = make_model("ema")
        model.register_buffer("rows", model[0].weight.data[2:4])
        model.register_buffer("bias", torch.zeros(3, requires_grad=True))
        opt = SAM.make([*model.named_parameters(), ("bias", model.bias)], "momentum", model=model if given else None)
        for x in data(3):

            def closure(model: Any = model, x: Tensor = x) -> Tensor:
                loss = (model(x) + model.bias - 1).square().mean()
                loss.backward()
                return loss

            opt.step(closure)
        assert torch.equal(model.rows, model[0].weight[2:4])
        assert not torch.equal(model.bias, torch.zeros(3))
        ends.append({**weights(model), "rows": model.rows.clone(), "bias": model.bias.detach().clone()})
    assert_same_bits(*ends)


def test_parameters_and_buffers_in_one_storage() -> None:
    """As a file that is mapped into memory gives them."""
    model = make_model("ema", "batch norm")
    file = torch.zeros(4096)
    at = 0
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor.is_floating_point():
                slot = file[at : at + tensor.numel()].view(tensor.shape).copy_(tensor.detach())
                at += tensor.numel()
                setattr(module, name, nn.Parameter(slot) if name in module._parameters else slot)
    opt = SAM.make(model.named_parameters(), "momentum", model=model)
    closure = Closure(model, data(1)[0])
    opt.step(closure)
    closure.check(calls=2)
    assert differ(*closure.left)


def test_a_model_that_is_cast_between_passes_keeps_values() -> None:
    model = make_model("ema", "batch norm")
    model(data(1)[0])
    before = bits(model)
    with sk.frozen_buffers(model):
        model(data(2)[1])
        model.double()
        model(data(2)[1].double())
    assert all(b.dtype != torch.float32 for b in model.buffers())
    for name, value in bits(model).items():
        assert torch.equal(value, before[name].to(value.dtype))


def test_graphs_over_buffers() -> None:
    """One over values that are gone raises, as in torch; one over a buffer that no pass changed is whole."""
    model = make_model("ema")
    model.register_buffer("mask", torch.arange(8.0))
    x = nn.Parameter(torch.ones(8))
    opt = SAM.make(model.named_parameters(), "momentum", model=model)
    constant = (x * model.mask).sum()
    graphs: list[Tensor] = []
    opt.step(Closure(model, data(1)[0], lambda call: graphs.append((x * model[1].mean).sum())))
    constant.backward()
    assert torch.equal(x.grad, model.mask)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graphs[1].backward()


def test_a_compiled_model_is_compiled_no_more_often() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = make_model("batch norm", "spectral norm", "anew")
    compiled = torch.compile(model, backend=counter)
    opt = SAM.make(model.named_parameters(), "momentum", model=compiled)
    compiled(data(1)[0])
    compiled(data(1)[0])
    before = counter.frame_count
    for x in data(10):
        opt.zero_grad()
        closure = Closure(compiled, x)
        opt.step(closure)
        closure.check(calls=2)
    assert before > 0
    assert counter.frame_count == before
