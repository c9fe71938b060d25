"""``master_weights=True``: a model in a half type trains as its float32 twin that is read through casts, to the bit."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import DEVICE_KERNELS, round_in_the_interpreter
from methods import METHODS, RULES, SGD, AdamW, Method
from models import assert_same_bits, batches, make_net, split, state_of, weights
from torch import Tensor, nn

import sharpkern as sk
from sharpkern import checks
from sharpkern.memory.layout import Layout

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
DEVICE = torch.get_default_device()
BASES = ("momentum", "adamw")
MASTERED = [m for m in METHODS.values() if m.name != "salr"]
every_method = pytest.mark.parametrize("method", MASTERED, ids=str)
every_base = pytest.mark.parametrize("base", BASES)
slow = pytest.mark.slow
# Plain steps, gradients that are left, half types without masters: what is warned of is tested elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:step", "ignore:half-precision")
STEPS = 12

Batch = tuple[Tensor, Tensor]
Run = tuple[nn.Module, Any]  # a model and its optimizer


class Cast(nn.Module):
    """A float32 model whose forward pass reads its parameters in a half type."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.wide, self.dtype = copy.deepcopy(model).float(), dtype
        self.shell = [copy.deepcopy(model)]  # with buffers in the half type; its parameters are not looked at

    def forward(self, x: Tensor) -> Tensor:
        low = {name: p.to(self.dtype) for name, p in self.wide.named_parameters()}
        return torch.func.functional_call(self.shell[0], low, x)

    def low(self) -> dict[str, Tensor]:
        """What the model in the half type should be."""
        return {name: p.detach().to(self.dtype) for name, p in self.wide.named_parameters()}


def closure_of(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    x, y = batch

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        return loss

    return closure


def data(n: int = STEPS, dtype: torch.dtype = bf16) -> list[Batch]:
    return batches(n, dtype, size=8)


def make(method: Method, base: str, dtype: torch.dtype = bf16, groups: bool = False, **more: Any) -> Run:
    model = make_net(dtype)
    params = split(model, RULES[base][1]) if groups else model.named_parameters()
    return model, method.make(params, base, STEPS, master_weights=True, **more)


def make_twin(model: nn.Module, method: Method, base: str, groups: bool = False, **more: Any) -> tuple[Cast, Any]:
    cast = Cast(model, next(model.parameters()).dtype)
    params = split(cast.wide, RULES[base][1]) if groups else cast.wide.named_parameters()
    return cast, method.make(params, base, STEPS, **more)


def masters_of(model: nn.Module, opt: Any) -> dict[str, Tensor]:
    return {name: opt.state[p]["master"].clone() for name, p in model.named_parameters() if "master" in opt.state[p]}


def assert_rounded(model: nn.Module, opt: Any) -> None:
    """Between steps each parameter is what the half type has of its master."""
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), opt.state[p]["master"].to(p.dtype)), name


