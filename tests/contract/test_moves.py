"""Users move things: data pointers, dtypes, memory formats, gradients; and flatten=True (contract 10)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from methods import METHODS, SGD, Method, each_method, every_base, every_later_call, every_method
from models import assert_same_bits, batches, make_closure, make_net, relative_error, state_of, train, weights
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.ops import scan

f32 = torch.float32
flattened = pytest.mark.parametrize("flatten", [False, True], ids=["segments", "flat"])


@pytest.fixture(
    params=["aten", pytest.param("dlpack", marks=pytest.mark.slow), pytest.param("op", marks=pytest.mark.slow)]
)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every way that tensors are found; the first one is whichever is there."""
    if request.param != "aten":
        monkeypatch.setattr(scan, "_aten", None)
    if request.param == "op":
        monkeypatch.setattr(scan, "_EXCHANGE", None)


def addresses(model: nn.Module) -> list[int]:
    return [p.data_ptr() for p in model.parameters()]


@flattened
@every_base
@every_method
def test_addresses_never_change(method: Method, base: str, flatten: bool) -> None:
    model = make_net()
    before = addresses(model)
    opt = method.make(model.named_parameters(), base, flatten=flatten)
    if not flatten:
        assert addresses(model) == before
    before = addresses(model)
    train(model, opt, batches(4))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt, batches(1))
    assert addresses(model) == before


# Moves that keep the values. The old memory stays, so that whoever writes to it is found and breaks nothing else.

OLD: list[tuple[Tensor, Tensor]] = []


@pytest.fixture(autouse=True)
def old_memory_is_left_alone() -> Iterator[None]:
    OLD.clear()
    yield
    assert all(torch.equal(memory, copy) for memory, copy in OLD)


def move(p: Tensor, to: Tensor) -> None:
    OLD.append((p.data, p.data.clone()))
    p.data = to


def swap_data(model: nn.Module) -> None:
    for p in model.parameters():
        move(p, p.data.clone())


def swap_one(model: nn.Module) -> None:
    move(model.hidden.weight, model.hidden.weight.data.clone())


def swap_strides(model: nn.Module) -> None:
    """To another order and back again."""
    dense = model.hidden.weight.is_contiguous()
    w, conv = model.hidden.weight.data, model.conv.weight.data
    move(model.hidden.weight, w.t().contiguous().t() if dense else w.contiguous())
    move(model.conv.weight, conv.clone(memory_format=torch.channels_last if dense else torch.contiguous_format))


def freeze_and_swap(model: nn.Module) -> None:
    """What is frozen in the middle of a step is put back all the same."""
    swap_data(model)
    model.hidden.bias.requires_grad_(False)


