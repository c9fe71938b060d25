"""What goes wrong in a pass leaves the weights where they were: exceptions, interrupts, gradients that are not finite
or sparse, closures that return nothing useful (contract 5, 7, 12)."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods import (
    LOOKING,
    METHODS,
    SGD,
    AdamW,
    Method,
    each_method,
    every_base,
    every_call,
    every_followed,
    every_method,
    over,
)
from models import assert_same_bits, batches, make_closure, make_net, state_of, train, weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sharpkern as sk

f32 = torch.float32


class Calls:
    """A closure that does something of its own after one of its calls."""

    def __init__(self, model: nn.Module, batch: Any, at: int, act: Callable[[], object]) -> None:
        self.closure = make_closure(model, batch)
        self.at, self.act = at, act
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        loss = self.closure()
        if self.calls == self.at + 1:
            self.act()
        return loss


def raising(error: type[BaseException]) -> Callable[[], object]:
    def act() -> None:
        raise error("in a pass")

    return act


def learnt(opt: Any) -> dict[str, Tensor]:
    """What a step that came to nothing must not touch: state, and statistics of earlier steps."""
    own = opt.state_dict()["sharpkern"]
    kept = ("g_v_squared_norm", "g_v_count", "history", "sharpness", "lr_scale", "skipped_steps")
    return state_of(opt) | {k: torch.as_tensor(v) for k, v in {**opt.stats, **own}.items() if k in kept}


# Exceptions.


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@every_base
@every_call
def test_an_exception_in_a_pass_leaves_no_trace(
    method: Method, call: int, base: str, error: type[BaseException]
) -> None:
    """Weights are back, nothing stays frozen, and the next steps are those of a run that never failed."""
    model, twin = make_net(f32), make_net(f32)
    opt, twin_opt = (method.make(m.named_parameters(), base, model=m, **method.every) for m in (model, twin))
    for each in ((model, opt), (twin, twin_opt)):
        train(*each, batches(2, f32))
    before, kept = weights(model), learnt(opt)
    closure = Calls(model, batches(3, f32)[2], call, raising(error))
    with pytest.raises(error, match="in a pass"):
        opt.step(closure)
    assert closure.calls == call + 1
    assert_same_bits(weights(model), before)
    assert_same_bits(learnt(opt), kept)
    assert not opt.is_perturbed
    assert model.bn.num_batches_tracked == 3  # the first pass of every step
    for name, buffer in model.named_buffers():  # the running statistics of the pass that failed
        buffer.copy_(dict(twin.named_buffers())[name])
    train(model, opt, batches(4, f32)[3:])
    train(twin, twin_opt, batches(4, f32)[3:])
    # A trigger counted the failed step's gradient; with these arguments it has no say.
    assert_same_bits(weights(model), weights(twin))


class Kernels(TorchDispatchMode):
    """Notes every op of ours in turn, and raises an interrupt right after (or before) one of them: Python delivers it
    when a long C call returns, before the next line runs."""

    def __init__(self, at: int = -1, before: bool = False) -> None:
        super().__init__()
        self.at, self.before = at, before
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = func.name().startswith("sharpkern::")
        due = ours and len(self.seen) == self.at
        if ours:
            self.seen.append(func.name().removeprefix("sharpkern::").split(".")[0])
        if due and self.before:
            raise KeyboardInterrupt
        out = func(*args, **(kwargs or {}))
        if due:
            raise KeyboardInterrupt
        return out


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@every_base
@every_method
def test_an_interrupt_around_every_kernel(method: Method, base: str, before: bool) -> None:
    """The weights are those before the step; after the rule's kernel they may be those after it."""
    model = make_net(f32)
    opt = method.make(model.named_parameters(), base, model=model, **method.every)
    closure = make_closure(model, batches(1, f32)[0])
    opt.step(closure)
    with Kernels() as kernels:
        opt.step(closure)
    assert len(kernels.seen) >= 1 + method.calls
    rule = min(
        (i for i, op in enumerate(kernels.seen) if op in ("sgd", "adam", "nudge_sgd")), default=len(kernels.seen)
    )
    if method.name == "wsam":  # past the rule there is one more: the rule's alone is a step, too
        rule = kernels.seen.index("mix") + 1
    for at, op in enumerate(kernels.seen):
        start, tracked = weights(model), model.bn.num_batches_tracked + 1
        with Kernels(at, before) as mode, pytest.raises(KeyboardInterrupt):
            opt.step(closure)
        assert mode.seen[at] == op
        assert not opt.is_perturbed
        assert tracked - model.bn.num_batches_tracked in ((0, 1) if method.one_gradient else (0,))
        if at < rule + before:
            assert_same_bits(weights(model), start)
        assert all(p.isfinite().all() for p in model.parameters())
        opt.step(closure)
        assert not torch.equal(model.out.weight, start["out.weight"])


