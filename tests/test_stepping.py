"""Stepping, errors in the middle, hooks, schedulers, groups, statistics (contract 5, 6, 8, 9; public contract)."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from models import assert_same_bits, batches, make_closure, make_net, train, train_by_hand, weights
from naive import Naive, plain
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import sharpkern as sk

SGD, AdamW, RMSprop = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop
BASES = {"sgd": SGD, "adamw": AdamW, "wrapped": RMSprop}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> Any:
    return BASES[request.param]


def sam(net: nn.Module, base: Any = SGD, **kwargs: Any) -> sk.SAM:
    options = {"momentum": 0.9} if base is SGD else {}
    return sk.SAM(net.parameters(), base, **{"lr": 0.01, **options, **kwargs})


# The closure.


def test_step_calls_the_closure_once_a_pass_and_returns_the_first_loss() -> None:
    model = make_net()
    opt = sam(model)
    losses = []
    closure = make_closure(model, batches(1)[0])

    def counted() -> torch.Tensor:
        assert torch.is_grad_enabled()
        losses.append(closure())
        return losses[-1]

    with torch.no_grad():
        loss = opt.step(counted)
    assert len(losses) == 2
    assert loss is losses[0]
    assert not torch.equal(losses[0], losses[1])


def test_closures_with_and_without_zero_grad_and_of_micro_batches_agree() -> None:
    ends = []
    for kind in ("bare", "zeroing", "micro"):
        model = make_net()
        opt = sam(model)
        model.eval()  # batch statistics would differ between one batch and two halves

        def make(kind: str, model: nn.Module, opt: sk.SAM, x: torch.Tensor, y: torch.Tensor) -> Any:
            def closure() -> torch.Tensor:
                if kind == "zeroing":
                    opt.zero_grad()
                if kind != "micro":
                    return make_closure(model, (x, y))()
                total = torch.zeros((), dtype=x.dtype)
                for part in (slice(0, 12), slice(12, 24)):
                    loss = nn.functional.cross_entropy(model(x[part]), y[part]) / 2
                    loss.backward()
                    total += loss.detach()
                return total

            return closure

        for x, y in batches(4):
            opt.step(make(kind, model, opt, x, y))
        ends.append(weights(model))
    assert_same_bits(ends[0], ends[1])
    for name, w in ends[2].items():
        torch.testing.assert_close(w, ends[0][name], rtol=1e-10, atol=1e-12)


def test_step_without_a_closure_is_a_plain_base_step(base: Any, backend: str) -> None:
    ours, theirs = make_net(), make_net()
    opt = sam(ours, base)
    own = base(theirs.parameters(), **({"momentum": 0.9} if base is SGD else {}), lr=0.01)
    for batch in batches(5):
        for model, o in ((ours, opt), (theirs, own)):
            o.zero_grad()
            make_closure(model, batch)()
            o.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)
    assert opt.stats["steps"] == 0
    assert opt.stats["grad_norm"] == 0


def test_first_step_zeroes_gradients_only_when_asked() -> None:
    model = make_net()
    opt = sam(model)
    make_closure(model, batches(1)[0])()
    grad = model.out.bias.grad.clone()
    assert opt.first_step() is True
    assert torch.equal(model.out.bias.grad, grad)
    opt.second_step()
    assert torch.equal(model.out.bias.grad, grad)
    opt.first_step(zero_grad=True)
    assert model.out.bias.grad is None
    make_closure(model, batches(1)[0])()
    opt.second_step(zero_grad=True)
    assert model.out.bias.grad is None


def test_wrong_order_is_an_error() -> None:
    model = make_net()
    opt = sam(model)
    closure = make_closure(model, batches(1)[0])
    closure()
    with pytest.raises(RuntimeError, match=r"second_step\(\) was called before first_step"):
        opt.second_step()
    opt.first_step()
    perturbed = weights(model)
    with pytest.raises(RuntimeError, match=r"first_step\(\) was called twice"):
        opt.first_step()
    with pytest.raises(RuntimeError, match="pending"):
        opt.step(closure)
    assert_same_bits(weights(model), perturbed)
    opt.step()  # finishes the pending pass
    assert not opt.is_perturbed
    with pytest.raises(RuntimeError, match="second_step"):
        opt.second_step()


def test_restore_cancels_and_is_idempotent(base: Any, backend: str) -> None:
    model = make_net(torch.float32)
    opt = sam(model, base)
    train(model, opt, batches(2, torch.float32))
    before = weights(model)
    opt.restore()
    make_closure(model, batches(1, torch.float32)[0])()
    assert not opt.is_perturbed
    opt.first_step()
    assert opt.is_perturbed
    for _ in range(2):
        opt.restore()
        assert not opt.is_perturbed
        assert_same_bits(weights(model), before)
    with pytest.raises(RuntimeError):
        opt.second_step()
    opt.step()  # a plain step works on what is there
    assert not torch.equal(model.out.weight, before["out.weight"])


def test_no_gradient_at_all_changes_nothing(base: Any, backend: str) -> None:
    model = make_net()
    opt = sam(model, base, weight_decay=0.1)
    before = weights(model)
    opt.step(lambda: torch.zeros(()))
    opt.first_step()
    opt.second_step()
    opt.step()
    assert_same_bits(weights(model), before)
    assert len(opt.state) == 0


# Exceptions (5).


@pytest.mark.parametrize("fail", [1, 2])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_a_pass_leaves_no_trace(fail: int, error: type[BaseException], base: Any, backend: str) -> None:
    model, twin = make_net(torch.float32), make_net(torch.float32)
    opt, twin_opt = sam(model, base, model=model), sam(twin, base, model=twin)
    data = batches(4, torch.float32)
    train(model, opt, data[:2])
    train(twin, twin_opt, data[:2])
    before = weights(model)
    calls = 0

    def failing() -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == fail:
            raise error("in the pass")
        return make_closure(model, data[2])()

    with pytest.raises(error, match="in the pass"):
        opt.step(failing)
    assert_same_bits(weights(model), before)
    assert not opt.is_perturbed
    assert model.bn.track_running_stats
    model.load_state_dict(twin.state_dict())  # the running statistics of the failed pass
    train(model, opt, data[3:])
    train(twin, twin_opt, data[3:])
    assert_same_bits(weights(model), weights(twin))


@pytest.mark.parametrize("after", ["_perturb", "first_step", "_collect"])
def test_an_interrupt_right_after_a_kernel(
    after: str, base: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python delivers an interrupt when a long C call returns: before the next line of ours runs."""
    model = make_net(torch.float32)
    opt = sam(model, base, model=model)
    closure = make_closure(model, batches(1, torch.float32)[0])
    opt.step(closure)
    before = weights(model)
    original = getattr(opt, after)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(opt, after, interrupted)
        opt.step(closure)
    assert_same_bits(weights(model), before)
    assert not opt.is_perturbed
    opt.step(closure)