def reload(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def to_none(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)


def to_zero(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


SWAPS: dict[str, Callable[[nn.Module], None]] = {f.__name__: f for f in (swap_data, swap_one, swap_strides)}
MOVES = SWAPS | {f.__name__: f for f in (reload, to_none, to_zero)}


@pytest.mark.parametrize("how", MOVES)
@flattened
@every_base
@every_method
@pytest.mark.usefixtures("path")
def test_moved_between_steps(method: Method, base: str, flatten: bool, how: str) -> None:
    """A move that keeps the values keeps the trajectory: what g_v or momentum a parameter has goes along."""
    model, still = make_net(), make_net()
    opt = method.make(model.named_parameters(), base, flatten=flatten)
    reference = method.make(still.named_parameters(), base)
    for batch in batches(5):
        opt.step(make_closure(model, batch))
        reference.step(make_closure(still, batch))
        MOVES[how](model)
    assert relative_error(model, still) < 1e-11


@pytest.mark.parametrize("how", [*SWAPS, "freeze_and_swap"])
@flattened
@every_base
@every_later_call
@pytest.mark.usefixtures("path")
def test_moved_between_passes(method: Method, call: int, base: str, flatten: bool, how: str) -> None:
    """Before any call of the closure but the first; the step ends well, or is restored."""
    act = {**SWAPS, "freeze_and_swap": freeze_and_swap}[how]
    model, still = make_net(), make_net()
    opt, reference = (
        method.make(m.named_parameters(), base, flatten=f, **method.every)
        for m, f in ((model, flatten), (still, False))
    )
    for t, batch in enumerate(batches(4)):
        for m, each in ((model, opt), (still, reference)):
            m.hidden.bias.requires_grad_(True)
            calls = 0

            def closure(m: nn.Module = m, batch: Any = batch, t: int = t) -> Tensor:
                nonlocal calls
                if calls == call:
                    if m is model:
                        act(m)
                    elif how == "freeze_and_swap":
                        m.hidden.bias.requires_grad_(False)
                calls += 1
                if calls > call and t % 2:
                    raise ValueError("after the move")
                return make_closure(m, batch)()

            before = weights(m)
            if t % 2:
                with pytest.raises(ValueError, match="after the move"):
                    each.step(closure)
                assert_same_bits(weights(m), before)
            else:
                each.step(closure)
    assert relative_error(model, still) < 1e-11


@pytest.mark.parametrize("end", ["second_step", "restore"])
@pytest.mark.parametrize("dtype", [f32, torch.bfloat16], ids=["float32", "masters"])
def test_a_parameter_that_leaves_its_group_between_passes_gets_its_weights_back(dtype: torch.dtype, end: str) -> None:
    """Also where the others are laid out anew there."""
    model = make_net(dtype)
    model.out.weight.requires_grad_(False)
    opt = sk.SAM(model.parameters(), SGD, lr=0.0, rho=5.0, master_weights=dtype != f32)
    before = weights(model)
    closure = make_closure(model, batches(1, dtype)[0])
    closure()
    opt.first_step(zero_grad=True)
    opt.param_groups[0]["params"].pop(4)
    model.out.weight.requires_grad_(True)
    closure()
    getattr(opt, end)()
    assert_same_bits(weights(model), before)


def _reversed(groups: list[dict[str, Any]]) -> None:
    groups.reverse()


def _popped(groups: list[dict[str, Any]]) -> None:
    groups.pop()


def _handed_over(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"].append(groups[1]["params"].pop())


@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
@pytest.mark.parametrize("base", [SGD, torch.optim.RMSprop], ids=lambda b: b.__name__)
@pytest.mark.parametrize("edit", [_reversed, _popped, _handed_over], ids=lambda edit: edit.__name__[1:])
def test_groups_that_change_between_passes_are_an_error(edit: Callable[[Any], None], base: Any, moved: bool) -> None:
    """A step does not know whose numbers are meant; the weights come back, and the next step is of the new groups."""
    params = [nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    rates = {params[0]: 1.0, params[1]: 0.01}
    opt = sk.SAM([{"params": [p], "lr": lr} for p, lr in rates.items()], base, lr=0.1, rho=0.5)

    def closure() -> None:
        for p in params:
            p.grad = torch.ones(2, 3)

    closure()
    opt.first_step(zero_grad=True)
    edit(opt.param_groups)
    if moved:
        params[0].data = params[0].data.t().contiguous().t()
    closure()
    with pytest.raises(RuntimeError, match="param_groups changed between two passes"):
        opt.second_step()
    opt.restore()
    assert all(torch.equal(p, torch.ones(2, 3)) for p in params)
    assert not opt.is_perturbed
    opt.step(closure)
    for group in opt.param_groups:
        for p in group["params"]:
            moved_by = group["lr"] * (1.0 if base is SGD else 10.0)
            torch.testing.assert_close(p.detach(), torch.full((2, 3), 1 - moved_by))


@flattened
def test_a_skip_is_not_forgotten_by_a_new_layout(flatten: bool) -> None:
    """SALR hears of a gradient of NaN on a branch at the end of both; parameters have other strides meanwhile."""
    p = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0], [0.5, 2.0, -1.0]]))
    opt = sk.SALR([p], SGD, lr=0.1, flatten=flatten)
    before, calls = p.detach().clone(), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            p.grad = None
            p.data = p.data.t().contiguous().t()
        loss = p.pow(4).sum()
        loss.backward()
        if calls == 2:
            p.grad[0, 0] = math.nan
        return loss

    opt.step(closure)
    assert calls == 11
    assert torch.equal(p, before)
    assert int(opt.stats["skipped_steps"]) == 1
    assert math.isnan(opt.stats["sharpness"])


