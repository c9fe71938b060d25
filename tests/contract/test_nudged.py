"""What NudgedSGD does beyond the contract: its directions, and where it is SGD."""

from __future__ import annotations

import copy
import importlib.util
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from methods import METHODS, RULES, SGD, orthonormal
from models import assert_same_bits, batches, make_closure, make_net, relative_error, state_of, train, weights
from torch import Tensor, nn

import sharpkern as sk

NUDGED = METHODS["nudged"]
f32, f64 = torch.float32, torch.float64


def made(dtype: torch.dtype = f64, rule: str = "momentum", **more: Any) -> tuple[nn.Module, Any]:
    """A model and its optimizer, without directions."""
    model = make_net(dtype)
    return model, sk.NudgedSGD(model.named_parameters(), **{**RULES[rule][1], **more})


def directions(model: nn.Module, k: int = 3) -> Tensor:
    return orthonormal(model.parameters(), k)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "dampening"])
def test_two_hundred_steps(rule: str) -> None:
    """Against the recursion written down, with a schedule of the nudge and other directions on the way."""
    models = make_net(f64), make_net(f64)
    opts = [make(m.named_parameters(), rule) for make, m in zip((NUDGED.make, NUDGED.oracle), models, strict=True)]
    for t, batch in enumerate(batches(200)):
        for model, opt in zip(models, opts, strict=True):
            opt.param_groups[0]["nudge"] = 0.01 + t % 3
            if t == 90:
                opt.refresh(directions(model, 4).flip(0))
            opt.step(make_closure(model, batch))
    assert relative_error(*models) < 1e-10


@pytest.mark.parametrize("rule", ["sgd", "momentum", "dampening"])
@pytest.mark.parametrize("how", ["nudge 1", "k 0", "none", "none any more", "by hand", "of the rule"])
def test_it_is_sgd_to_the_bit(rule: str, how: str) -> None:
    """The fused rule's, which a plain step of SAM's has; in two groups with a maximize of their own."""
    nets = make_net(f32), make_net(f32)
    groups = [
        [dict(params=ps[:4], lr=0.02), dict(params=ps[4:], maximize=True)]
        for ps in (list(m.parameters()) for m in nets)
    ]
    opt = sk.NudgedSGD(groups[0], nudge=1.0 if how == "nudge 1" else 0.1, k=0 if how == "k 0" else 5, **RULES[rule][1])
    rule_alone = sk.SSSAM(groups[1], SGD, p=0.0, **RULES[rule][1])
    if how in ("nudge 1", "none any more"):
        opt.refresh(directions(nets[0]))
    if how == "none any more":
        opt.refresh(None)
    assert opt.directions == (3 if how == "nudge 1" else 0)
    for batch in batches(5, f32):
        if how == "by hand":
            opt.zero_grad()
            make_closure(nets[0], batch)()
            assert not opt.first_step()
            opt.second_step()
        else:
            opt.step(make_closure(nets[0], batch))
        rule_alone.step(make_closure(nets[1], batch))
    assert_same_bits(weights(nets[0]), weights(nets[1]))


def test_a_step_is_one_however_it_is_taken() -> None:
    """step(), step(closure) and by hand: the same bits, the same counts, nothing said."""
    ends = []
    for how in ("step", "closure", "hand"):
        model, opt = made(f32)
        opt.refresh(directions(model))
        for batch in batches(4, f32):
            closure = make_closure(model, batch)
            if how == "closure":
                opt.step(closure)
                continue
            opt.zero_grad()
            closure()
            if how == "hand":
                assert not opt.first_step(zero_grad=True)
                opt.second_step()
            else:
                opt.step()
        assert {k: int(v) for k, v in opt.stats.items() if k != "grad_norm"} == {
            "steps": 4, "second_passes": 0, "skipped_steps": 0, "base_steps": 0
        }  # fmt: skip
        ends.append({**weights(model), **state_of(opt), **opt.stats})
    assert_same_bits(ends[0], ends[1])
    assert_same_bits(ends[0], ends[2])


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_the_products_are_over_all_dtypes(max_norm: float | None) -> None:
    """Two layouts, and parameters without a gradient in a step or frozen: their slots stay, they are no part of it."""
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(70), torch.randn(33), torch.randn(4)]
    kinds = [f64, f32, f64, f64]
    ours = [nn.Parameter(p.to(dtype)) for p, dtype in zip(start, kinds, strict=True)]
    theirs = [nn.Parameter(p.to(dtype).double()) for p, dtype in zip(start, kinds, strict=True)]
    limit = {} if max_norm is None else {"max_grad_norm": max_norm}
    opt, naive = NUDGED.make(ours, "momentum", **limit), NUDGED.oracle(theirs, "momentum", **limit)
    for params in (ours, theirs):
        params[3].requires_grad_(False)
    for t in range(6):
        taken = [i for i in range(4) if i != t % 3]
        for each, params in ((opt, ours), (naive, theirs)):

            def closure(params: Any = params, taken: Any = taken) -> Tensor:
                loss = torch.stack([params[i].cos().double().sum() for i in taken]).sum()
                loss.backward()
                return loss

            each.step(closure)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=2e-5 if p.dtype == f32 else 1e-7, atol=1e-6)
    assert torch.equal(ours[3], start[3].double())


