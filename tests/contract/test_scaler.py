"""Under ``torch.amp.GradScaler``: the step of a loss that is not scaled, and an overflow in any pass skips it."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods import METHODS, Method, each_method, every_by_hand, every_call, over
from models import assert_same_bits, batches, make_net, state_of, train, train_by_hand, weights
from torch import Tensor, nn

import sharpkern as sk

f32 = torch.float32


def scaler_of(growth_interval: int = 2) -> torch.amp.GradScaler:
    """Powers of two, which are exact; a scale that changes from step to step."""
    device = torch.get_default_device().type
    return torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=growth_interval)


def scaled(model: nn.Module, scaler: torch.amp.GradScaler, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    x, y = batch

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        return loss

    return closure


def overflowing(model: nn.Module, calls: Any) -> None:
    """These backward passes of the model's, by their number, leave a gradient that is infinite."""
    number = itertools.count()
    model.out.bias.register_hook(lambda g: g * torch.inf if next(number) in calls else g)


@each_method
def test_a_closure_of_scaled_losses(method: Method, base: str) -> None:
    model, twin = make_net(f32), make_net(f32)
    opt, plain = (method.make(net.named_parameters(), base, model=net) for net in (model, twin))
    scaler = scaler_of()
    for batch in batches(8, f32):
        opt.step(scaled(model, scaler, batch), scaler=scaler)
        scaler.update()
    assert scaler.get_scale() == 2.0**14
    train(twin, plain, batches(8, f32))
    assert_same_bits(weights(model), weights(twin))
    assert_same_bits(opt.stats, plain.stats)
    assert_same_bits(state_of(opt), state_of(plain))


def trained_by_hand(method: Method, end: str, early: bool = False) -> None:
    """As without a scaler; the user may unscale, early before the first pass, else before the end."""
    model, twin = make_net(f32), make_net(f32)
    opt, plain = (method.make(net.named_parameters(), "momentum") for net in (model, twin))
    scaler = scaler_of()
    for batch in batches(8, f32):
        closure = scaled(model, scaler, batch)
        opt.zero_grad()
        closure()
        if early:
            scaler.unscale_(opt)
        if opt.first_step(zero_grad=True, scaler=scaler):
            closure()
        if "unscale_" in end:
            scaler.unscale_(opt)
        opt.second_step() if "second_step" in end else scaler.step(opt)
        assert not opt.is_perturbed
        scaler.update()
    train_by_hand(twin, plain, batches(8, f32))
    assert_same_bits(weights(model), weights(twin))
    assert_same_bits(opt.stats, plain.stats)


@pytest.mark.parametrize("end", ["scaler.step", "unscale_, scaler.step", "second_step", "unscale_, second_step"])
@every_by_hand
def test_by_hand(method: Method, end: str) -> None:
    """Whatever ends the step, and whether the user unscales, to clip."""
    trained_by_hand(method, end)


@pytest.mark.parametrize("end", ["scaler.step", "second_step"])
@over(METHODS[name] for name in ("sam", "aesam", "gsam", "momentumsam"))
def test_a_first_gradient_that_the_user_unscaled(method: Method, end: str) -> None:
    trained_by_hand(method, end, early=True)