@each_method
def test_a_model_moves_while_a_group_joins(method: Method, base: str) -> None:
    ends = []
    for moved in (False, True):
        model = make_net()
        opt = method.make(model.named_parameters(), base, **method.every)
        data = batches(4)
        train(model, opt, data[:1])
        if moved:
            swap_data(model)
            opt.add_param_group({"params": [("more", nn.Parameter(torch.zeros(3, dtype=torch.float64)))]})
        train(model, opt, data[1:])
        ends.append(weights(model))
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-12, atol=1e-14)


@flattened
@every_base
@every_method
@pytest.mark.usefixtures("path")
def test_model_changes_dtype(method: Method, base: str, flatten: bool) -> None:
    """``model.to(dtype)``: the state follows, and the next steps are those of an optimizer made in that dtype."""
    model = make_net(f32)
    opt = method.make(model.named_parameters(), base, flatten=flatten)
    train(model, opt, batches(3, f32))
    twin = make_net()
    model.to(torch.float64)
    twin.load_state_dict(model.state_dict())
    twin_opt = method.make(twin.named_parameters(), base)
    twin_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    if base == "wrapped":  # torch leaves its own state in float32: make both alike
        for each in (opt, twin_opt):
            for entry in each.state.values():
                for key in ("square_avg", "momentum_buffer"):
                    entry[key] = entry[key].double()
    train(model, opt, batches(3))
    train(twin, twin_opt, batches(3))
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert relative_error(model, twin) < 1e-11


# flatten=True


@every_base
@every_method
def test_flat_has_the_same_bits(method: Method, base: str) -> None:
    """The trajectory, with a group that joins, a layer that is frozen, unflatten() in between or at the end."""
    models = [make_net(f32) for _ in range(3)]
    opts = [
        method.make([(n, p) for n, p in m.named_parameters() if not n.startswith("out")], base, flatten=i > 0)
        for i, m in enumerate(models)
    ]
    for t, batch in enumerate(batches(10, f32)):
        for i, (model, opt) in enumerate(zip(models, opts, strict=True)):
            if t == 3:
                rest = [(n, p) for n, p in model.named_parameters() if n.startswith("out")]
                opt.add_param_group({"params": rest})
            if t in (5, 7):
                model.hidden.requires_grad_(t == 7)
                opt.zero_grad()
                model.hidden.weight.grad = model.hidden.bias.grad = None
            if t == 6 and i == 2:
                opt.unflatten()
            model.out.zero_grad()
            frozen = model.hidden.weight.detach().clone()
            opt.step(make_closure(model, batch))
            assert torch.equal(model.hidden.weight, frozen) == (t in (5, 6))
    for model, opt in zip(models[1:], opts[1:], strict=True):
        assert_same_bits(weights(model), weights(models[0]))
        assert_same_bits(opt.stats, opts[0].stats)
        opt.unflatten()  # idempotent


@each_method
def test_flat_buffers_hold_parameters_and_gradients(method: Method, base: str) -> None:
    model = make_net(f32)
    model.to(memory_format=torch.channels_last)
    before, strides = weights(model), [p.stride() for p in model.parameters()]
    opt = method.make(model.named_parameters(), base, flatten=True)
    assert_same_bits(weights(model), before)
    assert [p.stride() for p in model.parameters()] == strides
    storage = model.out.weight.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == storage for p in model.parameters())
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())  # tools tell by that whether a step was taken
    train(model, opt, batches(1, f32))
    opt.zero_grad()
    make_closure(model, batches(1, f32)[0])()
    grads = model.out.weight.grad.untyped_storage()
    assert all(p.grad.untyped_storage().data_ptr() == grads.data_ptr() for p in model.parameters())
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    whole = torch.empty(0, device=model.out.weight.device).set_(grads)
    torch.testing.assert_close(whole.norm(), norm)  # gaps are zero
    opt.zero_grad()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@each_method
