"""Bad input gets an error that names the argument or the parameter, before anything changed (contract 13)."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import Method, every_method
from torch import nn

import sharpkern as sk

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))]


class NeedsClosure(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return closure()


class NoLr(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self) -> None: ...  # type: ignore[override]


class Wrapped(torch.Tensor):
    """A tensor whose elements are another one's, with no more than torch asks of it."""

    elements: torch.Tensor

    @staticmethod
    def __new__(cls, elements: torch.Tensor) -> Wrapped:
        wrapped = torch.Tensor._make_wrapper_subclass(cls, elements.size(), dtype=elements.dtype)
        wrapped.elements = elements
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*(a.elements if isinstance(a, Wrapped) else a for a in args), **(kwargs or {}))
        return cls(out) if isinstance(out, torch.Tensor) else out


shared = nn.Parameter(torch.ones(3))
memory = torch.ones(10)
CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "rho negative": (lambda: sk.SAM(params(), SGD, rho=-0.1, lr=0.1), ValueError, "Invalid rho: -0.1"),
    "rho nan": (lambda: sk.SAM(params(), SGD, rho=math.nan, lr=0.1), ValueError, "Invalid rho: nan"),
    "rho inf": (lambda: sk.ASAM(params(), SGD, rho=math.inf, lr=0.1), ValueError, "Invalid rho: inf"),
    "eps zero": (lambda: sk.SAM(params(), SGD, perturb_eps=0, lr=0.1), ValueError, "Invalid perturb_eps: 0"),
    "lazy": (
        lambda: sk.SAM(nn.LazyLinear(3).named_parameters(), SGD, lr=0.1),
        ValueError,
        "'weight' is not initialized",
    ),
    "differentiable in a group": (
        lambda: sk.SAM([{"params": params(), "differentiable": True}], torch.optim.RMSprop),
        ValueError,
        "differentiable=True",
    ),
    "rho text": (lambda: sk.SAM(params(), SGD, rho="big", lr=0.1), TypeError, "rho should be a number, but got 'big'"),
    "rho of a group": (lambda: sk.SAM([{"params": params(), "rho": -1}], SGD, lr=0.1), ValueError, "Invalid rho: -1"),
    "eta negative": (lambda: sk.ASAM(params(), SGD, eta=-0.5, lr=0.1), ValueError, "Invalid eta: -0.5"),
    "adaptive": (lambda: sk.SAM(params(), SGD, adaptive=2, lr=0.1), TypeError, "adaptive should be a bool"),
    **{
        f"p {p}": (lambda p=p: sk.SAM(params(), SGD, p=p, lr=0.1), ValueError, f"Invalid p: {p}")
        for p in (1, 1.0, 0.5, -2.0, math.nan, -math.inf, Fraction(10**20 + 1, 10**20))
    },
    **{
        f"p {p!r}": (lambda p=p: sk.AESAM(params(), SGD, p=p, total_steps=9, lr=0.1), TypeError, "p should be a number")
        for p in (True, "inf", None, 3j)
    },
    "p adaptive": (
        lambda: sk.SAM(params(), SGD, p=3, adaptive=True, lr=0.1),
        ValueError,
        "adaptive=True goes with p=2 only",
    ),
    "p adaptive group": (
        lambda: sk.SAM([{"params": params(), "adaptive": True}], SGD, p=math.inf, lr=0.1),
        ValueError,
        "adaptive=True goes with p=2 only, but p is inf",
    ),
    **{
        f"p of {cls.__name__}": (
            lambda cls=cls, more=more: cls(params(), SGD, p=3.0, lr=0.1, **more),
            TypeError,
            f"{cls.__name__} takes no p=, which is of SAM, SSSAM, AESAM",
        )
        for cls, more in {
            sk.ASAM: {},
            sk.LookSAM: {},
            sk.AELookSAM: {"total_steps": 9},
            sk.GSAM: {},
            sk.SALR: {},
        }.items()
    },
    "eps": (lambda: sk.SAM(params(), SGD, perturb_eps=-1, lr=0.1), ValueError, "Invalid perturb_eps: -1"),
    "max_grad_norm": (lambda: sk.SAM(params(), max_grad_norm=0, lr=0.1), ValueError, "Invalid max_grad_norm: 0"),
    "max_grad_norm nan": (lambda: sk.SAM(params(), max_grad_norm=math.nan), ValueError, "Invalid max_grad_norm: nan"),
    "model": (
        lambda: sk.SAM(params(), SGD, model="resnet", lr=0.1),
        TypeError,
        "model should be a torch.nn.Module, but got str",
    ),
    "tensor as model": (lambda: sk.SAM(params(), model=shared), TypeError, "got torch.nn.parameter.Parameter"),
    "lr": (lambda: sk.SAM(params(), SGD, lr=-0.5), ValueError, "Invalid learning rate: -0.5"),
    "lr of a group": (lambda: sk.SAM([{"params": params(), "lr": -2}], SGD), ValueError, "Invalid learning rate: -2"),
    "momentum": (lambda: sk.SAM(params(), SGD, lr=1, momentum=-1), ValueError, "Invalid momentum value: -1"),
    "weight decay": (lambda: sk.SAM(params(), AdamW, weight_decay=-1), ValueError, "Invalid weight_decay value: -1"),
    "betas": (lambda: sk.SAM(params(), Adam, betas=(1.5, 0.9)), ValueError, "Invalid beta parameter at index 0: 1.5"),
    "nesterov": (lambda: sk.SAM(params(), SGD, lr=1, nesterov=True), ValueError, "Nesterov momentum requires"),
    "differentiable": (lambda: sk.SAM(params(), SGD, differentiable=True), ValueError, "differentiable=True"),
    "differentiable wrapped": (
        lambda: sk.SAM(params(), torch.optim.RMSprop, differentiable=True),
        ValueError,
        "differentiable=True",
    ),
    "unknown keyword": (lambda: sk.SAM(params(), SGD, lr=0.1, momentun=0.9), TypeError, "'momentun'"),
    "unknown keyword wrapped": (lambda: sk.SAM(params(), torch.optim.RMSprop, momentun=0.9), TypeError, "'momentun'"),
    "colliding rho": (lambda: sk.SAM(params(), torch.optim.Adadelta), ValueError, "Adadelta.*'rho'.*SAM"),
    "instance": (lambda: sk.SAM(params(), SGD(params(), lr=0.1)), TypeError, "an instance of SGD"),
    "a model": (lambda: sk.SAM(nn.Linear(2, 2)), TypeError, "params should be those of the model, model.parameters"),
    "no optimizer": (lambda: sk.SAM(params(), nn.Linear), TypeError, "base_optimizer should be an optimizer class"),
    "none": (lambda: sk.SAM(params(), None), TypeError, "base_optimizer should be an optimizer class"),
    "two passes inside": (lambda: sk.SAM(params(), sk.ASAM), ValueError, "ASAM cannot be the base optimizer"),
    "LBFGS": (lambda: sk.SAM(params(), torch.optim.LBFGS), ValueError, "LBFGS cannot be the base.*closure"),
    "SparseAdam": (
        lambda: sk.SAM(params(), torch.optim.SparseAdam),
        ValueError,
        "SparseAdam cannot be the base.*sparse gradients",
    ),
    "closure base": (lambda: sk.SAM(params(), NeedsClosure), ValueError, "NeedsClosure cannot be the base"),
    "one tensor": (lambda: sk.SAM(params()[0], SGD, lr=0.1), TypeError, "params argument given to the optimizer"),
    "empty": (lambda: sk.SAM([], SGD, lr=0.1), ValueError, "optimizer got an empty parameter list"),
    "not a tensor": (lambda: sk.SAM([1.0], SGD, lr=0.1), TypeError, "can only optimize Tensors"),
    "no params key": (lambda: sk.SAM([{"lr": 0.1}], SGD), ValueError, "no 'params'"),
    "set": (lambda: sk.SAM([{"params": set(params())}], SGD), TypeError, "ordered collections"),
    "duplicate": (
        lambda: sk.SAM([shared, shared], SGD, lr=0.1),
        ValueError,
        "parameter 1 of group 0.*more than once.*twice",
    ),
    "duplicate in groups": (
        lambda: sk.SAM([{"params": [shared]}, {"params": [("w", shared)]}], SGD, lr=0.1),
        ValueError,
        "some parameters appear in more than one parameter group: parameter 'w'",
    ),
    "complex": (
        lambda: sk.SAM([("c", nn.Parameter(torch.ones(2, dtype=torch.complex64)))], SGD, lr=0.1),
        TypeError,
        "'c' has dtype torch.complex64",
    ),
    "wrapper": (
        lambda: sk.SAM([("w", Wrapped(torch.ones(3)).requires_grad_())], SGD, lr=0.1),
        TypeError,
        "'w' is a test_arguments.Wrapped: tensor subclasses",
    ),
    "not a leaf": (lambda: sk.SAM([params()[0] * 2], SGD, lr=0.1), ValueError, "non-leaf"),
    "sparse parameter": (
        lambda: sk.SAM([torch.eye(3).to_sparse().requires_grad_()], SGD, lr=0.1),
        TypeError,
        "parameter 0 of group 0 should be a dense tensor",
    ),
    "expanded": (
        lambda: sk.SAM([("e", torch.ones(3).expand(2, 3).detach().requires_grad_())], SGD, lr=0.1),
        ValueError,
        "'e' has elements that share memory",
    ),
    "flatten with gaps": (
        lambda: sk.SAM([("g", torch.ones(4, 6)[:, ::2].detach().requires_grad_())], SGD, lr=0.1, flatten=True),
        ValueError,
        "'g' has some",
    ),
    "backend": (lambda: sk.use_backend("cudnn").__enter__(), ValueError, "Invalid backend: 'cudnn'"),
}


