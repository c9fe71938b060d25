"""The optimizers that decide step by step: SS-SAM, AE-SAM, LookSAM, AE-LookSAM, SALR. Trajectories against the naive
implementations, and the contract that all of them keep."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import assert_same_bits, batches, make_closure, make_net, train, train_by_hand, weights
from naive import NaiveFamily, NaiveSALR, ae_sam
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.policy import Adaptive, Bernoulli, Every, Statistics

SGD, Adam, AdamW, RMSprop = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGD, dict(lr=0.05, momentum=0.9, weight_decay=1e-3)),
    "adamw": (AdamW, dict(lr=1e-2)),
    "wrapped": (RMSprop, dict(lr=1e-3)),
}
# Of the methods that take two passes: arguments, and when they do.
OWN: dict[str, tuple[Any, dict[str, Any], Callable[[int], Any]]] = {
    "sssam": (sk.SSSAM, dict(p=0.4, seed=7), lambda n: lambda t, _: Bernoulli(0.4, 7).second_pass(t)),
    "aesam": (sk.AESAM, dict(), lambda n: ae_sam(n, 1.0, -1.0, 0.9)),
    "looksam": (sk.LookSAM, dict(k=3, alpha=0.4), lambda n: lambda t, _: t % 3 == 0),
    "aelooksam": (sk.AELookSAM, dict(alpha=0.4), lambda n: ae_sam(n, 2.0, 0.0, 0.9)),
}
every_base = pytest.mark.parametrize("base", BASES)
every_method = pytest.mark.parametrize("method", OWN)
every_class = pytest.mark.parametrize("method", [*OWN, "salr"])
every_adaptive = pytest.mark.parametrize("method", ["aesam", "aelooksam"])


def make(method: str, params: Any, base: Any = SGD, total_steps: int = 40, **options: Any) -> Any:
    """An optimizer of the family, with ``options`` over its defaults here."""
    if method == "salr":
        own: dict[str, Any] = {"n_ascent": 2, "n_descent": 3}
        return sk.SALR(params, base, **{**own, **options})
    cls, own, _ = OWN[method]
    if cls in (sk.AESAM, sk.AELookSAM):
        own = {**own, "total_steps": total_steps}
    return cls(params, base, **{**own, **options})


@pytest.fixture(autouse=True)
def few_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    """It takes seconds a test: one base rule there, but for the trajectories."""
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    slow = in_interpreter(given.get("backend", "")) and given.get("base", "sgd") != "sgd"
    if slow and request.function is not test_every_backend_takes_the_same_steps:
        pytest.skip("the interpreter takes seconds: one base rule only")


def in_interpreter(backend: str) -> bool:
    return backend == "triton" and torch.get_default_device().type == "cpu"


def relative_error(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of each parameter, relative to its largest element; the worst of them."""
    return max(float((p - q).abs().max() / q.abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# Trajectories.


@every_base
@every_method
def test_two_hundred_steps(method: str, base: str) -> None:
    """In float64, with every decision the same."""
    steps = 200
    rule, options = BASES[base]
    ours, theirs = make_net(), make_net()
    opt = make(method, ours.parameters(), rule, total_steps=steps, **options)
    alpha = 0.4 if "look" in method else None
    groups = [{"params": list(theirs.parameters()), "rho": 0.05}]
    naive = NaiveFamily(groups, rule, OWN[method][2](steps), alpha, **options)
    decisions, seen = [], 0
    for t, batch in enumerate(batches(steps)):
        loss = opt.step(make_closure(ours, batch))
        expected = naive.step(make_closure(theirs, batch))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        taken = int(opt.stats["second_passes"])
        decisions.append(taken > seen)
        seen = taken
        if t == 50:
            assert relative_error(ours, theirs) < 1e-12
    assert decisions == naive.decisions
    assert 0 < seen < steps
    assert relative_error(ours, theirs) < 1e-10


@every_base
@every_method
def test_every_backend_takes_the_same_steps(method: str, base: str, backend: str) -> None:
    steps = 7 if in_interpreter(backend) else 40
    rule, options = BASES[base]
    ours, theirs = make_net(), make_net()
    named = list(ours.named_parameters())
    split = [
        dict(params=named[:2], lr=options["lr"] * 2),
        dict(params=named[2:5], rho=0.1, weight_decay=0.03),
        dict(params=named[5:]),
    ]
    opt = make(method, split, rule, total_steps=steps, **options)
    groups = [{"rho": 0.05, **g, "params": [dict(theirs.named_parameters())[n] for n, _ in g["params"]]} for g in split]
    naive = NaiveFamily(groups, rule, OWN[method][2](steps), 0.4 if "look" in method else None, **options)
    for batch in batches(steps):
        opt.step(make_closure(ours, batch))
        naive.step(make_closure(theirs, batch))
    assert int(opt.stats["second_passes"]) == sum(naive.decisions)
    assert relative_error(ours, theirs) < 1e-11


@every_base
@every_method
def test_float32(method: str, base: str) -> None:
    rule, options = BASES[base]
    ours, theirs = make_net(torch.float32), make_net(torch.float32)
    opt = make(method, ours.parameters(), rule, total_steps=50, **options)
    groups = [{"params": list(theirs.parameters()), "rho": 0.05}]
    naive = NaiveFamily(groups, rule, OWN[method][2](50), 0.4 if "look" in method else None, **options)
    for batch in batches(50, torch.float32):
        opt.step(make_closure(ours, batch))
        naive.step(make_closure(theirs, batch))
    assert int(opt.stats["second_passes"]) == sum(naive.decisions)
    assert relative_error(ours, theirs) < 1e-5


@every_base
@pytest.mark.parametrize("every", [1, 2])
def test_salr_two_hundred_steps(base: str, every: int) -> None:
    rule, options = BASES[base]
    ours, theirs = make_net(), make_net()
    ours.eval()  # batch statistics would see other passes in the naive one
    theirs.eval()
    opt = sk.SALR(ours.parameters(), rule, every=every, **options)
    naive = NaiveSALR(list(theirs.parameters()), rule, every=every, **options)
    ratios = set()
    for t, batch in enumerate(batches(200)):
        loss = opt.step(make_closure(ours, batch))
        expected = naive.step(make_closure(theirs, batch))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        assert float(opt.stats["lr_scale"]) == pytest.approx(naive.ratio, rel=1e-8)
        assert [group["lr"] for group in opt.param_groups] == [options["lr"]]
        ratios.add(naive.ratio)
        if t % every == 0:
            assert float(opt.stats["sharpness"]) == pytest.approx(naive.history[-1], rel=1e-8)
    assert len(ratios) > 150 / every
    assert len(naive.history) == 200 / every
    assert relative_error(ours, theirs) < 1e-9
    np.testing.assert_allclose(float(opt.stats["lr_scale"]), naive.history[-1] / np.median(naive.history), rtol=1e-8)


@every_base
def test_salr_on_every_backend(base: str, backend: str) -> None:
    steps = 3 if in_interpreter(backend) else 12
    rule, options = BASES[base]
    ours, theirs = make_net().eval(), make_net().eval()
    opt = sk.SALR(ours.parameters(), rule, n_ascent=2, n_descent=3, **options)
    naive = NaiveSALR(list(theirs.parameters()), rule, n_ascent=2, n_descent=3, **options)
    for batch in batches(steps):
        opt.step(make_closure(ours, batch))
        naive.step(make_closure(theirs, batch))
    assert float(opt.stats["lr_scale"]) == pytest.approx(naive.ratio, rel=1e-9)
    assert relative_error(ours, theirs) < 1e-11


# Limits.


def run(opt: Any, model: nn.Module, steps: int = 5) -> dict[str, Tensor]:
    train(model, opt, batches(steps, torch.float32))
    return weights(model) | dict(model.named_buffers())


@every_base
@pytest.mark.parametrize("sign", [-1, 1])
@every_adaptive
def test_an_infinite_threshold_is_sam_or_the_base_rule(method: str, sign: int, base: str, backend: str) -> None:
    rule, options = BASES[base]
    ours, theirs = make_net(torch.float32), make_net(torch.float32)
    bound = sign * math.inf
    opt = make(method, ours.parameters(), rule, lambda_start=bound, lambda_end=bound, **options)
    got = run(opt, ours)
    assert float(opt.stats["threshold"]) == bound
    twin = sk.SAM(theirs.parameters(), rule, **options)
    for batch in batches(5, torch.float32):
        if sign < 0:
            twin.step(make_closure(theirs, batch))
        else:
            twin.zero_grad()
            make_closure(theirs, batch)()
            twin.step()
    assert_same_bits(got, weights(theirs) | dict(theirs.named_buffers()))
    assert int(opt.stats["second_passes"]) == (5 if sign < 0 else 0)


@every_base
def test_looksam_with_k_1_is_sam(base: str, backend: str) -> None:
    rule, options = BASES[base]
    ours, theirs = make_net(torch.float32), make_net(torch.float32)
    got = run(sk.LookSAM(ours.parameters(), rule, k=1, **options), ours)
    want = run(sk.SAM(theirs.parameters(), rule, **options), theirs)
    assert_same_bits(got, want)


def test_looksam_with_alpha_0_is_plain_between_refreshes(backend: str) -> None:
    ours, theirs = make_net(torch.float32), make_net(torch.float32)
    got = run(sk.LookSAM(ours.parameters(), SGD, k=2, alpha=0.0, lr=0.1), ours)
    twin = sk.SSSAM(theirs.parameters(), SGD, p=lambda t: float(t % 2 == 0), lr=0.1)
    assert_same_bits(got, run(twin, theirs))


@every_method
def test_rho_0_changes_no_decision(method: str) -> None:
    shares = []
    for rho in (0.0, 1e-9):
        model = make_net()
        opt = make(method, model.parameters(), SGD, rho=rho, lr=0.05)
        taken = []
        for batch in batches(20):
            opt.step(make_closure(model, batch))
            taken.append(int(opt.stats["second_passes"]))
        shares.append(taken)
    assert shares[0] == shares[1]


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_base
def test_lr_zero_gives_the_same_bits_back(method: str, base: str, dtype: torch.dtype, backend: str) -> None:
    rule, options = BASES[base]
    model = make_net(dtype)
    before = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half precision
        opt = make(method, model.parameters(), rule, **{**options, "lr": 0.0})
    train(model, opt, batches(4, dtype))
    assert_same_bits(weights(model), before)


# The policy alone.


def shares(policy: Adaptive) -> list[float]:
    """Of second passes in each quarter, for independent squared norms from Normal(10, 1)."""
    steps = policy.total_steps
    draws = np.random.default_rng(0).normal(10.0, 1.0, steps).tolist()
    state, fired = Statistics(), []
    for t, n in enumerate(draws):
        state, second = policy.decide(state, t, n)
        fired.append(second)
    return [sum(fired[i : i + steps // 4]) / (steps // 4) for i in range(0, steps, steps // 4)]


def test_share_of_second_passes_of_ae_sam() -> None:
    quarters = shares(Adaptive(200_000, 1.0, -1.0, 0.9))
    assert quarters == pytest.approx([0.24, 0.41, 0.59, 0.76], abs=0.03)
    assert sum(quarters) / 4 == pytest.approx(0.5, abs=0.02)


def test_share_of_second_passes_of_ae_looksam() -> None:
    quarters = shares(Adaptive(200_000, 2.0, 0.0, 0.9))
    assert quarters == pytest.approx([0.03, 0.11, 0.24, 0.41], abs=0.03)
    assert sum(quarters) / 4 == pytest.approx(0.2, abs=0.02)


def test_a_spike_fires_and_nothing_infinite_counts() -> None:
    policy = Adaptive(10, 1.0, -1.0, 0.9)
    state = Statistics(10.0, 1.0, 11.0)
    assert policy.decide(state, 0, 1000.0)[1]
    for n in (math.inf, math.nan, 1e200):  # the last one's variance overflows
        assert policy.decide(state, 0, n) == (state, False)
    assert policy.coefficient(0) == 1.0
    assert policy.coefficient(5) == 0.0
    assert policy.coefficient(10) == policy.coefficient(99) == -1.0
    assert Adaptive(4, math.inf, math.inf, 0.9).coefficient(2) == math.inf


def test_every() -> None:
    assert [Every(3).second_pass(t) for t in range(7)] == [True, False, False, True, False, False, True]
    assert all(Every(1).second_pass(t) for t in range(5))


@every_adaptive
def test_the_statistics_are_those_of_the_policy(method: str, backend: str) -> None:
    model = make_net()
    opt = make(method, model.parameters(), SGD, lr=0.05, total_steps=6)
    state = Statistics()
    seen = 0
    for t, batch in enumerate(batches(6)):
        opt.step(make_closure(model, batch))
        stats = opt.stats
        state, fired = opt._adaptive.decide(state, t, float(stats["grad_norm"]) ** 2)
        for name, value in zip(("ema_mean", "ema_var", "threshold"), state, strict=True):
            assert float(stats[name]) == pytest.approx(value, rel=1e-12)
        assert (int(stats["second_passes"]) > seen) == fired
        seen = int(stats["second_passes"])


# Several layouts.


class TwoTypes(nn.Module):
    """Parameters of two dtypes: two layouts in one optimizer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        with torch.device("cpu"):
            self.wide = nn.Linear(6, 5, dtype=torch.float64)
            self.narrow = nn.Linear(5, 3, dtype=torch.float32)
        self.to(torch.get_default_device())

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(torch.tanh(self.wide(x)).float())


@every_class
@every_base
def test_one_decision_for_several_dtypes(method: str, base: str, backend: str) -> None:
    """Norms, products and statistics go over all layouts: as in one net of one dtype, to its precision."""
    rule, options = BASES[base]
    ours, theirs = TwoTypes(), TwoTypes()
    steps = 6
    opt = make(method, ours.parameters(), rule, total_steps=steps, **options)
    if method == "salr":
        naive: Any = NaiveSALR(list(theirs.parameters()), rule, n_ascent=2, n_descent=3, **options)
    else:
        groups = [{"params": list(theirs.parameters()), "rho": 0.05}]
        naive = NaiveFamily(groups, rule, OWN[method][2](steps), 0.4 if "look" in method else None, **options)
    generator = torch.Generator("cpu").manual_seed(0)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64, device="cpu").to(torch.get_default_device())

        def closure(model: nn.Module, x: Tensor = x) -> Tensor:
            loss = model(x).double().square().mean() + model.wide.weight.square().sum()
            loss.backward()
            return loss

        opt.step(lambda: closure(ours))
        naive.step(lambda: closure(theirs))
    if method != "salr":
        assert int(opt.stats["second_passes"]) == sum(naive.decisions)
    assert relative_error(ours, theirs) < 1e-5


# Stepping.


@every_method
@every_base
def test_by_hand_equals_closure(method: str, base: str, backend: str) -> None:
    rule, options = BASES[base]
    ends = []
    for by_hand in (False, True):
        model = make_net(torch.float32)
        opt = make(method, model.parameters(), rule, 400, model=model, **options)
        (train_by_hand if by_hand else train)(model, opt, batches(6, torch.float32))
        ends.append((weights(model) | dict(model.named_buffers()), opt.stats))
    assert_same_bits(ends[0][0], ends[1][0])
    assert_same_bits(ends[0][1], ends[1][1])
    assert 0 < int(ends[0][1]["second_passes"]) < 6


def plain_step_pending(method: str, model: nn.Module, rule: Any = SGD, **options: Any) -> Any:
    """An optimizer that has g_v where it is to, and whose first_step just decided for a plain step."""
    defaults = {"lr": 0.05, "momentum": 0.9} if rule is SGD else {}
    opt = make(method, model.parameters(), rule, **{**defaults, **options})
    data = batches(12, torch.float32)
    closure = make_closure(model, data[0])
    for batch in data:
        opt.zero_grad()
        closure = make_closure(model, batch)
        closure()
        if not opt.first_step(zero_grad=True):
            if int(opt.stats["second_passes"]):
                return opt
        else:
            closure()
        opt.second_step()
    raise AssertionError("every step took a second pass")


@every_method
def test_the_gradient_may_change_before_a_plain_step_ends(method: str, backend: str) -> None:
    """Clipped, averaged over processes, in whatever way: the check and the mix are of what the rule takes."""

    def after(change: str) -> dict[str, Tensor]:
        model = make_net(torch.float32)
        opt = plain_step_pending(method, model, max_grad_norm=0.05)
        skipped = int(opt.stats["skipped_steps"])
        before = weights(model)
        with torch.no_grad():
            for p in model.parameters():
                if change == "in place":
                    p.grad.mul_(0.25)
                elif change == "unseen":  # no version tells of it, nor of what a collective writes
                    p.grad.data.mul_(0.25)
                elif change == "not finite, unseen":
                    p.grad.data.fill_(math.nan)
                else:
                    p.grad = p.grad * 0.25
        opt.second_step()
        assert int(opt.stats["skipped_steps"]) - skipped == change.startswith("not finite")
        if change.startswith("not finite"):
            assert_same_bits(weights(model), before)
        else:
            assert not torch.equal(model.out.weight, before["out.weight"])
        return weights(model)

    expected = after("another tensor")
    assert_same_bits(after("in place"), expected)
    assert_same_bits(after("unseen"), expected)
    after("not finite, unseen")


@every_class
@every_base
def test_gradients_in_memory_that_every_pass_writes_to(method: str, base: str) -> None:
    """As with DDP's gradient_as_bucket_view: the tensors in ``p.grad`` are the same in every pass."""
    rule, options = BASES[base]
    ends = []
    for static in (False, True):
        model = make_net().eval()
        opt = make(method, model.parameters(), rule, **options)
        memory = {p: torch.zeros_like(p) for p in model.parameters()}
        for x, y in batches(4):

            def closure(x: Tensor = x, y: Tensor = y, model: Any = model, memory: Any = memory) -> Tensor:
                loss = nn.functional.cross_entropy(model(x), y)
                grads = torch.autograd.grad(loss, list(memory))
                for (p, buffer), g in zip(memory.items(), grads, strict=True):
                    p.grad = buffer.copy_(g) if static else g  # noqa: B023
                return loss.detach()

            opt.step(closure)
        ends.append(weights(model))
    assert_same_bits(*ends)


@every_method
def test_restore_cancels_a_plain_step(method: str) -> None:
    model = make_net(torch.float32)
    opt = plain_step_pending(method, model)
    before = weights(model)
    assert not opt.is_perturbed
    with pytest.raises(RuntimeError, match="twice"):
        opt.first_step()
    opt.restore()
    opt.restore()
    with pytest.raises(RuntimeError, match="before first_step"):
        opt.second_step()
    assert_same_bits(weights(model), before)


@every_class
def test_step_without_a_closure_asks_nothing(method: str, backend: str) -> None:
    """A plain base step that touches no policy and no statistics."""
    model, twin = make_net(torch.float32), make_net(torch.float32)
    opt = make(method, model.parameters(), lr=0.1, momentum=0.9)
    base = sk.SAM(twin.parameters(), lr=0.1, momentum=0.9)
    for batch in batches(2, torch.float32):
        for net, each in ((model, opt), (twin, base)):
            each.zero_grad()
            make_closure(net, batch)()
            each.step()
    assert_same_bits(weights(model), weights(twin))
    fresh = make(method, make_net(torch.float32).parameters(), lr=0.1, momentum=0.9).stats
    for name, value in opt.stats.items():
        torch.testing.assert_close(value.cpu(), fresh[name].cpu(), rtol=0, atol=0, equal_nan=True)
    assert opt.state_dict()["sharpkern"]["t"] == 0


@every_class
def test_no_gradient_at_all_changes_nothing(method: str, backend: str) -> None:
    model = make_net(torch.float32)
    opt = make(method, model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = weights(model)
    opt.step(lambda: torch.tensor(1.0))
    assert_same_bits(weights(model), before)
    assert not any(opt.state.values())
    if "ema_mean" in opt.stats:
        assert float(opt.stats["ema_mean"]) == 0.0


@every_class
def test_a_zero_gradient(method: str, backend: str) -> None:
    model = make_net(torch.float32)
    opt = make(method, model.parameters(), lr=0.1, momentum=0.9)
    before = weights(model)

    def closure() -> Tensor:
        loss = 0.0 * sum(p.sum() for p in model.parameters())
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
    assert_same_bits(weights(model), before)
    if method == "salr":
        assert math.isnan(float(opt.stats["sharpness"]))
        assert float(opt.stats["lr_scale"]) == 1.0


def certain(method: str) -> dict[str, Any]:
    """Options that make every step take its second pass."""
    return {
        "sssam": {"p": 1.0},
        "aesam": {"lambda_start": -9.0, "lambda_end": -9.0},
        "looksam": {"k": 1},
        "aelooksam": {"lambda_start": -9.0, "lambda_end": -9.0},
        "salr": {"every": 1},
    }[method]


# How many calls a step then has, and after which of them a gradient is followed: SALR's with 3 descents and 2 ascents
# are w, 2 descents, their end, 1 ascent, its end.
CALLS = {**dict.fromkeys(OWN, 2), "salr": 6}
FOLLOWED = [*((method, call) for method in OWN for call in (0, 1)), *(("salr", call) for call in (0, 1, 2, 4))]


class Poisoned:
    """A closure whose gradient is not finite in some of its calls."""

    def __init__(self, model: nn.Module, batch: tuple[Tensor, Tensor], value: float = math.nan) -> None:
        self.closure = make_closure(model, batch)
        self.model = model
        self.value = value
        self.calls = 0
        self.bad: set[int] = set()

    def __call__(self) -> Tensor:
        loss = self.closure()
        if self.calls in self.bad:
            self.model.out.bias.grad.fill_(self.value)
        self.calls += 1
        return loss


@every_base
@pytest.mark.parametrize("value", [math.inf, math.nan, 1e30], ids=str)
@pytest.mark.parametrize(("method", "bad"), FOLLOWED)
def test_a_gradient_that_is_not_finite(method: str, base: str, value: float, bad: int) -> None:
    """In any pass (of SALR: any whose gradient is followed): nothing changes, the step is counted once."""
    rule, options = BASES[base]
    model = make_net(torch.float32)
    opt = make(method, model.parameters(), rule, model=model, **{**options, **certain(method)})
    train(model, opt, batches(2, torch.float32))
    closure = Poisoned(model, batches(1, torch.float32)[0], value)
    closure.bad = {bad}
    before, stats, state = weights(model), opt.stats, copy.deepcopy(opt.state_dict())
    opt.step(closure)
    # A norm that is not finite decides for a plain step.
    assert closure.calls == (1 if method.startswith("ae") and bad == 0 else CALLS[method])
    assert_same_bits(weights(model), before)
    after = opt.stats
    assert int(after["skipped_steps"]) == 1
    assert int(after["steps"]) == int(stats["steps"]) + 1
    for name in ("ema_mean", "ema_var", "threshold"):
        if name in stats and bad == 0:
            assert torch.equal(after[name], stats[name])
    for name in ("sharpness", "lr_scale"):
        if name in stats:
            assert torch.equal(after[name], stats[name])
    now = opt.state_dict()
    for i, entry in state["state"].items():
        for key, old in entry.items():
            assert torch.equal(torch.as_tensor(now["state"][i][key]), torch.as_tensor(old)), key
    if "g_v_squared_norm" in state["sharpkern"]:
        assert torch.equal(now["sharpkern"]["g_v_squared_norm"], state["sharpkern"]["g_v_squared_norm"])
    if "history" in state["sharpkern"]:
        assert torch.equal(now["sharpkern"]["history"], state["sharpkern"]["history"])
    opt.step(make_closure(model, batches(1, torch.float32)[0]))  # and goes on
    assert not torch.equal(model.out.weight, before["out.weight"])
    assert all(p.isfinite().all() for p in model.parameters())


@every_base
@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
@every_method
def test_a_plain_step_with_a_gradient_that_is_not_finite(method: str, value: float, base: str, backend: str) -> None:
    """LookSAM's mix of it included: g_v stays as it was."""
    rule, options = BASES[base]
    model = make_net(torch.float32)
    opt = plain_step_pending(method, model, rule, **options)
    before, state = weights(model), copy.deepcopy(opt.state_dict())
    with torch.no_grad():
        model.out.bias.grad.fill_(value)
    opt.second_step()
    assert_same_bits(weights(model), before)
    assert int(opt.stats["skipped_steps"]) == 1
    for i, entry in opt.state_dict()["state"].items():
        assert_same_bits(*({k: torch.as_tensor(v) for k, v in e.items()} for e in (entry, state["state"][i])))


@pytest.mark.parametrize("bad", [3, 5])
def test_salr_does_not_follow_the_gradients_at_the_ends(bad: int) -> None:
    ends = []
    for poisoned in (False, True):
        model = make_net(torch.float32)
        opt = make("salr", model.parameters(), lr=0.1)
        closure = Poisoned(model, batches(1, torch.float32)[0])
        closure.bad = {bad} if poisoned else set()
        opt.step(closure)
        assert closure.calls == 6
        ends.append(weights(model) | opt.stats)
    assert_same_bits(*ends)
    assert int(ends[1]["skipped_steps"]) == 0


@every_adaptive
def test_an_adaptive_first_step_with_a_bad_gradient_wants_no_second_pass(method: str) -> None:
    model = make_net(torch.float32)
    opt = make(method, model.parameters(), lr=0.1)
    closure = Poisoned(model, batches(1, torch.float32)[0])
    closure.bad = {0}
    closure()
    assert opt.first_step() is False
    opt.second_step()
    assert int(opt.stats["skipped_steps"]) == 1


@every_base
@pytest.mark.parametrize(("method", "fail"), [*FOLLOWED, ("salr", 3), ("salr", 5)])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_a_pass(method: str, base: str, fail: int, error: type[BaseException], backend: str) -> None:
    """The weights are back, what was learnt before is kept, and the next step is right."""
    if in_interpreter(backend) and (error is ValueError or fail > 2):
        pytest.skip("the interpreter takes seconds")
    rule, options = BASES[base]
    model = make_net(torch.float32)
    opt = make(method, model.parameters(), rule, model=model, **{**options, **certain(method)})
    train(model, opt, batches(2, torch.float32))
    g_v = {i: s["g_v"] for i, s in opt.state_dict()["state"].items() if "g_v" in s}
    before, stats = weights(model), opt.stats
    inner = make_closure(model, batches(1, torch.float32)[0])
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = inner()
        if calls == fail + 1:
            raise error("in a pass")
        return loss

    with pytest.raises(error, match="in a pass"):
        opt.step(closure)
    assert calls == fail + 1
    assert_same_bits(weights(model), before)
    assert not opt.is_perturbed
    assert len(g_v) == (len(list(model.parameters())) if "look" in method else 0)
    for i, value in g_v.items():
        assert torch.equal(opt.state_dict()["state"][i]["g_v"], value)
    for name in ("sharpness", "lr_scale", "skipped_steps"):
        if name in stats:
            torch.testing.assert_close(opt.stats[name], stats[name], rtol=0, atol=0, equal_nan=True)
    assert model.bn.track_running_stats
    assert model.bn.momentum == 0.1
    assert opt.step(inner).isfinite()
    assert not torch.equal(model.out.weight, before["out.weight"])


@every_class
def test_hooks_fire_once_a_step(method: str) -> None:
    model = make_net(torch.float32)
    opt = make(method, model.parameters(), RMSprop, lr=1e-3)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    train(model, opt, batches(4, torch.float32))
    assert seen == ["pre", "post"] * 4


@every_class
@every_base
def test_schedulers(method: str, base: str) -> None:
    """A schedule moves the groups' lr, which no step writes to."""
    rule, options = BASES[base]
    model = make_net(torch.float32)
    opt = make(method, model.parameters(), rule, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)
    for i, batch in enumerate(batches(6, torch.float32)):
        assert opt.param_groups[0]["lr"] == options["lr"] * 0.5 ** (i // 2)
        opt.step(make_closure(model, batch))
        scheduler.step()


@pytest.mark.parametrize("rule", [SGD, AdamW, RMSprop], ids=lambda b: b.__name__)
@pytest.mark.parametrize("tensor", [False, True])
def test_salr_scales_the_lr_of_a_schedule(rule: Any, tensor: bool) -> None:
    """One step with the ratio is one of the base rule with that lr; AdamW's decay included."""
    options: dict[str, Any] = {"weight_decay": 0.1}
    model, twin = make_net().eval(), make_net().eval()
    lr = torch.tensor(0.02, dtype=torch.float64) if tensor else 0.02
    opt = sk.SALR(model.parameters(), rule, lr=lr, **options)
    base = sk.SAM(twin.parameters(), rule, lr=0.02, **options)
    ratios = []
    for t, batch in enumerate(batches(6)):
        now = 0.02 / (1 + t)
        opt.param_groups[0]["lr"] = torch.tensor(now, dtype=torch.float64) if tensor else now
        opt.step(make_closure(model, batch))
        ratios.append(float(opt.stats["lr_scale"]))
        base.param_groups[0]["lr"] = now * ratios[-1]
        base.zero_grad()
        make_closure(twin, batch)()
        base.step()
    assert len(set(ratios)) == 3
    assert ratios[0] == 1.0
    assert relative_error(model, twin) < 1e-14


@every_class
def test_model_keeps_norm_statistics_to_the_first_pass(method: str) -> None:
    model, twin = make_net(), make_net()
    opt = make(method, model.parameters(), lr=0.0, model=model)
    for batch in batches(6):
        opt.step(make_closure(model, batch))
        make_closure(twin, batch)()
    assert_same_bits(dict(model.named_buffers()), dict(twin.named_buffers()))


@every_class
@every_base
def test_flatten_takes_the_same_steps(method: str, base: str, backend: str) -> None:
    rule, options = BASES[base]
    ends = []
    for flatten in (False, True):
        model = make_net(torch.float32)
        opt = make(method, model.parameters(), rule, flatten=flatten, **options)
        train(model, opt, batches(3 if in_interpreter(backend) else 7, torch.float32))
        ends.append(weights(model))
        opt.unflatten()
        train(model, opt, batches(1, torch.float32))
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-5, atol=1e-6)


@every_method
@every_base
def test_gradients_in_one_pass_only(method: str, base: str, backend: str) -> None:
    """A parameter that has a gradient in some calls only: right, and never left perturbed."""
    rule, options = BASES[base]
    torch.manual_seed(0)
    start = torch.randn(6, dtype=torch.float64, device="cpu").to(torch.get_default_device())
    ours, theirs = ([nn.Parameter(start[2 * i : 2 * i + 2].clone()) for i in range(3)] for _ in range(2))
    opt = make(method, ours, rule, **options)
    alpha = 0.4 if "look" in method else None
    naive = NaiveFamily([{"params": theirs, "rho": 0.05}], rule, OWN[method][2](40), alpha, **options)

    def closure(params: list[nn.Parameter]) -> Callable[[], Tensor]:
        left_out = itertools.cycle([1, 2, 0, 1])

        def evaluate() -> Tensor:
            out = next(left_out)
            loss = sum((p.cos() * (i + 1)).sum() + p.square().sum() for i, p in enumerate(params) if i != out)
            loss.backward()
            return loss

        return evaluate

    evaluate, evaluate_theirs = closure(ours), closure(theirs)
    for _ in range(5):
        opt.step(evaluate)
        naive.step(evaluate_theirs)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_salr_with_a_gradient_that_comes_and_goes(backend: str) -> None:
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


# SALR.


def test_salr_calls_and_what_they_see(backend: str) -> None:
    """n_ascent + n_descent calls more in a step that measures; gradients reset before each; weights back at the end."""
    model = make_net()
    opt = make("salr", model.parameters(), lr=0.1, every=3)
    counts = []
    for batch in batches(7):
        calls = 0
        inner = make_closure(model, batch)

        def closure(inner: Any = inner) -> Tensor:
            nonlocal calls
            calls += 1
            assert all(p.grad is None for p in model.parameters())
            assert torch.is_grad_enabled()
            return inner()

        opt.step(closure)
        counts.append(calls)
    assert counts == [6, 1, 1, 6, 1, 1, 6]
    assert int(opt.stats["steps"]) == 7
    assert int(opt.stats["second_passes"]) == 0


@pytest.mark.parametrize("kind", ["bare", "zeroing", "to zero", "guarded", "float"])
def test_salr_takes_any_closure(kind: str) -> None:
    """With zero_grad or without, whether or not it looks at grad mode, with a number for the loss."""
    ends = []
    for each in ("bare", kind):
        model = make_net(torch.float32).eval()
        opt = make("salr", model.parameters(), lr=0.1)
        for x, y in batches(4, torch.float32):

            def closure(x: Tensor = x, y: Tensor = y, each: str = each, model: Any = model, opt: Any = opt) -> Any:
                if each in ("zeroing", "to zero"):
                    opt.zero_grad(set_to_none=each == "zeroing")
                loss = nn.functional.cross_entropy(model(x), y)
                if each != "guarded" or torch.is_grad_enabled():
                    loss.backward()
                return loss.item() if each == "float" else loss

            opt.step(closure)
        ends.append(weights(model))
    assert_same_bits(*ends)


def test_salr_measures_what_it_says(backend: str) -> None:
    """S against a direct computation, for a quadratic whose branches are straight lines."""
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    opt = sk.SALR([w], SGD, lr=0.0, n_ascent=4, n_descent=2, step_size=0.1, every=1)

    def closure() -> Tensor:
        loss = w.square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert float(opt.stats["sharpness"]) == pytest.approx((5 + 0.4) ** 2 - (5 - 0.2) ** 2, rel=1e-12)
    assert float(opt.stats["lr_scale"]) == 1.0
    values = [float(opt.stats["sharpness"])]
    for scale in (0.5, 3.0, 2.0, 0.1):
        with torch.no_grad():
            w.mul_(scale)
        opt.step(closure)
        values.append(float(opt.stats["sharpness"]))
        assert float(opt.stats["lr_scale"]) == values[-1] / np.median(values)


def test_salr_records_nothing_that_is_not_positive() -> None:
    """S <= 0: the descent runs into a wall."""
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = sk.SALR([w], SGD, lr=0.1, n_ascent=1, n_descent=1, step_size=1.0, every=1)

    def closure() -> Tensor:
        loss = torch.where(w > 0.5, 10 * w, -w).sum()
        loss.backward()
        return loss

    before = w.detach().clone()
    opt.step(closure)
    assert math.isnan(float(opt.stats["sharpness"]))
    assert float(opt.stats["lr_scale"]) == 1.0
    assert opt.state_dict()["sharpkern"]["history"].numel() == 0
    assert not torch.equal(w, before)  # the training step is taken


def test_salr_with_maximize(backend: str) -> None:
    """Sharpness of what is minimized: the loss with its sign turned."""
    ends = []
    for sign in (1.0, -1.0):
        model = make_net().eval()
        opt = make("salr", model.parameters(), lr=0.05, every=1, maximize=sign < 0)
        for x, y in batches(3):

            def closure(x: Tensor = x, y: Tensor = y, sign: float = sign, model: Any = model) -> Tensor:
                loss = sign * nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            opt.step(closure)
        ends.append(weights(model) | {"s": opt.stats["sharpness"], "r": opt.stats["lr_scale"]})
    assert_same_bits(*ends)
    assert float(ends[0]["s"]) > 0


def test_salr_is_stepped_by_a_closure_only() -> None:
    opt = make("salr", make_net().parameters(), lr=0.1)
    for by_hand in (opt.first_step, opt.second_step):
        with pytest.raises(RuntimeError, match=r"step\(closure\)"):
            by_hand()


NO_NUMBERS = [None, "0.5", torch.zeros(2), torch.zeros(0), True, torch.zeros((), dtype=torch.cfloat)]


@pytest.mark.parametrize("loss", NO_NUMBERS, ids=str)
def test_salr_wants_a_number(loss: Any) -> None:
    model = make_net(torch.float32)
    opt = make("salr", model.parameters(), lr=0.1)
    inner = make_closure(model, batches(1, torch.float32)[0])

    def closure() -> Any:
        inner()
        return loss

    before = weights(model)
    with pytest.raises((TypeError, ValueError), match="one number"):
        opt.step(closure)
    assert_same_bits(weights(model), before)
    assert int(opt.stats["steps"]) == 0
    opt.step(inner)


def test_salr_and_a_base_that_changes_its_lr() -> None:
    class Halving(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})

        def step(self) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-group["lr"])
                group["lr"] *= 0.5

    model = make_net().eval()
    opt = make("salr", model.parameters(), Halving, lr=0.1, every=1)
    for t, batch in enumerate(batches(5)):
        opt.step(make_closure(model, batch))
        assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 ** (t + 1), rel=1e-12)
    assert float(opt.stats["lr_scale"]) != 1.0


def test_salr_refuses_a_base_of_two_passes_or_without_lr() -> None:
    params = list(make_net().parameters())
    with pytest.raises(ValueError, match="takes two passes itself"):
        sk.SALR(params, sk.SAM, lr=0.1)

    class NoLr(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self) -> None: ...

    with pytest.raises(ValueError, match="NoLr has no learning rate"):
        sk.SALR(params, NoLr)


# Checkpoints.


@every_class
@every_base
@pytest.mark.parametrize("how", ["weights_only", "deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_in_the_middle(method: str, base: str, how: str, dtype: torch.dtype, tmp_path: Path) -> None:
    rule, options = BASES[base]
    data = batches(13, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half precision
        straight = make_net(dtype)
        straight_opt = make(method, straight.parameters(), rule, **options)
        train(straight, straight_opt, data)
        model = make_net(dtype)
        opt = make(method, model.parameters(), rule, **options)
        train(model, opt, data[:7])
        if how == "weights_only":
            torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "seven.pt")
            saved = torch.load(tmp_path / "seven.pt", weights_only=True)
            resumed = make_net(dtype, seed=1)
            resumed_opt = make(method, resumed.parameters(), rule, **options)
            train(resumed, resumed_opt, batches(2, dtype, seed=9))  # another past
            resumed.load_state_dict(saved["model"])
            resumed_opt.load_state_dict(saved["opt"])
        else:
            pair = (model, opt)
            resumed, resumed_opt = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert_same_bits(resumed_opt.stats, opt.stats)
    train(resumed, resumed_opt, data[7:])
    assert_same_bits(weights(resumed), weights(straight))
    assert_same_bits(resumed_opt.stats, straight_opt.stats)
    assert resumed_opt.state_dict()["sharpkern"].keys() == opt.state_dict()["sharpkern"].keys()


@every_method
def test_a_loaded_group_may_have_keys_of_another_class(method: str, backend: str) -> None:
    """Every state dict of SAM has ``adaptive``, an option that these classes do not have."""
    if method == "sssam":
        pytest.skip("it has the option")
    ends = []
    for adaptive in (False, True):
        model = make_net(torch.float32)
        source = sk.SAM(make_net(torch.float32).parameters(), adaptive=adaptive, lr=0.05, momentum=0.9)
        opt = make(method, model.parameters(), lr=0.05, momentum=0.9)
        opt.load_state_dict(source.state_dict())
        assert opt.param_groups[0]["adaptive"] is adaptive
        train(model, opt, batches(3, torch.float32))
        assert int(opt.stats["second_passes"]) > 0
        ends.append(weights(model))
    assert_same_bits(*ends)


@pytest.mark.parametrize("method", ["looksam", "aelooksam"])
@pytest.mark.parametrize("rule", [RMSprop, torch.optim.NAdam, SGD, AdamW], ids=lambda b: b.__name__)
@pytest.mark.parametrize("case", ["a parameter without a gradient", "a first refresh that was skipped"])
def test_a_parameter_that_has_no_state_of_its_rule(method: str, rule: Any, case: str) -> None:
    """Checkpoints load and copies step, here and in torch: many optimizers look into any state that is not empty."""
    params = [nn.Parameter(torch.randn(4)) for _ in range(3)]
    own = {"k": 1} if method == "looksam" else {"lambda_start": -9.0, "lambda_end": -9.0}  # every step is a refresh
    opt = make(method, params, rule, lr=0.01, **own)

    def closure_over(these: list[nn.Parameter], factor: float = 1.0) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = factor * sum(p.cos().sum() + p.pow(4).sum() for p in these)
            loss.backward()
            return loss

        return closure

    if case.startswith("a first"):
        opt.step(closure_over(params, math.nan))
        assert int(opt.stats["skipped_steps"]) == 1
    else:
        opt.step(closure_over(params[:2]))
        assert params[2] not in opt.state
    state = copy.deepcopy(opt.state_dict())
    for other in (make(method, params, rule, lr=0.01, **own), sk.SAM(params, rule, lr=0.01)):
        other.load_state_dict(state)
        other.step(closure_over(params))
        assert all("g_v" in other.state[p] for p in params) == isinstance(other, sk.LookSAM)
    if not case.startswith("a first"):
        theirs = rule(params, lr=0.01)
        theirs.load_state_dict(state)
        closure_over(params)()
        theirs.step()
    twins, twin = copy.deepcopy((params, opt))
    twin.step(closure_over(twins))


@pytest.mark.parametrize("method", ["looksam", "aelooksam"])
@pytest.mark.parametrize("how", ["no statistics", "one cleared", "frozen and back"])
def test_the_norm_of_g_v_is_that_of_what_is_there(method: str, how: str) -> None:
    model = make_net()
    opt = make(method, model.parameters(), lr=0.05, momentum=0.9)
    train(model, opt, batches(2))
    plain = opt.state_dict()
    if how == "no statistics":
        del plain["sharpkern"]
        for entry in plain["state"].values():
            entry["g_v"] *= 3
        opt.load_state_dict(plain)
    elif how == "one cleared":
        opt.state[model.hidden.weight].clear()
    else:
        model.out.weight.requires_grad_(False)
        model.out.weight.grad = None
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64))]})
        opt.step(lambda: None)
        model.out.weight.requires_grad_(True)
    opt.zero_grad()
    make_closure(model, batches(1)[0])()
    opt.step()  # without a closure: nothing but the rule
    squared = sum(float(e["g_v"].double().square().sum()) for e in opt.state.values() if "g_v" in e)
    assert squared > 0
    assert float(opt.state_dict()["sharpkern"]["g_v_squared_norm"]) == pytest.approx(squared, rel=1e-12)