@every_call
def test_an_overflow_in_any_pass_skips_the_step(method: Method, call: int) -> None:
    """No weight moves, no state changes, it is counted once, and the scale is lowered."""
    model = make_net(f32)
    opt = method.make(model.named_parameters(), "momentum", model=model, **method.every)
    scaler, data = scaler_of(100), batches(3, f32)
    opt.step(scaled(model, scaler, data[0]), scaler=scaler)
    scaler.update()
    before, state = weights(model), state_of(opt)
    overflowing(model, {call})
    opt.step(scaled(model, scaler, data[1]), scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    skipped = call in method.followed  # of the others nothing but the loss is taken
    if skipped:
        assert_same_bits(weights(model), before)
        assert_same_bits(state_of(opt), state)
    opt.step(scaled(model, scaler, data[2]), scaler=scaler)
    scaler.update()
    assert int(opt.stats["skipped_steps"]) == skipped
    assert all(w.isfinite().all() for w in weights(model).values())
    assert not torch.equal(weights(model)["hidden.weight"], before["hidden.weight"])


@pytest.mark.parametrize("call", [0, 1])
@over(METHODS[name] for name in ("sam", "looksam", "gsam", "aesam"))
def test_an_overflow_by_hand(method: Method, call: int) -> None:
    model = make_net(f32)
    opt = method.make(model.named_parameters(), "momentum", **method.every)
    scaler, before = scaler_of(100), weights(model)
    overflowing(model, {call})
    closure = scaled(model, scaler, batches(1, f32)[0])

    def step() -> None:
        opt.zero_grad()
        closure()
        if opt.first_step(zero_grad=True, scaler=scaler):
            closure()
        opt.second_step()
        scaler.update()
        assert scaler.get_scale() == 2.0**9
        assert int(opt.stats["skipped_steps"]) == 1
        assert not opt.is_perturbed

    step()
    assert_same_bits(weights(model), before)
    step()
    assert all(w.isfinite().all() for w in weights(model).values())
    assert not torch.equal(weights(model)["hidden.weight"], before["hidden.weight"])


def test_a_backward_that_is_not_wanted_is_of_the_same_scale() -> None:
    """The loop that everybody copies has no ``if``: the gradient counts twice, and no more."""
    model, twin = make_net(f32), make_net(f32)
    opt, plain = (sk.SSSAM(net.parameters(), p=0.0, lr=0.1) for net in (model, twin))
    scaler = scaler_of()
    for net, o, s in ((model, opt, scaler), (twin, plain, torch.amp.GradScaler(enabled=False))):
        closure = scaled(net, s, batches(1, f32)[0])
        closure()
        assert not o.first_step(zero_grad=True, scaler=s)
        closure()
        with pytest.warns(UserWarning, match="first_step.. returned False"):
            o.second_step()
    assert_same_bits(weights(model), weights(twin))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_knows_its_gradients(how: Any) -> None:
    """Of the very first step after it, which nothing has touched before."""
    model = make_net(f32)
    model, opt = how((model, sk.GSAM(model.parameters(), lr=0.1)))
    twin = make_net(f32)
    plain, scaler = sk.GSAM(twin.parameters(), lr=0.1), scaler_of()
    for net, o, s in ((model, opt, scaler), (twin, plain, torch.amp.GradScaler(enabled=False))):
        closure = scaled(net, s, batches(1, f32)[0])
        closure()
        assert o.first_step(zero_grad=True, scaler=s)
        closure()
        o.second_step()
    assert_same_bits(weights(model), weights(twin))
    assert_same_bits(opt.stats, plain.stats)


def test_a_closure_that_restores_before_a_step_is_open() -> None:
    model, twin = make_net(f32), make_net(f32)
    opt, plain = (sk.GSAM(net.parameters(), lr=0.1) for net in (model, twin))
    scaler = scaler_of()
    closure, calls = scaled(model, scaler, batches(1, f32)[0]), itertools.count()

    def restoring() -> Tensor:
        if next(calls) == 0:
            opt.restore()
        return closure()

    opt.step(restoring, scaler=scaler)
    plain.step(scaled(twin, torch.amp.GradScaler(enabled=False), batches(1, f32)[0]))
    assert_same_bits(weights(model), weights(twin))


def test_a_wrapper_is_known_by_its_own_id() -> None:
    """As Lightning's and Fabric's: the class is a mix with the optimizer's."""

    class Wrapper(sk.GSAM):
        def __init__(self, inner: Any) -> None:
            self.__dict__.update(vars(inner), inner=inner)

        def step(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner.step(*args, **kwargs)

    model, twin = make_net(f32), make_net(f32)
    wrapped, plain = Wrapper(sk.GSAM(model.parameters(), lr=0.1)), sk.GSAM(twin.parameters(), lr=0.1)
    scaler = scaler_of()
    for net, o, s in ((model, wrapped, scaler), (twin, plain, torch.amp.GradScaler(enabled=False))):
        closure = scaled(net, s, batches(1, f32)[0])
        closure()
        assert o.first_step(zero_grad=True, scaler=s)
        closure()
        s.unscale_(o)
        o.second_step()
    assert_same_bits(weights(model), weights(twin))


@pytest.mark.filterwarnings("ignore:.*is a step of SGD alone")
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("name", ["sam", "nudged", "momentumsam"])
def test_a_step_of_one_gradient(name: str, unscaled: bool) -> None:
    """The base rule's alone, and of algorithms that take one."""
    method = METHODS[name]
    model, twin = make_net(f32), make_net(f32)
    opt, plain = (method.make(net.named_parameters(), "momentum") for net in (model, twin))
    scaler, none = scaler_of(), torch.amp.GradScaler(enabled=False)
    for batch in batches(4, f32):
        for net, o, s in ((model, opt, scaler), (twin, plain, none)):
            o.zero_grad()
            if method.one_gradient:
                o.first_step()
            scaled(net, s, batch)()
            if unscaled:
                s.unscale_(o)
            s.step(o)
            s.update()
    assert_same_bits(weights(model), weights(twin))


def test_a_scaler_that_is_not_enabled_is_none() -> None:
    model, twin = make_net(f32), make_net(f32)
    opt, plain = (sk.AESAM(net.parameters(), lr=0.1, total_steps=4) for net in (model, twin))
    scaler = torch.amp.GradScaler(enabled=False)
    for batch in batches(4, f32):
        opt.step(scaled(model, scaler, batch), scaler=scaler)
        scaler.update()
    train(twin, plain, batches(4, f32))
    assert_same_bits(weights(model), weights(twin))


def test_esam_scales_the_losses_itself() -> None:
    """Of samples: its closure calls no backward."""
    model, twin = make_net(f32), make_net(f32)
    opt, plain = (sk.ESAM(net.parameters(), lr=0.1, beta=0.6, gamma=0.5, seed=1) for net in (model, twin))
    scaler = scaler_of()

    def losses(net: nn.Module, x: Tensor, y: Tensor) -> Callable[..., Tensor]:
        def closure(index: Any = slice(None)) -> Tensor:
            return nn.functional.cross_entropy(net(x[index]), y[index], reduction="none")

        return closure

    for batch in batches(6, f32):
        opt.step(losses(model, *batch), scaler=scaler)
        scaler.update()
        plain.step(losses(twin, *batch))
    assert_same_bits(weights(model), weights(twin))


BAD: dict[str, tuple[Callable[[Any, Any, Any], Any], type[Exception], str]] = {
    "no scaler": (lambda opt, s, c: opt.step(c, scaler=2.0), TypeError, "scaler should be a torch.amp.GradScaler"),
    "no scaler by hand": (lambda opt, s, c: (c(), opt.first_step(scaler=2.0)), TypeError, "should be a torch.amp"),
    "no closure": (lambda opt, s, c: (c(), opt.step(scaler=s)), RuntimeError, "goes with a closure"),
    "pending": (
        lambda opt, s, c: (c(), opt.first_step(scaler=s), opt.step(c, scaler=s)),
        RuntimeError,
        "goes with a closure of all passes",
    ),
    "no update": (
        lambda opt, s, c: (opt.step(c, scaler=s), opt.step(c, scaler=s)),
        RuntimeError,
        "update.. is due",
    ),
    "unscaled by the closure": (
        lambda opt, s, c: opt.step(lambda: (c(), s.unscale_(opt)), scaler=s),
        RuntimeError,
        "scaler.unscale_ is not to be called as well",
    ),
    "not scaled": (
        lambda opt, s, c: opt.step(lambda: None, scaler=torch.amp.GradScaler(torch.get_default_device().type)),
        AssertionError,
        "_scale is None",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_misuse(case: str) -> None:
    act, error, message = BAD[case]
    model = make_net(f32)
    opt = sk.SAM(model.parameters(), lr=0.1)
    scaler = scaler_of()
    closure = scaled(model, scaler, batches(1, f32)[0])
    if case == "no update":
        opt.step(closure, scaler=scaler)
        act = lambda opt, s, c: opt.step(c, scaler=s)  # noqa: E731
    before = weights(model)
    with pytest.raises(error, match=message):
        act(opt, scaler, closure)
    opt.restore()
    assert_same_bits(weights(model), before)
    scaler = scaler_of()
    opt.step(scaled(model, scaler, batches(1, f32)[0]), scaler=scaler)
    assert not torch.equal(weights(model)["hidden.weight"], before["hidden.weight"])


@pytest.mark.parametrize("how", ["closure", "first_step"])
def test_who_skips_nothing_goes_with_no_scaler(how: str) -> None:
    model = make_net(f32)
    opt = sk.SAM(model.parameters(), lr=0.1, skip_nonfinite=False)
    scaler, before = scaler_of(), weights(model)
    closure = scaled(model, scaler, batches(1, f32)[0])
    closure()
    with pytest.raises(RuntimeError, match="skip_nonfinite=True"):
        if how == "closure":
            opt.step(closure, scaler=scaler)
        else:
            opt.first_step(scaler=scaler)
    assert_same_bits(weights(model), before)
    assert not opt.is_perturbed


@pytest.mark.parametrize("call", [0, 1])
def test_a_step_that_was_given_up_is_tried_again(call: int) -> None:
    """After an update, where any gradient was unscaled."""
    model, twin = make_net(f32), make_net(f32)
    opt, plain = (sk.GSAM(net.parameters(), lr=0.1) for net in (model, twin))
    scaler, calls = scaler_of(), itertools.count()
    closure = scaled(model, scaler, batches(1, f32)[0])

    def failing() -> Tensor:
        if next(calls) == call:
            raise MemoryError
        return closure()

    with pytest.raises(MemoryError):
        opt.step(failing, scaler=scaler)
    if call == 1:
        with pytest.raises(RuntimeError, match="update.. is due"):
            opt.step(failing, scaler=scaler)
        scaler.update()
    opt.step(failing, scaler=scaler)
    plain.step(scaled(twin, torch.amp.GradScaler(enabled=False), batches(1, f32)[0]))
    assert_same_bits(weights(model), weights(twin))


@pytest.mark.parametrize("unscaled", ["", "early", "late"])
@over(METHODS[name] for name in ("momentumsam", "sam", "sssam"))
def test_a_second_step_before_the_update_is_refused(method: Method, unscaled: str) -> None:
    """It would be taken for one whose gradients the user unscaled."""
    model = make_net(f32)
    opt = method.make(model.named_parameters(), "momentum", **(method.never or {}))
    scaler = scaler_of()
    closure = scaled(model, scaler, batches(1, f32)[0])
    closure()
    if unscaled == "early":
        scaler.unscale_(opt)
    if opt.first_step(zero_grad=True, scaler=scaler):
        closure()
    if unscaled == "late":
        scaler.unscale_(opt)
    opt.second_step()
    before = weights(model)
    with pytest.raises(RuntimeError, match="update.. is due"):
        opt.first_step(scaler=scaler)
    assert_same_bits(weights(model), before)
