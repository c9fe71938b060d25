"""What WSAM, StableSAM, Friendly-SAM, VaSSO and Momentum-SAM do beyond the contract that every class keeps, and the
mistakes of other implementations that they do not make."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods import METHODS, RULES, SGD, Adam, AdamW, RMSprop
from models import assert_same_bits, batches, make_closure, make_net, relative_error, train, weights
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.optim.optimizer import SharpnessAwareOptimizer
from sharpkern.optim.step import AGAIN, Passes, Step
from sharpkern.policy import Every

f32 = torch.float32
AVERAGING = ["friendlysam", "vasso"]
FAMILY = ["stablesam", "wsam", "wsam-coupled", *AVERAGING, "momentumsam"]


def ends_of(*makes: Callable[[Any], Any], dtype: torch.dtype = f32, steps: int = 6) -> list[dict[str, Tensor]]:
    ends = []
    for make in makes:
        model = make_net(dtype)
        train(model, make(model.named_parameters()), batches(steps, dtype))
        ends.append(weights(model))
    return ends


# Limits.


@pytest.mark.parametrize("base", ["momentum", "adamw", "wrapped"])
@pytest.mark.parametrize(
    ("cls", "own"),
    [(sk.WSAM, dict(gamma=0.5, decouple=False)), (sk.FriendlySAM, dict(sigma=0.0)), (sk.VaSSO, dict(theta=1.0))],
)
def test_a_limit_is_sam_to_the_bit(cls: Any, own: dict[str, Any], base: str) -> None:
    rule, options = RULES[base]
    assert_same_bits(*ends_of(lambda p: cls(p, rule, **own, **options), lambda p: sk.SAM(p, rule, **options)))


@pytest.mark.parametrize("decouple", [False, True])
def test_wsam_without_a_weight_is_the_base_optimizer(decouple: bool) -> None:
    options = {"lr": 0.1, "momentum": 0.9}
    assert_same_bits(
        *ends_of(lambda p: sk.WSAM(p, gamma=0.0, decouple=decouple, **options), lambda p: sk.SSSAM(p, p=0.0, **options))
    )


# What others get wrong.


@pytest.mark.parametrize("name", AVERAGING)
def test_the_average_is_of_gradients_not_of_directions(name: str) -> None:
    """An average of g - sigma m dies away where the gradient stays what it is; Friendly-SAM's is that gradient. With
    the m of before: with the new one the first direction would be zero."""
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    g = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    opt = METHODS[name].make([p], SGD, lr=0.0, **({"sigma": 0.5} if name == "friendlysam" else {}))
    seen = []

    def closure() -> None:
        seen.append(p.detach().clone())
        p.grad = g.clone()

    for _ in range(8):
        opt.step(closure)
        torch.testing.assert_close(opt.state[p][METHODS[name].state[0]], g, rtol=1e-14, atol=0)
    for away in seen[1::2]:
        torch.testing.assert_close(away, 0.05 * g / g.norm(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["sam", "gsam", *FAMILY])
def test_the_perturbation_has_the_length_rho(name: str) -> None:
    """A norm that is forgotten, or taken a tensor, makes another length of it."""
    model = make_net()
    opt = METHODS[name].make(model.named_parameters(), "momentum", rho=0.3)
    for batch in batches(3):
        before, lengths = weights(model), []

        def closure(batch: Any = batch, before: Any = before, lengths: Any = lengths) -> Tensor:
            moved = [(p.detach() - before[name]).square().sum() for name, p in model.named_parameters()]
            lengths.append(float(sum(moved)) ** 0.5)
            return make_closure(model, batch)()

        opt.step(closure)
    assert lengths[-1] == pytest.approx(0.3, rel=1e-9)


@pytest.mark.parametrize("name", FAMILY)
def test_weights_come_back_to_the_bit(name: str) -> None:
    """Not by a subtraction, which drifts an ulp a step: steps of a large radius, at a rate of zero."""
    p = nn.Parameter(torch.linspace(0.1, 3.7, 57))
    before = p.detach().clone()
    opt = METHODS[name].make([p], SGD, lr=0.0, momentum=0.9, rho=7.3)

    def closure() -> None:
        p.grad = torch.cos(3 * p.detach())

    for _ in range(50):
        opt.step(closure)
    assert torch.equal(p, before)


@pytest.mark.parametrize("size", [0.0, 1e-13, 1e-30])
def test_stablesam_with_a_second_gradient_of_next_to_nothing(size: float) -> None:
    """Is a step on a zero gradient: weights decay, nothing is infinite."""
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = sk.StableSAM([p], lr=0.5, weight_decay=0.1)
    sizes = iter([1.0, size])

    def closure() -> None:
        p.grad = torch.full_like(p, next(sizes))

    opt.step(closure)
    torch.testing.assert_close(p.detach(), torch.full_like(p, 0.95), rtol=1e-15, atol=0)


# The average.


@pytest.mark.parametrize("name", AVERAGING)
def test_a_first_step_that_is_skipped_is_none(name: str) -> None:
    """Nor does state of zeros, which a tool makes to load a checkpoint, count as an average."""
    models = [make_net(f32) for _ in range(3)]
    opts = [METHODS[name].make(m.named_parameters(), "adamw") for m in models]

    def broken() -> Tensor:
        loss = make_closure(models[1], batches(1, f32)[0])()
        models[1].out.bias.grad[0] = math.nan
        return loss

    opts[1].step(broken)
    assert int(opts[1].stats["skipped_steps"]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lr = opts[2].param_groups[0]["lr"]
        opts[2].param_groups[0]["lr"] = 0.0
        for p in models[2].parameters():
            p.grad = torch.zeros_like(p)
        opts[2].step()
        opts[2].param_groups[0]["lr"] = lr
        for p in models[2].parameters():
            opts[2].state[p]["step"].zero_()
    for model, opt in zip(models, opts, strict=True):
        model.bn.reset_running_stats()
        train(model, opt, batches(4, f32))
    assert_same_bits(weights(models[1]), weights(models[0]))
    assert_same_bits(weights(models[2]), weights(models[0]))


@pytest.mark.parametrize("name", AVERAGING)
def test_a_plain_step_leaves_the_average_alone(name: str) -> None:
    model = make_net()
    opt = METHODS[name].make(model.named_parameters(), "momentum", policy=Every(2))
    averages = []
    for batch in batches(4):
        opt.step(make_closure(model, batch))
        averages.append({n: opt.state[p][METHODS[name].state[0]].clone() for n, p in model.named_parameters()})
    assert_same_bits(averages[0], averages[1])
    assert_same_bits(averages[2], averages[3])
    assert not torch.equal(averages[1]["out.weight"], averages[2]["out.weight"])


class Averaging(SharpnessAwareOptimizer):
    """A user's own: the base rule's step along an average of the gradients that is kept with the parameters."""

    state_names = ("mine",)

    def passes(self, step: Step) -> Passes:
        step.norm()
        step.combine("mine", "mine", 0.25, 0.75)
        step.mix(constant=(0, 1))
        step.descend("mine")
        return
        yield AGAIN


def test_state_of_a_users_own() -> None:
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    opt = Averaging([p], SGD, {"rho": 0.05}, lr=1.0)
    average, w = None, torch.zeros(4, dtype=torch.float64)
    for t in range(4):
        g = torch.arange(4.0, dtype=torch.float64) + t * t
        if t == 2:
            g[1] = math.inf

        def closure(g: Tensor = g) -> None:
            p.grad = g.clone()

        opt.step(closure)
        if t != 2:
            average = g if average is None else 0.25 * g + 0.75 * average
            w = w - average
        torch.testing.assert_close(opt.state[p]["mine"], average, rtol=1e-14, atol=0)
        torch.testing.assert_close(p.detach(), w, rtol=1e-14, atol=0)
    assert int(opt.stats["skipped_steps"]) == 1


# Momentum-SAM.


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_one_gradient_by_hand(base: str) -> None:
    """Perturb, backward, step: to the bit what a closure does. A loop for two gradients wastes the first one, and is
    told so."""
    ends = []
    for way in ("closure", "by hand", "two"):
        model = make_net(f32).eval()
        opt = METHODS["momentumsam"].make(model.named_parameters(), base, rho=0.3)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for t, batch in enumerate(batches(5, f32)):
                closure = make_closure(model, batch)
                before = weights(model)
                if way == "closure":
                    opt.step(closure)
                    continue
                if way == "two":
                    closure()
                assert opt.first_step(zero_grad=True) is True
                assert opt.is_perturbed == (t > 0)
                assert torch.equal(model.out.weight, before["out.weight"]) == (t == 0)
                closure()
                opt.second_step(zero_grad=True)
                assert not opt.is_perturbed
        assert [str(w.message)[:72] for w in seen] == [
            "first_step() of MomentumSAM comes before the only backward of a step, an"
        ] * (way == "two")
        ends.append((weights(model), opt.stats))
    for end, stats in ends[1:]:
        assert_same_bits(end, ends[0][0])
        assert_same_bits(stats, ends[0][1])
    assert int(ends[0][1]["steps"]) == 5
    assert int(ends[0][1]["second_passes"]) == 0


def test_one_gradient_leaves_the_models_buffers_to_its_pass() -> None:
    ends = []
    for given in (False, True):
        model = make_net(f32)
        opt = METHODS["momentumsam"].make(model.named_parameters(), "momentum", **({"model": model} if given else {}))
        train(model, opt, batches(4, f32))
        assert model.bn.num_batches_tracked == 4
        ends.append(dict(model.named_buffers()) | weights(model))
    assert_same_bits(*ends)


def test_a_parameter_that_is_frozen_stays_where_it_is() -> None:
    """Its momentum is of another time."""
    model = make_net(f32)
    opt = METHODS["momentumsam"].make(model.named_parameters(), "momentum", rho=0.5)
    train(model, opt, batches(2, f32))
    model.out.weight.requires_grad_(False)
    model.out.weight.grad = None
    before = weights(model)

    def closure() -> Tensor:
        assert torch.equal(model.out.weight, before["out.weight"])
        assert not torch.equal(model.hidden.weight, before["hidden.weight"])
        return make_closure(model, batches(1, f32)[0])()

    opt.step(closure)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_momentum_of_half_precision_parameters(dtype: torch.dtype) -> None:
    """It is float32, and read by a kernel for the parameters' dtype."""
    p = nn.Parameter(torch.ones(5, dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = sk.MomentumSAM([p], rho=1.0, lr=0.0, momentum=0.9)
    seen = []

    def closure() -> None:
        seen.append(p.detach().float())
        p.grad = torch.tensor([3.0, 0.0, -4.0, 0.0, 0.0], dtype=dtype)

    for _ in range(2):
        opt.step(closure)
    torch.testing.assert_close(seen[1], torch.tensor([0.4, 1.0, 1.8, 1.0, 1.0]), rtol=1e-2, atol=0)
    assert torch.equal(p, torch.ones_like(p))


# Arguments.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: sk.WSAM(p, lr=0.1, gamma=1.0), ValueError, "Invalid gamma: 1.0"),
        (lambda p: sk.WSAM(p, lr=0.1, gamma=-0.1), ValueError, "Invalid gamma: -0.1"),
        (lambda p: sk.WSAM(p, lr=0.1, gamma=math.nan), ValueError, "Invalid gamma: nan"),
        (lambda p: sk.WSAM(p, lr=0.1, gamma="0.5"), TypeError, "gamma should be a number"),
        (lambda p: sk.WSAM(p, lr=0.1, decouple=1), TypeError, "decouple should be a bool"),
        (lambda p: sk.FriendlySAM(p, lr=0.1, sigma=-1.0), ValueError, "Invalid sigma: -1.0"),
        (lambda p: sk.FriendlySAM(p, lr=0.1, lam=1.5), ValueError, "Invalid lam: 1.5"),
        (lambda p: sk.VaSSO(p, lr=0.1, theta=0.0), ValueError, "Invalid theta: 0.0"),
        (lambda p: sk.VaSSO(p, lr=0.1, theta=1.1), ValueError, "Invalid theta: 1.1"),
        (lambda p: sk.StableSAM(p, lr=0.1, rho=-1.0), ValueError, "Invalid rho: -1.0"),
        (lambda p: sk.MomentumSAM(p, lr=0.1, momentum=0.9, policy=Every(2)), TypeError, "takes no policy="),
        (lambda p: sk.MomentumSAM(p, lr=0.1), ValueError, "momentum should be above 0"),
        (
            lambda p: sk.MomentumSAM(p, RMSprop, lr=0.1),
            ValueError,
            "RMSprop cannot be the base optimizer of MomentumSAM",
        ),
        (lambda p: sk.MomentumSAM(p, Adam, lr=0.1, rho=-0.1), ValueError, "Invalid rho: -0.1"),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(make_net().parameters())


def test_wsam_needs_a_learning_rate_for_the_sharpness() -> None:
    class Fixed(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-0.1)

    with pytest.raises(ValueError, match="Fixed has no learning rate lr for WSAM's sharpness"):
        sk.WSAM(make_net().parameters(), Fixed)
    model, twin = make_net(), make_net()
    train(model, sk.WSAM(model.parameters(), Fixed, decouple=False), batches(3))
    train(twin, sk.WSAM(twin.parameters(), SGD, lr=0.1, decouple=False), batches(3))
    assert relative_error(model, twin) < 1e-12


def test_momentumsam_takes_every_rule_with_a_momentum() -> None:
    for cls, options in ((SGD, {"momentum": 0.5}), (Adam, {}), (AdamW, {"amsgrad": True})):
        model = make_net(f32)
        train(model, sk.MomentumSAM(model.parameters(), cls, lr=1e-3, **options), batches(2, f32))


def test_a_layout_of_the_second_pass_alone_has_what_the_first_one_kept() -> None:
    """Nothing had a gradient in the first pass, and the parameter moves before the second one."""
    p = nn.Parameter(torch.ones(3))
    opt = sk.WSAM([p], lr=0.1, gamma=0.6)
    a = 0.6 / 0.4
    for missing in (False, True):
        before = p.detach().clone()
        p.grad = None if missing else torch.ones(3)
        opt.first_step(zero_grad=True)
        p.data = p.data.clone().to(torch.float64 if missing else torch.float32)
        p.grad = torch.full((3,), 2.0, dtype=p.dtype)
        opt.second_step(zero_grad=True)
        g = 0.0 if missing else 1.0
        torch.testing.assert_close(p.detach().float(), before - 0.1 * (g + a * (2.0 - g)))


def test_loaded_options_are_checked_as_given_ones() -> None:
    model = make_net()
    opt = sk.MomentumSAM(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="momentum should be above 0"):
        opt.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.3).state_dict())
    assert opt.param_groups[0]["lr"] == 0.1
