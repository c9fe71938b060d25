"""Accumulated gradients: accumulate(closure) of every micro-batch, then step(), is step(closure) over all of them."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from loops import MICRO, STEPS, Batch, assert_same, data, make, mean_loss
from methods import FIRST, METHODS, Method, every_call, every_method, over
from models import assert_same_bits, make_net, relative_error, state_of, weights
from torch import Tensor, nn

import sharpkern as sk

SAM, SALR = METHODS["sam"], METHODS["salr"]


def micro_closure(model: nn.Module, batch: Batch, scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> Any:
    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1]) / MICRO
        scale(loss).backward()
        return loss

    return closure


def closures(model: nn.Module, i: int = 0, scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> list[Any]:
    """Of the micro-batches of a step."""
    return [micro_closure(model, batch, scale) for batch in data(MICRO)[i * MICRO : (i + 1) * MICRO]]


def of_all(model: nn.Module, i: int = 0, scale: Any = Tensor.backward) -> Callable[[], Tensor]:
    taken = data(MICRO)[i * MICRO : (i + 1) * MICRO]
    return lambda: mean_loss(model, taken, scale)


def accumulated_step(model: nn.Module, opt: Any, i: int = 0, end: str = "step()", **more: Any) -> Any:
    """``end``: without a closure; with one that does nothing, as trainers hand it over; with the last micro-batch's."""
    *before, last = closures(model, i)
    for closure in before:
        opt.accumulate(closure)
    if end == "the last one":
        return opt.step(last, **more)
    opt.accumulate(last)
    return opt.step(**more) if end == "step()" else opt.step(lambda: None, **more)


@pytest.mark.parametrize(
    ("end", "flatten"), [("step()", False), ("step()", True), ("nothing", False), ("the last one", True)]
)
@every_method
def test_a_step_is_that_of_one_closure(method: Method, flatten: bool, end: str) -> None:
    """Weights, buffers, state and statistics to the bit, and the loss that is returned."""
    (model, opt), (twin, other) = (make(method, flatten=flatten) for _ in range(2))
    for i in range(STEPS):
        loss = accumulated_step(model, opt, i, end)
        assert torch.equal(loss, other.step(of_all(twin, i)))
        assert not loss.requires_grad
    assert_same((model, opt), (twin, other))


@every_method
def test_micro_batches_are_as_the_joint_batch(method: Method) -> None:
    """But for norm layers, whose statistics are a micro-batch's."""
    models = []
    for joint in (False, True):
        model = make_net()
        model.bn = nn.Identity()
        opt = method.make(model.named_parameters(), FIRST[method.name], STEPS)
        for i in range(STEPS):
            if joint:
                x, y = map(torch.cat, zip(*data(MICRO)[i * MICRO : (i + 1) * MICRO], strict=True))
                opt.step(lambda net=model, x=x, y=y: mean_loss(net, [(x, y)]))
            else:
                accumulated_step(model, opt, i)
        models.append(model)
    assert relative_error(*models) < 1e-6
    untrained = make_net()
    untrained.bn = nn.Identity()
    assert relative_error(models[0], untrained) > 1e-3


@over([SAM, SALR])
def test_losses_in_memory_that_every_call_writes_to(method: Method) -> None:
    """As of a captured graph's output."""
    (model, opt), (twin, other) = (make(method) for _ in range(2))
    out = torch.zeros_like(model.out.bias[0]).detach()

    def static(closure: Callable[[], Tensor]) -> Tensor:
        return out.copy_(closure().detach())

    for i in range(STEPS):
        for closure in closures(model, i):
            opt.accumulate(functools.partial(static, closure))
        assert torch.equal(opt.step(), other.step(of_all(twin, i)))
    assert_same((model, opt), (twin, other))