def test_half_precision_has_directions_in_float32() -> None:
    model, opt = made(torch.bfloat16)
    opt.refresh(directions(model))
    train(model, opt, batches(2, torch.bfloat16))
    assert {opt.state[p][name].dtype for p in model.parameters() for name in NUDGED.state} == {f32}


# Directions.


def test_every_form_of_directions() -> None:
    flat = directions(make_net())
    ends = []
    for form in ("flat", "lists", "object", "object of lists"):
        model, opt = made()
        parts = [list(row.split([p.numel() for p in model.parameters()])) for row in flat]
        lists = [[x.view(p.shape) for x, p in zip(row, model.parameters(), strict=True)] for row in parts]
        given: Any = flat if "flat" in form else lists
        if "object" in form:
            given = SimpleNamespace(vectors=lists if "lists" in form else flat, values=torch.tensor([3.0, 2.0, 1.0]))
        opt.refresh(given)
        train(model, opt, batches(2))
        ends.append(weights(model))
    assert all(assert_same_bits(end, ends[0]) is None for end in ends)


def test_directions_that_are_read_from_the_state() -> None:
    """In another order, in the memory that they are written to."""
    flat = directions(make_net())
    ends = []
    for read in (False, True):
        model, opt = made()
        opt.refresh(flat)
        train(model, opt, batches(1))
        params = list(model.parameters())
        there = [[opt.state[p][f"eigenvector_{i}"] for p in params] for i in (2, 0, 1)]
        opt.refresh(there if read else flat[[2, 0, 1]])
        train(model, opt, batches(2))
        ends.append(weights(model))
    assert_same_bits(ends[0], ends[1])


def test_directions_of_no_positive_curvature_are_left_out() -> None:
    """And what is beyond k is."""
    flat = directions(make_net(), 6)
    ends = []
    for given, values in (
        (flat, [5.0, -4.0, 3.0, 0.0, 2.0, 1.0]),
        (flat[[0, 2, 4]], None),
        (flat[[0, 2, 4, 5]], [1.0] * 4),
    ):
        model, opt = made(k=3)
        opt.refresh(given, values)
        assert opt.directions == 3
        train(model, opt, batches(2))
        ends.append(weights(model))
    assert_same_bits(ends[0], ends[1])
    assert_same_bits(ends[0], ends[2])