def of(cls: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda p: cls(p, **{"lr": 0.1, **options})


def ae(**options: Any) -> Callable[[Any], Any]:
    return of(sk.AESAM, **{"total_steps": 10, **options})


FAMILY: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (of(sk.SSSAM, p=-0.1), ValueError, "Invalid p: -0.1"),
    (of(sk.SSSAM, p=1.5), ValueError, "Invalid p: 1.5"),
    (of(sk.SSSAM, p=math.nan), ValueError, "Invalid p: nan"),
    (of(sk.SSSAM, p="half"), TypeError, "p should be a number, but got 'half'"),
    (of(sk.SSSAM, p=True), TypeError, "p should be a number"),
    (of(sk.SSSAM, seed=0.5), TypeError, "seed should be an integer, but got 0.5"),
    (of(sk.SSSAM, rho=-1.0), ValueError, "Invalid rho: -1.0"),
    (of(sk.AESAM), TypeError, "total_steps"),
    (of(sk.AELookSAM), TypeError, "total_steps"),
    (ae(total_steps=0), ValueError, "Invalid total_steps: 0"),
    (ae(total_steps=-5), ValueError, "Invalid total_steps: -5"),
    (ae(total_steps=10.0), TypeError, "total_steps should be an integer"),
    (ae(decay=1.0), ValueError, "Invalid decay: 1.0"),
    (ae(decay=-0.1), ValueError, "Invalid decay: -0.1"),
    (ae(decay=math.nan), ValueError, "Invalid decay: nan"),
    (ae(lambda_end=math.nan), ValueError, "Invalid lambda_end: nan"),
    (ae(lambda_start="1"), TypeError, "lambda_start should be a number"),
    (ae(lambda_start=math.inf, lambda_end=-math.inf), ValueError, "Invalid lambda_end: -inf"),
    (ae(rho=-1), ValueError, "Invalid rho: -1"),
    (of(sk.LookSAM, k=0), ValueError, "Invalid k: 0"),
    (of(sk.LookSAM, k=2.5), TypeError, "k should be an integer"),
    (of(sk.LookSAM, k=True), TypeError, "k should be an integer"),
    (of(sk.LookSAM, alpha=-0.1), ValueError, "Invalid alpha: -0.1"),
    (of(sk.LookSAM, alpha=math.inf), ValueError, "Invalid alpha: inf"),
    (of(sk.AELookSAM, total_steps=9, alpha="x"), TypeError, "alpha should be a number"),
    (of(sk.LookSAM, adaptive=True), TypeError, "adaptive"),
    (of(sk.SALR, n_ascent=0), ValueError, "Invalid n_ascent: 0"),
    (of(sk.SALR, n_descent=1.5), TypeError, "n_descent should be an integer"),
    (of(sk.SALR, every=0), ValueError, "Invalid every: 0"),
    (of(sk.SALR, step_size=0.0), ValueError, "Invalid step_size: 0.0"),
    (of(sk.SALR, step_size=math.nan), ValueError, "Invalid step_size: nan"),
    (of(sk.SALR, max_lr_scale=0.0), ValueError, "Invalid max_lr_scale: 0.0"),
    (of(sk.SALR, max_lr_scale=math.nan), ValueError, "Invalid max_lr_scale: nan"),
    (of(sk.SALR, max_lr_scale="2"), TypeError, "max_lr_scale should be a number"),
    (of(sk.SALR, rho=0.05), TypeError, "rho"),
    (of(sk.SALR, lr=-0.5), ValueError, "Invalid learning rate: -0.5"),
    (of(sk.SALR, base_optimizer=sk.SAM), ValueError, "takes two passes itself"),
    (lambda p: sk.SALR(p, NoLr), ValueError, "NoLr has no learning rate"),
]


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments(case: str) -> None:
    make, error, message = CASES[case]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(("make", "error", "message"), FAMILY)
