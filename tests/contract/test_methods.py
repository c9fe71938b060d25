"""What LookSAM and SALR do beyond the contract that every class keeps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from methods import METHODS, SGD
from models import assert_same_bits, batches, make_closure, make_net, relative_error, train, weights
from torch import Tensor, nn

import sharpkern as sk

f32 = torch.float32


def test_looksam_with_alpha_0_is_plain_between_refreshes() -> None:
    ends = []
    for make in (
        lambda p: sk.LookSAM(p, SGD, k=2, alpha=0.0, lr=0.1),
        lambda p: sk.SSSAM(p, SGD, p=lambda t: float(t % 2 == 0), lr=0.1),
    ):
        model = make_net(f32)
        train(model, make(model.parameters()), batches(5, f32))
        ends.append(weights(model))
    assert_same_bits(*ends)


# SALR.


def salr(params: Any, base: Any = SGD, **options: Any) -> sk.SALR:
    return METHODS["salr"].make(params, base, **options)


def test_salr_measures_now_and_then() -> None:
    """n_ascent + n_descent calls more in a step that measures."""
    model = make_net()
    opt = salr(model.named_parameters(), lr=0.1, every=3)
    counts = []
    for batch in batches(7):
        calls = 0
        inner = make_closure(model, batch)

        def closure(inner: Any = inner) -> Tensor:
            nonlocal calls
            calls += 1
            return inner()

        opt.step(closure)
        counts.append(calls)
    assert counts == [6, 1, 1, 6, 1, 1, 6]
    assert int(opt.stats["steps"]) == 7
    assert int(opt.stats["second_passes"]) == 0


def test_salr_measures_what_it_says() -> None:
    """S against a direct computation, for a quadratic whose branches are straight lines; the median with this S."""
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


@pytest.mark.parametrize("base", ["momentum", "wrapped"])
def test_salr_bounds_its_ratio(base: str) -> None:
    """As the naive one, where the bound is met and where it is not."""
    model, twin = make_net(), make_net()
    data = batches(12)
    free = salr(make_net().named_parameters(), base, every=1)
    opt, naive = (m(net.named_parameters(), base, every=1, max_lr_scale=1.02)
                  for m, net in ((METHODS["salr"].make, model), (METHODS["salr"].oracle, twin)))  # fmt: skip
    ratios = []
    for batch in data:
        opt.step(make_closure(model, batch))
        naive.step(make_closure(twin, batch))
        ratios.append(float(opt.stats["lr_scale"]))
        assert ratios[-1] == pytest.approx(naive.ratio, rel=1e-9)
    assert max(ratios) == 1.02
    assert min(ratios) < 1.0
    assert relative_error(model, twin) < 1e-11
    assert free.max_lr_scale == math.inf


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


NO_NUMBERS = [None, "0.5", torch.zeros(2), torch.zeros(0), True, torch.zeros((), dtype=torch.cfloat)]


@pytest.mark.parametrize("loss", NO_NUMBERS, ids=str)
def test_salr_wants_a_number(loss: Any) -> None:
    model = make_net(f32)
    opt = salr(model.named_parameters(), lr=0.1)
    inner = make_closure(model, batches(1, f32)[0])

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

        def step(self) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-group["lr"])
                group["lr"] *= 0.5

    model = make_net().eval()
    opt = salr(model.named_parameters(), Halving, lr=0.1, every=1)
    for t, batch in enumerate(batches(5)):
        opt.step(make_closure(model, batch))
        assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 ** (t + 1), rel=1e-12)
    assert float(opt.stats["lr_scale"]) != 1.0


def test_salr_without_a_closure_keeps_its_ratio() -> None:
    model = make_net().eval()
    opt = salr(model.named_parameters(), lr=0.1, every=1)
    train(model, opt, batches(2))
    ratio = float(opt.stats["lr_scale"])
    assert ratio != 1.0
    opt.zero_grad()
    make_closure(model, batches(1)[0])()
    before, grad = model.out.weight.detach().clone(), model.out.weight.grad.clone()
    opt.step()
    torch.testing.assert_close(model.out.weight.detach(), before - 0.1 * ratio * grad, rtol=1e-12, atol=0)


def test_salr_measures_anew_after_a_measurement_that_failed() -> None:
    model = make_net(f32)
    opt = salr(model.named_parameters(), lr=0.1, every=2)
    inner = make_closure(model, batches(1, f32)[0])
    calls = 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ValueError("in a branch")
        return inner()

    with pytest.raises(ValueError, match="in a branch"):
        opt.step(failing)
    assert int(opt.stats["steps"]) == 0
    opt.step(inner)
    assert float(opt.stats["sharpness"]) > 0
