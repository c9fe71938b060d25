"""Gradients that come and go, parameters that are frozen, added, shared, empty; odd gradients (contract 6)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods import METHODS, RULES, SGD, AdamW, Method, each_method, every_base, every_method
from models import assert_same_bits, batches, make_closure, make_net, relative_error, state_of, train, weights
from torch import Tensor, nn

import sharpkern as sk

DEVICE = torch.get_default_device()


@every_base
@every_method
def test_gradients_in_some_passes_only(method: Method, base: str) -> None:
    """What has no gradient in a pass is not moved by it; a 0-dim one, an empty one and one that never has any."""
    torch.manual_seed(0)
    start = [torch.randn(2, 3), torch.randn(70), torch.tensor(0.7), torch.randn(0, 3), torch.randn(5)]
    start = [p.double() for p in start]
    ours, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    named = [[(f"weight{i}", p) for i, p in enumerate(params)] for params in (ours, theirs)]
    opt, naive = method.make(named[0], base), method.oracle(named[1], base)
    state = copy.deepcopy(opt.state.get(ours[4], {}))

    def closure(params: list[nn.Parameter]) -> Callable[[], Tensor]:
        left_out = itertools.cycle([1, 2, 0, 1, 3, 2, 2])

        def evaluate() -> Tensor:
            out = next(left_out)
            loss = sum((p.cos() * (i + 1)).sum() + p.square().sum() for i, p in enumerate(params[:4]) if i != out)
            loss.backward()
            return loss

        return evaluate

    evaluate, evaluate_theirs = closure(ours), closure(theirs)
    for _ in range(6):
        opt.step(evaluate)
        naive.step(evaluate_theirs)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert torch.equal(ours[4], start[4])
    assert_same_bits(opt.state.get(ours[4], {}), state)


def test_salr_with_a_gradient_that_comes_and_goes() -> None:
    """One that first appears on a branch is moved there, and back."""
    params = [nn.Parameter(torch.tensor([1.0 + i, -2.0], dtype=torch.float64)) for i in range(3)]
    opt = sk.SALR(params, SGD, lr=0.1, n_ascent=3, n_descent=3)
    before = [p.detach().clone() for p in params]
    seen: list[list[Tensor]] = []
    left_out = iter([2, 1, 0, 2, 0, 1, 2])

    def closure() -> Tensor:
        out = next(left_out)
        seen.append([p.detach().clone() for p in params])
        loss = sum(p.square().sum() for i, p in enumerate(params) if i != out)
        loss.backward()
        return loss

    opt.step(closure)
    assert len(seen) == 7
    moved = [[not torch.equal(a, b) for a, b in zip(now, before, strict=True)] for now in seen]
    # Before the call that follows the step along the gradients of the call before; ascents begin again at w.
    assert moved == [[False] * 3, [True, True, False], [True] * 3, [True] * 3, [True, True, False], [True] * 3,
                     [True] * 3]  # fmt: skip
    assert torch.equal(params[2], before[2])  # no gradient at w: no step
    for p, old in zip(params[:2], before, strict=False):
        torch.testing.assert_close(p, 0.8 * old, rtol=1e-15, atol=0)


@every_base
@every_method
def test_no_gradient_at_all_changes_nothing(method: Method, base: str) -> None:
    model = make_net()
    opt = method.make(model.named_parameters(), base, weight_decay=0.1)
    before, state = weights(model), state_of(opt)
    opt.step(lambda: torch.tensor(1.0))
    if method.by_hand:
        opt.first_step()
        opt.second_step()
    opt.step()
    assert_same_bits(weights(model), before)
    assert_same_bits(state_of(opt), state)
    if "ema_mean" in opt.stats:
        assert float(opt.stats["ema_mean"]) == 0.0
    train(model, opt, batches(3))  # an empty step spoils nothing
    assert relative_error(model, make_net()) > 0
    assert int(opt.stats["skipped_steps"]) == 0


@each_method
def test_steps_of_frozen_parameters_count(method: Method, base: str) -> None:
    """Whether or not they have been laid out."""
    counts = []
    for stepped in (False, True):
        p = nn.Parameter(torch.ones(2))
        opt = method.make([p], base)
        if stepped and not method.one_pass:
            p.grad = torch.zeros(2)
            opt.step()
        p.requires_grad_(False)
        p.grad = None
        opt.step(lambda: torch.tensor(1.0))
        counts.append({name: int(opt.stats[name]) for name in ("steps", "second_passes", "skipped_steps")})
    assert counts[0] == counts[1]
    assert counts[0]["steps"] == 1


@every_method
def test_state_appears_with_a_parameters_first_step(method: Method) -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = method.make([a, b], AdamW, lr=0.1, **method.every)

    def closure_over(*params: nn.Parameter) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            for p in (a, b):
                p.grad = torch.ones(3) if any(p is q for q in params) else None
            return torch.tensor(1.0)

        return closure

    opt.step(closure_over(a))
    assert set(opt.state) == {a}
    assert set(opt.state[a]) == {"step", "exp_avg", "exp_avg_sq", *method.state}
    opt.step(closure_over(a, b))
    assert opt.state[a]["step"] == 2
    assert opt.state[b]["step"] == 1
    torch.testing.assert_close(opt.state[b]["exp_avg"], torch.full((3,), 0.1))


@every_base
@every_method
def test_frozen_thawed_and_added(method: Method, base: str) -> None:
    """Against the definition: a layer is frozen at first, another one later, a third one joins with a group."""
    ours, theirs = make_net(), make_net()
    lr = RULES[base][1]["lr"]

    def named(m: nn.Module, joined: bool) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in m.named_parameters() if name.startswith("out") == joined]

    opt, naive = (make(named(m, False), base) for make, m in ((method.make, ours), (method.oracle, theirs)))
    for m in (ours, theirs):
        m.conv.requires_grad_(False)
    for i, batch in enumerate(batches(8)):
        for m, each in ((ours, opt), (theirs, naive)):
            if i == 2:
                m.conv.requires_grad_(True)
            if i == 3:
                each.add_param_group({"params": named(m, True), "lr": lr * 2, "rho": 0.2})
            if i == 5:
                m.hidden.requires_grad_(False)
                m.hidden.weight.grad = m.hidden.bias.grad = None
            m.zero_grad()
            each.step(make_closure(m, batch))
    assert relative_error(ours, theirs) < 1e-11


@pytest.mark.parametrize("flatten", [False, True])
@each_method
def test_thawed_between_two_passes(method: Method, base: str, flatten: bool) -> None:
    """Against the definition, from the second call of the closure in the third step on; clipped, and skipped where its
    gradient is not finite, as any other."""
    ours, theirs = make_net(), make_net()
    more = method.every | ({} if method.name == "salr" else {"max_grad_norm": 0.05})
    opt = method.make(ours.named_parameters(), base, flatten=flatten, **more)
    naive = method.oracle(theirs.named_parameters(), base, **more)
    for m, each in ((ours, opt), (theirs, naive)):
        m.conv.requires_grad_(False)
        for i, batch in enumerate(batches(7)):
            calls, inner = itertools.count(), make_closure(m, batch)

            def closure(m: nn.Module = m, i: int = i, calls: Any = calls, inner: Any = inner) -> Tensor:
                thawing = next(calls) == 1 and i >= 2
                if thawing:
                    m.conv.requires_grad_(True)
                loss = inner()
                if thawing and i == 2:
                    m.conv.weight.grad.view(-1)[0] = math.nan
                    m.conv.requires_grad_(False)
                return loss

            each.step(closure)
            m.zero_grad()
    assert relative_error(ours, theirs) < 1e-11
    assert torch.equal(ours.conv.weight, make_net().conv.weight) == (method.calls == 1)


@each_method
def test_a_parameter_that_is_frozen_stays(method: Method, base: str) -> None:
    """From the next step on, which resets its gradient; thawed, it is trained again."""
    ends = []
    for flatten in (False, True):
        model = make_net()
        opt = method.make(model.named_parameters(), base, flatten=flatten)
        data = batches(6)
        train(model, opt, data[:2])
        model.conv.requires_grad_(False)
        before = model.conv.weight.detach().clone()
        train(model, opt, data[2:4])
        assert torch.equal(model.conv.weight, before)
        model.conv.requires_grad_(True)
        train(model, opt, data[4:])
        assert not torch.equal(model.conv.weight, before)
        ends.append(weights(model))
    assert_same_bits(*ends)


@each_method
def test_a_parameter_shared_by_two_modules(method: Method, base: str) -> None:
    ends = []
    for make in (method.make, method.oracle):
        torch.manual_seed(0)
        with torch.device("cpu"):
            a, b, x = nn.Linear(6, 6), nn.Linear(6, 6), torch.randn(8, 6, dtype=torch.float64)
        b.weight = a.weight
        model, x = nn.Sequential(a, nn.Tanh(), b).to(DEVICE, torch.float64), x.to(DEVICE)
        opt = make(model.named_parameters(), base)

        def closure(model: nn.Module = model, x: Tensor = x) -> Tensor:
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        for _ in range(5):
            opt.step(closure)
        ends.append(weights(model))
    for name, w in ends[0].items():
        torch.testing.assert_close(w, ends[1][name], rtol=1e-11, atol=1e-14)


@every_base
def test_a_parameter_replaced_in_its_group_is_followed(base: str) -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = METHODS["sam"].make([a], base)
    for p in (a, b):
        opt.param_groups[0]["params"][0] = p
        p.grad = torch.ones(3)
        opt.first_step()
        assert not torch.equal(p.detach(), torch.ones(3))
        opt.second_step()
    assert torch.equal(a, b)


@each_method
def test_a_second_optimizer_over_the_same_parameters(method: Method, base: str) -> None:
    model, twin = make_net(), make_net()
    pairs = [(method.make(m.named_parameters(), base), sk.ASAM(m.parameters(), AdamW, lr=1e-3)) for m in (model, twin)]
    for i, batch in enumerate(batches(6)):
        for m, pair in zip((model, twin), pairs, strict=True):
            pair[i % 2].step(make_closure(m, batch))
    assert_same_bits(weights(model), weights(twin))
    state = pairs[0][0].state[model.out.weight]
    assert state
    assert state is not pairs[0][1].state[model.out.weight]


# Odd gradients.


@every_base
@every_method
def test_gradients_with_other_strides(method: Method, base: str) -> None:
    start = torch.randn(6, 5, 3, 3)
    ends = []
    for fmt in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(start.clone())
        opt = method.make([("weight", p)], base)

        def closure(p: nn.Parameter = p, fmt: Any = fmt) -> Tensor:
            p.grad = torch.sin(3 * p.detach()).contiguous(memory_format=fmt)
            return p.detach().sum()

        for _ in range(4):
            opt.step(closure)
        ends.append({"p": p.detach()} | state_of(opt))
    for key, value in ends[0].items():  # sums take another order
        torch.testing.assert_close(value, ends[1][key], rtol=1e-5, atol=1e-6)


def test_lazily_negated_gradients() -> None:
    """The imaginary part of a conjugate is a view that torch negates when it is read."""
    p, q = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.ones(5))
    opt = sk.SAM([p, q], SGD, lr=0.1, rho=0.0)
    p.grad, q.grad = torch._neg_view(torch.tensor(2.0)), torch._neg_view(torch.arange(5.0))
    assert p.grad.is_neg()
    opt.first_step()
    opt.second_step()
    torch.testing.assert_close(p.detach(), torch.tensor(1.5))
    torch.testing.assert_close(q.detach(), 1 + 0.1 * torch.arange(5.0))


@each_method
def test_gradients_made_in_inference_mode(method: Method, base: str) -> None:
    """As methods without a backward make them. Such tensors have no version."""
    ends = []
    for inference in (False, True):
        p = nn.Parameter(torch.linspace(-1, 1, 5))
        opt = method.make([p], base)

        def closure(p: nn.Parameter = p, inference: bool = inference) -> Tensor:
            with torch.inference_mode(inference):
                grad = p.detach().cos()
            p.grad = grad
            return p.detach().sin().sum()

        for _ in range(3):
            opt.step(closure)
        ends.append({"p": p.detach()})
    assert_same_bits(*ends)


def test_gradients_of_another_dtype() -> None:
    p = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch ties a gradient's dtype to its parameter's")
    p.grad_dtype = None
    p.grad = torch.full((5,), 0.5)
    opt = sk.SAM([p], SGD, lr=1.0, rho=0.0)
    opt.first_step()
    opt.second_step()
    assert torch.equal(p.detach(), torch.full((5,), 0.5, dtype=torch.bfloat16))


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


@pytest.mark.parametrize("end", ["second_step", "restore"])
def test_a_parameter_with_gaps_that_took_no_part(end: str) -> None:
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