def test_flat_buffers_that_are_made_late_make_no_gradients(method: Method, base: str) -> None:
    """A copy moves in with its first step: what has no gradient then does not get one of zeros, and is not decayed."""
    params = [nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    opt = method.make(params, base, flatten=True, weight_decay=0.1)
    (used, unused), opt = copy.deepcopy((params, opt))
    state = copy.deepcopy(opt.state.get(unused, {}))

    def closure() -> Tensor:
        loss = used.square().sum()
        loss.backward()
        unused.grad = None
        return loss

    opt.step(closure)
    assert not torch.equal(used, params[0])
    assert torch.equal(unused, params[1])
    assert_same_bits(opt.state.get(unused, {}), state)


@pytest.mark.parametrize("set_to_none", [None, False, True])
def test_flat_gradients_accumulate(set_to_none: bool | None) -> None:
    """Whether they are added to the flat buffer from the start, or moved there by each pass."""
    model, twin = make_net(), make_net()
    opt, twin_opt = (sk.SAM(m.parameters(), SGD, lr=0.1, flatten=f) for m, f in ((model, True), (twin, False)))
    flat: list[list[int]] = []
    for _ in range(2):
        for m, o in ((model, opt), (twin, twin_opt)):
            o.zero_grad(set_to_none)
            for batch in batches(2):
                make_closure(m, batch)()
            o.first_step()
            if o is opt:
                flat.append([p.grad.data_ptr() for p in m.parameters()])
            o.zero_grad(set_to_none)
            to_none = (o is twin_opt) if set_to_none is None else set_to_none
            assert all((p.grad is None) == to_none for p in m.parameters())
            for batch in batches(2):
                make_closure(m, batch)()
            o.second_step()
    assert flat[0] == flat[1]
    assert_same_bits(weights(model), weights(twin))


def test_flat_gradients_that_never_come_decay_nothing() -> None:
    """A parameter without a gradient is left alone, as in torch."""
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = sk.SAM([used, unused], SGD, lr=0.1, weight_decay=0.5, flatten=True)
    for _ in range(3):
        opt.step(lambda: used.square().sum().backward())
    assert unused.grad is None
    assert torch.equal(unused.detach(), torch.ones(3))


@each_method
def test_unflatten(method: Method, base: str) -> None:
    model, twin = make_net(f32), make_net(f32)
    model.to(memory_format=torch.channels_last)
    twin.to(memory_format=torch.channels_last)
    opt = method.make(model.named_parameters(), base, flatten=True)
    twin_opt = method.make(twin.named_parameters(), base)
    data = batches(6, f32)
    train(model, opt, data[:2])
    train(twin, twin_opt, data[:2])
    opt.zero_grad()
    make_closure(model, data[2])()
    grad, strides = model.conv.weight.grad.clone(), model.conv.weight.stride()
    before, state = weights(model), state_of(opt)
    opt.unflatten()
    assert_same_bits(weights(model), before)
    assert_same_bits(state_of(opt), state)
    assert torch.equal(model.conv.weight.grad, grad)
    assert model.conv.weight.stride() == strides
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    assert len({p.grad.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    opt.zero_grad()
    assert model.conv.weight.grad is None
    train(model, opt, data[3:])
    train(twin, twin_opt, data[3:])
    for name, w in weights(twin).items():
        torch.testing.assert_close(weights(model)[name], w, rtol=1e-5, atol=1e-6)


@each_method
def test_unflatten_after_the_model_changed_its_dtype(method: Method, base: str) -> None:
    """And before the optimizer could notice."""
    ends = []
    for flatten in (False, True):
        model = make_net(f32)
        opt = method.make(model.named_parameters(), "adamw" if base == "wrapped" else base, flatten=flatten)
        train(model, opt, batches(1, f32))
        model.to(torch.float64)
        opt.unflatten()
        train(model, opt, batches(2))
        ends.append(weights(model))
    assert_same_bits(*ends)


@pytest.mark.parametrize("fail", [False, True])
@every_method
def test_unflatten_between_passes(method: Method, fail: bool) -> None:
    model = make_net()
    opt = method.make(model.named_parameters(), SGD, lr=0.0, flatten=True, **method.every)
    before = weights(model)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == min(2, method.calls):
            opt.unflatten()
            if fail:
                raise ValueError
        return make_closure(model, batches(1)[0])()

    if fail:
        with pytest.raises(ValueError):
            opt.step(closure)
    else:
        opt.step(closure)
    assert_same_bits(weights(model), before)
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


@each_method
def test_flat_copies_are_independent(method: Method, base: str) -> None:
    model = make_net()
    opt = method.make(model.named_parameters(), base, flatten=True)
    train(model, opt, batches(1))
    twin, twin_opt = copy.deepcopy((model, opt))
    before = weights(model)
    train(twin, twin_opt, batches(1))
    assert_same_bits(weights(model), before)
    storage = twin.out.weight.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == storage for p in twin.parameters())
    assert storage != model.out.weight.untyped_storage().data_ptr()


def test_flatten_refuses_gaps_and_aliases_before_it_moves_anything() -> None:
    memory = torch.ones(10)
    for params, message in (
        ([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 6, dtype=torch.float64)[:, ::2])], "without gaps"),
        ([nn.Parameter(memory[:6]), nn.Parameter(memory[4:])], "share memory"),
    ):
        before = [p.data_ptr() for p in params]
        for method in METHODS.values():
            with pytest.raises(ValueError, match=message):
                method.make(params, SGD, lr=0.1, flatten=True)
            assert [p.data_ptr() for p in params] == before


