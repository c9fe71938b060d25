"""ESAM: which tensors are drawn, which samples are picked, and the closure of losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods import METHODS, RULES
from models import assert_same_bits, batches, make_closure, make_net, relative_error, split, state_of, train, weights
from naive import NaiveESAM
from torch import Tensor, nn

import sharpkern as sk

f32, SGD = torch.float32, torch.optim.SGD
slow = pytest.mark.slow


class Losses:
    """A closure of losses of samples, which notes how it was called."""

    def __init__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        self.model, self.batch = model, batch
        self.calls: list[tuple[list[int] | None, bool]] = []  # the samples asked for, and whether gradients were
        self.tracked: list[int] = []  # how many batches the norm layer had seen before

    def __call__(self, index: Tensor | None = None) -> Tensor:
        self.tracked.append(int(self.model.bn.num_batches_tracked))  # type: ignore[arg-type, union-attr]
        self.calls.append((None if index is None else index.tolist(), torch.is_grad_enabled()))
        x, y = self.batch if index is None else (part[index] for part in self.batch)
        return nn.functional.cross_entropy(self.model(x), y, reduction="none")


def esam(net: nn.Module, **options: Any) -> sk.ESAM:
    return sk.ESAM(net.named_parameters(), SGD, **{"lr": 0.05, "momentum": 0.9, **options})


def learnt(model: nn.Module, opt: Any) -> dict[str, Tensor]:
    return weights(model) | state_of(opt)


# Trajectories.


@pytest.mark.parametrize(
    ("base", "gamma"),
    [("momentum", 0.5), pytest.param("adamw", 0.3, marks=slow), pytest.param("wrapped", 0.9, marks=slow)],
)
def test_two_hundred_steps(base: str, gamma: float) -> None:
    """Both of its halves, three groups, against the plain twin."""
    base_cls, options = RULES[base]
    ours, theirs = make_net(), make_net()
    own = {"beta": 0.3, "gamma": gamma, "seed": 5}
    opt = sk.ESAM(split(ours, options), base_cls, 0.05, **own, **options)
    naive = NaiveESAM(split(theirs, options), base_cls, {"rho": 0.05}, perturb_eps=1e-7, **own, **options)
    for batch in batches(50, size=11) * 4:
        loss, expected = opt.step(Losses(ours, batch)), naive.step(Losses(theirs, batch))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert relative_error(ours, theirs) < 1e-10
    assert 0 < int(opt.stats["second_passes"]) == sum(naive.decisions) < 200


def test_by_hand_equals_closure() -> None:
    """To the bit, the model's buffers, too: those of spectral norm move in every forward."""
    ends = []
    for by_hand in (False, True):
        model = make_net(f32)
        nn.utils.parametrizations.spectral_norm(model.hidden)
        opt = esam(model, beta=0.3, model=model)
        for batch in batches(8, f32):
            closure = Losses(model, batch)
            if not by_hand:
                opt.step(closure)
                continue
            losses = closure()
            losses.mean().backward()
            if opt.first_step(zero_grad=True):
                with torch.no_grad():
                    index = opt.select(losses, closure())
                closure(index).mean().backward()
            opt.second_step(zero_grad=True)
        ends.append(learnt(model, opt) | opt.stats | dict(model.named_buffers()))
    assert_same_bits(*ends)
    assert 0 < int(ends[0]["second_passes"]) < 8


def test_with_all_of_both_it_is_sam() -> None:
    ours, theirs = make_net(), make_net()
    opt = esam(ours, beta=1.0, gamma=1.0)
    sam = sk.SAM(theirs.parameters(), SGD, perturb_eps=1e-7, lr=0.05, momentum=0.9)
    for model, each in ((ours, opt), (theirs, sam)):
        train(model, each, batches(5))
    assert_same_bits(weights(ours), weights(theirs))


# Tensors.