@every_base
def test_state_cleared_between_two_passes_comes_back(base: str) -> None:
    rule, options = BASES[base]
    model = make_net(torch.float32)
    opt = make("looksam", model.parameters(), rule, **options)
    closure = make_closure(model, batches(1, torch.float32)[0])
    opt.step(closure)
    keys = {p: set(entry) for p, entry in opt.state.items()}
    opt.zero_grad()
    closure()
    assert not opt.first_step()
    opt.restore()
    opt._t = 0
    closure()
    assert opt.first_step(zero_grad=True)
    opt.state.clear()
    closure()
    opt.second_step()
    assert {p: set(entry) for p, entry in opt.state.items()} == keys


@every_class
def test_any_state_dict_of_the_family_or_of_torch_loads(method: str) -> None:
    """The rule's state and the number of steps go over; what is not there keeps its value."""
    for other in (*OWN, "salr", "sam", "asam", "torch"):
        model = make_net(torch.float32)
        if other == "torch":
            source: Any = SGD(model.parameters(), lr=0.05, momentum=0.9)
            for batch in batches(3, torch.float32):
                source.zero_grad()
                make_closure(model, batch)()
                source.step()
        else:
            if other in ("sam", "asam"):
                cls = sk.SAM if other == "sam" else sk.ASAM
                source = cls(model.parameters(), lr=0.05, momentum=0.9)
            else:
                source = make(other, model.parameters(), lr=0.05, momentum=0.9)
            train(model, source, batches(3, torch.float32))
        opt = make(method, model.parameters(), lr=0.05, momentum=0.9)
        opt.load_state_dict(source.state_dict())
        for p in model.parameters():
            assert torch.equal(opt.state[p]["momentum_buffer"], source.state[p]["momentum_buffer"])
        train(model, opt, batches(3, torch.float32))
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", ["looksam", "aelooksam"])
@every_base
def test_g_v_in_the_state(method: str, base: str) -> None:
    """Parameter-shaped, of the state's dtype, gone when the state is cleared, unseen by a wrapped optimizer."""
    rule, options = BASES[base]
    model = make_net(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = make(method, model.parameters(), rule, **options)
    train(model, opt, batches(2, torch.bfloat16))
    for p in model.parameters():
        assert opt.state[p]["g_v"].shape == p.shape
        assert opt.state[p]["g_v"].dtype == torch.float32
    assert "gradient" not in opt.state[p]
    assert float(opt.state_dict()["sharpkern"]["g_v_squared_norm"]) > 0
    opt.state.clear()
    opt.zero_grad()
    make_closure(model, batches(1, torch.bfloat16)[0])()
    opt.step()
    assert float(opt.state_dict()["sharpkern"]["g_v_squared_norm"]) == 0


@pytest.mark.parametrize("method", ["looksam", "aelooksam"])
def test_a_moved_model_keeps_g_v(method: str, backend: str) -> None:
    ends = []
    for moved in (False, True):
        model = make_net(torch.float64)
        early = {"lambda_start": -9.0} if method == "aelooksam" else {}
        opt = make(method, model.parameters(), lr=0.05, momentum=0.9, **early)
        data = batches(4)
        train(model, opt, data[:1])
        for step, batch in enumerate(data[1:]):
            if moved and step == 0:
                for p in model.parameters():
                    p.data = p.data.clone()
                opt.add_param_group({"params": [nn.Parameter(torch.zeros(3, dtype=torch.float64))]})
            opt.zero_grad()
            closure = make_closure(model, batch)
            closure()
            if opt.first_step(zero_grad=True):
                if moved:  # between the passes, with the gradient kept
                    model.hidden.weight.data = model.hidden.weight.data.clone()
                closure()
            opt.second_step()
        ends.append(weights(model))
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-12, atol=1e-14)


