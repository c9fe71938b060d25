"""Corners in which a fault shows nowhere else: each was found by breaking a line that no other test held."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, RMSprop

import sharpkern as sk
from sharpkern.policy import Adaptive, Statistics


def param(*values: float, grad: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float32), requires_grad=grad)


def loss_of(*ps: Tensor) -> Any:
    loss = sum(p.pow(4).sum() for p in ps)
    loss.backward()
    return loss


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_no_gradient_is_held_between_passes(p: float) -> None:
    w = param(1.0, 2.0)
    opt = sk.SSSAM([w], SGD, lr=0.1, p=p)
    loss_of(w)
    held = weakref.ref(w.grad)
    opt.first_step()
    w.grad = None
    assert held() is None


@pytest.mark.parametrize("cls", [sk.GSAM, sk.LookSAM])
def test_the_mixed_gradient_is_gone_after_the_step(cls: Any) -> None:
    w = param(1.0, 2.0)
    opt = cls([w], RMSprop, lr=0.01, **({"k": 2} if cls is sk.LookSAM else {}))
    seen: list[Tensor] = []

    def closure() -> Any:
        loss = (w.pow(4) * torch.tensor([1.0, 3.0])).sum()
        loss.backward()
        seen.append(w.grad.clone())
        return loss

    for _ in range(2):
        opt.step(closure)
        assert torch.equal(w.grad, seen[-1])


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (SGD, {}),
        (SGD, {"momentum": 0.9}),
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {"weight_decay": 0.0}),
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (None, {"momentum": 0.9}),
        (None, {}),
    ],
)
def test_a_decay_of_0_does_not_touch_an_infinite_weight(base: Any, options: dict[str, Any], backend: str) -> None:
    """A mask that is learnt, say: its gradient is 0 there."""
    w, twin = param(1.0, -math.inf, -2.0), param(1.0, -math.inf, -2.0)
    if base is None:
        opt: Any = sk.NudgedSGD([w], lr=0.1, nudge=1.5, **options)
        opt.refresh(torch.tensor([[0.0, 0.0, 1.0]]))
        plain: Any = SGD([twin], lr=0.1, **options)
    else:
        opt, plain = sk.SAM([w], base, rho=0.0, lr=0.1, **options), base([twin], lr=0.1, **options)
    scale = torch.tensor([1.0, 0.0, 1.0]) if base else torch.tensor([1.0, 0.0, 0.0])

    def closure(p: Tensor) -> None:
        p.grad = None
        p.backward(scale * p.detach().nan_to_num(neginf=0.0))

    for _ in range(3):
        opt.step(lambda: closure(w))
        closure(twin)
        plain.step()
    torch.testing.assert_close(w, twin)
    assert int(opt.stats["skipped_steps"]) == 0


def test_salr_leaves_flat_gradients_flat() -> None:
    ps = [param(1.0, 2.0), param(3.0)]
    opt = sk.SALR(ps, SGD, lr=0.01, flatten=True)
    opt.step(lambda: loss_of(*ps))
    where = [p.grad.data_ptr() for p in ps]
    opt.step(lambda: loss_of(*ps))
    assert [p.grad.data_ptr() for p in ps] == where


def test_salr_flat_gradient_in_a_branch_only() -> None:
    w, v = param(1.0, 2.0), param(3.0)
    opt = sk.SALR([w, v], SGD, lr=0.01, flatten=True)
    calls: list[int] = []

    def closure() -> Any:
        if not calls:
            v.grad = None
        calls.append(1)
        return loss_of(w) if len(calls) == 1 else loss_of(w, v)

    opt.step(closure)
    assert len(calls) > 1
    assert v.item() == 3.0


@pytest.mark.parametrize("resumed", [False, True])
def test_g_v_of_a_frozen_parameter_goes_with_a_refresh(resumed: bool) -> None:
    """With one that takes place; until then it is a part of the direction, whose norm is its."""
    w, v = param(1.0, 2.0), param(3.0)
    opt = sk.LookSAM([w, v], SGD, lr=0.01, k=2)
    opt.step(lambda: loss_of(w, v))
    v.requires_grad_(False)
    v.grad = None
    if resumed:
        opt, saved = sk.LookSAM([w, v], SGD, lr=0.01, k=2), opt.state_dict()
        opt.load_state_dict(saved)
    g_v = torch.cat([opt.state[p]["g_v"] for p in (w, v)])
    assert g_v.all()
    w.grad = 4 * w.detach() ** 3
    expected = w.detach() - 0.01 * (w.grad + 0.7 * w.grad.norm() / g_v.norm() * g_v[:2])
    opt.step(lambda: loss_of(w))
    torch.testing.assert_close(w.detach(), expected)

    def broken() -> Tensor:
        loss = loss_of(w)
        w.grad.fill_(math.nan)
        return loss

    opt.step(broken)  # a refresh that is skipped
    assert torch.equal(opt.state[v]["g_v"], g_v[2:])
    assert int(opt.stats["skipped_steps"]) == 1
    for _ in range(2):
        opt.step(lambda: loss_of(w))
    assert not opt.state[v]["g_v"].any()


def test_thawed_without_a_first_gradient() -> None:
    w, v = param(1.0), param(3.0, grad=False)
    opt = sk.SAM([w, v], SGD, lr=0.01)
    opt.step(lambda: loss_of(w))
    opt.zero_grad()
    v.requires_grad_()
    loss_of(w)
    opt.first_step(zero_grad=True)
    loss_of(w, v)
    opt.second_step()
    assert v.item() != 3.0


def test_frozen_with_a_gradient_by_hand() -> None:
    w, v = param(1.0), param(3.0, grad=False)
    opt = sk.SAM([w, v], SGD, lr=0.01)
    opt.step(lambda: loss_of(w))
    v.grad = torch.ones(1)
    opt.step()
    assert v.item() == pytest.approx(2.99)


def test_frozen_and_moved_between_passes_then_restored() -> None:
    w, v = param(1.0, 2.0), param(3.0)
    opt = sk.SAM([w, v], SGD, lr=0.01)
    loss_of(w, v)
    opt.first_step(zero_grad=True)
    v.requires_grad_(False)
    w.data = w.data.double()
    opt.restore()
    assert v.item() == 3.0


def test_replaced_between_passes_then_restored() -> None:
    w, v = param(1.0, 2.0), param(3.0)
    opt = sk.SAM([w, v], SGD, lr=0.01)
    loss_of(w, v)
    opt.first_step(zero_grad=True)
    opt.param_groups[0]["params"][1] = param(5.0)
    opt.restore()
    assert v.item() == 3.0


def test_state_replaced_by_another_of_the_same_size() -> None:
    w = param(1.0, 2.0)
    opt = sk.SAM([w], SGD, lr=0.01, momentum=0.9)
    opt.step(lambda: loss_of(w))
    opt.state = defaultdict(dict, {w: {k: torch.zeros_like(x) for k, x in opt.state[w].items()}})
    opt.step(lambda: loss_of(w))
    assert opt.state[w]["momentum_buffer"].any()


def test_a_loaded_dict_is_not_written_to() -> None:
    w = param(1.0, 2.0)
    opt = sk.SAM([w], SGD, lr=0.01)
    opt.step(lambda: loss_of(w))
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    opt.load_state_dict(saved)
    opt.step(lambda: loss_of(w))
    assert torch.equal(saved["sharpkern"]["counters"], kept["sharpkern"]["counters"])


def test_counters_of_another_length_are_refused() -> None:
    opt = sk.SAM([param(1.0)], SGD, lr=0.01)
    saved = opt.state_dict()
    saved["sharpkern"]["counters"] = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="counters"):
        opt.load_state_dict(saved)


def test_a_loaded_dict_is_not_held() -> None:
    opt = sk.SAM([param(1.0)], SGD, lr=0.01)
    saved = opt.state_dict()
    ref = weakref.ref(saved["sharpkern"]["counters"])
    opt.load_state_dict(saved)
    del saved
    gc.collect()
    assert ref() is None


def test_at_the_threshold_it_fires() -> None:
    assert Adaptive(10, 0.0, 0.0, 0.0).update(Statistics(), 0, 1.0)[1]


def test_stats_are_copies() -> None:
    w = param(1.0, 2.0)
    opt = sk.SAM([w], SGD, lr=0.01)
    opt.step(lambda: loss_of(w))
    stats = opt.stats
    opt.step(lambda: loss_of(w))
    assert int(stats["second_passes"]) == 1


def test_autocast_after_a_step() -> None:
    m = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    opt = sk.SAM(m.parameters(), SGD, lr=0.5)

    def closure() -> Any:
        loss = m(x).pow(2).sum()
        loss.backward()
        return loss

    device = torch.get_default_device().type
    with torch.autocast(device, dtype=torch.bfloat16):
        opt.step(closure)
        inside = m(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(inside, m(x))


def test_no_gradient_leaves_the_statistics() -> None:
    w = param(1.0, 2.0)
    opt = sk.AESAM([w], SGD, lr=0.01, total_steps=10)
    opt.step(lambda: loss_of(w))
    before = opt.stats["ema_mean"]
    opt.step(lambda: w.sum())
    assert torch.equal(opt.stats["ema_mean"], before)


def test_g_v_of_another_shape() -> None:
    w = param(1.0, 2.0)
    opt = sk.LookSAM([w], SGD, lr=0.01)
    opt.step(lambda: loss_of(w))
    opt.state = defaultdict(dict, {w: {"g_v": torch.zeros(1)}})
    with pytest.raises(RuntimeError, match="its state g_v"):
        opt.step(lambda: loss_of(w))


def test_loading_an_empty_state_clears() -> None:
    w = param(1.0, 2.0)
    opt = sk.SAM([w], SGD, lr=0.01, momentum=0.9)
    fresh = opt.state_dict()
    opt.step(lambda: loss_of(w))
    opt.load_state_dict(fresh)
    assert not opt.state


def test_a_wrapped_optimizers_numbers_keep_their_dtype() -> None:
    """NAdam's product of momentums is float32 whatever the parameters are."""
    p = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    opts = [sk.SAM([p], torch.optim.NAdam, lr=0.01) for _ in range(2)]
    opts[0].step(lambda: loss_of(p))
    opts[1].load_state_dict(opts[0].state_dict())
    assert opts[0].state[p]["mu_product"].dtype == opts[1].state[p]["mu_product"].dtype == torch.float32
    assert opts[1].state[p]["exp_avg"].dtype == torch.float64