def test_fewer_directions_leave_nothing_of_more() -> None:
    """In the state neither, of which a saved number tells."""
    model, opt = made()
    fresh, other = made()
    flat = directions(model, 5)
    for k in (5, 2):
        opt.refresh(flat[:k])
    other.refresh(flat[:2])
    for m, o in ((model, opt), (fresh, other)):
        train(m, o, batches(2))
    assert_same_bits(weights(model), weights(fresh))
    assert_same_bits(state_of(opt), state_of(other))
    numbers = opt.state_dict()["sharpkern"]
    assert numbers["directions"] == 2
    assert [round(float(numbers[f"eigenvector_{i}_squared_norm"]), 6) for i in range(5)] == [1, 1, 0, 0, 0]


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "elements": (lambda e: e[:, 1:], ValueError, r"\[K, \d+\].*shape \(3, "),
    "one row": (lambda e: e[0], ValueError, r"\[K, \d+\]"),
    "length": (lambda e: 1.01 * e, ValueError, r"orthonormal.*0\.0201"),
    "angle": (lambda e: torch.stack([e[0], e[0]]), ValueError, "orthonormal"),
    "nan": (lambda e: e * math.nan, ValueError, "orthonormal"),
    "inf": (lambda e: torch.full_like(e, math.inf), ValueError, "orthonormal"),
    "shapes": (lambda e: [[e[0]]], ValueError, r"direction 0 should be \d+ tensors .* got 1"),
    "no tensors": (lambda e: [[1.0, 2.0]], ValueError, "direction 0 should be"),
    "number": (lambda e: 3, TypeError, "got int"),
    "values": (lambda e: SimpleNamespace(vectors=e, values=[1.0]), ValueError, "eigenvalue for each of 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_directions_change_nothing(case: str) -> None:
    change, error, message = BAD[case]
    model, opt = made()
    flat = directions(model)
    opt.refresh(flat)
    before = state_of(opt)
    with pytest.raises(error, match=message):
        opt.refresh(change(flat))
    assert_same_bits(state_of(opt), before)
    assert opt.directions == 3
    twin, other = made()
    other.refresh(flat)
    for m, o in ((model, opt), (twin, other)):
        train(m, o, batches(2))
    assert_same_bits(weights(model), weights(twin))


def test_nearly_orthonormal_directions_are_taken() -> None:
    model, opt = made(f32)
    opt.refresh(1.0004 * directions(model))
    assert opt.directions == 3


def test_no_refresh_between_two_passes() -> None:
    model, opt = made()
    make_closure(model, batches(1)[0])()
    opt.first_step()
    with pytest.raises(RuntimeError, match=r"refresh\(\) between two passes"):
        opt.refresh(directions(model))
    opt.second_step()
    opt.refresh(directions(model))


def test_options_of_a_loss_are_for_a_loss() -> None:
    model, opt = made()
    with pytest.raises(TypeError, match="tol"):
        opt.refresh(directions(model), tol=0.1)


@pytest.mark.parametrize("way", ["state dict", "deepcopy"])
def test_directions_are_saved(way: str) -> None:
    """Into an optimizer that has others, or none."""
    model, opt = made()
    opt.refresh(directions(model, 5)[3:])
    train(model, opt, batches(2))
    if way == "deepcopy":
        twin, other = copy.deepcopy((model, opt))
    else:
        twin, other = made()
        other.refresh(directions(twin, 4))
        twin.load_state_dict(model.state_dict())
        other.load_state_dict(opt.state_dict())
    assert other.directions == 2
    for m, o in ((model, opt), (twin, other)):
        train(m, o, batches(3))
    assert_same_bits(weights(model), weights(twin))
    assert_same_bits(state_of(opt), state_of(other))


def test_a_state_dict_of_sgd_has_no_directions() -> None:
    model, opt = made()
    opt.refresh(directions(model))
    plain = SGD(model.parameters(), **RULES["momentum"][1])
    make_closure(model, batches(1)[0])()
    plain.step()
    with pytest.warns(UserWarning, match="directions"):
        opt.load_state_dict(plain.state_dict())
    assert opt.directions == 0


def test_more_directions_than_saved() -> None:
    model, fresh = make_net(), make_net(seed=1)
    opt = sk.NudgedSGD(model.parameters(), lr=0.1, momentum=0.9, k=2)
    opt.refresh(orthonormal(model.parameters(), 2))
    train(model, opt, batches(2))
    other = sk.NudgedSGD(fresh.parameters(), lr=0.1, momentum=0.9, k=4)
    other.refresh(orthonormal(fresh.parameters(), 4))
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(opt.state_dict())
    assert other.directions == 2
    train(model, opt, batches(2))
    train(fresh, other, batches(2))
    assert_same_bits(weights(fresh), weights(model))


def test_fewer_directions_than_saved() -> None:
    model, opt = made()
    opt.refresh(directions(model, 5))
    saved = opt.state_dict()
    fresh, other = made(k=2)
    other.load_state_dict(saved)
    assert other.directions == 2
    twin, two = made(k=2)
    two.refresh(directions(twin, 5)[:2])
    for m, o in ((fresh, other), (twin, two)):
        train(m, o, batches(2))
    assert_same_bits(weights(fresh), weights(twin))


@pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="the extra `analysis` is not installed")
@pytest.mark.parametrize("form", ["function", "pairs"])
def test_directions_of_a_loss(form: str) -> None:
    """The top of the Hessian, of which a dense one tells; a frozen parameter is no part of it."""
    torch.manual_seed(0)
    matrix = torch.randn(9, 9, dtype=f64)
    hessian = matrix @ matrix.t() - 4 * torch.eye(9, dtype=f64)
    w, frozen = nn.Parameter(torch.randn(3, 3, dtype=f64)), nn.Parameter(torch.ones(2, dtype=f64), requires_grad=False)
    opt = sk.NudgedSGD([frozen, w], lr=0.1, nudge=0.0, k=2)

    def value() -> Tensor:
        x = w.flatten()
        return 0.5 * x @ hessian @ x + frozen.sum()

    def loss() -> Any:
        return value() if form == "function" else [(value(), 3), (value(), 5)]

    opt.refresh(loss, tol=1e-12)
    values, vectors = torch.linalg.eigh(hessian)
    assert opt.directions == min(2, int((values > 0).sum()))
    for i in range(opt.directions):
        product = (opt.state[w][f"eigenvector_{i}"].flatten() @ vectors[:, -1 - i]).abs()
        assert float(product) == pytest.approx(1, abs=1e-6)
    assert not any(name.startswith("eigen") for name in opt.state.get(frozen, {}))
    value().backward()
    step = w.detach().clone()
    opt.step()
    step -= w.detach()
    assert float((step.flatten() @ vectors[:, -2:]).abs().max()) < 1e-6  # nudge 0: nothing of the step is along them
    assert float(step.norm()) > 1e-3