def test_bad_arguments_of_the_family(make: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    given = params()
    addresses = [p.data_ptr() for p in given]
    with pytest.raises(error, match=message):
        make(given)
    assert [p.data_ptr() for p in given] == addresses


# What every class refuses, and what it does with what they all have.

SHARED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "perturb_eps": ({"perturb_eps": 0}, ValueError, "Invalid perturb_eps: 0"),
    "max_grad_norm": ({"max_grad_norm": -1}, ValueError, "Invalid max_grad_norm: -1"),
    "model": ({"model": "resnet"}, TypeError, "model should be a torch.nn.Module"),
    "lr": ({"lr": -0.5}, ValueError, "Invalid learning rate: -0.5"),
    "keyword": ({"momentun": 0.9}, TypeError, "'momentun'"),
    "differentiable": ({"differentiable": True}, ValueError, "differentiable=True"),
    "two passes inside": ({"base_optimizer": sk.ASAM}, ValueError, "ASAM cannot be the base optimizer"),
    "instance": ({"base_optimizer": SGD(params(), lr=0.1)}, TypeError, "an instance of SGD"),
}


@pytest.mark.parametrize("case", SHARED)
@every_method
def test_bad_arguments_of_every_class(method: Method, case: str) -> None:
    more, error, message = SHARED[case]
    if method.one_pass and case in ("perturb_eps", "model"):
        more, error, message = {case: 1}, TypeError, f"takes no {case}"
    base = {"base": more["base_optimizer"]} if "base_optimizer" in more else {}
    with pytest.raises(error, match=message):
        method.make(params(), **base, **{"lr": 0.1, **{k: v for k, v in more.items() if k != "base_optimizer"}})