@pytest.mark.parametrize("beta", [0.3, 0.8])
def test_the_radius_is_divided_by_the_share_that_is_kept(beta: float) -> None:
    """Not by one less it, as in a port whose argument is the share that is dropped."""
    model = make_net()
    opt = esam(model, rho=0.05, beta=beta, seed=1)
    kept = opt.draw(0)
    assert 0 < int(kept.sum()) < 8
    make_closure(model, batches(1)[0])()
    before = weights(model)
    g = torch.cat([p.grad.flatten() for p, k in zip(model.parameters(), kept, strict=True) if k])
    assert opt.first_step()
    moved = [w - old for w, old in zip(weights(model).values(), before.values(), strict=True)]
    assert [bool((d != 0).any()) for d in moved] == kept.tolist()
    e = torch.cat([d.flatten() for d, k in zip(moved, kept, strict=True) if k])
    torch.testing.assert_close(e, 0.05 / (beta * (g.norm() + 1e-7)) * g, rtol=1e-9, atol=1e-15)
    assert float(opt.stats["grad_norm"]) == pytest.approx(float(g.norm()), rel=1e-12)


def test_a_step_that_draws_no_tensor_is_a_plain_one() -> None:
    """And one that draws such without a gradient only."""
    ours, theirs = make_net(), make_net()
    opt, base = esam(ours, beta=1e-9), SGD(theirs.parameters(), lr=0.05, momentum=0.9)
    for batch in batches(3):
        closure = Losses(ours, batch)
        opt.step(closure)
        assert closure.calls == [(None, True)]
        base.zero_grad()
        make_closure(theirs, batch)()
        base.step()
    assert relative_error(ours, theirs) < 1e-12
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = sk.ESAM([used, unused], SGD, lr=0.1, beta=0.5, seed=next(s for s in range(99) if draws(s) == [False, True]))
    used.sum().backward()
    assert not opt.first_step()
    opt.second_step()
    torch.testing.assert_close(used.detach(), torch.full((3,), 0.9))


def draws(seed: int) -> list[bool]:
    return sk.ESAM([nn.Parameter(torch.ones(1)) for _ in range(2)], SGD, lr=0.1, seed=seed).draw(0).tolist()


def test_draws() -> None:
    """Of the seed, the step and the place among all; a parameter that is added changes those of no other."""
    params = [nn.Parameter(torch.ones(1)) for _ in range(40)]
    opt = sk.ESAM(params, SGD, lr=0.1, beta=0.3, seed=2)
    drawn = torch.stack([opt.draw(t) for t in range(500)])
    assert drawn.dtype == torch.bool
    assert drawn.double().mean() == pytest.approx(0.3, abs=0.015)  # four standard deviations are 0.013
    assert drawn.double().mean(0).min() > 0.2
    assert len({tuple(row) for row in drawn.tolist()}) == 500
    opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    longer = torch.stack([opt.draw(t) for t in range(500)])
    assert torch.equal(longer[:, :40], drawn)
    assert not torch.equal(sk.ESAM(params, SGD, lr=0.1, beta=0.3, seed=3).draw(0), drawn[0])


def test_an_adaptive_policy_looks_at_the_whole_gradient() -> None:
    model = make_net()
    policy = sk.policy.Adaptive(10, lambda_start=-9.0, lambda_end=-9.0)
    opt = esam(model, beta=0.5, seed=1, policy=policy)
    make_closure(model, batches(1)[0])()
    n = sum(float(p.grad.square().sum()) for p in model.parameters())
    assert opt.first_step()
    assert float(opt.stats["ema_mean"]) == pytest.approx(0.1 * n, rel=1e-12)
    kept = sum(float(p.grad.square().sum()) for p, k in zip(model.parameters(), opt.draw(0), strict=True) if k)
    assert float(opt.stats["grad_norm"]) == pytest.approx(kept**0.5, rel=1e-12)
    assert kept < n


# Samples.


SELECTED: dict[str, tuple[float, list[float], list[int]]] = {
    "rounded down": (0.5, [1.0, 5.0, 3.0, 2.0, 4.0], [1, 4]),
    "in order": (0.8, [5.0, 4.0, 3.0, 2.0, 1.0], [0, 1, 2, 3]),
    "at least one": (0.1, [1.0, 5.0, 3.0], [1]),
    "one sample": (0.5, [-1.0], [0]),
    "equal ones": (0.5, [2.0] * 6, [0, 1, 2]),
    "equal to the last one kept": (0.5, [1.0, 2.0, 1.0, 1.0], [0, 1]),
    "nan first": (0.5, [1.0, math.inf, math.nan, -math.inf], [1, 2]),
    "nan above infinity": (0.3, [1.0, math.inf, math.nan, -math.inf], [2]),
    "all": (1.0, [1.0, 2.0], [0, 1]),
}