# Arguments.


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"nudge": -0.1}, ValueError, "Invalid nudge: -0.1"),
        ({"nudge": math.inf}, ValueError, "Invalid nudge: inf"),
        ({"nudge": "large"}, TypeError, "nudge should be a number"),
        ({"k": -1}, ValueError, "Invalid k: -1"),
        ({"k": 9}, ValueError, "Invalid k: 9.* 8 directions"),
        ({"k": 2.0}, TypeError, "k should be an integer"),
        ({"k": False}, TypeError, "k should be an integer"),
        ({"nesterov": True}, ValueError, "nesterov=True"),
        ({"momentum": -0.9}, ValueError, "Invalid momentum value: -0.9"),
        *(({name: 0.5}, TypeError, f"takes no {name}=") for name in ("policy", "model", "perturb_eps", "rho")),
        ({"base_optimizer": SGD}, TypeError, "takes no base_optimizer="),
    ],
    ids=str,
)
def test_bad_arguments(more: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        made(**more)


def test_a_group_may_not_have_nesterov() -> None:
    _, opt = made()
    with pytest.raises(ValueError, match="nesterov=True"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "nesterov": True})
    with pytest.raises(ValueError, match="Invalid nudge: -1"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "nudge": -1})


def test_eigenpairs_tell_their_order() -> None:
    """Those of a model, for an optimizer whose groups have another one, or that has more parameters."""
    analysis = pytest.importorskip("sharpkern.analysis")
    model, (x, y) = make_net(), batches(1)[0]
    params = list(model.parameters())
    model.conv.weight.requires_grad_(False)
    groups = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.1}]
    opt = sk.NudgedSGD(groups, lr=0.1, k=2)
    found = analysis.top_eigenvalues(model, nn.functional.cross_entropy, [(x, y)], 2, which="LA")
    opt.refresh(found)
    for i in range(2):
        parts = dict(zip(found.params, found.as_parameters(i), strict=True))
        for p in params:
            got = opt.state[p].get(f"eigenvector_{i}", torch.zeros_like(p))
            assert torch.equal(got, parts.get(p, torch.zeros_like(p)))
    with pytest.raises(ValueError, match="has a part|have a part"):
        sk.NudgedSGD(params[:4], lr=0.1, k=2).refresh(found)


def test_a_value_of_the_users_among_the_state_is_no_parameters() -> None:
    model = make_net()
    base = torch.optim.SGD(model.parameters(), lr=0.3)
    base.state["note"] = 5  # type: ignore[index]
    opt = sk.NudgedSGD(model.parameters(), lr=0.1)
    opt.load_state_dict(base.state_dict())
    assert opt.param_groups[0]["lr"] == 0.3