@every_method
def test_a_wrapped_optimizer_that_raises_leaves_nothing_frozen(method: Method) -> None:
    class Failing(SGD):
        def step(self, closure: Any = None) -> Any:
            raise ValueError("inside")

    model = make_net(f32)
    opt = method.make(model.named_parameters(), Failing, lr=0.1, model=model, **method.every)
    before = weights(model)
    with pytest.raises(ValueError, match="inside"):
        opt.step(make_closure(model, batches(1, f32)[0]))
    assert_same_bits(weights(model), before)
    assert model.bn.num_batches_tracked == 1
    assert not opt.is_perturbed
    assert [group["lr"] for group in opt.param_groups] == [0.1]


# Gradients that are not finite.


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30], ids=str)
@every_base
@every_followed
def test_a_gradient_that_is_not_finite_changes_nothing(method: Method, base: str, value: float, call: int) -> None:
    """In any pass whose gradient is followed; the step is counted once. One element will do."""
    model = make_net(f32)
    opt = method.make(model.named_parameters(), base, model=model, **method.every)
    train(model, opt, batches(2, f32))
    closure = Calls(model, batches(1, f32)[0], call, lambda: model.out.weight.grad[-1, -1:].fill_(value))
    before, kept, stats = weights(model), learnt(opt), opt.stats
    opt.step(closure)
    # A norm that is not finite decides for a plain step.
    assert closure.calls == (1 if method.triggered and call == 0 else method.calls)
    assert_same_bits(weights(model), before)
    assert_same_bits({**learnt(opt), "skipped_steps": kept["skipped_steps"]}, kept)
    after = opt.stats
    assert int(after["skipped_steps"]) == 1
    assert int(after["steps"]) == int(stats["steps"]) + 1
    if method.triggered and call == 0:  # nor does it count in the trigger's averages
        assert_same_bits(*({k: s[k] for k in ("ema_mean", "ema_var", "threshold")} for s in (after, stats)))
    opt.step(make_closure(model, batches(1, f32)[0]))  # and goes on
    assert int(opt.stats["skipped_steps"]) == 1
    assert not torch.equal(model.out.weight, before["out.weight"])
    assert all(p.isfinite().all() for p in model.parameters())


@each_method
def test_gradients_that_nobody_follows_may_be_anything(method: Method, base: str) -> None:
    for call in set(range(method.calls)) - set(method.followed):
        ends = []
        for bad in (False, True):
            model = make_net(f32)
            opt = method.make(model.named_parameters(), base, **method.every)
            fill = lambda model=model, bad=bad: model.out.bias.grad.fill_(math.nan) if bad else None  # noqa: E731
            opt.step(Calls(model, batches(1, f32)[0], call, fill))
            ends.append(weights(model) | opt.stats)
        assert_same_bits(*ends)
        assert int(ends[1]["skipped_steps"]) == 0