def test_adamw_group_without_the_key() -> None:
    ws = [param(1.0, 2.0), param(1.0, 2.0)]
    opts = [sk.SAM([w], torch.optim.AdamW, lr=0.01, weight_decay=0.5) for w in ws]
    opts[0].param_groups[0].pop("decoupled_weight_decay")
    for w, opt in zip(ws, opts, strict=True):
        opt.step(lambda w=w: loss_of(w))
    assert torch.equal(*ws)


def test_salr_lr_0_and_a_base_that_changes_it() -> None:
    class Halving(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            self.param_groups[0]["lr"] *= 0.5

    w = param(1.0, 2.0)
    opt = sk.SALR([w], Halving, lr=1e-3, every=1)
    for i in range(4):
        if i == 3:
            opt.param_groups[0]["lr"] = 0.0
        with torch.no_grad():
            w.mul_(1.5)
        opt.step(lambda: loss_of(w))
    assert opt.param_groups[0]["lr"] == 0.0
    assert float(opt.stats["lr_scale"]) != 1


def test_looksam_with_alpha_0_launches_no_mix() -> None:
    from test_errors import Kernels

    w = param(1.0, 2.0)
    opt = sk.LookSAM([w], SGD, lr=0.01, k=2, alpha=0.0)
    opt.step(lambda: loss_of(w))
    with Kernels() as kernels:
        opt.step(lambda: loss_of(w))
    assert kernels.seen
    assert "mix" not in kernels.seen