@pytest.mark.parametrize("case", SELECTED)
def test_select(case: str) -> None:
    """The share of the samples whose loss rose most: a cut above the last one kept would keep none of equal ones."""
    gamma, rises, expected = SELECTED[case]
    opt = esam(make_net(), gamma=gamma)
    before = torch.arange(float(len(rises)), requires_grad=True)
    index = opt.select(before, before.detach() + torch.tensor(rises))
    assert index.tolist() == expected
    assert index.dtype == torch.int64
    assert not index.requires_grad


def test_losses_of_samples_in_memory_that_every_call_writes_to() -> None:
    """As of a captured graph's output: the rises are those of two passes."""
    picked, out = [], torch.zeros(24)

    class Static(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, losses: Tensor) -> Tensor:
            return out.copy_(losses).detach()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad

    for static in (False, True):
        model = make_net()
        closure = Losses(model, batches(1)[0])
        take = lambda index=None, c=closure, s=static: Static.apply(c(index)) if s and index is None else c(index)  # noqa: E731
        esam(model, beta=1.0, gamma=0.25, rho=0.5).step(take)
        picked.append(closure.calls[-1][0])
    assert picked[0] == picked[1] != list(range(6))


def test_the_second_pass_is_of_the_picked_samples_only() -> None:
    model = make_net()
    opt = esam(model, beta=1.0, gamma=0.25, model=model)
    batch = batches(1)[0]
    closure = Losses(model, batch)
    expected = nn.functional.cross_entropy(make_net()(batch[0]), batch[1])
    loss = opt.step(closure)
    (_, first), (_, second), (index, third) = closure.calls
    assert (first, second, third) == (True, False, True)
    assert index == sorted(index)
    assert len(index) == 6
    assert loss.shape == ()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    assert [*closure.tracked, int(model.bn.num_batches_tracked)] == [
        0,
        1,
        1,
        1,
    ]  # each pass from what the first one left


def test_a_step_by_hand_is_finished_by_an_ordinary_closure() -> None:
    ends = []
    for by_closure in (False, True):
        model = make_net(f32)
        opt = esam(model, beta=1.0)
        closure = make_closure(model, batches(1, f32)[0])
        closure()
        opt.first_step(zero_grad=True)
        opt.step(closure) if by_closure else (closure(), opt.second_step())
        ends.append(learnt(model, opt))
    assert_same_bits(*ends)


# Bad input.