# Bad arguments.


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda p: sk.AESAM(p, lr=0.1), TypeError, "total_steps"),
        (lambda p: sk.AELookSAM(p, lr=0.1), TypeError, "total_steps"),
        (lambda p: sk.AESAM(p, lr=0.1, total_steps=0), ValueError, "Invalid total_steps: 0"),
        (lambda p: sk.AESAM(p, lr=0.1, total_steps=-5), ValueError, "Invalid total_steps: -5"),
        (lambda p: sk.AESAM(p, lr=0.1, total_steps=10.0), TypeError, "total_steps should be an integer"),
        (lambda p: sk.AESAM(p, lr=0.1, total_steps=10, decay=1.0), ValueError, "Invalid decay: 1.0"),
        (lambda p: sk.AESAM(p, lr=0.1, total_steps=10, decay=-0.1), ValueError, "Invalid decay: -0.1"),
        (lambda p: sk.AESAM(p, lr=0.1, total_steps=10, decay=math.nan), ValueError, "Invalid decay: nan"),
        (lambda p: sk.AESAM(p, lr=0.1, total_steps=10, lambda_end=math.nan), ValueError, "Invalid lambda_end: nan"),
        (lambda p: sk.AESAM(p, lr=0.1, total_steps=10, lambda_start="1"), TypeError, "lambda_start should be a number"),
        (
            lambda p: sk.AESAM(p, lr=0.1, total_steps=10, lambda_start=math.inf, lambda_end=-math.inf),
            ValueError,
            "Invalid lambda_end: -inf",
        ),
        (lambda p: sk.AESAM(p, lr=0.1, total_steps=10, rho=-1), ValueError, "Invalid rho: -1"),
        (lambda p: sk.LookSAM(p, lr=0.1, k=0), ValueError, "Invalid k: 0"),
        (lambda p: sk.LookSAM(p, lr=0.1, k=2.5), TypeError, "k should be an integer"),
        (lambda p: sk.LookSAM(p, lr=0.1, k=True), TypeError, "k should be an integer"),
        (lambda p: sk.LookSAM(p, lr=0.1, alpha=-0.1), ValueError, "Invalid alpha: -0.1"),
        (lambda p: sk.LookSAM(p, lr=0.1, alpha=math.inf), ValueError, "Invalid alpha: inf"),
        (lambda p: sk.AELookSAM(p, lr=0.1, total_steps=9, alpha="x"), TypeError, "alpha should be a number"),
        (lambda p: sk.LookSAM(p, lr=0.1, adaptive=True), TypeError, "adaptive"),
        (lambda p: sk.SALR(p, lr=0.1, n_ascent=0), ValueError, "Invalid n_ascent: 0"),
        (lambda p: sk.SALR(p, lr=0.1, n_descent=1.5), TypeError, "n_descent should be an integer"),
        (lambda p: sk.SALR(p, lr=0.1, every=0), ValueError, "Invalid every: 0"),
        (lambda p: sk.SALR(p, lr=0.1, step_size=0.0), ValueError, "Invalid step_size: 0.0"),
        (lambda p: sk.SALR(p, lr=0.1, step_size=math.nan), ValueError, "Invalid step_size: nan"),
        (lambda p: sk.SALR(p, lr=0.1, rho=0.05), TypeError, "rho"),
        (lambda p: sk.SALR(p, lr=-0.5), ValueError, "Invalid learning rate: -0.5"),
    ],
)
def test_bad_arguments(make_it: Any, error: type[Exception], message: str) -> None:
    params = list(make_net().parameters())
    addresses = [p.data_ptr() for p in params]
    with pytest.raises(error, match=message):
        make_it(params)
    assert [p.data_ptr() for p in params] == addresses