def test_a_wrapped_optimizer_that_raises_leaves_nothing_frozen() -> None:
    class Failing(SGD):
        def step(self, closure: Any = None) -> Any:
            raise ValueError("inside")

    model = make_net(torch.float32)
    opt = sk.SAM(model.parameters(), Failing, lr=0.1, model=model)
    before = weights(model)
    make_closure(model, batches(1, torch.float32)[0])()
    opt.first_step()
    with pytest.raises(ValueError, match="inside"):
        opt.second_step()
    assert_same_bits(weights(model), before)
    assert model.bn.track_running_stats
    assert not opt.is_perturbed


def test_an_autocast_region_around_both_passes() -> None:
    """autocast keeps low-precision copies of weights: the second pass must not see those of the first."""
    losses = []
    device = torch.get_default_device()
    for outside in (True, False):
        torch.manual_seed(0)
        with torch.device("cpu"):
            model, x, y = nn.Linear(8, 3), torch.randn(16, 8), torch.randint(0, 3, (16,))
        model, x, y = model.to(device), x.to(device), y.to(device)
        opt = sk.SAM(model.parameters(), SGD, rho=5.0, lr=0.1)
        seen = []

        def closure(
            model: nn.Module = model, x: Any = x, y: Any = y, seen: Any = seen, outside: bool = outside
        ) -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=True) if not outside else torch.enable_grad():
                loss = nn.functional.cross_entropy(model(x).float(), y)
            loss.backward()
            seen.append(float(loss.detach()))
            return loss

        with torch.autocast(device.type, torch.bfloat16, enabled=outside):
            for _ in range(2):
                opt.step(closure)
        losses.append(seen)
    assert losses[0] == losses[1]
    assert losses[0][1] > 1.5 * losses[0][0]