def test_what_is_refused_of_distributed_tensors(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.tensor import DTensor, Partial, distribute_tensor
    from torch.testing._internal.two_tensor import TwoTensor

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        weight = nn.Parameter(distribute_tensor(torch.ones(4, 2, device="cpu"), mesh))
        partial = nn.Parameter(DTensor.from_local(torch.ones(4, 2, device="cpu"), mesh, [Partial()]))
        with pytest.raises(TypeError, match=r"'weight' has placements \(Partial\(sum\),\): a parameter is sharded"):
            sk.SAM([("weight", partial)], SGD, lr=0.1)
        with pytest.raises(ValueError, match="flatten=True takes no DTensor, but parameter 'weight' is one"):
            sk.SAM([("weight", weight)], SGD, lr=0.1, flatten=True)
        with pytest.raises(TypeError, match="NudgedSGD takes no DTensor"):
            sk.NudgedSGD([weight])
        two = TwoTensor(torch.ones(2), torch.ones(2)).requires_grad_()
        with pytest.raises(TypeError, match=r"'weight' is a torch.testing.*TwoTensor: tensor subclasses other than"):
            sk.SAM([("weight", two)], SGD, lr=0.1)
        opt = sk.NudgedSGD([nn.Parameter(torch.ones(2))])
        with pytest.raises(TypeError, match="NudgedSGD takes no DTensor"):
            opt.add_param_group({"params": [weight]})
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("base", [SGD, torch.optim.RMSprop], ids=lambda b: b.__name__)
def test_integer_parameters_are_left_alone(base: Any) -> None:
    """They cannot require a gradient. One that is put there is an error, before anything changed."""
    count, weight = torch.arange(3), nn.Parameter(torch.ones(3))
    opt = sk.SAM([("count", count), ("weight", weight)], base, lr=0.1)
    weight.grad = torch.ones(3)
    opt.first_step()
    opt.second_step()
    before = weight.detach().clone()
    assert not torch.equal(before, torch.ones(3))
    count.grad = torch.ones(3, dtype=torch.int64)
    with pytest.raises(TypeError, match="'count' is torch.int64.*cannot be optimized"):
        opt.first_step()
    assert torch.equal(count, torch.arange(3))
    assert torch.equal(weight, before)
    assert not opt.is_perturbed


def test_overlapping_parameters_are_refused_before_anything_moves() -> None:
    a, b = (nn.Parameter(m) for m in (memory[:6], memory[4:]))
    with pytest.raises(ValueError, match="'a' and parameter 'b' share memory"):
        sk.SAM([("a", a), ("b", b)], SGD, lr=0.1)
    opt = sk.SAM([("a", a)], SGD, lr=0.1)
    with pytest.raises(ValueError, match="'b' share memory"):
        opt.add_param_group({"params": [("b", b)]})
    c = nn.Parameter(torch.ones(6))
    opt.add_param_group({"params": [("c", c)]})
    c.data = b.data
    a.grad, c.grad = torch.ones(6), torch.ones(6)
    before = memory.clone()
    with pytest.raises(ValueError, match="'a' and parameter 'c' share memory"):
        opt.first_step()
    assert torch.equal(memory, before)
    assert not opt.is_perturbed


@pytest.mark.parametrize("tied", ["all", "part", "gaps", "one element for all"])
def test_memory_that_comes_to_be_shared_is_refused_before_anything_moves(tied: str) -> None:
    """After steps; and where it was taken between two passes, in the next step."""
    for by_hand in (False, True) if tied != "one element for all" else (False,):
        wide = torch.ones(60)
        ties = {"all": wide[:24], "part": wide[20:44], "gaps": wide[:48:2], "one element for all": wide[-1:].expand(24)}
        a, b = nn.Parameter(wide[:24]), nn.Parameter(torch.full((24,), 2.0))
        opt = sk.SAM([a, b], SGD, rho=0.5, lr=0.1)

        def closure(a: Any = a, b: Any = b) -> Any:
            loss = (a * b).sum()
            loss.backward()
            return loss

        opt.step(closure)
        if by_hand:
            opt.zero_grad()
            closure()
            opt.first_step(zero_grad=True)
            b.data = ties[tied]
            closure()
            opt.second_step()
        else:
            b.data = ties[tied]
        before = a.detach().clone(), b.detach().clone()
        for _ in range(2):
            with pytest.raises(ValueError, match="share memory"):
                opt.step(closure)
            assert torch.equal(a, before[0])
            assert torch.equal(b, before[1])
            assert not opt.is_perturbed
        b.data = torch.full((24,), 2.0)
        opt.step(closure)
        assert not torch.equal(a, before[0])


@pytest.mark.parametrize("way", ["taken out", "frozen"])
def test_memory_may_be_that_of_a_parameter_that_is_trained_no_more(way: str) -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = sk.SAM([a, b], SGD, rho=0.0, lr=0.5)
    opt.step(lambda: (a + b).sum().backward())
    b.data = a.data
    with pytest.raises(ValueError, match="take it out of its group"):
        opt.step(lambda: b.sum().backward())
    if way == "taken out":
        opt.param_groups[0]["params"] = [b]
    else:
        a.requires_grad_(False)
        a.grad = None
    opt.step(lambda: b.sum().backward())
    assert a.tolist() == b.tolist() == [0.0] * 3


def test_gaps_may_hold_another_parameter() -> None:
    base = torch.ones(4, 6)
    rows, odd, even = (nn.Parameter(m) for m in (torch.ones(3), base[:, ::2], base[:, 1::2]))
    opt = sk.SAM([rows, odd, even], SGD, rho=0.0, lr=0.5)
    opt.step(lambda: (odd.sum() + 2 * even.sum()).backward())
    assert torch.equal(base, torch.tensor([0.5, 0.0] * 3).expand(4, 6))
    with pytest.raises(ValueError, match="share memory"):
        opt.add_param_group({"params": [nn.Parameter(base[1:3])]})


def test_a_parameter_of_which_torch_keeps_the_negative() -> None:
    p = nn.Parameter(torch.tensor([1 + 2j, 3 - 4j]).conj().imag[:1])
    assert p.is_neg()
    opt = sk.SAM([p], SGD, rho=0.5, lr=0.1)
    for weight in (-2.0, -1.9):
        assert p.tolist() == pytest.approx([weight])
        opt.step(lambda: (-p).sum().backward())
    assert p.tolist() == pytest.approx([-1.8])


def test_a_gradient_without_memory() -> None:
    p, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0))
    opt = sk.SAM([p, empty], SGD, lr=0.1)
    p.grad, empty.grad = torch.ones(3), torch._neg_view(torch.ones(0))
    opt.first_step()
    opt.second_step()
    p.grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="the gradient of parameter 0 of group 0 has no memory behind it"):
        opt.first_step()