# Parameters that get memory late.


@pytest.fixture
def swapped_parameters() -> Iterator[None]:
    """``to_empty`` keeps the parameters of a module."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def on_meta(dtype: torch.dtype = f32) -> nn.Module:
    return copy.deepcopy(make_net(dtype)).to("meta")


@flattened
@each_method
@pytest.mark.usefixtures("path")
def test_memory_before_the_first_step(method: Method, base: str, flatten: bool, swapped_parameters: None) -> None:
    for rule in {base, "wrapped-adagrad"}:  # the latter makes its state when it is made
        straight, model = make_net(f32), on_meta()
        opts = [method.make(m.named_parameters(), rule, flatten=flatten) for m in (straight, model)]
        if method.one_pass:
            opts[0].refresh(None)  # there are none on the meta device
        model.to_empty(device=torch.get_default_device())
        model.load_state_dict(make_net(f32).state_dict())
        for m, opt in zip((straight, model), opts, strict=True):
            train(m, opt, batches(3, f32))
        assert_same_bits(weights(model), weights(straight))


@flattened
@each_method
def test_a_step_without_memory_is_an_error(method: Method, base: str, flatten: bool) -> None:
    """Also where ``to_empty`` put other parameters in their place: torch steps nothing then, without a word."""
    model = on_meta()
    opt = method.make(model.named_parameters(), base, flatten=flatten)
    saved = method.make(make_net(f32).named_parameters(), base).state_dict()
    with pytest.raises(RuntimeError, match="parameter 'gain' is on the meta device.*before the first step"):
        opt.load_state_dict({**saved, "param_groups": [{**saved["param_groups"][0], "lr": 5.0}]})
    assert opt.param_groups[0]["lr"] != 5.0
    model.to_empty(device=torch.get_default_device())
    with pytest.raises(RuntimeError, match="parameter 'gain' is on the meta device.*set_swap_module_params"):
        opt.step(make_closure(model, batches(1, f32)[0]))