@pytest.mark.parametrize("base", ["momentum", "adamw"])
@every_method
def test_without_the_check_nan_goes_through_as_in_torch(method: Method, base: str) -> None:
    model = make_net(f32)
    opt = method.make(model.named_parameters(), base, skip_nonfinite=False, **method.every)
    at = 1 if method.two_passes else 0  # SALR's rule takes its first gradient
    opt.step(Calls(model, batches(1, f32)[0], at, lambda: model.out.bias.grad[:1].fill_(math.nan)))
    assert torch.isnan(model.out.bias[0])
    assert opt.stats["skipped_steps"] == 0


@every_base
@every_method
def test_a_zero_gradient(method: Method, base: str) -> None:
    """Is no NaN: weights decay, as they do in torch."""
    ours, theirs = make_net(), make_net()
    opt = method.make(ours.named_parameters(), base)
    naive = (method if method.one_pass else METHODS["sam"]).oracle(theirs.named_parameters(), base)

    def closure(model: nn.Module) -> Tensor:
        loss = 0.0 * sum(p.sum() for p in model.parameters())
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(lambda: closure(ours))
        naive.base.zero_grad()
        closure(theirs)
        naive.base_step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.isfinite(p).all()
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)
    if "sharpness" in opt.stats:
        assert math.isnan(float(opt.stats["sharpness"]))
        assert float(opt.stats["lr_scale"]) == 1.0


@pytest.mark.parametrize("p", [1.01, 3.0, math.inf])
def test_gradients_of_zero_and_of_nan_in_another_ball(p: float) -> None:
    """Neither moves a weight."""
    model = make_net(f32)
    before = weights(model)
    opt = sk.SAM(model.parameters(), SGD, rho=0.1, p=p, lr=0.1)
    for skipped, bad in enumerate((0.0, math.nan, math.inf, -math.inf)):
        for q in model.parameters():
            q.grad = torch.zeros_like(q)
        model.out.weight.grad[0, 0] = bad
        assert opt.first_step()
        assert_same_bits(weights(model), before)
        model.out.weight.grad[0, 0] = 0.0
        opt.second_step()
        assert_same_bits(weights(model), before)
        assert int(opt.stats["skipped_steps"]) == skipped


# Sparse gradients.


@every_base
@every_followed
def test_a_sparse_gradient_is_refused_by_name_and_changes_nothing(method: Method, call: int, base: str) -> None:
    table, dense = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.ones(3))
    opt = method.make([("dense", dense), ("table", table.weight)], base, **method.every)
    before, state = table.weight.detach().clone(), state_of(opt)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = (table(torch.tensor([1, 2])) if calls == call + 1 else table.weight.square()).sum() + dense.sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=rf"{method.cls.__name__} does not support sparse gradients.*'table'"):
        opt.step(closure)
    assert calls == call + 1
    assert torch.equal(table.weight.detach(), before)
    assert torch.equal(dense.detach(), torch.ones(3))
    assert not opt.is_perturbed
    assert_same_bits(state_of(opt), state)
    calls = 9
    opt.step(closure)
    assert not torch.equal(table.weight.detach(), before)


@every_method
def test_a_sparse_gradient_in_a_plain_step(method: Method) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    opt = method.make([("table", table.weight)], AdamW, lr=0.1)
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="does not support sparse gradients.*'table'"):
        opt.step()
    assert torch.equal(table.weight.detach(), before)
    assert len(opt.state) == 0
    assert opt.stats["steps"] == 0


# Parameters without memory, state that does not fit.


@each_method
def test_a_parameter_without_memory_is_an_error(method: Method, base: str) -> None:
    model = make_net()
    opt = method.make(model.named_parameters(), base)
    train(model, opt, batches(1))
    kept = model.hidden.weight.data.clone()
    before = weights(model)
    storage = model.hidden.weight.untyped_storage()
    size = storage.nbytes()
    loss = make_closure(model, batches(1)[0])

    def freed() -> Tensor:
        out = loss()
        storage.resize_(0)
        return out

    with pytest.raises(RuntimeError, match=r"parameter 'hidden.weight' has no memory"):
        opt.step(freed)
    storage.resize_(size)
    model.hidden.weight.data.copy_(kept)
    opt.restore()  # of those that were away
    assert_same_bits(weights(model), before)
    train(model, opt, batches(1))