def test_a_bad_group_changes_nothing() -> None:
    opt = sk.SAM(params(), SGD, lr=0.1)
    for group, error in (
        ({"params": params(), "rho": -1.0}, ValueError),
        ({"params": params(), "lr": -1.0}, ValueError),
        ({"params": [opt.param_groups[0]["params"][0]]}, ValueError),
        ([], TypeError),
    ):
        with pytest.raises(error):
            opt.add_param_group(group)
        assert len(opt.param_groups) == 1


@pytest.mark.parametrize("base", [SGD, Adam, AdamW], ids=lambda b: b.__name__)
def test_implementation_choices_make_no_difference(base: Any) -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    a = sk.SAM([p], base, lr=0.1, foreach=True, fused=False, capturable=True)
    b = sk.SAM([q], base, lr=0.1)
    for opt, x in ((a, p), (b, q)):
        x.grad = torch.arange(3.0)
        opt.first_step()
        opt.second_step()
    assert torch.equal(p, q)


def test_subclasses_are_wrapped() -> None:
    class Mine(SGD):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            Mine.calls += 1
            return super().step(closure)

    p = nn.Parameter(torch.ones(3))
    opt = sk.SAM([p], Mine, lr=0.1)
    p.grad = torch.ones(3)
    opt.first_step()
    opt.second_step()
    assert Mine.calls == 1
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))


