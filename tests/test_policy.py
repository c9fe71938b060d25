"""Which steps take the second pass: the draws alone, and in SS-SAM."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from models import assert_same_bits, batches, make_closure, make_net, train, train_by_hand, weights
from naive import Naive, plain
from torch import nn

import sharpkern as sk
from sharpkern.policy import Always, Bernoulli

SGD, AdamW, RMSprop = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGD, dict(lr=0.05, momentum=0.9, weight_decay=1e-3)),
    "adamw": (AdamW, dict(lr=1e-2)),
    "wrapped": (RMSprop, dict(lr=1e-3)),
}
every_base = pytest.mark.parametrize("base", BASES)


# Draws.


def draws(policy: Any, n: int) -> list[bool]:
    return [policy.second_pass(t) for t in range(n)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_second_passes(p: float) -> None:
    for seed in range(3):
        share = sum(draws(Bernoulli(p, seed), 20_000)) / 20_000
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 20_000)


def test_neighbouring_steps_and_seeds_are_independent() -> None:
    a, b = draws(Bernoulli(0.5, 0), 20_000), draws(Bernoulli(0.5, 1), 20_000)
    for x, y in ((a, b), (a[1:], a[:-1]), (a[2:], a[:-2])):
        agree = sum(u == v for u, v in zip(x, y, strict=False)) / len(y)
        assert abs(agree - 0.5) < 4 * 0.5 / math.sqrt(20_000)


def test_the_bounds_are_certain() -> None:
    assert not any(draws(Bernoulli(0.0, 0), 5000))
    assert all(draws(Bernoulli(1.0, 0), 5000))
    assert all(draws(Always(), 10))


def test_a_schedule() -> None:
    cosine = Bernoulli(lambda t: 0.5 + 0.5 * math.cos(math.pi * t / 20_000), 0)
    quarters = [sum(draws(cosine, 20_000)[i : i + 5000]) / 5000 for i in range(0, 20_000, 5000)]
    expected = [0.5 + 2 / math.pi * (math.sin((i + 1) * math.pi / 4) - math.sin(i * math.pi / 4)) for i in range(4)]
    assert quarters == pytest.approx(expected, abs=0.03)
    assert draws(Bernoulli(lambda t: float(t % 3 == 0), 5), 6) == [True, False, False] * 2


def test_every_process_draws_the_same() -> None:
    code = "from sharpkern.policy import Bernoulli; print([int(Bernoulli(0.3, 42).second_pass(t)) for t in range(64)])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert seen.strip() == str([int(d) for d in draws(Bernoulli(0.3, 42), 64)])


# SS-SAM.


@every_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_trajectory(base: str, dtype: torch.dtype) -> None:
    """The naive SAM where the policy says so, the naive base optimizer elsewhere."""
    rule, options = BASES[base]
    ours, theirs = make_net(dtype), make_net(dtype)
    opt = sk.SSSAM(ours.parameters(), rule, rho=0.05, p=0.4, seed=7, **options)
    names = {p: name for name, p in theirs.named_parameters()}
    naive = Naive([{"params": list(theirs.parameters()), "rho": 0.05}], rule, plain, names, **options)
    taken = 0
    for t, batch in enumerate(batches(50, dtype)):
        before = opt.stats["second_passes"].item()
        opt.step(make_closure(ours, batch))
        second = Bernoulli(0.4, 7).second_pass(t)
        assert opt.stats["second_passes"].item() - before == second
        if second:
            naive.step(make_closure(theirs, batch))
            taken += 1
        else:
            naive.base.zero_grad()
            make_closure(theirs, batch)()
            naive.base.step()
    assert 10 < taken < 40
    assert opt.stats["steps"].item() == 50
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p - q).abs().max() <= rtol * q.abs().max()


@every_base
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_bounds_are_the_base_optimizer_and_sam(base: str, p: float, backend: str) -> None:
    rule, options = BASES[base]
    ours, theirs = make_net(torch.float32), make_net(torch.float32)
    opt = sk.SSSAM(ours.parameters(), rule, p=p, **options)
    twin = sk.SAM(theirs.parameters(), rule, **options)
    for batch in batches(4, torch.float32):
        opt.step(make_closure(ours, batch))
        if p:
            twin.step(make_closure(theirs, batch))
        else:
            twin.zero_grad()
            make_closure(theirs, batch)()
            twin.step()
    assert_same_bits(weights(ours), weights(theirs))
    assert opt.stats["second_passes"].item() == 4 * p
    assert opt.stats["steps"].item() == 4


@every_base
def test_by_hand_equals_closure(base: str, backend: str) -> None:
    rule, options = BASES[base]
    ends = []
    for by_hand in (False, True):
        model = make_net(torch.float32)
        opt = sk.SSSAM(model.parameters(), rule, model=model, **options)
        (train_by_hand if by_hand else train)(model, opt, batches(6, torch.float32))
        ends.append((weights(model), opt.stats))
    assert_same_bits(ends[0][0], ends[1][0])
    assert_same_bits(ends[0][1], ends[1][1])
    assert 0 < ends[0][1]["second_passes"].item() < 6


def never(**options: Any) -> tuple[nn.Module, sk.SSSAM]:
    model = make_net(torch.float32)
    return model, sk.SSSAM(model.parameters(), SGD, p=0.0, lr=0.1, momentum=0.9, **options)


def test_a_plain_step_by_hand(backend: str) -> None:
    model, opt = never()
    closure = make_closure(model, batches(1, torch.float32)[0])
    closure()
    before = weights(model)
    grads = [p.grad for p in model.parameters()]
    assert opt.first_step(zero_grad=True) is False
    assert_same_bits(weights(model), before)
    assert not opt.is_perturbed
    assert [p.grad for p in model.parameters()] == grads  # zero_grad is for a second backward
    with pytest.raises(RuntimeError, match="twice"):
        opt.first_step()
    opt.restore()  # cancels it
    with pytest.raises(RuntimeError, match="before first_step"):
        opt.second_step()
    assert opt.first_step() is False
    opt.second_step()
    assert not torch.equal(model.out.weight, before["out.weight"])


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_non_finite_plain_step_is_skipped_once(after: int, backend: str) -> None:
    """Whatever an earlier step measured: its norm is not this one's."""
    model = make_net(torch.float32)
    opt = sk.SSSAM(model.parameters(), SGD, p=lambda t: float(t < after), lr=0.1, momentum=0.9)
    train(model, opt, batches(after, torch.float32))
    before = weights(model)
    for bad in (True, False):
        opt.zero_grad()
        make_closure(model, batches(1, torch.float32)[0])()
        if bad:
            model.gain.grad.fill_(float("inf"))
        opt.first_step()
        opt.second_step()
        assert torch.equal(model.out.weight, before["out.weight"]) == bad
    assert opt.stats["skipped_steps"].item() == 1
    assert opt.stats["steps"].item() == after + 2


