"""Whoever calls: trainers that wrap the optimizer, closures that do nothing, gradients made too early, compilers."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from methods import METHODS, Method, each_method, every_by_hand, every_deciding, every_method
from models import assert_same_bits, batches, make_closure, make_net, state_of, train, train_by_hand, weights
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

f32 = torch.float32
SAM = METHODS["sam"]


class Wrapper:
    """What trainers make of an optimizer: an object of a class that is a mix with the optimizer's. Attributes are read
    from the optimizer, written to the wrapper; ``step`` hands over a closure always, and counts."""

    def __init__(self, opt: Any) -> None:
        object.__setattr__(self, "inner", opt)
        self.__class__ = type("Wrapped" + type(opt).__name__, (type(self), type(opt)), {})
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "inner"), name)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.count += 1
        return self.inner.step(closure or (lambda: None))


class Copied(Wrapper):
    """The same, with the optimizer's attributes copied at the start."""

    def __init__(self, opt: Any) -> None:
        super().__init__(opt)
        self.__dict__.update({k: v for k, v in vars(opt).items() if k != "step"})


@contextmanager
def told(*phrases: str) -> Iterator[None]:
    """Exactly these warnings are given."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    messages = [str(w.message) for w in seen]
    assert len(messages) == len(phrases), messages
    for phrase, message in zip(phrases, messages, strict=True):
        assert phrase in message
    assert all(w.filename == __file__ for w in seen)


@pytest.mark.parametrize("wrap", [Wrapper, Copied])
@every_method
def test_a_wrapper_steps_as_the_optimizer_does(method: Method, wrap: Any) -> None:
    """By hand and by closures, also after one that raised, and one step is counted for each."""
    data = batches(6, f32)
    for by_hand in (False, True) if method.by_hand else (False,):
        model, twin = make_net(f32), make_net(f32)
        opt, plain = method.make(model.named_parameters(), "momentum"), method.make(twin.named_parameters(), "momentum")
        wrapped = wrap(opt)
        with told():
            (train_by_hand if by_hand else train)(model, wrapped, data)
            (train_by_hand if by_hand else train)(twin, plain, data)
        assert_same_bits(weights(model), weights(twin))
        assert_same_bits(opt.stats, plain.stats)
        assert wrapped.count == 6
        assert not wrapped.is_perturbed


@pytest.mark.parametrize("base", ["momentum", "wrapped"])
def test_a_state_dict_is_loaded_through_a_wrapper(base: str) -> None:
    """Hooks of the optimizer are called, through the wrapper, too, which gets nothing of its own."""
    model, seen = make_net(f32), []
    opt = METHODS["looksam"].make(model.named_parameters(), base)
    train(model, opt, batches(2, f32))
    opt.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    opt.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    opt.register_step_post_hook(lambda *_: seen.append("stepped"))
    wrapped = Wrapper(opt)
    own = set(vars(wrapped))
    wrapped.load_state_dict(wrapped.state_dict())
    wrapped.state_dict()
    train(model, wrapped, batches(1, f32))
    assert seen == ["saved", "loaded", "saved", "stepped"]
    assert set(vars(wrapped)) == own


@every_by_hand
def test_at_a_learning_rate_of_0_a_wrapper_leaves_the_weights_alone(method: Method) -> None:
    model = make_net(f32)
    opt = method.make(model.named_parameters(), lr=0.0, **method.every)
    wrapped, before = Wrapper(opt), weights(model)
    train_by_hand(model, wrapped, batches(2, f32))
    assert_same_bits(weights(model), before)
    make_closure(model, batches(1, f32)[0])()
    wrapped.first_step(zero_grad=True)
    assert opt.is_perturbed
    wrapped.restore()
    assert_same_bits(weights(model), before)


@every_by_hand
def test_a_wrapper_that_does_not_step_ends_the_step(method: Method) -> None:
    """As with a scaler after an overflow: the weights are back, and the next step is like any other."""

    class Skipping(Wrapper):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            return None

    model = make_net(f32)
    opt = method.make(model.named_parameters(), "momentum", **method.every)
    closure, before = make_closure(model, batches(1, f32)[0]), weights(model)
    closure()
    skipping = Skipping(opt)
    assert skipping.first_step(zero_grad=True)
    closure()
    skipping.second_step(zero_grad=True)
    assert_same_bits(weights(model), before)
    with told():
        train_by_hand(model, opt, batches(1, f32))


# step(closure) after first_step.


@every_by_hand
def test_a_closure_finishes_a_pending_step(method: Method) -> None:
    """It is called once, at the perturbed weights, and its loss is returned; one that does nothing will do."""
    model, twin, third = make_net(f32), make_net(f32), make_net(f32)
    opts = [method.make(net.named_parameters(), "momentum") for net in (model, twin, third)]
    for batch in batches(6, f32):
        closures = [make_closure(net, batch) for net in (model, twin, third)]
        for net, opt, closure in zip((model, twin, third), opts, closures, strict=True):
            opt.zero_grad()
            closure()
            again = opt.first_step(zero_grad=True)
            if net is model:
                calls = []
                evaluate = closure if again else (lambda: None)
                result = opt.step(lambda f=evaluate, c=calls: c.append(f()) or c[-1])
                assert len(calls) == 1
                assert result is calls[0]
                continue
            if again:
                closure()
            opt.second_step() if net is twin else opt.step(lambda: None)
    assert_same_bits(weights(model), weights(twin))
    assert_same_bits(weights(third), weights(twin))


def test_a_closure_that_raises_or_cancels_in_a_pending_step() -> None:
    model = make_net(f32)
    opt = SAM.make(model.named_parameters(), "momentum")
    closure, before = make_closure(model, batches(1, f32)[0]), weights(model)
    closure()
    opt.first_step(zero_grad=True)

    def fail() -> None:
        raise ValueError("no loss")

    with pytest.raises(ValueError, match="no loss"):
        opt.step(fail)
    assert_same_bits(weights(model), before)
    closure()
    opt.first_step(zero_grad=True)
    assert opt.step(opt.restore) is None
    assert_same_bits(weights(model), before)
    assert opt.stats["skipped_steps"] == 0
    train(model, opt, batches(1, f32))


def test_a_step_within_a_closure_of_more_passes_is_refused() -> None:
    model = make_net(f32)
    opt = METHODS["salr"].make(model.named_parameters())
    before, closure = weights(model), make_closure(model, batches(1, f32)[0])
    for last in range(1, METHODS["salr"].calls):
        calls: list[int] = []

        def nested(calls: list[int] = calls, last: int = last) -> Any:
            calls.append(1)
            if len(calls) > last:
                opt.step(closure)
            return closure()

        with pytest.raises(RuntimeError, match=r"more passes than two: call step\(closure\)"):
            opt.step(nested)
        assert_same_bits(weights(model), before)


# What would go wrong without a word.


@every_method
def test_gradients_that_a_closure_step_discards_are_said(method: Method) -> None:
    """Whether they were made before the first step, or are made later, anew or on top of the last step's."""
    data = batches(3, f32)
    for first in (0, 1):
        for fresh in (False, True):
            model = make_net(f32)
            opt = method.make(model.named_parameters(), "momentum")
            with told():
                train(model, opt, data[:first])
            if fresh:
                opt.zero_grad()
            make_closure(model, data[0])()
            before = copy.deepcopy(model), copy.deepcopy(opt)
            with told("those that were there are not used"):
                opt.step(make_closure(model, data[1]))
            with told():
                make_closure(model, data[0])()
                opt.step(make_closure(model, data[2]))
            twin, other = before[0], method.make(before[0].named_parameters(), "momentum")
            other.load_state_dict(before[1].state_dict())
            other.zero_grad()
            train(twin, other, data[1:])
            assert_same_bits(weights(model), weights(twin))


