"""A policy, a direction and a mix combine: the named classes are combinations, and there are others. And what a user's
own algorithm or policy may do wrong."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from typing import Any

import pytest
import torch
from methods import METHODS, RULES, Method, every_base
from models import assert_same_bits, batches, make_closure, make_net, relative_error, train, train_by_hand, weights
from naive import Naive, Trigger, asam, dot, draws
from torch import nn

import sharpkern as sk
from sharpkern.optim.optimizer import SharpnessAwareOptimizer
from sharpkern.optim.step import AGAIN, AS_IS
from sharpkern.policy import Adaptive, Always, Bernoulli, Every, Policy

STEPS = 12
# A named class, and what it is made of.
MADE_OF: dict[str, tuple[Any, Any]] = {
    "aesam": (
        lambda p, *b, **o: sk.AESAM(p, *b, total_steps=STEPS, **o),
        lambda p, *b, **o: sk.SAM(p, *b, policy=Adaptive(STEPS), **o),
    ),
    "aesam-p": (
        lambda p, *b, **o: sk.AESAM(p, *b, total_steps=STEPS, p=3.0, **o),
        lambda p, *b, **o: sk.SAM(p, *b, p=3.0, policy=Adaptive(STEPS), **o),
    ),
    "sam-p-2": (
        lambda p, *b, **o: sk.SAM(p, *b, p=2, **o),
        lambda p, *b, **o: sk.SAM(p, *b, **o),
    ),
    "aelooksam": (
        lambda p, *b, **o: sk.AELookSAM(p, *b, total_steps=STEPS, alpha=0.4, **o),
        lambda p, *b, **o: sk.LookSAM(p, *b, alpha=0.4, policy=Adaptive(STEPS, 2.0, 0.0), **o),
    ),
    "sssam": (
        lambda p, *b, **o: sk.SSSAM(p, *b, p=0.4, seed=7, **o),
        lambda p, *b, **o: sk.SAM(p, *b, policy=Bernoulli(0.4, 7), **o),
    ),
    "looksam": (
        lambda p, *b, **o: sk.LookSAM(p, *b, **o),
        lambda p, *b, **o: sk.LookSAM(p, *b, policy=Every(5), **o),
    ),
    "looksam-k-1": (
        lambda p, *b, **o: sk.LookSAM(p, *b, policy=Always(), **o),
        lambda p, *b, **o: sk.SAM(p, *b, **o),
    ),
    "gsam-alpha-0": (
        lambda p, *b, **o: sk.GSAM(p, *b, alpha=0.0, policy=Bernoulli(0.5), **o),
        lambda p, *b, **o: sk.SSSAM(p, *b, **o),
    ),
}


@every_base
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("made", MADE_OF)
def test_a_named_class_is_a_combination(made: str, by_hand: bool, base: str) -> None:
    ends = []
    for make in MADE_OF[made]:
        model = make_net(torch.float32)
        rule, options = RULES[base]
        opt = make(model.parameters(), rule, **options)
        (train_by_hand if by_hand else train)(model, opt, batches(STEPS, torch.float32))
        ends.append((weights(model), opt.stats))
    assert_same_bits(ends[0][0], ends[1][0])
    assert_same_bits(ends[0][1], ends[1][1])
    assert int(ends[0][1]["second_passes"]) > 0


@every_base
@pytest.mark.parametrize("clip", [{}, {"max_grad_norm": 0.3}], ids=["", "clipped"])
@pytest.mark.parametrize("policy", ["adaptive", "bernoulli"])
def test_asam_with_a_policy(policy: str, clip: dict[str, float], base: str) -> None:
    """The trigger compares the scaled norm; clipping, in both kinds of step, that of the gradient itself."""
    ours, theirs = make_net(), make_net()
    rule, options = RULES[base]
    chosen = Adaptive(STEPS) if policy == "adaptive" else Bernoulli(0.5, 3)
    opt = sk.ASAM(ours.named_parameters(), rule, policy=chosen, **options, **clip)

    fires = Trigger(STEPS, 1.0, -1.0) if policy == "adaptive" else draws(0.5, 3)
    own = {"rho": 0.5, "eta": 0.01}
    naive = Naive(theirs.named_parameters(), rule, own, scale=asam, fires=fires, **options, **clip)
    for batch in batches(STEPS):
        opt.step(make_closure(ours, batch))
        naive.step(make_closure(theirs, batch))
    assert int(opt.stats["second_passes"]) == sum(naive.decisions)
    assert 0 < sum(naive.decisions) < STEPS
    assert relative_error(ours, theirs) < 1e-11


SAM_INF = dataclasses.replace(METHODS["sam-p"], name="sam-inf", options={"rho": 0.005, "p": math.inf})


@pytest.mark.parametrize(
    ("method", "base"),
    [(METHODS["asam"], "momentum"), (METHODS["gsam"], "adamw"), (METHODS["sam-p"], "momentum"), (SAM_INF, "wrapped")],
    ids=str,
)
def test_the_policy_of_ae_sam_in_any_step(method: Method, base: str) -> None:
    """The AE-SAM paper claims it for every variant of SAM. What is compared is the norm of the direction: of T_w g in
    ASAM, of g in a ball of any norm."""
    ours, theirs = make_net(), make_net()
    opt = method.make(ours.named_parameters(), base, policy=Adaptive(200, 0.5, -0.5))
    trigger = Trigger(200, 0.5, -0.5)
    naive = method.oracle(theirs.named_parameters(), base, fires=trigger)
    taken = [0]
    for batch in batches(200):
        opt.step(make_closure(ours, batch))
        naive.step(make_closure(theirs, batch))
        taken.append(int(opt.stats["second_passes"]))
        measured = [float(opt.stats[name]) for name in ("grad_norm", "ema_mean", "ema_var", "threshold")]
        assert measured == pytest.approx([trigger.n**0.5, trigger.mean, trigger.var, trigger.threshold], rel=1e-8)
    assert [b > a for a, b in itertools.pairwise(taken)] == naive.decisions
    assert 50 < taken[-1] < 150
    assert relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: sk.SAM(p, lr=0.1, policy=lambda t: True), TypeError, "policy should be a sharpkern.policy.Policy"),
        (lambda p: sk.SAM(p, lr=0.1, policy=Every), TypeError, "policy should be a sharpkern.policy.Policy"),
        (lambda p: sk.SSSAM(p, lr=0.1, p=0.5, policy=Always()), TypeError, "policy= and p= both"),
        (lambda p: sk.SSSAM(p, lr=0.1, seed=0, policy=Always()), TypeError, "policy= and seed= both"),
        (lambda p: sk.LookSAM(p, lr=0.1, k=5, policy=Always()), TypeError, "policy= and k= both"),
        (lambda p: sk.AESAM(p, lr=0.1, total_steps=9, policy=Always()), TypeError, "takes no policy="),
        (lambda p: sk.AELookSAM(p, lr=0.1, total_steps=9, policy=Always()), TypeError, "takes no policy="),
        (lambda p: sk.AELookSAM(p, lr=0.1, total_steps=9, k=3), TypeError, "AELookSAM takes no k="),
        (lambda p: sk.SALR(p, lr=0.1, policy=Always()), TypeError, "SALR takes no policy="),
    ],
)
def test_bad_policies(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(make_net().parameters())


def test_the_signature_shows_the_shared_arguments() -> None:
    for cls in (
        sk.SAM, sk.ASAM, sk.SSSAM, sk.AESAM, sk.AELookSAM, sk.LookSAM, sk.GSAM, sk.WSAM, sk.StableSAM, sk.FriendlySAM,
        sk.VaSSO, sk.MomentumSAM,
    ):  # fmt: skip
        names = list(inspect.signature(cls).parameters)
        assert names[:3] == ["params", "base_optimizer", "rho"]
        if cls in (sk.SAM, sk.ASAM, sk.SSSAM, sk.AESAM):
            names.remove("perturb")
        shared = ["perturb_eps", "model", "max_grad_norm", "skip_nonfinite", "flatten", "m_sharpness", "master_weights"]
        shared.remove("m_sharpness") if cls is sk.MomentumSAM else None
        assert names[-1 - len(shared) :] == [*shared, "base_kwargs"]
        assert names.count("policy") == (cls not in (sk.AESAM, sk.AELookSAM, sk.MomentumSAM))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: sk.LookSAM(p, adaptive=True), "LookSAM takes no adaptive=, which is of SAM, SSSAM"),
        (lambda p: sk.SAM(p, total_steps=9), "SAM takes no total_steps=, which is of AESAM, AELookSAM"),
        (lambda p: sk.SALR(p, rho=0.1), "SALR takes no rho="),
        (lambda p: sk.NudgedSGD(p, alpha=0.1), "NudgedSGD takes no alpha=, which is of LookSAM, AELookSAM, GSAM"),
        (lambda p: sk.NudgedSGD(p, torch.optim.SGD), "NudgedSGD takes no base optimizer, but got SGD"),
        (lambda p: sk.SAM(p, torch.optim.RMSprop, k=3), "SAM takes no k=, which is of LookSAM"),
        (lambda p: sk.SAM(p, torch.optim.Adam, momentum=0.9), "unexpected keyword argument 'momentum'"),
    ],
)
def test_arguments_of_another_class(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make(make_net().parameters())


def test_an_option_of_the_base_optimizer_may_have_the_name_of_another_classs() -> None:
    opt = sk.SAM(make_net().parameters(), torch.optim.RMSprop, alpha=0.5)
    assert opt.param_groups[0]["alpha"] == 0.5


class Undecided(Policy):
    def decide(self, step: Any) -> Any:
        step.norm()
        self.seen = float(step.scalars["squared_norm"])


def test_a_policy_that_decides_nothing() -> None:
    model, policy = make_net(), Undecided()
    opt = sk.SAM(model.parameters(), lr=0.1, policy=policy)
    before = weights(model)
    with pytest.raises(TypeError, match=r"Undecided\.decide should return a bool, but returned None"):
        opt.step(make_closure(model, batches(1)[0]))
    assert_same_bits(weights(model), before)
    assert policy.seen == pytest.approx(sum(float(p.grad.square().sum()) for p in model.parameters()))


class Clamping(Policy):
    def decide(self, step: Any) -> bool:
        for layout in step.layouts:
            for p in layout.params:
                p.grad = p.grad.clamp(-0.01, 0.01)
        return True


def test_a_policy_may_put_other_gradients_in_place(backend: str) -> None:
    model = make_net()
    opt = sk.SAM(model.parameters(), lr=0.1, policy=Clamping())
    make_closure(model, batches(1)[0])()
    clamped = sum(float(p.grad.clamp(-0.01, 0.01).square().sum()) for p in model.parameters())
    opt.first_step()
    assert float(opt.stats["grad_norm"]) == pytest.approx(clamped**0.5)
    opt.restore()


# A user's own.


class Odd(SharpnessAwareOptimizer):
    """Yields what it is told to."""

    wishes: tuple[Any, ...] = ()

    def __init__(self, params: Any, *wishes: Any) -> None:
        self.wishes = wishes
        super().__init__(params, torch.optim.SGD, {"rho": 0.05}, lr=0.1)

    def passes(self, step: Any) -> Any:
        step.norm()
        step.ascend()
        for wish in self.wishes:
            if isinstance(wish, Exception):
                raise wish
            yield wish
        step.descend()


def stepped(model: nn.Module, opt: Any, by_hand: bool) -> None:
    closure = make_closure(model, batches(1, torch.float32)[0])
    if not by_hand:
        opt.step(closure)
        return
    closure()
    opt.first_step()
    closure()
    opt.second_step()


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize(
    ("wishes", "message"),
    [(("again",), "yielded 'again'"), ((None,), "yielded None"), ((AGAIN, True), "yielded True"),
     ((AGAIN, ValueError("mine")), "mine"), ((ValueError("mine"),), "mine")],
)  # fmt: skip
def test_an_algorithm_that_fails_gives_the_weights_back(by_hand: bool, wishes: Any, message: str) -> None:
    model = make_net(torch.float32)
    before = weights(model)
    opt = Odd(model.parameters(), *wishes)
    with pytest.raises((RuntimeError, ValueError), match=message):
        stepped(model, opt, by_hand)
    assert not opt.is_perturbed
    assert_same_bits(weights(model), before)
    opt.wishes = (AGAIN,)
    stepped(model, opt, by_hand)
    assert not torch.equal(model.out.weight, before["out.weight"])


def test_an_algorithm_that_takes_no_step_gives_the_weights_back() -> None:
    class Measuring(Odd):
        """Goes away, and ends there."""

        def passes(self, step: Any) -> Any:
            step.norm()
            step.ascend()
            yield AGAIN

    for by_hand in (False, True):
        model = make_net(torch.float32)
        before = weights(model)
        opt = Measuring(model.parameters())
        stepped(model, opt, by_hand)
        assert not opt.is_perturbed
        assert_same_bits(weights(model), before)


def test_an_algorithm_without_a_yield_is_an_error() -> None:
    class Plain(Odd):
        def passes(self, step: Any) -> None:
            step.norm()
            step.ascend()

    model = make_net(torch.float32)
    before = weights(model)
    opt = Plain(model.parameters())
    for by_hand in (False, True):
        with pytest.raises(TypeError, match="Plain.passes should be a generator"):
            stepped(model, opt, by_hand)
        assert_same_bits(weights(model), before)


def test_more_passes_than_stepping_by_hand_has() -> None:
    ends = []
    for wishes in ((AGAIN,), (AGAIN, AS_IS), (AGAIN, AGAIN, AGAIN)):
        model = make_net(torch.float32).eval()
        stepped(model, Odd(model.parameters(), *wishes), by_hand=False)
        ends.append(weights(model))
    for end in ends[1:]:
        assert_same_bits(ends[0], end)
    model = make_net(torch.float32)
    before = weights(model)
    opt = Odd(model.parameters(), AGAIN, AGAIN)
    with pytest.raises(RuntimeError, match=r"more passes than two: call step\(closure\)"):
        stepped(model, opt, by_hand=True)
    assert_same_bits(weights(model), before)


def test_a_policy_of_the_users_own() -> None:
    class Falling(Policy):
        """While the loss of the step, by closure, is above a bound."""

        def decide(self, step: Any) -> bool:
            return float(step.loss.detach()) > 0.9

    model = make_net()
    opt = sk.SAM(model.parameters(), lr=0.5, policy=Falling())
    losses = train(model, opt, batches(1) * 20)
    assert int(opt.stats["second_passes"]) == sum(loss > 0.9 for loss in losses)
    assert 0 < int(opt.stats["second_passes"]) < 20


def test_a_norm_before_the_decision_does_not_take_its_statistics() -> None:
    class Measured(sk.SAM):
        def passes(self, step: Any) -> Any:
            step.norm()
            yield from super().passes(step)

    ends = []
    for cls in (sk.SAM, Measured):
        model = make_net(torch.float32)
        opt = cls(model.parameters(), lr=0.05, policy=Adaptive(STEPS))
        train(model, opt, batches(STEPS, torch.float32))
        ends.append(weights(model) | opt.stats)
    assert_same_bits(*ends)


def test_a_step_counts_once() -> None:
    class Late(Odd):
        """Goes away after the caller was asked, and twice."""

        def passes(self, step: Any) -> Any:
            yield AS_IS
            for _ in range(2):
                step.norm()
                step.ascend()
                yield AGAIN
            step.descend()

    model = make_net(torch.float32)
    opt = Late(model.parameters())
    train(model, opt, batches(3, torch.float32))
    assert int(opt.stats["steps"]) == 3
    assert opt.state_dict()["sharpkern"]["t"] == 3


def test_a_number_is_declared_once() -> None:
    class Clashing(Odd):
        scalars = {"t": 7}

    with pytest.raises(ValueError, match="'t' is declared twice"):
        Clashing(make_net().parameters())
    with pytest.raises(TypeError, match="scalars"):
        sk.SAM(make_net().parameters(), lr=0.1, scalars={"t": 7})


def test_a_users_class_shows_its_own_signature_and_takes_no_state_from_others() -> None:
    class Own(sk.SAM):
        state_names = ("exp_avg",)

        def __init__(self, params: Any, *, gamma: float, **kwargs: Any) -> None:
            super().__init__(params, torch.optim.SGD, **kwargs)

    assert list(inspect.signature(Own).parameters) == ["params", "gamma", "kwargs"]
    model = make_net(torch.float32)
    opt = sk.SAM(model.parameters(), torch.optim.Adam, lr=0.1)
    train(model, opt, batches(1, torch.float32))
    opt.load_state_dict(opt.state_dict())
    assert "exp_avg" in opt.state[model.out.weight]


class StableSAM(Odd):
    """Steps with (norm(g) / norm(g_s)) g_s; the verbs measure what they need."""

    def passes(self, step: Any) -> Any:
        step.ascend()
        yield AGAIN
        step.mix("first", "last", constant=(0, 0), slope=(1, 0), root=True)
        step.descend()


@pytest.mark.parametrize("by_hand", [False, True])
def test_verbs_measure_what_they_need(by_hand: bool) -> None:
    def rescaled() -> Any:
        def mix(g: Any, g_s: Any) -> Any:
            return {p: (dot(g, g) / dot(g_s, g_s)) ** 0.5 * x for p, x in g_s.items()}

        return mix

    ours, theirs = make_net(), make_net()
    opt = StableSAM(ours.parameters())
    naive = Naive(theirs.named_parameters(), torch.optim.SGD, {"rho": 0.05}, mix=rescaled(), lr=0.1)
    (train_by_hand if by_hand else train)(ours, opt, batches(STEPS))
    for batch in batches(STEPS):
        naive.step(make_closure(theirs, batch))
    assert relative_error(ours, theirs) < 1e-11


@pytest.mark.parametrize("direction", ["gradient", "nothing"])
def test_a_direction_needs_a_buffer_and_coefficients(direction: str) -> None:
    class Unmixed(Odd):
        def passes(self, step: Any) -> Any:
            step.ascend(keep_gradient=True)
            yield AGAIN
            if direction == "nothing":
                step.mix("first", "last", constant=(1, 1), slope=(0, 0))
            step.descend(direction)

    model = make_net(torch.float32)
    before = weights(model)
    with pytest.raises(RuntimeError, match=f"descend.'{direction}'. needs such a buffer, and mix"):
        stepped(model, Unmixed(model.parameters()), by_hand=False)
    assert_same_bits(weights(model), before)


@pytest.mark.parametrize("options", [{"adaptive": True}, {"p": 3.0}], ids=str)
def test_a_kept_gradient_is_the_direction(options: dict[str, Any]) -> None:
    """A scaled one is none: GSAM's decomposition, say, would be of another vector."""

    class Keeping(sk.SAM):
        def passes(self, step: Any) -> Any:
            step.ascend(keep_gradient=True)
            yield AGAIN
            step.descend()

    model = make_net(torch.float32)
    opt = Keeping(model.parameters(), lr=0.1, **options)
    before = weights(model)
    with pytest.raises(RuntimeError, match="keep_gradient=True. goes along the whole gradient, unscaled"):
        train(model, opt, batches(1, torch.float32))
    assert_same_bits(weights(model), before)
    assert not opt.is_perturbed