def test_a_plain_step_after_a_skipped_one(backend: str) -> None:
    """A norm that was not finite in a first pass must not stop the plain steps that follow."""
    model = make_net(torch.float32)
    opt = sk.SSSAM(model.parameters(), SGD, p=lambda t: float(t == 0), lr=0.1)
    closure = make_closure(model, batches(1, torch.float32)[0])
    closure()
    model.gain.grad.fill_(float("nan"))
    opt.first_step(zero_grad=True)
    closure()
    opt.second_step()
    before = weights(model)
    opt.step(closure)
    assert not torch.equal(model.out.weight, before["out.weight"])
    assert opt.stats["skipped_steps"].item() == 1


def test_step_without_a_closure_asks_no_policy() -> None:
    asked: list[int] = []
    model = make_net(torch.float32)
    opt = sk.SSSAM(model.parameters(), SGD, p=lambda t: asked.append(t) or 0.5, lr=0.1)
    make_closure(model, batches(1, torch.float32)[0])()
    opt.step()
    assert asked == []
    train(model, opt, batches(3, torch.float32))
    assert asked == [0, 1, 2]


def schedule(t: int) -> float:
    return 1.0 - t / 12


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_resuming_in_the_middle_of_a_schedule(how: str) -> None:
    data = batches(12, torch.float32)
    straight = make_net(torch.float32)
    straight_opt = sk.SSSAM(straight.parameters(), SGD, p=schedule, seed=5, lr=0.05, momentum=0.9)
    train(straight, straight_opt, data)
    model = make_net(torch.float32)
    opt = sk.SSSAM(model.parameters(), SGD, p=schedule, seed=5, lr=0.05, momentum=0.9)
    train(model, opt, data[:5])
    if how == "state_dict":
        resumed = make_net(torch.float32)
        resumed_opt = sk.SSSAM(resumed.parameters(), SGD, p=schedule, seed=5, lr=0.05, momentum=0.9)
        resumed.load_state_dict(model.state_dict())
        resumed_opt.load_state_dict(opt.state_dict())
    else:
        pair = (model, opt)
        resumed, resumed_opt = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert_same_bits(resumed_opt.stats, opt.stats)
    train(resumed, resumed_opt, data[5:])
    assert_same_bits(weights(resumed), weights(straight))
    assert_same_bits(resumed_opt.stats, straight_opt.stats)


def test_a_state_dict_of_sam_goes_on_at_its_step() -> None:
    model = make_net(torch.float32)
    sam = sk.SAM(model.parameters(), SGD, lr=0.05)
    train(model, sam, batches(3, torch.float32))
    state = sam.state_dict()
    for key in ("t", "plain_steps"):  # as before there were any
        del state["sharpkern"][key]
    asked: list[int] = []
    opt = sk.SSSAM(model.parameters(), SGD, p=lambda t: asked.append(t) or 0.0, lr=0.05)
    opt.load_state_dict(state)
    train(model, opt, batches(2, torch.float32))
    assert asked == [3, 4]
    assert opt.stats["steps"].item() == 5


# Bad arguments.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"p": -0.1}, ValueError, "Invalid p: -0.1"),
        ({"p": 1.5}, ValueError, "Invalid p: 1.5"),
        ({"p": math.nan}, ValueError, "Invalid p: nan"),
        ({"p": "half"}, TypeError, "p should be a number, but got 'half'"),
        ({"p": True}, TypeError, "p should be a number"),
        ({"seed": 0.5}, TypeError, "seed should be an integer, but got 0.5"),
        ({"rho": -1.0}, ValueError, "Invalid rho: -1.0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sk.SSSAM(make_net().parameters(), SGD, lr=0.1, **options)


def test_a_schedule_that_leaves_the_interval_changes_nothing() -> None:
    model = make_net(torch.float32)
    opt = sk.SSSAM(model.parameters(), SGD, p=lambda t: 0.5 if t < 2 else 1.5, lr=0.1)
    train(model, opt, batches(2, torch.float32))
    before, stats = weights(model), opt.stats
    with pytest.raises(ValueError, match=r"Invalid p\(2\): 1.5"):
        opt.step(make_closure(model, batches(1, torch.float32)[0]))
    assert_same_bits(weights(model), before)
    assert_same_bits(opt.stats, stats)
    assert not opt.is_perturbed