LOSSES: dict[str, tuple[int, Callable[[Tensor], Any], type[Exception], str]] = {
    "mean": (
        0,
        lambda x: x.mean(),
        ValueError,
        r"losses of the samples, a tensor of shape \[samples\], but got.* \(\)",
    ),
    "column": (0, lambda x: x[:, None], ValueError, r"but got one of shape \(24, 1\)"),
    "none": (0, lambda x: None, TypeError, "but got NoneType"),
    "empty": (0, lambda x: x[:0], ValueError, r"but got one of shape \(0,\)"),
    "integers": (0, lambda x: x.long(), TypeError, r"but got a tensor of torch\.int64"),
    "detached": (0, lambda x: x.detach(), ValueError, "requires no gradient"),
    "backward called": (
        0,
        lambda x: (x.mean().backward(), x)[1],
        RuntimeError,
        "ESAM with gamma=0.5 calls backward itself",
    ),
    "kept": (0, lambda x: (x.mean().backward(retain_graph=True), x)[1], RuntimeError, "calls backward itself"),
    "mean in the second pass": (1, lambda x: x.mean(), ValueError, r"but got one of shape \(\)"),
    "fewer in the second pass": (1, lambda x: x[1:], ValueError, "24 of them, but got 23"),
    "all in the third pass": (2, lambda x: torch.cat([x, x]), ValueError, "12 of them, but got 24"),
    "detached in the third pass": (2, lambda x: x.detach(), ValueError, "requires no gradient"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_closures_that_return_no_losses(case: str) -> None:
    """A clear error; weights, state and buffers are what they were, and the optimizer goes on."""
    call, change, error, message = LOSSES[case]
    model = make_net(f32)
    opt = esam(model, beta=1.0, model=model)
    opt.step(Losses(model, batches(1, f32)[0]))
    closure = Losses(model, batches(1, f32)[0])
    before = learnt(model, opt)

    def bad(index: Tensor | None = None) -> Any:
        losses = closure(index)
        return change(losses) if len(closure.calls) == call + 1 else losses

    with pytest.raises(error, match=message):
        opt.step(bad)
    assert not opt.is_perturbed
    assert_same_bits(learnt(model, opt), before)
    assert int(model.bn.num_batches_tracked) == 2  # that of the first pass
    opt.step(Losses(model, batches(1, f32)[0]))
    assert int(opt.stats["skipped_steps"]) == 0
    assert not torch.equal(model.out.weight, before["out.weight"])


def test_a_closure_without_an_argument_is_an_error() -> None:
    model = make_net(f32)
    opt = esam(model, beta=1.0)
    before = weights(model)
    losses = Losses(model, batches(1, f32)[0])
    with pytest.raises(TypeError, match=r"closure\(index\).*takes no index"):
        opt.step(lambda: losses())
    assert_same_bits(weights(model), before)


@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
def test_a_loss_that_is_not_finite_changes_nothing(value: float, call: int) -> None:
    """In the pass without gradients it is picked, and the second gradient tells; here the third pass is fine again."""
    model = make_net(f32)
    opt = esam(model, beta=1.0)
    opt.step(Losses(model, batches(1, f32)[0]))
    before = learnt(model, opt)
    closure = Losses(model, batches(1, f32)[0])

    def bad(index: Tensor | None = None) -> Tensor:
        losses = closure(index)
        if len(closure.calls) == call + 1:
            losses = torch.where(torch.arange(len(losses)) == 7, losses * value, losses)
        return losses

    opt.step(bad)
    assert int(opt.stats["skipped_steps"]) == (call != 1)
    if call == 1:
        assert 7 in (closure.calls[2][0] or [])
    else:
        assert_same_bits(learnt(model, opt), before)


ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"beta": 0.0}, ValueError, "Invalid beta: 0.0"),
    ({"beta": 1.5}, ValueError, "Invalid beta: 1.5"),
    ({"beta": math.nan}, ValueError, "Invalid beta: nan"),
    ({"beta": True}, TypeError, "beta should be a number"),
    ({"gamma": 0}, ValueError, "Invalid gamma: 0"),
    ({"gamma": "half"}, TypeError, "gamma should be a number"),
    ({"seed": 1.5}, TypeError, "seed should be an integer"),
    ({"rho": -0.1}, ValueError, "Invalid rho: -0.1"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), ARGUMENTS, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        esam(make_net(), **options)


def test_select_takes_losses_of_the_same_samples() -> None:
    opt = esam(make_net())
    for before, after, error in [
        (torch.ones(3), torch.ones(4), ValueError),
        (torch.ones(3, 1), torch.ones(3, 1), ValueError),
        (torch.ones(3), torch.ones(3, dtype=torch.int64), TypeError),
        ([1.0], torch.ones(1), TypeError),
    ]:
        with pytest.raises(error, match="losses of the samples"):
            opt.select(before, after)  # type: ignore[arg-type]


def test_the_contract_meets_steps_of_both_kinds() -> None:
    """The seed that the contract's ESAM has draws no tensor now and then."""
    opt = METHODS["esam"].make(make_net().named_parameters(), lr=0.1)
    kept = [int(opt.draw(t).sum()) for t in range(12)]
    assert min(kept) == 0 < max(kept) < 8


def test_maximize_looks_at_the_falls() -> None:
    """Maximizing -L is minimizing L, sample by sample."""

    def ends(sign: float) -> dict[str, Tensor]:
        model = make_net()
        opt = sk.ESAM(model.parameters(), lr=0.1, beta=1.0, gamma=0.4, maximize=sign < 0)
        for x, y in batches(3):
            losses = nn.CrossEntropyLoss(reduction="none")
            opt.step(lambda index=slice(None), x=x, y=y, of=losses: sign * of(model(x[index]), y[index]))
        return weights(model)

    assert_same_bits(ends(1.0), ends(-1.0))