@every_adaptive
def test_training_past_total_steps_warns_once(method: str) -> None:
    model = make_net(torch.float32)
    opt = make(method, model.parameters(), lr=0.01, total_steps=3)
    data = batches(6, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, data[:3])
    with pytest.warns(UserWarning, match="total_steps=3") as seen:
        train(model, opt, data[3:])
    assert len(seen) == 1
    assert opt._adaptive.coefficient(5) == opt._adaptive.lambda_end


@pytest.mark.parametrize("key", ["ema", "g_v_squared_norm", "history", "g_v", "counters", "no lr_scale"])
def test_a_state_dict_that_does_not_fit_changes_nothing(key: str) -> None:
    method = "salr" if key in ("history", "no lr_scale") else "aelooksam"
    model = make_net(torch.float32)
    opt = make(method, model.parameters(), lr=0.05, momentum=0.9)
    train(model, opt, batches(2, torch.float32))
    state = opt.state_dict()
    if key == "g_v":
        state["state"][0]["g_v"] = torch.zeros(7)
    elif key == "no lr_scale":
        del state["sharpkern"]["lr_scale"]
    elif key == "counters":
        state["sharpkern"]["counters"] = torch.zeros(3)
    else:
        state["sharpkern"][key] = torch.zeros(2, 2)
    before, stats = opt.state_dict(), opt.stats
    with pytest.raises(ValueError, match="loaded state dict"):
        opt.load_state_dict(state)
    assert_same_bits(opt.stats, stats)
    for i, entry in before["state"].items():
        assert_same_bits({k: torch.as_tensor(v) for k, v in entry.items()},
                         {k: torch.as_tensor(v) for k, v in opt.state_dict()["state"][i].items()})  # fmt: skip