@over([m for m in METHODS.values() if m is not SALR])
def test_what_closures_return_and_who_may_return_nothing(method: Method) -> None:
    """step() returns their sum where it is one; accumulate() what a closure returned."""
    model, opt = make(method)
    for returned, total in [((1, 2.5), 3.5), ((None, None), None), ((1, None), 1), ((None, 1), None), (("a", 1), None)]:
        for value in returned:

            def closure(value: Any = value) -> Any:
                micro_closure(model, data()[0])()
                return value

            assert opt.accumulate(closure) == value
        assert opt.step() == total


def test_salr_needs_losses() -> None:
    model, opt = make(SALR)
    before = weights(model)
    opt.accumulate(lambda: micro_closure(model, data()[0])() and None)
    with pytest.raises(TypeError, match="got None"):
        opt.step()
    assert_same_bits(weights(model), before)


@over([SAM, METHODS["salr"], METHODS["momentumsam"], METHODS["nudged"]])
def test_a_gradient_scaler(method: Method) -> None:
    """step(scaler=) is told of it, as with a closure; an overflow skips the step."""
    (model, opt), (twin, other) = (make(method, **method.every) for _ in range(2))
    scaler, plain = (torch.amp.GradScaler(torch.get_default_device().type, init_scale=2.0**10) for _ in range(2))
    for i in range(3):
        for closure in closures(model, i, scaler.scale):
            opt.accumulate(closure)
        loss = opt.step(scaler=scaler)
        backward = lambda loss: plain.scale(loss).backward()  # noqa: E731
        assert torch.equal(loss, other.step(of_all(twin, i, backward), scaler=plain))
        scaler.update()
        plain.update()
    assert_same((model, opt), (twin, other))
    before = weights(model)
    opt.accumulate(micro_closure(model, data()[0], lambda loss: scaler.scale(loss) * torch.inf))
    opt.step(scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert int(opt.stats["skipped_steps"]) == 1
    assert_same_bits(weights(model), before)


def test_a_scaler_that_cannot_serve_drops_them() -> None:
    model, opt = make(SAM, skip_nonfinite=False)
    opt.accumulate(micro_closure(model, data()[0]))
    with pytest.raises(RuntimeError, match="skip_nonfinite=True"):
        opt.step(scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="goes with a closure"):
        opt.step(scaler=torch.amp.GradScaler("cpu"))


# They are dropped.


@every_call
def test_an_exception_drops_them(method: Method, call: int) -> None:
    """In any closure of any pass; the next step is a step, and nobody warns of what is left."""
    (model, opt), (twin, other) = (make(method, **method.every) for _ in range(2))
    numbers = itertools.count()
    before = weights(model)

    def failing(closure: Callable[[], Any]) -> Any:
        if next(numbers) == call * MICRO + 1:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        for closure in closures(model):
            opt.accumulate(lambda closure=closure: failing(closure))
        opt.step()
    assert not opt.is_perturbed
    assert_same_bits(weights(model), before)
    if call == 0 and method.name not in ("sssam", "esam"):  # a step that began keeps its number
        other.step(of_all(twin))
        model.load_state_dict({**model.state_dict(), **dict(make(method)[0].named_buffers())})
        accumulated_step(model, opt)
        assert_same_bits(weights(model), weights(twin))
    else:
        accumulated_step(model, opt)


@pytest.mark.parametrize("how", ["restore", "zero_grad"])
@every_method
def test_they_are_dropped_by_hand(method: Method, how: str) -> None:
    (model, opt), (twin, other) = (make(method, model=None) for _ in range(2))
    for net in (model, twin):
        net.eval()  # no statistics
    before = weights(model)
    for closure in closures(model, 1):
        opt.accumulate(closure)
    getattr(opt, how)()
    assert not opt.is_perturbed
    assert_same_bits(weights(model), before)
    accumulated_step(model, opt)
    other.step(of_all(twin))
    assert_same_bits(weights(model), weights(twin))
    # Within a closure, too, of whichever pass.
    for cancelled in range(2):
        opt.accumulate(micro_closure(model, data()[0]))
        calls = itertools.count()
        closure = micro_closure(model, data()[0])
        opt.accumulate(lambda calls=calls, c=cancelled: opt.restore() if next(calls) == c else closure())  # noqa: B023
        if cancelled:
            opt.step()
        assert not opt.is_perturbed
    accumulated_step(model, opt)


@every_method
def test_nothing_is_held_after_the_step(method: Method) -> None:
    class Closure:
        def __call__(self) -> Tensor:
            return micro_closure(model, data()[0])()

    model, opt = make(method)
    closure = Closure()
    held = weakref.ref(closure)
    opt.accumulate(closure)
    opt.step()
    del closure
    gc.collect()
    assert held() is None


# What does not go.


@over([m for m in METHODS.values() if m.by_hand])
def test_other_ways_of_stepping_between_are_refused(method: Method) -> None:
    (model, opt), (twin, other) = (make(method) for _ in range(2))
    *before, last = closures(model)
    for closure in before:
        opt.accumulate(closure)
    for step in (opt.first_step, opt.second_step):
        with pytest.raises(RuntimeError, match=r"after accumulate\(\): step\(\) takes all passes"):
            step()
    opt.accumulate(last)
    opt.step()
    other.step(of_all(twin))
    assert_same_bits(weights(model), weights(twin))
    if not (method.always or method.one_gradient) or method is SAM:
        model, opt = make(method, **method.every)
        micro_closure(model, data()[0])()
        opt.first_step()
        with pytest.raises(RuntimeError, match=r"accumulate\(\) between two passes"):
            opt.accumulate(last)
        opt.restore()


@over([SAM, SALR, METHODS["momentumsam"]])
def test_closures_that_disturb_each_other_are_refused(method: Method) -> None:
    """Resetting gradients, or stepping; the first closure of a pass has nothing to reset."""

    def disturbing(what: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (what(), micro_closure(model, data()[0])())[1]

    model, opt = make(method)
    before = weights(model)
    for what in (opt.zero_grad, opt.step, lambda: opt.accumulate(lambda: None), lambda: opt.step(lambda: None)):
        opt.accumulate(micro_closure(model, data()[0]))
        with pytest.raises(RuntimeError, match=r"zero_grad\(\)|within a closure"):
            opt.accumulate(disturbing(what))
        assert not opt.is_perturbed
        assert_same_bits(weights(model), before)
        if what != opt.zero_grad:
            with pytest.raises(RuntimeError, match="within a closure"):
                opt.accumulate(disturbing(what))
    (model, opt), (twin, other) = (make(method) for _ in range(2))
    first, *rest = closures(model)
    for closure in (lambda: (opt.zero_grad(), first())[1], *rest):
        opt.accumulate(closure)
    opt.step()
    other.step(of_all(twin))
    assert_same_bits(weights(model), weights(twin))


@pytest.mark.parametrize("then", ["accumulate", "step"])
@pytest.mark.parametrize("how", ["clipped", "reset", "added to", "replaced"])
@over([SAM, SALR, METHODS["momentumsam"], METHODS["nudged"]])
def test_gradients_that_only_the_first_pass_would_have_are_refused(method: Method, how: str, then: str) -> None:
    """But for who takes one pass."""
    model, opt = make(method)
    opt.accumulate(micro_closure(model, data()[0]))
    if how == "clipped":
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    elif how == "reset":
        model.zero_grad()
    elif how == "added to":
        mean_loss(model, data()[:1])
    else:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    before = weights(model)
    act = opt.step if then == "step" else lambda: opt.accumulate(micro_closure(model, data()[0]))
    if method.one_gradient or method.one_pass:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is left of what was reset
            act()
        return
    with pytest.raises(RuntimeError, match="gradients were changed after"):
        act()
    assert_same_bits(weights(model), before)
    accumulated_step(model, opt)


@pytest.mark.parametrize("how", ["written to", "replaced", "reset"])
def test_a_change_of_any_gradient_is_refused(how: str) -> None:
    model, opt = make(SAM)
    before = weights(model)
    for p in model.parameters():
        opt.accumulate(micro_closure(model, data()[0]))
        if how == "written to":
            p.grad.mul_(0)
        else:
            p.grad = None if how == "reset" else torch.zeros_like(p)
        with pytest.raises(RuntimeError, match="gradients were changed after"):
            opt.step()
    assert_same_bits(weights(model), before)


LOOP: Any = None  # a variable of a module's loop


def write_a_namesake() -> None:
    """A global variable, of the name of one of a loop's."""
    global batch
    batch = None


def test_variables_of_a_loop_are_not_what_they_were() -> None:
    """A closure that reads them would see the last micro-batch each time; what it writes itself may change."""
    global LOOP
    model, opt = make(SAM)
    micro_batches, total, i = data(MICRO)[:MICRO], 0.0, -1
    before = weights(model)

    def of_free(x: Any = None) -> Any:
        return micro_closure(model, batch)()

    def of_index() -> Any:
        return micro_closure(model, micro_batches[i])()

    def of_global() -> Any:
        return next(micro_closure(model, b)() for b in [LOOP])

    def inner() -> Any:
        return of_free()

    def through() -> Any:
        return inner()

    loops = [(of_free, "batch"), (functools.partial(of_free, 3), "batch"), (of_index, "i"), (of_global, "LOOP")]
    loops.append((through, "batch"))

    def beside_a_namesake() -> Any:
        write_a_namesake()
        return of_free()

    loops.append((beside_a_namesake, "batch"))
    for closure, name in loops:
        for i, batch in enumerate(micro_batches):  # noqa: B007
            LOOP = batch
            opt.accumulate(closure)
        with pytest.raises(RuntimeError, match=f"reads '{name}', which has another value"):
            opt.step()
        assert_same_bits(weights(model), before)

    def of_equals() -> Any:
        assert (shape, where) == (micro_batches[0][0].shape, (torch.device("cpu"), 1.5))
        return of_first()

    def of_first() -> Any:
        return micro_closure(model, micro_batches[0])()

    for _ in range(2):
        shape, where = micro_batches[0][0].shape, (torch.device("cpu"), float("1.5"))  # equal, and made anew
        opt.accumulate(of_equals)
    opt.step()
    model, opt = make(SAM)

    def add(loss: float) -> None:
        nonlocal total
        total += loss

    def own(batch: Batch) -> Any:
        add(float(micro_closure(model, batch)().detach()))
        return torch.tensor(total)

    for batch in micro_batches:
        opt.accumulate(functools.partial(own, batch))
    opt.step()
    twin, other = make(SAM)
    other.step(of_all(twin))
    assert_same_bits(weights(model), weights(twin))


def test_the_step_of_a_scaler_is_refused() -> None:
    """It unscales the gradients that are there. Without a second pass it is right."""
    for method in (SAM, METHODS["nudged"]):
        model, opt = make(method)
        scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=2.0)
        before = weights(model)
        for closure in closures(model, 0, scaler.scale):
            opt.accumulate(closure)
        if method is SAM:
            with pytest.raises(RuntimeError, match=r"call step\(scaler=scaler\)"):
                scaler.step(opt)
            assert_same_bits(weights(model), before)
        else:
            scaler.step(opt)
            twin, other = make(method)
            other.step(of_all(twin))
            assert_same_bits(weights(model), weights(twin))


def test_a_model_may_move_between_micro_batches() -> None:
    models = []
    for moves in (False, True):
        model, opt = make(SAM)
        first, *rest = closures(model)
        opt.accumulate(first)
        if moves:
            for p in model.parameters():
                p.data, p.grad.data = p.data.clone(), p.grad.data.clone()
        for closure in rest:
            opt.accumulate(closure)
        opt.step()
        models.append(model)
    assert_same_bits(*map(weights, models))


def test_a_callable_that_has_every_attribute() -> None:
    """Which is looked through for the variables that it reads."""
    model, opt = make(SAM)
    for closure in closures(model):
        opt.accumulate(mock.Mock(side_effect=closure))
    opt.step()
    assert int(opt.stats["second_passes"]) == 1


def test_what_is_no_closure_is_refused() -> None:
    model, opt = make(SAM)
    mean_loss(model, data()[:1])
    grads = [p.grad for p in model.parameters()]
    with pytest.raises(TypeError, match="closure should be a function, but got None"):
        opt.accumulate(None)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


def test_esam_ranks_samples_of_the_whole_batch() -> None:
    model = make_net()
    opt = sk.ESAM(model.parameters(), lr=0.1, gamma=0.5)
    with pytest.raises(RuntimeError, match="compares the losses of all samples"):
        opt.accumulate(lambda: None)


def test_loading_drops_them() -> None:
    (model, opt), (twin, other) = (make(SAM, model=None) for _ in range(2))
    for net in (model, twin):
        net.eval()  # no statistics
    opt.accumulate(micro_closure(model, data()[0]))
    opt.load_state_dict(opt.state_dict())
    model.zero_grad()
    accumulated_step(model, opt, 1)
    other.step(of_all(twin, 1))
    assert_same_bits(weights(model), weights(twin))


def test_gradients_that_were_there_are_told_of() -> None:
    model, opt = make(SAM)
    mean_loss(model, data()[:1])
    with pytest.warns(UserWarning, match="those that were there are not used"):
        opt.accumulate(micro_closure(model, data()[0]))


@over([SAM, METHODS["looksam"], SALR])
def test_saving_and_copying_between_micro_batches(method: Method) -> None:
    """What is accumulated belongs to the gradients, which are in neither."""
    model, opt = make(method)
    accumulated_step(model, opt)
    saved = state_of(opt)
    opt.accumulate(micro_closure(model, data()[0]))
    assert_same_bits(state_of(opt), saved)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        with pytest.raises(RuntimeError, match="goes with a closure"):
            other.step(scaler=torch.amp.GradScaler("cpu"))  # it has none
    opt.step()


def test_an_error_in_the_step_gives_the_weights_back() -> None:
    """Those of an algorithm that moves them before its gradient."""
    table = nn.Embedding(5, 3, sparse=True)
    opt = sk.MomentumSAM(table.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    opt.state[table.weight]["momentum_buffer"] = torch.ones(5, 3)
    before = table.weight.detach().clone()

    def closure() -> Tensor:
        loss = table(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    opt.accumulate(closure)
    assert not torch.equal(table.weight, before)
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert torch.equal(table.weight, before)
    assert not opt.is_perturbed


def test_gradients_that_the_user_unscaled_are_not_unscaled_again() -> None:
    p = nn.Parameter(torch.ones(5))
    opt = sk.MomentumSAM([p], torch.optim.SGD, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(p.device.type, init_scale=1024.0)

    def closure() -> Tensor:
        loss = p.square().sum()
        scaler.scale(loss).backward()
        return loss

    opt.accumulate(closure)
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="unscale_ is not to be called"):
        opt.step(scaler=scaler)
    assert torch.equal(p, torch.ones(5))


def test_a_closure_that_drops_the_gradients_before_it_is_told_so() -> None:
    """The model's zero_grad() does not ask the optimizer; a graph of gradients is added to out of place."""
    p = nn.Parameter(torch.ones(5))
    held = nn.ParameterList([p])
    opt = sk.SAM([p], torch.optim.SGD, lr=0.1)

    def resetting() -> Tensor:
        held.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    def with_a_graph() -> Tensor:
        loss = p.square().sum()
        loss.backward(create_graph=True)
        return loss

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward")
        for _ in range(2):
            opt.accumulate(with_a_graph)
        opt.step()
    opt.zero_grad()
    opt.accumulate(resetting)
    with pytest.warns(UserWarning, match="leave model.zero_grad"):
        opt.accumulate(resetting)