@pytest.mark.parametrize("flatten", [False, True])
def test_discarded_gradients_are_seen_however_they_came(flatten: bool) -> None:
    """After steps whose gradients were reset by either hand, to None or to zeros; on a parameter that is first with one
    because another was frozen."""
    data = batches(5, f32)

    def frozen(model: nn.Module, opt: Any) -> None:
        opt.zero_grad()
        next(model.parameters()).requires_grad_(False).grad = None

    for reset in (
        lambda model, opt: model.zero_grad(),
        lambda model, opt: opt.zero_grad(),
        lambda model, opt: opt.zero_grad(set_to_none=False),
        frozen,
    ):
        model = make_net(f32)
        opt = SAM.make(model.named_parameters(), "momentum", flatten=flatten)
        with told():
            for batch in data:
                opt.step(make_closure(model, batch))
                reset(model, opt)
        make_closure(model, data[0])()
        with told("those that were there are not used"):
            opt.step(make_closure(model, data[0]))


def _reset_to_zero(model: nn.Module, opt: Any) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def _move(model: nn.Module, opt: Any) -> None:
    model.double().float()


def _swap(model: nn.Module, opt: Any) -> None:
    """As torch moves a model that has this future: parameters and gradients are swapped with their copies."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize(
    "reset",
    [
        lambda model, opt: None,
        lambda model, opt: opt.zero_grad(),
        lambda model, opt: model.zero_grad(set_to_none=False),
        lambda model, opt: opt.unflatten() if opt.stats["steps"] else None,
        _reset_to_zero,
        _move,
        _swap,
    ],
)
@pytest.mark.parametrize("flatten", [False, True])
def test_gradients_of_the_last_step_and_zeros_are_not_said(reset: Any, flatten: bool) -> None:
    """Nor those that a closure which raised has left, nor where they were moved with the model."""
    model = make_net(f32)
    opt = SAM.make(model.named_parameters(), "momentum", flatten=flatten)
    closure = make_closure(model, batches(1, f32)[0])

    def fail() -> None:
        closure()
        raise ValueError("after backward")

    with told():
        for i in range(6):
            reset(model, opt)
            if i % 3 == 2:
                with pytest.raises(ValueError, match="after backward"):
                    opt.step(fail)
            elif i % 3 == 1:
                opt.zero_grad()
                closure()
                opt.first_step(zero_grad=True)
                closure()
                opt.second_step()
            else:
                opt.step(closure)


@each_method
def test_a_closure_without_a_gradient_is_said(method: Method, base: str) -> None:
    model = make_net(f32)
    opt = method.make(model.named_parameters(), base)
    x, y = batches(1, f32)[0]
    before = weights(model)
    with told("the closure left no gradient"):
        for _ in range(2):
            opt.step(lambda: nn.functional.cross_entropy(model(x), y))
    if method.two_passes:
        other = method.make(model.named_parameters(), base)
        with told("first_step() found no gradient", "second_step() found no gradient"):
            for _ in range(2):
                other.first_step()
                other.second_step()
    assert_same_bits(weights(model), before)


@every_by_hand
def test_a_forgotten_backward_is_said(method: Method) -> None:
    model = make_net(f32)
    opt = method.make(model.named_parameters(), "momentum", **method.every)
    closure, before = make_closure(model, batches(1, f32)[0]), weights(model)
    with told("second_step() found no gradient"):
        for _ in range(2):
            closure()
            opt.first_step(zero_grad=True)
            opt.second_step()
    assert_same_bits(weights(model), before)


@every_deciding
def test_a_backward_that_is_not_wanted_is_said(method: Method) -> None:
    """The loop that everybody copies has no ``if``: a plain step would count the gradient twice. Clipping between is
    nothing to say a word about, and no hook of ours stays."""
    model = make_net(f32)
    never = {**(method.never or {"k": 10**9}), "skip_nonfinite": True}
    opt = method.make(model.named_parameters(), "momentum", **never)
    data = batches(4, f32)
    with told():
        train_by_hand(model, opt, data)
        for batch in data:
            opt.zero_grad()
            make_closure(model, batch)()
            if opt.first_step(zero_grad=True):
                make_closure(model, batch)()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.second_step()
            make_closure(model, batch)()
    with told("first_step() returned False"):
        for batch in data:
            opt.zero_grad()
            make_closure(model, batch)()
            opt.first_step(zero_grad=True)
            make_closure(model, batch)()
            opt.second_step(zero_grad=True)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("reset", ["argument", "to none", "to zero", "another memory", "forgotten"])
@every_by_hand
def test_a_second_backward_that_adds_to_the_first_gradients_is_told_of(method: Method, reset: str) -> None:
    model = make_net(f32)
    opt = method.make(model.named_parameters(), "momentum", **method.every)
    with told(*["added to the gradients that were there"] * (reset == "forgotten")):
        for batch in batches(4, f32):
            opt.zero_grad()
            make_closure(model, batch)()
            assert opt.first_step(zero_grad=reset == "argument")
            if reset.startswith("to"):
                opt.zero_grad(set_to_none=reset == "to none")
            held = [p.grad for p in model.parameters()]
            if reset == "another memory":
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
            make_closure(model, batch)()
            make_closure(model, batch)()  # of a second micro-batch
            opt.second_step()
            del held
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@each_method
def test_a_step_of_the_base_optimizer_is_said_and_counted(method: Method, base: str) -> None:
    if method.one_pass:
        pytest.skip("of one pass: step() without a closure is its step")
    model = make_net(f32)
    opt = method.make(model.named_parameters(), base)
    closure = make_closure(model, batches(1, f32)[0])
    with told():
        opt.step()  # no gradients: nothing happens
        train(model, opt, batches(1, f32))
    assert opt.stats["base_steps"] == 0
    with told(f"is a step of {opt._step.rule.base.__name__} alone"):
        for _ in range(3):
            opt.zero_grad()
            closure()
            opt.step()
    assert opt.stats["base_steps"] == 3
    resumed = method.make(model.named_parameters(), base)
    resumed.load_state_dict(opt.state_dict())
    assert resumed.stats["base_steps"] == 3


@pytest.mark.parametrize("what", ["discarded", "none", "base step"])
@each_method
def test_a_warning_that_is_an_error_changes_nothing(method: Method, base: str, what: str) -> None:
    """The next step is taken, and no gradient is held meanwhile."""
    if what == "base step" and method.one_pass:
        pytest.skip("of one pass: step() without a closure is its step")
    model, twin = make_net(f32), make_net(f32)
    opt, other = (method.make(m.named_parameters(), base) for m in (model, twin))
    closures = [make_closure(m, batches(1, f32)[0]) for m in (model, twin)]
    if what != "none":
        closures[0]()
    before, stats, state = weights(model), {name: x.cpu() for name, x in opt.stats.items()}, state_of(opt)
    with warnings.catch_warnings(), pytest.raises(UserWarning):
        warnings.simplefilter("error")
        opt.step(*{"discarded": [closures[0]], "none": [lambda: torch.tensor(1.0)]}.get(what, []))
    assert_same_bits(weights(model), before)
    assert_same_bits({name: x.cpu() for name, x in opt.stats.items()}, stats)  # by now they lie with the parameters
    assert_same_bits(state_of(opt), state)
    grads = [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]
    assert len(grads) == (0 if what == "none" else len(before))
    for p in model.parameters():
        p.grad = None
    assert not any(grad() is not None for grad in grads)
    for o, closure in zip((opt, other), closures, strict=True):
        o.step(closure)
    assert_same_bits(weights(model), weights(twin))


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_state_made_by_a_tool_is_no_step_of_the_base_optimizer(tensor_lr: bool) -> None:
    """torch.distributed.checkpoint makes it by a step with a learning rate of 0 on zero gradients."""
    model = make_net(f32)
    lr = torch.tensor(0.1, device="cpu") if tensor_lr else 0.1
    opt = SAM.make(model.named_parameters(), lr=lr, momentum=0.9)
    before = weights(model)
    _reset_to_zero(model, opt)
    opt.param_groups[0]["lr"] = torch.tensor(0.0, device="cpu") if tensor_lr else 0.0
    with told():
        opt.step()
    assert opt.stats["base_steps"] == 0
    assert "momentum_buffer" in opt.state[model.out.bias]
    assert_same_bits(weights(model), before)
    make_closure(model, batches(1, f32)[0])()
    with told("is a step of SGD alone"):
        opt.step()
    assert opt.stats["base_steps"] == 1


# Compiled functions, closures of mixed precision.


@pytest.mark.parametrize("base", ["momentum", "wrapped"])
@every_method
def test_a_compiled_function_may_contain_the_step(method: Method, base: str) -> None:
    """20 calls, the bits of eager ones, and nothing of the package is compiled: the parts around it are, once."""
    data = batches(20, f32, size=8)

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 7), nn.Tanh(), nn.Linear(7, 3)).to(torch.get_default_device())

    def steps(model: nn.Module, opt: Any, by_hand: bool) -> Callable[[Tensor, Tensor], None]:
        def loss(x: Tensor, y: Tensor) -> Tensor:
            result = nn.functional.cross_entropy(model(x), y)
            result.backward()
            return result

        def by_closure(x: Tensor, y: Tensor) -> None:
            opt.step(lambda: loss(x, y))

        def manual(x: Tensor, y: Tensor) -> None:
            opt.zero_grad()
            loss(x, y)
            if opt.first_step(zero_grad=True):
                loss(x, y)
            opt.second_step(zero_grad=True)

        return manual if by_hand else by_closure

    for by_hand in (False, True) if method.by_hand else (False,):
        torch._dynamo.reset()
        model, twin = net(), net()
        counter = CompileCounter()
        compiled = torch.compile(steps(model, method.make(model.parameters(), base), by_hand), backend=counter)
        eager = steps(twin, method.make(twin.parameters(), base), by_hand)
        for x, y in data:
            compiled(x, y)
            eager(x, y)
        assert_same_bits(weights(model), weights(twin))
        assert counter.frame_count <= 2  # the forward passes of the two evaluations


def test_restore_and_zero_grad_break_the_graph() -> None:
    model = make_net(f32)
    opt = SAM.make(model.named_parameters(), "momentum")
    x, y = batches(1, f32)[0]
    before = weights(model)
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter)
    def look(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.first_step()
        loss = nn.functional.cross_entropy(model(x), y)
        opt.restore()
        return loss

    for _ in range(3):
        assert look(x, y) > nn.functional.cross_entropy(model(x), y)
    assert_same_bits(weights(model), before)
    assert counter.frame_count <= 4


def test_a_trainer_asks_before_it_hands_over_a_closure() -> None:
    """Composer hands one to optimizers that say that they take it under mixed precision. Its closure takes arguments,
    resets the gradients itself and returns a number."""
    model, twin = make_net(f32), make_net(f32)
    opt, plain = SAM.make(model.named_parameters(), "momentum"), SAM.make(twin.named_parameters(), "momentum")
    for batch in batches(4, f32):

        def evaluate(sync: bool = True, batch: Any = batch) -> float:
            opt.zero_grad()
            return make_closure(model, batch)().item()

        if getattr(opt, "_step_supports_amp_closure", False):
            opt.step(closure=lambda **kwargs: evaluate(**kwargs))
        else:
            evaluate()
            opt.step()
        plain.step(make_closure(twin, batch))
    assert opt.stats["second_passes"] == 4
    assert_same_bits(weights(model), weights(twin))