def test_lazily_negated_gradients(backend: str) -> None:
    """The imaginary part of a conjugate is a view that torch negates when it is read."""
    p, q = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.ones(5))
    opt = sk.SAM([p, q], SGD, lr=0.1, rho=0.0)
    p.grad, q.grad = torch._neg_view(torch.tensor(2.0)), torch._neg_view(torch.arange(5.0))
    assert p.grad.is_neg()
    opt.first_step()
    opt.second_step()
    torch.testing.assert_close(p.detach(), torch.tensor(1.5))
    torch.testing.assert_close(q.detach(), 1 + 0.1 * torch.arange(5.0))


def test_a_default_device_makes_no_difference() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with torch.device("meta"):
        opt = sk.SAM([p], AdamW, lr=0.1)
        for _ in range(2):
            opt.first_step()
            opt.second_step()
    assert torch.isfinite(p).all()
    assert opt.state[p]["step"] == 2


def test_an_abandoned_step_by_hand_is_undone_by_restore(base: Any) -> None:
    model = make_net(torch.float32)
    opt = sam(model, base, model=model)
    before = weights(model)
    make_closure(model, batches(1, torch.float32)[0])()
    opt.first_step(zero_grad=True)
    assert not model.bn.track_running_stats
    opt.restore()
    assert_same_bits(weights(model), before)
    assert model.bn.track_running_stats


def test_a_sparse_gradient_in_the_second_pass_restores(base: Any) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    dense = table.weight.detach().clone()
    opt = sk.SAM([("table", table.weight)], base, lr=0.1)
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = table.weight.square().sum() if calls == 1 else table(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"sparse gradients.*'table'"):
        opt.step(closure)
    assert calls == 2
    assert torch.equal(table.weight.detach(), dense)
    assert not opt.is_perturbed


# Gradients that come and go (6).


@pytest.mark.parametrize("base", [SGD, AdamW, RMSprop], ids=lambda b: b.__name__)
def test_gradients_in_one_pass_or_none(base: Any, backend: str) -> None:
    """Against the definition: only what has a first gradient is perturbed, only what has a second one steps."""
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(70), torch.tensor(0.7), torch.randn(0, 3), torch.randn(5)]
    ours = [nn.Parameter(p.clone()) for p in start]
    theirs = [nn.Parameter(p.clone()) for p in start]
    opt, own = sk.SAM(ours, base, rho=0.5, lr=0.1), base(theirs, lr=0.1)
    patterns = [  # (has a first gradient, has a second one) for each parameter
        [(1, 1), (1, 0), (0, 1), (1, 1), (0, 0)],
        [(0, 1), (1, 1), (1, 1), (0, 0), (0, 0)],
        [(1, 0), (0, 0), (1, 1), (1, 1), (1, 1)],
    ]
    for pattern in patterns:
        first = [torch.randn_like(p) for p in start]
        second = [torch.randn_like(p) for p in start]
        before = [p.detach().clone() for p in ours]
        for p, g, (has, _) in zip(ours, first, pattern, strict=True):
            p.grad = g if has else None
        norm = sum(float(g.square().sum()) for g, (has, _) in zip(first, pattern, strict=True) if has) ** 0.5
        opt.first_step()
        for p, old, g, (has, _) in zip(ours, before, first, pattern, strict=True):
            torch.testing.assert_close(p.detach(), old + 0.5 * g / norm if has else old)
        for p, q, g, (_, has) in zip(ours, theirs, second, pattern, strict=True):
            p.grad = g.clone() if has else None
            q.grad = g.clone() if has else None
        opt.second_step()
        own.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q)
    assert set(opt.state) <= set(ours)
    assert all(p in opt.state for p in ours if p in opt.state)


def test_state_appears_with_a_parameters_first_step(backend: str) -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = sk.SAM([a, b], AdamW, lr=0.1)
    a.grad = torch.ones(3)
    opt.first_step()
    opt.second_step()
    assert set(opt.state) == {a}
    assert set(opt.state[a]) == {"step", "exp_avg", "exp_avg_sq"}
    b.grad = torch.ones(3)
    opt.first_step()
    opt.second_step()
    assert opt.state[a]["step"] == 2
    assert opt.state[b]["step"] == 1
    assert torch.equal(opt.state[b]["exp_avg"], torch.full((3,), 0.1))