@pytest.fixture
def rounded_directions(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Within it a float32 optimizer follows a flat buffer rounded to a half type: what the optimizers do that go along
    an average or a momentum, whose direction goes where gradients are."""
    follow = Layout.follow

    def rounded(self: Layout, name: str, rows: Any) -> None:
        if self.dtype == f32:
            self.buffer("gradient").copy_(self.buffer(name).to(bf16))
            name = "gradient"
        follow(self, name, rows)

    return lambda: monkeypatch.setattr(Layout, "follow", rounded)


def trajectories() -> Iterator[Any]:
    """(backend, method, base, dtype, groups, steps)."""
    for backend in sk.available_backends(DEVICE):
        interpreted = backend == "triton" and DEVICE.type == "cpu"
        for method in MASTERED:
            for base in BASES:
                values = (backend, method, base)
                if interpreted:  # a second a step
                    if (str(method), base) in (("sam", "adamw"), ("asam", "momentum"), ("wsam", "momentum")):
                        marks = [slow] * (str(method) != "asam")
                        yield pytest.param(*values, bf16, False, 3, id=f"{backend}-{method}-{base}", marks=marks)
                    continue
                yield pytest.param(*values, bf16, False, STEPS, id=f"{backend}-{method}-{base}")
                if backend == "cpp":
                    marks = [slow] * (str(method) not in ("asam", "looksam"))
                    yield pytest.param(*values, f16, True, STEPS, id=f"{backend}-{method}-{base}-float16", marks=marks)


# On a GPU kernels of half types and of float32 round a last bit otherwise.
def assert_low(model: nn.Module, cast: Cast) -> None:
    if DEVICE.type == "cpu":
        assert_same_bits(weights(model), cast.low())


def assert_wide(model: nn.Module, opt: Any, cast: Cast) -> None:
    if DEVICE.type == "cpu":
        assert_same_bits(masters_of(model, opt), weights(cast.wide))
    else:
        torch.testing.assert_close(masters_of(model, opt), weights(cast.wide), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("backend", "method", "base", "dtype", "groups", "steps"), list(trajectories()))
def test_it_trains_as_a_float32_model_that_is_read_through_casts(
    backend: str,
    method: Method,
    base: str,
    dtype: torch.dtype,
    groups: bool,
    steps: int,
    rounded_directions: Any,
) -> None:
    if method.name in ("momentumsam", "friendlysam", "vasso"):
        if dtype != bf16:
            pytest.skip("the twin rounds its directions to bfloat16, whatever the dtype")
        rounded_directions()
    if backend == "triton" and DEVICE.type == "cpu":
        round_in_the_interpreter()
    with sk.use_backend(backend):
        model, opt = make(method, base, dtype, groups)
        cast, twin = make_twin(model, method, base, groups)
        for batch in data(steps, dtype):
            got, want = opt.step(closure_of(model, batch)), twin.step(closure_of(cast, batch))
            if not DEVICE_KERNELS:
                assert torch.equal(got, want)
                assert_same_bits(weights(model), cast.low())
            assert_rounded(model, opt)
    if DEVICE_KERNELS:
        # They add up a half type's squares in another order: a last bit of the norm, and what rounding makes of that.
        torch.testing.assert_close(masters_of(model, opt), weights(cast.wide), rtol=0, atol=2e-3)
    else:
        assert_same_bits(masters_of(model, opt), weights(cast.wide))
        assert_same_bits(opt.stats, twin.stats)
    assert any((w != p.float()).any() for w, p in zip(masters_of(model, opt).values(), model.parameters(), strict=True))


@every_base
@pytest.mark.parametrize("flatten", [False, True], ids=["", "flat"])
def test_by_hand_and_clipped(base: str, flatten: bool) -> None:
    """Loops of two backward passes, decisions, clipping and flat parameters change nothing of it."""
    options = {"max_grad_norm": 0.5, "policy": sk.policy.Every(2), "flatten": flatten}
    model, opt = make(METHODS["sam"], base, **options)
    cast, twin = make_twin(make_net(bf16), METHODS["sam"], base, **options)
    for batch in data():
        for each, net in ((opt, model), (twin, cast)):
            each.zero_grad()
            closure_of(net, batch)()
            if each.first_step(zero_grad=True):
                closure_of(net, batch)()
            each.second_step()
        assert_low(model, cast)
    assert_wide(model, opt, cast)


@pytest.mark.parametrize("base", ["sgd", *BASES, "nesterov", "amsgrad"])
def test_without_a_radius_it_is_the_base_rule_on_the_masters(base: str) -> None:
    """To the bit as it is fused here, which a plain step is; torch's own within float32's rounding."""
    model, opt = make(METHODS["sam"], base, rho=0.0)
    cast, twin = make_twin(make_net(bf16), METHODS["sam"], base)
    torchs = Cast(make_net(bf16), bf16)
    own = RULES[base][0](torchs.wide.parameters(), **RULES[base][1])
    for batch in data():
        opt.step(closure_of(model, batch))
        for each, net in ((twin, cast), (own, torchs)):
            each.zero_grad()
            closure_of(net, batch)()
            each.step()
        assert_low(model, cast)
        for p, q in zip(cast.wide.parameters(), torchs.wide.parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5)
            q.data.copy_(p)  # a rounding that falls otherwise would lead elsewhere
    assert_wide(model, opt, cast)


@pytest.mark.parametrize("base", BASES)
def test_what_memory_it_takes(base: str) -> None:
    """4 bytes a parameter, which take the place of a backup of 2; nothing for other parameters."""
    sizes = {}
    for dtype in (bf16, f32):
        for mastered in (False, True):
            p = nn.Parameter(torch.ones(64, 8, dtype=dtype))
            opt = sk.SAM([p], RULES[base][0], **RULES[base][1], master_weights=mastered)
            p.grad = torch.ones_like(p)
            opt.first_step()
            (layout,) = opt._step.layouts
            opt.second_step()
            held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layout.buffers.values()}
            state = {k: v.untyped_storage().data_ptr() for k, v in opt.state[p].items() if k != "step"}
            assert set(state.values()) <= held.keys()
            assert ("master" in state) == (mastered and dtype == bf16)
            sizes[dtype, mastered] = sum(held.values()) / p.numel()
    assert sizes[bf16, True] - sizes[bf16, False] == 2
    assert sizes[f32, True] == sizes[f32, False]


def test_parameters_of_other_types_have_none() -> None:
    """Not to a bit other, and beside ones of a half type neither."""
    models, opts = [], []
    for mastered in (False, True):
        torch.manual_seed(0)
        with torch.device("cpu"):
            model = nn.ModuleList([nn.Linear(6, 5, dtype=f32), nn.Linear(5, 3, dtype=bf16)])
        models.append(model.to(DEVICE))
        opts.append(sk.SAM(model.parameters(), AdamW, lr=1e-2, master_weights=mastered))
    x = torch.randn(4, 6)

    for model, opt in zip(models, opts, strict=True):
        inner = nn.Sequential(model[0])  # whose gradient is the same, whatever the other one is
        for _ in range(3):
            opt.step(lambda m=model, i=inner: _backward(i(x).square().sum() + m[1](x[:, :5].to(bf16)).float().sum()))
    assert_same_bits(weights(models[0][0]), weights(models[1][0]))
    assert "master" not in opts[1].state[models[1][0].weight]
    assert opts[1].state[models[1][1].weight]["master"].dtype == f32


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


# Exceptions, and gradients that are not finite.


@every_method
def test_an_exception_leaves_the_masters_and_what_they_round_to(method: Method) -> None:
    model, opt = make(method, "momentum", **method.every)
    opt.step(closure_of(model, data(1)[0]))
    before, masters = weights(model), masters_of(model, opt)

    for call in range(method.calls):
        left = call

        def closure() -> Tensor:
            nonlocal left
            loss = closure_of(model, data(1)[0])()
            left -= 1
            if left < 0:
                raise ZeroDivisionError
            return loss

        with pytest.raises(ZeroDivisionError):
            opt.step(closure)
        assert_same_bits(weights(model), before)
        assert_same_bits(masters_of(model, opt), masters)
    assert_rounded(model, opt)


@every_base
@pytest.mark.parametrize("call", [0, 1])
def test_a_skipped_step_changes_no_master(call: int, base: str) -> None:
    model, opt = make(METHODS["sam"], base)
    opt.step(closure_of(model, data(1)[0]))
    before, state = weights(model), state_of(opt)
    calls = iter(range(2))

    def closure() -> Tensor:
        loss = closure_of(model, data(1)[0])()
        if next(calls) == call:
            model.hidden.bias.grad[1] = float("inf")
        return loss

    opt.step(closure)
    assert int(opt.stats["skipped_steps"]) == 1
    assert_same_bits(weights(model), before)
    assert_same_bits(state_of(opt), state)


# Checkpoints.


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resumed(way: str, method: Method, base: str, model: nn.Module, opt: Any) -> Run:
    if way == "copied":
        return copy.deepcopy((model, opt))
    if way == "pickled":
        return pickle.loads(pickle.dumps((model, opt)))
    other = make_net(bf16, seed=5)
    twin = method.make(other.named_parameters(), base, STEPS, master_weights=True)
    if way == "into a trained one":
        twin.step(closure_of(other, data(1)[0]))
    loads = [(twin, opt), (other, model)]
    for to, of in loads if way == "optimizer first" else reversed(loads):
        to.load_state_dict(through_a_file(of.state_dict()))
    return other, twin


@pytest.mark.parametrize("way", ["optimizer first", "model first", "into a trained one", "copied", "pickled"])
@every_method
def test_a_resumed_run_is_the_same_to_the_bit(method: Method, way: str) -> None:
    base = "momentum" if method.sgd_only else "adamw"
    model, opt = make(method, base)
    for batch in data()[:4]:
        opt.step(closure_of(model, batch))
    other, twin = resumed(way, method, base, model, opt)
    assert_same_bits(masters_of(other, twin), masters_of(model, opt))
    for batch in data()[4:8]:
        for net, each in ((model, opt), (other, twin)):
            each.step(closure_of(net, batch))
    assert_same_bits(weights(other), weights(model))
    assert_same_bits(state_of(twin), state_of(opt))


@pytest.mark.parametrize("of", ["without masters", "torch"])
def test_a_state_dict_without_masters_is_told_of(of: str) -> None:
    model = make_net(bf16)
    options = RULES["adamw"][1]
    source: Any = AdamW(model.parameters(), **options)
    if of != "torch":
        source = sk.SAM(model.parameters(), AdamW, **options)
    source.step(closure_of(model, data(1)[0]))
    opt = sk.SAM(model.parameters(), AdamW, **options, master_weights=True)
    with pytest.warns(UserWarning, match="no master weights") as told:
        opt.load_state_dict(source.state_dict())
    assert sum("master" in str(each.message) for each in told) == 1
    opt.step(closure_of(model, data(2)[1]))
    assert_rounded(model, opt)
    assert opt.state[model.gain]["step"] == 2


def test_an_optimizer_without_the_option_leaves_masters_out() -> None:
    model, opt = make(METHODS["sam"], "sgd")
    opt.step(closure_of(model, data(1)[0]))
    for base in (SGD, torch.optim.RMSprop):
        bare = sk.SAM(model.parameters(), base, lr=0.1)
        bare.load_state_dict(opt.state_dict())
        assert not any("master" in entry for entry in bare.state.values())
        bare.step(closure_of(model, data(1)[0]))


def test_loaded_masters_are_checked() -> None:
    model, opt = make(METHODS["sam"], "momentum")
    opt.step(closure_of(model, data(1)[0]))
    loaded = opt.state_dict()
    loaded["state"][0]["master"] = torch.zeros(3)
    masters = masters_of(model, opt)
    with pytest.raises(ValueError, match="master of shape"):
        opt.load_state_dict(loaded)
    assert_same_bits(masters_of(model, opt), masters)


# What users do to parameters.


def _copy(p: nn.Parameter, to: Tensor) -> None:
    with torch.no_grad():
        p.copy_(to)


def _replace(p: nn.Parameter, to: Tensor) -> None:
    p.data = to.clone()


def _refill(p: nn.Parameter, to: Tensor) -> None:
    """New memory at the old address, as an allocator gives out what was freed."""
    again, address = torch.from_dlpack(p.detach()), p.data_ptr()
    again.copy_(to)
    p.data = again
    assert p.data_ptr() == address


WRITES: dict[str, Callable[[nn.Parameter, Tensor], None]] = {"copy_": _copy, "data": _replace, "refilled": _refill}


@pytest.mark.parametrize("when", ["between", "by hand", "open"])
@pytest.mark.parametrize("write", WRITES)
def test_what_users_write_into_a_parameter_is_its_master(write: str, when: str) -> None:
    """Elements that they leave alone keep theirs. ``open``: between first_step and second_step of a plain step."""
    model, opt = make(METHODS["sam"], "adamw", policy=sk.policy.Every(3), lr=1e-3)
    for batch in data()[:2]:
        opt.step(closure_of(model, batch))
    p = model.hidden.weight
    to = p.detach().clone()
    to[1] = 0.25
    expected = opt.state[p]["master"].clone()
    expected[1] = 0.25

    def act() -> None:
        WRITES[write](p, to)

    assert not torch.equal(expected, expected.to(bf16).float())
    for group in opt.param_groups:
        group["lr"] = 0.0  # what a step makes of it is not the question
    if when == "between":
        act()
        opt.step(closure_of(model, data(1)[0]))
    else:
        opt.zero_grad()
        closure_of(model, data(1)[0])()
        if when == "by hand":
            act()
        assert not opt.first_step()
        if when == "open":
            act()
        opt.second_step()
    assert_same_bits({"": opt.state[p]["master"]}, {"": expected})
    assert_rounded(model, opt)


def test_a_loaded_model_is_where_the_training_goes_on() -> None:
    model, opt = make(METHODS["sam"], "momentum")
    opt.step(closure_of(model, data(1)[0]))
    kept = copy.deepcopy(model.state_dict())
    for batch in data()[1:3]:
        opt.step(closure_of(model, batch))
    model.load_state_dict(kept)
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step(closure_of(model, data(1)[0]))
    assert_same_bits(weights(model), {name: kept[name] for name, _ in model.named_parameters()})
    assert_rounded(model, opt)


def test_cleared_state_is_made_anew() -> None:
    model, opt = make(METHODS["sam"], "momentum")
    for batch in data()[:2]:
        opt.step(closure_of(model, batch))
    opt.state.clear()
    for batch in data()[2:4]:
        opt.step(closure_of(model, batch))
    assert_rounded(model, opt)


def test_frozen_moved_and_added_parameters_keep_their_masters() -> None:
    model, opt = make(METHODS["sam"], "momentum")
    cast, twin = make_twin(make_net(bf16), METHODS["sam"], "momentum")
    for t, batch in enumerate(data()):
        for net in (model, cast.wide):
            net.out.weight.requires_grad_(t not in (3, 4))
            if t == 6:
                for p in net.parameters():
                    p.data = p.data.clone()
        opt.step(closure_of(model, batch))
        twin.step(closure_of(cast, batch))
        assert_low(model, cast)
    assert_wide(model, opt, cast)


@pytest.mark.parametrize("flatten", [False, True], ids=["", "flat"])
def test_moved_between_two_passes(flatten: bool) -> None:
    """Weights that are away lie elsewhere, or in other layouts, when they come home."""
    model, opt = make(METHODS["sam"], "adamw", flatten=flatten)
    cast, twin = make_twin(make_net(bf16), METHODS["sam"], "adamw")
    for t, batch in enumerate(data()[:5]):
        for net, each in ((model, opt), (cast, twin)):
            each.zero_grad()
            closure_of(net, batch)()
            assert each.first_step(zero_grad=True)
            inner = net.wide if net is cast else net
            if t == 0 and not flatten:
                opt.unflatten()
            for p in inner.parameters() if t == 1 else ():
                p.data = p.data.clone()
            if t in (0, 2):
                each._step.layouts.valid = False  # as after a change of the groups
            closure_of(net, batch)()
            each.second_step()
        assert_low(model, cast)
    assert_wide(model, opt, cast)


def test_a_model_that_becomes_float32_has_its_masters_no_more() -> None:
    model, opt = make(METHODS["sam"], "momentum")
    opt.step(closure_of(model, data(1)[0]))
    model.float()
    opt.step(closure_of(model, data(2, f32)[1]))
    assert not any("master" in entry for entry in opt.state.values())
    model.to(bf16)
    opt.step(closure_of(model, data(2)[1]))
    assert_rounded(model, opt)


def test_parameters_with_gaps() -> None:
    """They are served by dense copies."""
    ends = []
    for dtype in (bf16, f32):
        p = nn.Parameter(torch.linspace(-1, 1, 36, device="cpu").to(DEVICE, bf16).to(dtype).view(6, 6)[:, ::2])
        opt = sk.ASAM([p], SGD, lr=0.01, momentum=0.9, rho=0.1, master_weights=True)
        for t in range(4):
            opt.step(lambda p=p, t=t: _backward((p.to(bf16).float().cos() * (t + 1)).sum()))
        ends.append(opt.state[p]["master"] if dtype == bf16 else p.detach())
        if dtype == bf16:
            assert torch.equal(p.detach(), ends[0].to(bf16))
    assert torch.equal(*ends)


def test_weights_that_are_kept_later_are_in_the_masters_already() -> None:
    """Of parameters that get their gradient in a later pass, or in another process."""
    for keep in ("keep_others", "keep_rows"):
        model, opt = make(METHODS["sam"], "momentum")
        opt.step(closure_of(model, data(1)[0]))
        masters = masters_of(model, opt)
        opt.zero_grad()
        closure_of(model, data(1)[0])()
        model.out.weight.grad = None
        opt.first_step()
        closure_of(model, data(1)[0])()
        (layout,) = opt._step.layouts
        opt._step.collect()
        layout.keep_others() if keep == "keep_others" else layout.keep_rows([True] * len(layout.params))
        opt.restore()
        assert_same_bits(masters_of(model, opt), masters)
        assert_rounded(model, opt)


# Arguments.


def test_who_takes_none_says_so() -> None:
    p = nn.Parameter(torch.ones(3, dtype=bf16))
    with pytest.raises(ValueError, match="RMSprop cannot be the base optimizer with master_weights=True"):
        sk.SAM([p], torch.optim.RMSprop, lr=0.1, master_weights=True)
    with pytest.raises(TypeError, match="SALR takes no master_weights=True: its branches"):
        sk.SALR([p], SGD, lr=0.1, master_weights=True)
    sk.SALR([p], SGD, lr=0.1, master_weights=False)
    with pytest.raises(TypeError, match="master_weights should be a bool, but got 1"):
        sk.SAM([p], SGD, lr=0.1, master_weights=1)


def test_the_warning_of_half_types_is_for_those_without_masters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_warned_half", False)
    p = nn.Parameter(torch.ones(3, dtype=bf16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.SAM([p], SGD, lr=0.1, master_weights=True)
    with pytest.warns(UserWarning, match="master_weights=True"):
        sk.SAM([p], SGD, lr=0.1)


def test_masters_are_no_part_of_a_graph() -> None:
    """Laid out by the constructor, where gradients are on."""
    model, opt = make(METHODS["sam"], "momentum", flatten=True)
    opt.step(closure_of(model, data()[0]))
    assert not any(opt.state[p]["master"].requires_grad for p in model.parameters())
    copy.deepcopy(opt.state_dict())
    opt.unflatten()
    opt.step(closure_of(model, data()[0]))
    assert all(opt.state[p]["master"].is_leaf for p in model.parameters())


class Keeping(torch.optim.Optimizer):
    """Has state of its own that is called like ours."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p].update(n=0, master=torch.zeros(3, device=p.device))
                self.state[p]["master"] += 1


def test_state_of_a_wrapped_optimizer_may_have_that_name() -> None:
    p, q = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    opt = sk.SAM([p], Keeping)

    def closure() -> Tensor:
        loss = (p.sum() + q.sum()) ** 2
        loss.backward()
        return loss

    opt.step(closure)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.add_param_group({"params": [q]})
    opt.step(closure)
    assert opt.state[p]["master"].tolist() == [2.0] * 3


def test_a_model_that_becomes_float32_has_the_masters() -> None:
    model, opt = make(METHODS["sam"], "momentum")
    for batch in data():
        opt.step(closure_of(model, batch))
    exact = masters_of(model, opt)
    model.float()
    with torch.no_grad():
        model.out.bias.add_(1)
    written = model.out.bias.detach().clone()
    opt._step.refresh()
    assert_same_bits(weights(model), {**exact, "out.bias": written})
    assert not any("master" in opt.state[p] for p in model.parameters())


def test_writes_that_torch_does_not_count_are_told_of() -> None:
    model, opt = make(METHODS["sam"], "momentum", lr=0.0, weight_decay=0.0)
    opt.step(closure_of(model, data()[0]))
    model.out.bias.data.add_(1)
    written = model.out.bias.detach().clone()
    opt.take_parameters()
    opt.step(closure_of(model, data()[0]))
    assert torch.equal(model.out.bias, written)
    assert_rounded(model, opt)
    opt.zero_grad()
    closure_of(model, data()[0])()
    opt.first_step()
    with pytest.raises(RuntimeError, match=r"take_parameters\(\) while"):
        opt.take_parameters()