def test_generators_dicts_and_pairs_are_taken() -> None:
    net = nn.Linear(3, 2)
    for given in (
        net.parameters(),
        net.named_parameters(),
        [{"params": net.parameters(), "lr": 0.5}],
        ({"params": [p]} for p in net.parameters()),
        [{"params": net.weight}, {"params": [net.bias], "rho": 0}],
    ):
        opt = sk.SAM(given, SGD, lr=0.1)
        net.weight.grad, net.bias.grad = torch.ones(2, 3), torch.ones(2)
        opt.first_step()
        opt.second_step()
        assert sum(len(group["params"]) for group in opt.param_groups) == 2


def test_repr_and_defaults() -> None:
    opt = sk.SAM(params())
    assert opt.defaults["lr"] == 1e-3
    assert opt.defaults["rho"] == 0.05
    assert repr(opt).startswith("SAM (\nParameter Group 0\n    adaptive: False\n")
    assert "rho: 0.05" in repr(opt)
    assert "sharpkern" not in repr(opt)
    opt = sk.LookSAM(params(), alpha=0.2)
    assert repr(opt).startswith("LookSAM (\nalpha: 0.2\npolicy: Every(k=5)\nParameter Group 0\n")
    assert sk.ASAM(params()).defaults["rho"] == 0.5
    assert sk.ASAM(params()).defaults["eta"] == 0.01


def test_half_precision_is_warned_of_once_at_the_users_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from sharpkern import checks

    monkeypatch.setattr(checks, "_warned_half", False)
    half = [nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    with pytest.warns(UserWarning, match="half-precision parameters") as caught:
        sk.SAM(half, SGD, lr=0.1)
        sk.ASAM(half, SGD, lr=0.1)
    assert [Path(w.filename).name for w in caught] == [Path(__file__).name]
