"""Options that move between steps: schedulers, a tensor for the learning rate, groups edited by hand (contract 8)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from methods import METHODS, RULES, SGD, AdamW, Method, every_base, every_method
from models import assert_same_bits, batches, make_closure, make_net, relative_error, train, train_by_hand, weights
from torch import nn

import sharpkern as sk

SCHEDULERS = {
    "StepLR": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.5),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=8),
    "ReduceLROnPlateau": lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, threshold=10.0),
    "of base_optimizer": lambda opt: torch.optim.lr_scheduler.StepLR(getattr(opt, "base_optimizer", opt), 2, 0.5),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@every_base
@every_method
def test_schedulers(method: Method, base: str, scheduler: str) -> None:
    """They see the groups, move their lr, which no step writes to, and do not warn."""
    for by_hand in (False, True) if method.by_hand else (False,):
        ours, theirs = make_net(), make_net()
        opt, naive = method.make(ours.named_parameters(), base), method.oracle(theirs.named_parameters(), base)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
            schedules = [SCHEDULERS[scheduler](opt), SCHEDULERS[scheduler](naive.base)]
            for batch in batches(6):
                (train_by_hand if by_hand else train)(ours, opt, [batch])
                naive.step(make_closure(theirs, batch))
                for schedule in schedules:
                    schedule.step(1.0) if scheduler == "ReduceLROnPlateau" else schedule.step()
                assert opt.param_groups[0]["lr"] == naive.param_groups[0]["lr"]
        assert opt.param_groups[0]["lr"] != RULES[base][1]["lr"]
        # RMSprop with a large lr amplifies rounding; a wrong lr would show in the third digit.
        assert relative_error(ours, theirs) < 1e-8


@pytest.mark.parametrize("base", ["momentum", "adamw", "wrapped"])
@every_method
def test_a_tensor_lr(method: Method, base: str) -> None:
    a, b = make_net(), make_net()
    lr = torch.tensor(0.02, dtype=torch.float64)
    tensor, number = method.make(a.named_parameters(), base, lr=lr), method.make(b.named_parameters(), base, lr=0.02)
    for i, batch in enumerate(batches(4)):
        if i == 2:
            lr.fill_(0.01)
            number.param_groups[0]["lr"] = 0.01
        tensor.step(make_closure(a, batch))
        number.step(make_closure(b, batch))
        assert tensor.param_groups[0]["lr"] is lr
        assert lr == (0.02 if i < 2 else 0.01)
    assert relative_error(a, b) < 1e-12


@every_method
def test_options_may_change_between_steps(method: Method) -> None:
    """Momentum from 0, away and back again; weight decay; the radius and what else a group has."""
    ours, theirs = make_net(), make_net()
    opt, naive = (make(m.named_parameters(), "sgd", lr=0.05)
                  for make, m in ((method.make, ours), (method.oracle, theirs)))  # fmt: skip
    for i, batch in enumerate(batches(8)):
        for group in (opt.param_groups[0], naive.param_groups[0]):
            group["momentum"] = 0.0 if i in (0, 1, 5) else 0.9
            group["weight_decay"] = 0.01 * i
            group["rho"] = group["eta"] = 0.05 * (i + 1)
        opt.step(make_closure(ours, batch))
        naive.step(make_closure(theirs, batch))
    assert relative_error(ours, theirs) < 1e-12


def test_adaptive_may_change_between_steps() -> None:
    p = nn.Parameter(torch.full((4,), 2.0))
    opt = sk.SAM([p], SGD, rho=1.0, lr=0.0)
    p.grad = torch.ones(4)
    for adaptive, moved in ((False, 2.5), (True, 3.0), (False, 2.5)):
        opt.param_groups[0]["adaptive"] = adaptive
        opt.first_step()
        torch.testing.assert_close(p.detach(), torch.full((4,), moved))
        opt.second_step()


@every_method
def test_amsgrad_may_be_turned_on(method: Method) -> None:
    ours, theirs = make_net(), make_net()
    opt, naive = (make(m.named_parameters(), AdamW, lr=1e-2)
                  for make, m in ((method.make, ours), (method.oracle, theirs)))  # fmt: skip
    for i, batch in enumerate(batches(5)):
        if i == 2:
            for each in (opt, naive):
                each.param_groups[0]["amsgrad"] = True
            for p in theirs.parameters():  # torch would miss it
                naive.base.state[p]["max_exp_avg_sq"] = torch.zeros_like(p)
        opt.step(make_closure(ours, batch))
        naive.step(make_closure(theirs, batch))
    assert relative_error(ours, theirs) < 1e-12


def test_one_shared_list_of_groups() -> None:
    """A wrapped optimizer and a script's opt.base_optimizer see the groups that the user edits."""
    seen: list[Any] = []

    class Spy(torch.optim.RMSprop):
        def step(self, closure: Any = None) -> Any:
            seen.append((self.param_groups, [group["lr"] for group in self.param_groups], self.state))
            return super().step(closure)

    model = make_net()
    opt = METHODS["sam"].make(model.named_parameters(), Spy, lr=0.01)
    assert opt.base_optimizer.param_groups is opt.param_groups
    for lr in (0.01, 0.002):
        opt.param_groups[0]["lr"] = lr
        train(model, opt, batches(1))
        groups, lrs, state = seen[-1]
        assert groups is opt.param_groups
        assert lrs == [lr]
        assert state is opt.state
    before = weights(model)
    opt.param_groups[0]["lr"] = 0.0
    train(model, opt, batches(1))
    assert_same_bits(weights(model), before)