def test_frozen_then_trained(base: Any, backend: str) -> None:
    model, twin = make_net(), make_net()
    for m in (model, twin):
        m.conv.requires_grad_(False)
    opt = sam(model, base)
    names = {p: n for n, p in twin.named_parameters()}
    naive = Naive(
        [{"params": list(twin.parameters()), "rho": 0.05}],
        base,
        plain,
        names,
        lr=0.01,
        **({"momentum": 0.9} if base is SGD else {}),
    )
    for i, (batch, other) in enumerate(zip(batches(6), batches(6), strict=True)):
        if i == 2:
            for m in (model, twin):
                m.conv.requires_grad_(True)
        if i == 4:
            for m in (model, twin):
                m.hidden.requires_grad_(False)
                m.hidden.weight.grad = m.hidden.bias.grad = None
        opt.step(make_closure(model, batch))
        naive.step(make_closure(twin, other))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_added_group_and_shared_parameter(base: Any, backend: str) -> None:
    model, twin = make_net(), make_net()
    options = {"momentum": 0.9} if base is SGD else {}

    def first(m: nn.Module) -> list[nn.Parameter]:
        return [m.hidden.weight, m.hidden.bias]

    def rest(m: nn.Module) -> list[nn.Parameter]:
        return [p for p in m.parameters() if all(p is not q for q in first(m))]

    opt = sk.SAM(first(model), base, lr=0.01, **options)
    names = {p: n for n, p in twin.named_parameters()}
    naive = Naive([{"params": first(twin), "rho": 0.05}], base, plain, names, lr=0.01, **options)
    for i, batch in enumerate(batches(6)):
        if i == 3:
            opt.add_param_group({"params": rest(model), "lr": 0.02, "rho": 0.2})
            naive.base.add_param_group({"params": rest(twin), "lr": 0.02})
            naive.own.append({"params": rest(twin), "rho": 0.2})
        naive.base.zero_grad()
        for m in (model, twin):
            m.zero_grad()
        opt.step(make_closure(model, batch))
        naive.step(make_closure(twin, batch))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_group_cannot_join_between_two_passes() -> None:
    model = make_net()
    opt = sk.SAM([model.hidden.weight], SGD, lr=0.1)
    model.hidden.weight.grad = torch.ones_like(model.hidden.weight)
    opt.first_step()
    with pytest.raises(RuntimeError, match="between two passes"):
        opt.add_param_group({"params": [model.hidden.bias]})
    assert len(opt.param_groups) == 1
    opt.second_step()


def test_a_parameter_shared_by_two_modules(backend: str) -> None:
    ends = []
    for naive in (False, True):
        torch.manual_seed(0)
        a, b = nn.Linear(6, 6), nn.Linear(6, 6)
        b.weight = a.weight
        model = nn.Sequential(a, nn.Tanh(), b).double()
        x = torch.randn(8, 6, dtype=torch.float64)
        if naive:
            names = {p: n for n, p in model.named_parameters()}
            opt: Any = Naive([{"params": list(model.parameters()), "rho": 0.1}], SGD, plain, names, lr=0.1)
        else:
            opt = sk.SAM(model.parameters(), SGD, rho=0.1, lr=0.1)

        def closure(model: nn.Module = model, x: torch.Tensor = x) -> torch.Tensor:
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        for _ in range(5):
            opt.step(closure)
        ends.append(weights(model))
    for name, w in ends[0].items():
        torch.testing.assert_close(w, ends[1][name], rtol=1e-12, atol=1e-15)


# Schedulers and hooks (8, 9).

SCHEDULERS = {
    "StepLR": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.5),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=8),
    "ReduceLROnPlateau": lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, threshold=10.0),
    "of base_optimizer": lambda opt: torch.optim.lr_scheduler.StepLR(getattr(opt, "base_optimizer", opt), 2, 0.5),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("by_hand", [False, True])
