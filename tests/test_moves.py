"""Users move things: data pointers, devices' dtypes, checkpoints, gradients; and flatten=True (contract 10)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import assert_same_bits, batches, make_closure, make_net, train, train_by_hand, weights
from torch import nn

import sharpkern as sk

SGD, AdamW, RMSprop = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGD, dict(lr=0.05, momentum=0.9)),
    "adamw": (AdamW, dict(lr=1e-2)),
    "wrapped": (RMSprop, dict(lr=1e-3)),
}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    return BASES[request.param]


@pytest.fixture(params=[False, True], ids=["segments", "flat"])
def flatten(request: pytest.FixtureRequest) -> bool:
    return request.param


def addresses(model: nn.Module) -> list[int]:
    return [p.data_ptr() for p in model.parameters()]


def test_addresses_never_change(base: Any, flatten: bool, backend: str) -> None:
    model = make_net()
    before = addresses(model)
    opt = sk.SAM(model.parameters(), base[0], flatten=flatten, **base[1])
    if not flatten:
        assert addresses(model) == before
    before = addresses(model)
    train(model, opt, batches(2))
    train_by_hand(model, opt, batches(2))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt, batches(1))
    assert addresses(model) == before


def swap_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def swap_one(model: nn.Module) -> None:
    model.hidden.weight.data = model.hidden.weight.data.clone()


def swap_strides(model: nn.Module) -> None:
    model.hidden.weight.data = model.hidden.weight.data.t().contiguous().t()
    model.conv.weight.data = model.conv.weight.data.to(memory_format=torch.channels_last)


def reload(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def to_none(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)


def to_zero(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


MOVES: dict[str, Callable[[nn.Module], None]] = {
    f.__name__: f for f in (swap_data, swap_one, swap_strides, reload, to_none, to_zero)
}


@pytest.mark.parametrize("move", MOVES)
def test_moved_between_steps(move: str, base: Any, flatten: bool, backend: str) -> None:
    """A move that keeps the values keeps the trajectory."""
    model, still = make_net(), make_net()
    opt = sk.SAM(model.parameters(), base[0], flatten=flatten, **base[1])
    reference = sk.SAM(still.parameters(), base[0], **base[1])
    for batch in batches(5):
        opt.step(make_closure(model, batch))
        reference.step(make_closure(still, batch))
        MOVES[move](model)
    for p, q in zip(model.parameters(), still.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("move", ["swap_data", "swap_one", "swap_strides"])
@pytest.mark.parametrize("end", ["second_step", "restore"])
def test_moved_between_passes(move: str, end: str, base: Any, flatten: bool, backend: str) -> None:
    model, still = make_net(), make_net()
    opts = [sk.SAM(m.parameters(), base[0], flatten=flatten, **base[1]) for m in (model, still)]
    for batch in batches(3):
        for m, opt in ((model, opts[0]), (still, opts[1])):
            opt.zero_grad()
            make_closure(m, batch)()
            opt.first_step(zero_grad=True)
            if m is model:
                MOVES[move](m)
            make_closure(m, batch)()
            getattr(opt, end)()
    for p, q in zip(model.parameters(), still.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("end", ["second_step", "restore"])
def test_frozen_and_moved_between_passes(end: str, base: Any, backend: str) -> None:
    model = make_net()
    opt = sk.SAM(model.parameters(), base[0], **{**base[1], "lr": 0.0})
    before = weights(model)
    make_closure(model, batches(1)[0])()
    opt.first_step(zero_grad=True)
    model.hidden.requires_grad_(False)
    swap_data(model)
    getattr(opt, end)()
    assert_same_bits(weights(model), before)


def test_flatten_refuses_aliases_before_it_moves_them(backend: str) -> None:
    memory = torch.ones(10)
    a, b = nn.Parameter(memory[:6]), nn.Parameter(memory[4:])
    before = [p.data_ptr() for p in (a, b)]
    with pytest.raises(ValueError, match="share memory"):
        sk.SAM([a, b], SGD, lr=0.1, flatten=True)
    assert [p.data_ptr() for p in (a, b)] == before


def test_model_changes_dtype(base: Any, flatten: bool, backend: str) -> None:
    """``model.to(dtype)``: the state follows, and the next steps are those of an optimizer made in that dtype."""
    model = make_net(torch.float32)
    opt = sk.SAM(model.parameters(), base[0], flatten=flatten, **base[1])
    train(model, opt, batches(3, torch.float32))
    twin = make_net(torch.float64)
    model.to(torch.float64)
    twin.load_state_dict(model.state_dict())
    twin_opt = sk.SAM(twin.parameters(), base[0], **base[1])
    state = copy.deepcopy(opt.state_dict())
    twin_opt.load_state_dict(state)
    if base[0] is RMSprop:  # torch leaves its own state in float32: make both alike
        for entry in opt.state.values():
            entry["square_avg"] = entry["square_avg"].double()
    train(model, opt, batches(3))
    train(twin, twin_opt, batches(3))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.dtype == torch.float64
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_gradients_with_other_strides(base: Any, backend: str) -> None:
    start = torch.randn(6, 5, 3, 3)
    params = [nn.Parameter(start.clone()), nn.Parameter(start.clone())]
    opts = [sk.SAM([p], base[0], **base[1]) for p in params]
    for _ in range(3):
        for p, opt, fmt in zip(params, opts, (torch.contiguous_format, torch.channels_last), strict=True):
            for act in (opt.first_step, opt.second_step):
                p.grad = torch.sin(3 * p.detach()).contiguous(memory_format=fmt)
                act()
    assert torch.equal(params[0], params[1])


def test_gradients_of_another_dtype(backend: str) -> None:
    p = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch ties a gradient's dtype to its parameter's")
    p.grad_dtype = None
    p.grad = torch.full((5,), 0.5)
    opt = sk.SAM([p], SGD, lr=1.0, rho=0.0)
    opt.first_step()
    opt.second_step()
    assert torch.equal(p.detach(), torch.full((5,), 0.5, dtype=torch.bfloat16))


def test_a_parameter_without_memory_is_an_error(backend: str) -> None:
    model = make_net()
    opt = sk.SAM(model.parameters(), SGD, lr=0.1)
    train(model, opt, batches(1))
    kept = model.hidden.weight.data.clone()
    before = weights(model)
    storage = model.hidden.weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match="parameter 4 of group 0 has no memory"):
        opt.first_step()
    storage.resize_(size)
    model.hidden.weight.data.copy_(kept)
    assert_same_bits(weights(model), before)
    train(model, opt, batches(1))


def test_a_parameter_replaced_in_its_group_is_followed(base: Any, backend: str) -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = sk.SAM([a], base[0], **base[1])
    for p in (a, b):
        opt.param_groups[0]["params"][0] = p
        p.grad = torch.ones(3)
        opt.first_step()
        assert not torch.equal(p.detach(), torch.ones(3))
        opt.second_step()
    assert torch.equal(a, b)


@pytest.mark.parametrize("end", ["second_step", "restore"])
def test_a_parameter_with_gaps_that_took_no_part(end: str, backend: str) -> None:
    gappy, other = nn.Parameter(torch.randn(4, 6)[:, :3]), nn.Parameter(torch.ones(3))
    opt = sk.SAM([gappy, other], SGD, lr=0.1)
    other.grad = torch.ones(3)
    opt.first_step()
    with torch.no_grad():
        gappy.fill_(7.0)
    other.grad = None
    other.data = other.data.double()
    getattr(opt, end)()
    assert (gappy == 7.0).all()
    torch.testing.assert_close(other.detach(), torch.ones(3, dtype=torch.float64))


def test_state_of_another_shape_is_an_error_that_loses_nothing(backend: str) -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    opt = sk.SAM([("p", p), ("q", q)], SGD, lr=0.1, momentum=0.9)
    p.grad, q.grad = torch.ones(3), torch.ones(2)
    opt.step()
    p.data, p.grad = torch.ones(5), torch.ones(5)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="'p' has shape .5,. now, its state momentum_buffer"):
            opt.step()
    del opt.state[p]
    opt.step()
    assert opt.state[q]["step"] == 2
    assert torch.equal(opt.state[q]["momentum_buffer"], torch.full((2,), 1.9))


# flatten=True


def test_flat_frozen_weights_stay(backend: str) -> None:
    model = make_net()
    opt = sk.SAM(model.parameters(), SGD, lr=0.1, momentum=0.9, weight_decay=0.1, flatten=True)
    train(model, opt, batches(2))
    model.hidden.requires_grad_(False)
    before = model.hidden.weight.detach().clone()
    opt.zero_grad()
    train(model, opt, batches(2))
    assert torch.equal(model.hidden.weight, before)


def test_flat_refuses_gaps_before_it_moves_anything() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 6, dtype=torch.float64)[:, ::2])
    before = p.data_ptr()
    with pytest.raises(ValueError, match="without gaps"):
        sk.SAM([p, q], SGD, lr=0.1, flatten=True)
    assert p.data_ptr() == before


def test_flat_has_the_same_bits(base: Any, backend: str) -> None:
    models = [make_net(torch.float32) for _ in range(2)]
    opts = [sk.SAM(m.parameters(), base[0], flatten=f, **base[1]) for m, f in zip(models, (False, True), strict=True)]
    for batch in batches(6, torch.float32):
        for model, opt in zip(models, opts, strict=True):
            opt.step(make_closure(model, batch))
    assert_same_bits(weights(models[0]), weights(models[1]))
    assert_same_bits(opts[0].stats, opts[1].stats)


def test_flat_buffers_hold_parameters_and_gradients(backend: str) -> None:
    model = make_net(torch.float32)
    model.to(memory_format=torch.channels_last)
    before, strides = weights(model), [p.stride() for p in model.parameters()]
    opt = sk.SAM(model.parameters(), SGD, lr=0.1, flatten=True)
    assert_same_bits(weights(model), before)
    assert [p.stride() for p in model.parameters()] == strides
    storage = model.out.weight.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == storage for p in model.parameters())
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())
    make_closure(model, batches(1, torch.float32)[0])()
    grads = model.out.weight.grad.untyped_storage().data_ptr()
    assert all(p.grad.untyped_storage().data_ptr() == grads for p in model.parameters())
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(opt._flat[0].flat_grads.norm(), norm)  # gaps are zero
    opt.zero_grad()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_flat_gradients_accumulate(backend: str) -> None:
    model, twin = make_net(), make_net()
    opt, twin_opt = (sk.SAM(m.parameters(), SGD, lr=0.1, flatten=f) for m, f in ((model, True), (twin, False)))
    for m, o in ((model, opt), (twin, twin_opt)):
        o.zero_grad()
        for batch in batches(2):
            make_closure(m, batch)()
        o.first_step(zero_grad=True)
        for batch in batches(2):
            make_closure(m, batch)()
        o.second_step()
    assert_same_bits(weights(model), weights(twin))


def test_unflatten(base: Any, backend: str) -> None:
    model, twin = make_net(torch.float32), make_net(torch.float32)
    model.to(memory_format=torch.channels_last)
    twin.to(memory_format=torch.channels_last)
    opt = sk.SAM(model.parameters(), base[0], flatten=True, **base[1])
    twin_opt = sk.SAM(twin.parameters(), base[0], **base[1])
    data = batches(6, torch.float32)
    train(model, opt, data[:2])
    train(twin, twin_opt, data[:2])
    make_closure(model, data[2])()
    grad, strides = model.conv.weight.grad.clone(), model.conv.weight.stride()
    before = weights(model)
    opt.unflatten()
    assert_same_bits(weights(model), before)
    assert torch.equal(model.conv.weight.grad, grad)
    assert model.conv.weight.stride() == strides
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    assert len({p.grad.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    opt.zero_grad()
    assert model.conv.weight.grad is None
    train(model, opt, data[3:])
    train(twin, twin_opt, data[3:])
    assert_same_bits(weights(model), weights(twin))
    opt.unflatten()  # idempotent


@pytest.mark.parametrize("end", ["second_step", "restore"])
def test_unflatten_between_passes(end: str, backend: str) -> None:
    model = make_net()
    opt = sk.SAM(model.parameters(), SGD, lr=0.0, flatten=True)
    before = weights(model)
    make_closure(model, batches(1)[0])()
    opt.first_step()
    opt.unflatten()
    getattr(opt, end)()
    assert_same_bits(weights(model), before)


def test_flat_copies_are_independent() -> None:
    model = make_net()
    opt = sk.SAM(model.parameters(), SGD, lr=0.1, flatten=True)
    train(model, opt, batches(1))
    twin, twin_opt = copy.deepcopy((model, opt))
    before = weights(model)
    train(twin, twin_opt, batches(1))
    assert_same_bits(weights(model), before)
    assert twin_opt._flat[0].flat_params is not None
    assert twin.out.weight.untyped_storage().data_ptr() == twin_opt._flat[0].flat_params.untyped_storage().data_ptr()


def test_flat_added_group(backend: str) -> None:
    ends = []
    for flatten in (True, False):
        model = make_net()
        opt = sk.SAM([model.hidden.weight, model.hidden.bias], SGD, lr=0.1, momentum=0.9, flatten=flatten)
        rest = [p for p in model.parameters() if p is not model.hidden.weight and p is not model.hidden.bias]
        for i, batch in enumerate(batches(4)):
            if i == 2:
                opt.add_param_group({"params": rest})
            model.zero_grad()
            opt.step(make_closure(model, batch))
        ends.append(weights(model))
    assert_same_bits(*ends)