@over([METHODS["sam"], *LOOKING])
def test_state_of_another_shape_is_an_error_that_loses_nothing(method: Method) -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    opt = method.make([("p", p), ("q", q)], SGD, lr=0.1, momentum=0.9)
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


@pytest.mark.parametrize("p", [1.5, -0.1, math.nan])
def test_a_schedule_that_leaves_the_interval_changes_nothing(p: float) -> None:
    model = make_net(f32)
    opt = sk.SSSAM(model.parameters(), SGD, p=lambda t: 0.5 if t < 2 else p, lr=0.1)
    train(model, opt, batches(2, f32))
    before, stats = weights(model), opt.stats
    with pytest.raises(ValueError, match=rf"Invalid p\(2\): {p}"):
        opt.step(make_closure(model, batches(1, f32)[0]))
    assert_same_bits(weights(model), before)
    assert_same_bits(opt.stats, stats)
    assert not opt.is_perturbed


@over([METHODS["sam"], METHODS["looksam"], METHODS["gsam"]])
def test_a_closure_that_restores_cancels_the_step(method: Method) -> None:
    model = make_net(f32)
    opt = method.make(model.named_parameters(), "momentum", model=model)
    before = weights(model)
    inner = make_closure(model, batches(1, f32)[0])
    calls = 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        loss = inner()
        if calls == 2:
            opt.restore()
        return loss

    opt.step(closure)
    assert calls == 2
    assert_same_bits(weights(model), before)
    opt.step(inner)
    assert not torch.equal(model.out.weight, before["out.weight"])


@over([METHODS["sam"], METHODS["salr"], METHODS["friendlysam"]])
def test_restore_at_any_line_of_a_step(method: Method) -> None:
    """As from a signal's handler: an error where the step could not go on, and never a step that ends elsewhere."""
    batch = batches(1, f32)[0]
    lines = itertools.count(step=7)

    def run(at: int) -> tuple[bool, bool, dict[str, Tensor], dict[str, Tensor]]:
        """Whether the line was reached and the step ended, and the weights before and after."""
        model = make_net(f32).eval()
        opt = method.make(model.named_parameters(), "momentum")
        closure = make_closure(model, batch)
        opt.step(closure)
        before, left, ended = weights(model), itertools.count(at, -1), True

        def trace(frame: Any, event: str, argument: Any) -> Any:
            if "sharpkern" not in frame.f_code.co_filename or frame.f_code.co_name == "restore":
                return None
            if event == "line" and next(left) == 0:
                with contextlib.suppress(RuntimeError):
                    opt.restore()
            return trace

        sys.settrace(trace)
        try:
            opt.step(closure)
        except (RuntimeError, TypeError):
            ended = False
        finally:
            sys.settrace(None)
        assert not opt.is_perturbed
        reached = next(left) < 0
        after = weights(model)
        opt.step(closure)
        return reached, ended, before, after

    *_, done = run(1_000_000)
    for at in lines:
        reached, ended, before, after = run(at)
        if not reached:
            break
        if not ended or not torch.equal(after["out.weight"], done["out.weight"]):
            assert_same_bits(after, before)
        else:
            assert_same_bits(after, done)
    assert at > 100


def test_an_error_while_a_step_is_given_up_leaves_none_open() -> None:
    """Gradients of SALR's first pass fit no parameter that was cast meanwhile."""
    model = make_net(f32)
    opt = METHODS["salr"].make(model.named_parameters(), "momentum", model=model)
    inner = make_closure(model, batches(1, f32)[0])
    calls = 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        loss = inner()
        if calls == 3:
            model.double()
            raise ValueError("after a cast")
        return loss

    with pytest.raises((ValueError, RuntimeError)):
        opt.step(closure)
    model.float()
    opt.zero_grad()
    assert model.bn.num_batches_tracked == 1
    opt.step(inner)