def test_schedulers(scheduler: str, by_hand: bool, base: Any) -> None:
    ours, theirs = make_net(), make_net()
    options = {"momentum": 0.9} if base is SGD else {}
    opt = sk.SAM(ours.parameters(), base, rho=0.05, lr=0.02, **options)
    names = {p: n for n, p in theirs.named_parameters()}
    naive = Naive([{"params": list(theirs.parameters()), "rho": 0.05}], base, plain, names, lr=0.02, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        schedules = [SCHEDULERS[scheduler](opt), SCHEDULERS[scheduler](naive.base)]
        for batch in batches(6):
            if by_hand:
                train_by_hand(ours, opt, [batch])
            else:
                opt.step(make_closure(ours, batch))
            naive.step(make_closure(theirs, batch))
            for schedule in schedules:
                schedule.step(1.0) if scheduler == "ReduceLROnPlateau" else schedule.step()
    assert opt.param_groups[0]["lr"] == naive.base.param_groups[0]["lr"] != 0.02
    # RMSprop with a large lr amplifies rounding; a wrong lr would show in the third digit.
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_one_shared_list_of_groups() -> None:
    model = make_net()
    opt = sam(model, RMSprop)
    assert opt._rule.optimizer.param_groups is opt.param_groups  # type: ignore[union-attr]
    assert opt.base_optimizer.param_groups is opt.param_groups


@pytest.mark.parametrize("cls", [SGD, AdamW], ids=lambda b: b.__name__)
def test_a_tensor_lr(cls: Any) -> None:
    a, b = make_net(), make_net()
    lr = torch.tensor(0.05, dtype=torch.float64)
    tensor, number = sk.SAM(a.parameters(), cls, lr=lr), sk.SAM(b.parameters(), cls, lr=0.05)
    for i, batch in enumerate(batches(4)):
        if i == 2:
            lr.fill_(0.01)
            number.param_groups[0]["lr"] = 0.01
        tensor.step(make_closure(a, batch))
        number.step(make_closure(b, batch))
    assert_same_bits(weights(a), weights(b))


@pytest.mark.parametrize("by_hand", [False, True])
def test_hooks_fire_once_a_step(by_hand: bool, base: Any) -> None:
    model = make_net()
    opt = sam(model, base)
    seen: list[str] = []
    handles = [
        opt.register_step_pre_hook(lambda *_: seen.append("pre")),
        opt.register_step_post_hook(lambda *_: seen.append("post")),
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    try:
        (train_by_hand if by_hand else train)(model, opt, batches(1))
        assert sorted(seen) == ["global post", "global pre", "post", "pre"]
        (train_by_hand if by_hand else train)(model, opt, batches(2))
        assert len(seen) == 12
    finally:
        for handle in handles:
            handle.remove()


# Options that move between steps.


def test_options_may_change_between_steps(backend: str) -> None:
    ours, theirs = make_net(), make_net()
    opt = sk.SAM(ours.parameters(), SGD, rho=0.05, lr=0.05, momentum=0.0)
    names = {p: n for n, p in theirs.named_parameters()}
    naive = Naive([{"params": list(theirs.parameters()), "rho": 0.05}], SGD, plain, names, lr=0.05, momentum=0.0)
    for i, batch in enumerate(batches(8)):
        for group in (opt.param_groups[0], naive.base.param_groups[0]):
            group["momentum"] = 0.0 if i in (0, 1, 5) else 0.9
            group["weight_decay"] = 0.01 * i
        opt.param_groups[0]["rho"] = naive.own[0]["rho"] = 0.05 * (i + 1)
        opt.step(make_closure(ours, batch))
        naive.step(make_closure(theirs, batch))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_adaptive_may_change_between_steps() -> None:
    p = nn.Parameter(torch.full((4,), 2.0))
    opt = sk.SAM([p], SGD, rho=1.0, lr=0.0)
    p.grad = torch.ones(4)
    opt.first_step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 2.5))
    opt.second_step()
    opt.param_groups[0]["adaptive"] = True
    opt.first_step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 3.0))
    opt.second_step()


def test_a_second_optimizer_over_the_same_parameters() -> None:
    model, twin = make_net(), make_net()
    first, second = sam(model), sk.ASAM(model.parameters(), AdamW, lr=1e-3)
    alone, other = sam(twin), sk.ASAM(twin.parameters(), AdamW, lr=1e-3)
    for i, batch in enumerate(batches(6)):
        (first if i % 2 else second).step(make_closure(model, batch))
        (alone if i % 2 else other).step(make_closure(twin, batch))
    assert_same_bits(weights(model), weights(twin))
    assert model.out.weight in first.state
    assert first.state[model.out.weight] is not second.state[model.out.weight]


# Statistics.


def test_stats() -> None:
    model = make_net()
    opt = sam(model)
    assert {k: float(v) for k, v in opt.stats.items()} == dict(grad_norm=0, steps=0, second_passes=0, skipped_steps=0)
    make_closure(model, batches(1)[0])()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    opt.first_step()
    held = opt.stats
    opt.second_step()
    train(model, opt, batches(2))
    for value in opt.stats.values():
        assert value.shape == ()
        assert value.device == model.out.weight.device
    torch.testing.assert_close(held["grad_norm"], norm, rtol=1e-12, atol=0)
    assert held["steps"] == 1  # what was read stays what it was
    assert opt.stats["steps"] == 3
    assert opt.stats["second_passes"] == 3


# Gradient scaling.


def test_grad_scaler_by_hand(backend: str) -> None:
    """A scale of a power of two cancels; an overflow that the scaler sees is undone by restore()."""
    model, twin = make_net(torch.float32), make_net(torch.float32)
    opt, twin_opt = sam(model), sam(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i, (x, y) in enumerate(batches(4, torch.float32)):
        before = weights(model)
        for last in (False, True):
            loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            if last and i == 2:
                model.out.bias.grad[0] = float("inf")
            if last:
                scaler.step(opt)
            else:
                opt.first_step(zero_grad=True)
        opt.restore()
        scaler.update()
        opt.zero_grad()
        if i == 2:
            assert_same_bits(weights(model), before)
        else:
            twin_opt.step(make_closure(twin, (x, y)))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# Batch norm.


def test_model_freezes_batch_statistics_in_the_second_pass() -> None:
    ends = []
    for train_model in (train, train_by_hand):
        model, once = make_net(torch.float32), make_net(torch.float32)
        opt = sam(model, model=model)
        for batch in batches(3, torch.float32):
            once.load_state_dict(model.state_dict())
            with torch.no_grad():
                once(batch[0])
            train_model(model, opt, [batch])
            assert torch.equal(model.bn.running_mean, once.bn.running_mean)
            assert torch.equal(model.bn.running_var, once.bn.running_var)
            assert torch.equal(model.bn.num_batches_tracked, once.bn.num_batches_tracked)
        ends.append(weights(model))
    assert_same_bits(*ends)


def test_restore_thaws_batch_statistics() -> None:
    model = make_net(torch.float32)
    opt = sam(model, model=model)
    make_closure(model, batches(1, torch.float32)[0])()
    opt.first_step()
    assert not model.bn.track_running_stats
    opt.restore()
    assert model.bn.track_running_stats


NORMS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "BatchNorm1d cumulative": lambda: nn.BatchNorm1d(3, momentum=None),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(3),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(3, track_running_stats=True),
    "InstanceNorm1d without": lambda: nn.InstanceNorm1d(3),
    "BatchNorm1d without": lambda: nn.BatchNorm1d(3, track_running_stats=False),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_frozen_batch_stats(norm: str, training: bool) -> None:
    model = nn.Sequential(NORMS[norm]()).train(training)
    twin = copy.deepcopy(model)
    x = torch.randn(5, 3, 4)
    if norm == "SyncBatchNorm" and training:
        return  # needs a process group
    buffers = dict(model.named_buffers())
    before = {name: b.clone() for name, b in buffers.items()}
    with sk.frozen_batch_stats(model):
        with sk.frozen_batch_stats(model):
            out = model(torch.full_like(x, float("inf")))
        out = model(x)
    assert torch.equal(out, twin(x))  # normalizes as it does outside
    for name, b in model.named_buffers():
        assert b is buffers[name]
        assert torch.equal(b, before[name]), name
    model(x)
    if training and "without" not in norm:
        assert not torch.equal(model[0].running_mean, before["0.running_mean"])


def test_frozen_batch_stats_survives_exceptions_and_leaves_others_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.LayerNorm(3))
    with pytest.raises(ValueError, match="training True"), sk.frozen_batch_stats(model):
        raise ValueError(f"training {model.training and model[0].training}")
    assert model[0].track_running_stats
    mean = model[0].running_mean.clone()
    model(torch.randn(4, 3))
    assert not torch.equal(model[0].running_mean, mean)


# Autograd.


@pytest.mark.parametrize("moment", ["ascend", "descend", "restore"])
def test_a_stale_graph_raises_as_in_torch(moment: str, backend: str) -> None:
    p = nn.Parameter(torch.ones(3))
    opt = sk.SAM([p], SGD, lr=0.1)
    p.grad = torch.ones(3)
    if moment != "ascend":
        opt.first_step()
    loss = (p * p).sum()
    if moment == "ascend":
        opt.first_step()
    elif moment == "descend":
        opt.second_step()
    else:
        opt.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_without_a_gradient_are_not_announced_as_written() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = sk.SAM([p, q], SGD, lr=0.1)
    p.grad = torch.ones(3)
    version = q._version
    opt.first_step()
    opt.second_step()
    assert q._version == version
    assert p._version >= 2
