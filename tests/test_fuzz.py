"""Random trainings: layouts, classes, rules, policies, and what users do between and within steps.

A scenario is plain data, and is run three times side by side: as it says; *straight*, by a closure, with nothing saved,
copied, moved or flattened, to the same bits; and by the naive version in float64, its weights rounded to the dtypes of
the parameters. After everything that happens weights, statistics and memory are compared.

``make fuzz`` runs many, ``make fuzz SEED=2`` others. Hypothesis shrinks what fails and prints it.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import math
import os
import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from methods import METHODS, RULES, SGD_RULES
from models import assert_same_bits
from naive import Look, NaiveSALR, Trigger, always, draws, every
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.ops import schema
from sharpkern.policy import Adaptive, Always, Bernoulli, Every

f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
HALVES = {f16, bf16}
SENTINEL = 99.0
AVERAGES = ("g_v", "friendly_m", "vasso_d")
# Momentum-SAM takes few base rules, and one gradient: tests/contract/test_family.py.
FUZZED = [name for name, method in METHODS.items() if not method.one_gradient]


class Interrupt(BaseException):
    """What a closure raises: nothing may depend on its being an Exception."""


# Scenarios.


class Brief:
    """Printed with what is not as by default."""

    def __repr__(self) -> str:
        given = [f for f in dataclasses.fields(self) if getattr(self, f.name) != _default(f)]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


def _default(f: Any) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


@dataclass(frozen=True, repr=False)
class Param(Brief):
    """A parameter: ``memory`` is how its elements lie, ``uses`` how often the loss takes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype = f64
    memory: str = "dense"
    group: int = 0
    uses: int = 1
    named_weight: bool = True


@dataclass(frozen=True, repr=False)
class Step(Brief):
    """One step: ``missing`` are (pass, parameter), ``poison`` is (pass, parameter, value)."""

    way: str = "closure"
    missing: tuple[tuple[int, int], ...] = ()
    poison: tuple[int, int, float] | None = None
    raises: int | None = None
    turned: bool = False  # gradients lie otherwise than their parameters
    halves: bool = False  # two backward calls a pass; three micro-batches where these are accumulated
    moved: bool = False  # parameters get other memory before every pass but the first
    lr_0: bool = False


@dataclass(frozen=True, repr=False)
class Act(Brief):
    """What a user does between two steps."""

    what: str
    where: int = 0
    value: Any = None


@dataclass(frozen=True, repr=False)
class Scenario(Brief):
    """A training."""

    method: str
    rule: str
    params: tuple[Param, ...]
    groups: tuple[dict[str, Any], ...]
    events: tuple[Step | Act, ...]
    joins: tuple[Param, ...] = ()  # in groups that are added
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    policy: tuple[Any, ...] | None = None
    named: bool = True
    with_model: bool = False
    flatten: bool = False
    backend: str = "cpp"


SIZES = (1, 3, 2, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
SIZES += (schema.BLOCK - 1, schema.BLOCK, schema.BLOCK + 1, 2 * schema.BLOCK + 1, 0)
SHAPES = [(n,) for n in SIZES] + [(), (2, 3), (3, 1), (5, 7), (16, 16), (1, 9), (0, 4), (33, 2), (2, 3, 4)]
SHAPES += [(2, 3, 3, 3), (5, 1, 2, 2), (1, 4, 3, 3), (4, 8, 1, 1), (9, 5, 3, 3)]
NEUTRAL = ("save", "restart", "deepcopy", "pickle", "move", "reload", "zero_grad", "unflatten")
TELLING = ("add", "freeze", "thaw", "set", "widen")


def sampled(*common: Any, rare: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """The first one is the simplest; the rare ones have one chance in ten together."""
    return st.sampled_from(common) if not rare else st.sampled_from([c for c in common for _ in range(9)] + [*rare])


@st.composite
def params(draw: Any, rule: str, groups: int, dtypes: list[torch.dtype], flatten: bool) -> Param:
    shape = draw(st.sampled_from(SHAPES))
    if rule == "wrapped-nadam" and shape == ():
        shape = (1,)  # torch casts its mu_product with what it takes for a parameter's state
    memory = ["dense", "odd"] + ["gaps"] * (not flatten) + ["transposed"] * (len(shape) >= 2)
    memory += ["channels_last"] * (len(shape) == 4)
    return Param(
        shape,
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(memory)),
        draw(st.integers(0, groups - 1)),
        draw(sampled(1, 1, 1, 1, 2, 0)),
        draw(st.booleans()),
    )


@st.composite
def group_options(draw: Any, method: str, rule: str) -> dict[str, Any]:
    """Some options of a group's own."""
    have: dict[str, Any] = {
        "lr": st.sampled_from([0.01, 0.1]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "rho": st.sampled_from([0.3, 0.0]),
        "maximize": st.booleans(),
    }
    if method == "asam":
        have["eta"] = st.just(0.2)
    if method in ("sam", "sam-adaptive", "sssam"):
        have["adaptive"] = st.booleans()
    if rule in ("sgd", "momentum"):
        have["momentum"] = st.sampled_from([0.5, 0.0])
    if rule.startswith("adam"):
        have |= {"betas": st.just((0.8, 0.9)), "amsgrad": st.booleans()}
    keys = draw(st.lists(st.sampled_from(sorted(have)), unique=True, max_size=3))
    return {key: draw(have[key]) for key in keys}


@st.composite
def steps(draw: Any, count: int, by_hand: bool, calls: int) -> Step:
    passes, which = st.just(0) | st.integers(0, calls - 1), st.integers(0, count - 1)
    ways = "closure", "hand", "hand", "accumulate"
    fault = draw(sampled(None, None, "missing", "missing", "poison", "raises"))
    poison = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e200])) if fault == "poison" else None
    return Step(
        draw(sampled(*ways, rare=("cancel", "base")) if by_hand else st.sampled_from(("closure", "accumulate"))),
        tuple(draw(st.lists(st.tuples(passes, which), min_size=1, max_size=4))) if fault == "missing" else (),
        (draw(passes), draw(which), poison) if poison is not None else None,
        draw(passes) if fault == "raises" else None,
        *(draw(sampled(False, rare=(True,))) for _ in range(4)),
    )


@st.composite
def acts(draw: Any, count: int, groups: int, fused: bool) -> Act:
    what = draw(st.sampled_from([a for a in NEUTRAL + TELLING if fused or a != "widen"]))
    if what == "set":
        key = draw(st.sampled_from(["lr", "rho", "weight_decay", "momentum"]))
        return Act("set", draw(st.integers(0, groups - 1)), (key, draw(st.sampled_from([0.02, 0.2, 0.0]))))
    return Act(what, draw(st.integers(0, count - 1)), draw(st.booleans()) if what == "zero_grad" else None)


@st.composite
def scenarios(draw: Any) -> Scenario:
    method = METHODS[draw(st.sampled_from(sorted(FUZZED, key="sam asam".find, reverse=True)))]
    rule = draw(st.sampled_from([rule for rule in RULES if not method.sgd_only or rule in SGD_RULES]))
    fused, flatten = not rule.startswith("wrapped"), draw(sampled(False, False, True))
    # torch's own optimizers keep their state in half precision, and round otherwise for other strides.
    some = [f64, f64, f32, f32] + [bf16, f16] * fused
    first = draw(st.sampled_from(some))
    dtypes = [first] * 5 + (some if draw(sampled(False, False, True)) else [])
    groups = draw(st.lists(group_options(method.name, rule), min_size=1, max_size=3))
    described = st.lists(params(rule, len(groups), dtypes, flatten), min_size=1, max_size=6)
    own, joins = draw(described), draw(st.lists(params(rule, 1, dtypes, flatten), max_size=2))
    count = len(own) + len(joins)
    policy = None
    if method.name not in ("aesam", "aelooksam", "salr", "esam", "nudged"):
        total = draw(st.integers(2, 9))
        policies = [None, None, ("every", 2), ("always",), ("bernoulli", 0.5, 3), ("adaptive", total, 1.0, -1.0)]
        policy = draw(st.sampled_from(policies))
    options: dict[str, Any] = {}
    if draw(sampled(False, False, True)):
        options["max_grad_norm"] = draw(st.sampled_from([0.5, 20.0]))
    if draw(sampled(False, rare=(True,))):
        options["skip_nonfinite"] = False
    if fused and method.name != "salr" and HALVES & {spec.dtype for spec in own + joins} and draw(st.booleans()):
        options["master_weights"] = True
    if method.of_length:
        options["total_steps"] = draw(st.integers(2, 9))
    named, with_model = draw(sampled(True, True, False)), draw(st.booleans())
    backend = draw(st.sampled_from(["cpp"] * 50 + ["reference"] * 8 + ["triton"]))
    a_step, an_act = steps(count, method.by_hand, method.calls), acts(count, len(groups), fused)
    events = draw(st.lists(st.one_of(a_step, a_step, an_act), min_size=1, max_size=9))
    return Scenario(
        method.name, rule, tuple(own), tuple(groups), tuple(events), tuple(joins), options, policy, named, with_model,
        flatten, backend,
    )  # fmt: skip


# Running one.


def constants(i: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Parameter i at the start, and the coefficients of its part of the loss."""
    generator = torch.Generator().manual_seed(i)
    rows = torch.rand(3, math.prod(shape), generator=generator, dtype=f64) * 1.5 + 0.5
    signs = torch.randint(0, 2, rows.shape, generator=generator) * 2 - 1
    start, factor, shift = (rows * signs).to(dtype).reshape(3, *shape)
    return start, factor, shift


def placed(values: Tensor, memory: str) -> Tensor:
    """A copy, in memory of that kind."""
    if memory == "transposed":
        order = list(reversed(range(values.dim())))
        return values.permute(order).contiguous().permute(order)
    if memory == "channels_last":
        return values.clone(memory_format=torch.channels_last)
    if memory == "dense":
        return values.clone(memory_format=torch.contiguous_format)
    step = 2 if memory == "gaps" else 1
    room = torch.full((step * values.numel() + 2,), SENTINEL, dtype=values.dtype)
    strides = [step * s for s in torch.empty(values.shape, device="meta").stride()]
    return room.as_strided(values.shape, strides, 1).copy_(values)


def around(p: Tensor) -> Tensor:
    """Of a parameter in a room of its own: what is there beside its elements."""
    room = torch.empty(0, dtype=p.dtype).set_(p.untyped_storage())
    outside = torch.ones(room.numel(), dtype=torch.bool)
    outside.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(False)
    return room[outside]


def loss_of(weights: list[Tensor | None], uses: list[int], t: int) -> Tensor:
    """Of every weight that is there, with a gradient that is nowhere near 0; the same bits however the weights lie."""
    total, together = torch.zeros((), dtype=f64), torch.zeros((), dtype=f64)
    for i, w in enumerate(weights):
        if w is not None:
            _, factor, shift = constants(i, tuple(w.shape), w.dtype)
            w = w.contiguous()  # a sum depends on how its elements lie
            for use in range(uses[i]):
                s = w + shift + 0.1 * (t + use)
                total = total + (factor * (1.5 * w + s / (1 + s * s))).sum(dtype=f64)
            together = together + w.sum(dtype=f64) / max(w.numel(), 1)
    return total + 0.05 * together / (1 + together * together)


class Run(ABC):
    """What all three runs share: parameters, groups of them, closures."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.specs = scenario, list(scenario.params)
        self.method = METHODS[scenario.method]
        used = sorted({spec.group for spec in self.specs})
        self.groups = [[i for i, spec in enumerate(self.specs) if spec.group == g] for g in used]
        self.options = [scenario.groups[g] for g in used]
        self.t = 0  # calls of step
        self.now = 0  # the pass that is taken
        self.opt: Any = None
        self.params: Any = []

    def named(self, members: list[int], named: bool) -> list[Any]:
        names = [f"{i}.{'weight' if self.specs[i].named_weight else 'bias'}" for i in members]
        return [(name, self.params[i]) if named else self.params[i] for name, i in zip(names, members, strict=True)]

    def seen(self, i: int) -> Tensor:
        """Parameter i as the loss takes it."""
        return self.params[i]

    def micro_batches(self, step: Step) -> list[Callable[[], Tensor]]:
        """Closures to be called in turn in every pass; their losses add up to that of the step."""
        shares = [(1.0,), (0.5, 0.5), (0.25, 0.25, 0.5)][step.halves + (step.way == "accumulate")]
        passes = itertools.count()

        def evaluate(part: int) -> Tensor:
            if part == 0:
                self.now = next(passes)
                self.before_pass(self.now, step)
            there = [
                p.requires_grad and spec.uses > 0 and (self.now, i) not in step.missing
                for i, (p, spec) in enumerate(zip(self.params, self.specs, strict=True))
            ]
            weights = [self.seen(i) if ok else None for i, ok in enumerate(there)]
            loss = shares[part] * loss_of(weights, [s.uses for s in self.specs], self.t)
            if loss.requires_grad:
                loss.backward()
            if part == len(shares) - 1:
                self.after_backward(self.now, there, step)
                if step.raises == self.now:
                    raise Interrupt
            return loss

        return [partial(evaluate, part) for part in range(len(shares))]

    def closure(self, step: Step) -> Callable[[], Tensor]:
        closures = self.micro_batches(step)
        return lambda: torch.stack([closure() for closure in closures]).sum()

    def before_pass(self, now: int, step: Step) -> None:  # noqa: B027
        """Whatever happens right before a pass: nothing, but to the package's own."""

    def after_backward(self, now: int, there: list[bool], step: Step) -> None:
        for i, (p, ok) in enumerate(zip(self.params, there, strict=True)):
            if not ok:
                p.grad = None  # also where zero_grad() keeps zeros
            elif step.poison and step.poison[:2] == (now, i) and p.numel():
                p.grad[tuple(n - 1 for n in p.shape)] = torch.tensor(step.poison[2], dtype=f64).to(self.seen(i).dtype)

    # What is done to the parameters, whoever optimizes them.

    def add(self, where: int) -> None:
        taken = len(self.specs) - len(self.scenario.params)
        if taken < len(self.scenario.joins):
            self.specs.append(self.scenario.joins[taken])
            self.join(len(self.specs) - 1)
            self.groups.append([len(self.specs) - 1])
            options = self.scenario.groups[where % len(self.scenario.groups)]
            self.opt.add_param_group({"params": self.named(self.groups[-1], self.is_named), **options})

    def freeze(self, where: int) -> None:
        if where < len(self.params):
            self.params[where].requires_grad_(False)
            self.params[where].grad = None

    def thaw(self, where: int) -> None:
        if where < len(self.params):
            self.params[where].requires_grad_(True)

    def set(self, where: int, key: str, value: float) -> None:
        group = self.opt.param_groups[where % len(self.groups)]
        if key in group and not (key == "momentum" and group.get("nesterov")):
            group[key] = value

    @property
    def is_named(self) -> bool:
        return self.scenario.named

    @abstractmethod
    def join(self, i: int) -> None:
        """Parameter i becomes a group of its own."""

    def lr_0(self, step: Step) -> Callable[[], None]:
        """No learning rate for a step. Returns what gives it back."""
        lrs = [group["lr"] for group in self.opt.param_groups]
        for group in self.opt.param_groups if step.lr_0 else ():
            group["lr"] = 0.0

        def give_back() -> None:
            for group, lr in zip(self.opt.param_groups, lrs, strict=True):
                group["lr"] = lr

        return give_back


class Ours(Run):
    """The package; ``straight`` in the simplest way."""

    def __init__(self, scenario: Scenario, straight: bool) -> None:
        super().__init__(scenario)
        self.straight = straight
        self.flatten = scenario.flatten and not straight
        self.holder = nn.Module()
        self.holder.params = nn.ParameterList()
        self.holder.norm = nn.BatchNorm1d(2, affine=False)
        self.params = self.holder.params
        for i in range(len(self.specs)):
            self.join(i)
        self.first_passes = 0
        self.settled = False  # whether the last event was a step
        self.measured = False  # whether there was anything to measure in the last step
        self.make(self.options)

    def join(self, i: int) -> None:
        spec = self.specs[i]
        start = constants(i, spec.shape, spec.dtype)[0]
        self.params.append(nn.Parameter(placed(start, spec.memory)))

    def make(self, options: Any) -> None:
        s = self.scenario
        groups = [{"params": self.named(m, s.named), **own} for m, own in zip(self.groups, options, strict=True)]
        more = {"model": self.holder if s.with_model else None, "flatten": self.flatten, **s.options}
        method = self.method
        if s.policy:
            kind, *arguments = s.policy
            make = {"always": Always, "every": Every, "bernoulli": Bernoulli, "adaptive": Adaptive}[kind]
            more["policy"] = make(*arguments)
            said = {"sssam": ("p", "seed"), "looksam": ("k",)}.get(method.name, ())  # by the policy
            own = {key: value for key, value in method.options.items() if key not in said}
            method = dataclasses.replace(method, options=own)
        self.opt = method.make(groups, s.rule, **more)

    def before_pass(self, now: int, step: Step) -> None:
        if now > 0 and step.moved and not self.straight:
            self.move(Act("move"))

    def after_backward(self, now: int, there: list[bool], step: Step) -> None:
        super().after_backward(now, there, step)
        if not self.straight and step.turned:
            for p in self.params:
                if p.grad is not None:
                    p.grad = placed(p.grad, "transposed" if p.dim() >= 2 else "gaps")
        if now == 0:
            self.first_passes += 1
        self.holder.norm(torch.full((3, 2), now + 1.0 + self.t))

    def step(self, step: Step) -> None:
        self.measured = any(p.requires_grad for p in self.params)
        before, where = self.weights(), [p.data_ptr() for p in self.params]
        skipped = int(self.opt.stats["skipped_steps"])
        way = "closure" if step.way in ("hand", "accumulate") and self.straight else step.way
        give_back = self.lr_0(step)
        raised = False
        try:
            if way == "closure":
                self.opt.step(self.closure(step))
            elif way == "accumulate":
                for closure in self.micro_batches(step):
                    self.opt.accumulate(closure)
                self.opt.step()
            else:
                self.by_hand(way, self.closure(step))
        except Interrupt:
            raised = True
            if way not in ("closure", "accumulate"):
                self.opt.restore()
        give_back()
        self.t += 1
        assert not self.opt.is_perturbed
        if not step.moved and (self.settled or not self.flatten):
            assert [p.data_ptr() for p in self.params] == where
        self.settled = not step.moved and (self.settled or not raised)  # flat buffers are made with the first gradients
        skipped = int(self.opt.stats["skipped_steps"]) - skipped
        assert skipped == (skipped > 0)
        finite = self.scenario.options.get("skip_nonfinite", True)  # 0 * NaN is NaN
        if raised or skipped or way == "cancel" or (step.lr_0 and finite):
            assert_same_bits(self.weights(), before)
        if self.scenario.with_model:
            assert int(self.holder.norm.num_batches_tracked) == self.first_passes

    def by_hand(self, way: str, evaluate: Callable[[], Tensor]) -> None:
        self.opt.zero_grad()
        evaluate()
        if way == "base":
            self.opt.step()
            return
        zero = self.t % 2 == 0
        again = self.opt.first_step(zero_grad=zero)
        assert self.opt.is_perturbed == again
        if way == "cancel":
            self.opt.restore()
            return
        if again:
            if not zero:
                self.opt.zero_grad()
            evaluate()
        self.opt.second_step(zero_grad=not zero)

    def act(self, act: Act) -> None:
        self.settled = False
        if act.what in TELLING:
            getattr(self, act.what)(act.where, *(act.value or ()))
        elif not self.straight:
            getattr(self, act.what)(act)

    def widen(self, where: int) -> None:
        for i, p in enumerate(self.params):
            if p.dtype == f32:
                p.grad = None
                p.data = placed(p.data.double(), self.specs[i].memory)

    # What makes no difference.

    def save(self, act: Act) -> None:
        """To a fresh optimizer of the same parameters, which learns of every option from the file."""
        state = through_a_file(self.opt.state_dict())
        self.make([{}] * len(self.groups))
        self.opt.load_state_dict(state)

    def restart(self, act: Act) -> None:
        """As in another process: other parameters, too."""
        frozen = [not p.requires_grad for p in self.params]
        weights = [p.detach().clone() for p in self.params]
        for i, (w, spec) in enumerate(zip(weights, self.specs, strict=True)):
            self.params[i] = nn.Parameter(placed(w, spec.memory), not frozen[i])
        self.save(act)

    def deepcopy(self, act: Act) -> None:
        self.holder, self.opt = copy.deepcopy((self.holder, self.opt))
        self.params = self.holder.params

    def pickle(self, act: Act) -> None:
        self.holder, self.opt = pickle.loads(pickle.dumps((self.holder, self.opt)))
        self.params = self.holder.params

    def move(self, act: Act) -> None:
        for i, p in enumerate(self.params):
            if act.where % 2 == 0 or i == act.where:
                p.grad = None
                p.data = placed(p.data, self.specs[i].memory)

    def reload(self, act: Act) -> None:
        self.holder.load_state_dict(copy.deepcopy(self.holder.state_dict()))

    def zero_grad(self, act: Act) -> None:
        self.opt.zero_grad(set_to_none=act.value)

    def unflatten(self, act: Act) -> None:
        self.opt.unflatten()
        self.flatten = False

    # What is compared.

    def weights(self) -> dict[str, Tensor]:
        return {str(i): p.detach().clone() for i, p in enumerate(self.params)}

    def learnt(self) -> dict[str, Tensor]:
        state, stats = self.opt.state_dict(), self.opt.stats
        if not self.measured:
            del stats["grad_norm"]  # 0, or that of a step before
        entries = {(i, key): torch.as_tensor(x) for i, e in state["state"].items() for key, x in e.items()}
        # A frozen parameter may have a g_v or an average of zeros, or none.
        return stats | {f"{i}.{key}": x for (i, key), x in entries.items() if key not in AVERAGES or x.any()}

    def check_memory(self) -> None:
        for p, spec in zip(self.params, self.specs, strict=True):
            if spec.memory in ("gaps", "odd") and p.storage_offset() == 1:
                assert torch.equal(around(p), torch.full_like(around(p), SENTINEL)), f"around {spec}"


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Theirs(Run):
    """The naive version, in float64; the loss is evaluated in the dtypes of the parameters."""

    is_named = True

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self.dtypes: list[torch.dtype] = []
        for i in range(len(self.specs)):
            self.join(i)
        s = scenario
        groups = [{"params": self.named(m, True), **own} for m, own in zip(self.groups, self.options, strict=True)]
        options = {key: value for key, value in s.options.items() if key not in ("skip_nonfinite", "master_weights")}
        self.opt = self.method.oracle(groups, s.rule, **options)
        if s.policy:
            kind, *arguments = s.policy
            self.opt.fires = {"always": lambda: always, "every": every, "bernoulli": draws, "adaptive": Trigger}[kind](
                *arguments
            )
        self.round_to_dtypes()

    def named(self, members: list[int], named: bool) -> list[Any]:
        if self.scenario.named:
            return super().named(members, True)
        return [(f"{i}.weight" if self.params[i].dim() >= 2 else f"{i}.bias", self.params[i]) for i in members]

    def join(self, i: int) -> None:
        spec = self.specs[i]
        self.params.append(nn.Parameter(constants(i, spec.shape, spec.dtype)[0].double()))
        self.dtypes.append(spec.dtype)
        if self.opt:
            self.round_to_dtypes()

    def round_to_dtypes(self) -> None:
        masters = self.scenario.options.get("master_weights")
        dtypes = [f32 if masters and dtype in HALVES else dtype for dtype in self.dtypes]
        self.opt.dtypes = dict(zip(self.params, dtypes, strict=True))

    def seen(self, i: int) -> Tensor:
        return self.params[i].to(self.dtypes[i])

    def widen(self, where: int) -> None:
        self.dtypes = [f64 if dtype == f32 else dtype for dtype in self.dtypes]
        self.round_to_dtypes()

    def act(self, act: Act) -> None:
        if act.what in TELLING:
            getattr(self, act.what)(act.where, *(act.value or ()))

    def step(self, step: Step) -> None:
        give_back, evaluate = self.lr_0(step), self.closure(step)
        try:
            if step.way == "base":
                self.opt.base.zero_grad()
                evaluate()
                self.opt.base_step()
            elif step.way == "cancel":
                self.opt.step(evaluate, cancel=True)
            else:
                self.opt.step(evaluate)
        except Interrupt:
            pass
        give_back()
        self.t += 1

    @property
    def precision(self) -> float:
        """Of the coarsest dtype: norms couple all parameters."""
        return max(torch.finfo(spec.dtype).eps for spec in self.specs)

    @property
    def rtol(self) -> float:
        return 1e-12 if self.precision < 1e-10 else 1e-5 if self.precision < 1e-4 else 4 * self.precision

    @property
    def is_ill_conditioned(self) -> bool:
        """Whether rounding decides: g_v is little more than that, or the last decision may be another one."""
        mix, trigger = self.opt.mix, self.opt.fires
        if isinstance(mix, Look) and self.precision > 10 * self.rtol * mix.share:
            return True
        if not isinstance(trigger, Trigger) or math.isnan(trigger.threshold):
            return False
        return abs(trigger.n - trigger.threshold) <= 100 * self.precision * (trigger.mean + abs(trigger.threshold))

    @property
    def went_on_with_nan(self) -> bool:
        """Whether the others did not skip a step that this one skipped."""
        return self.opt.skipped > 0 and not self.scenario.options.get("skip_nonfinite", True)

    def compare(self, ours: Ours) -> None:
        half, rtol = self.precision > 1e-4, self.rtol
        naive, stats = self.opt, ours.opt.stats
        counts = {"steps": naive.t, "second_passes": sum(naive.decisions), "skipped_steps": naive.skipped}
        assert {name: int(stats[name]) for name in counts} == counts
        for i, (p, q) in enumerate(zip(ours.params, self.params, strict=True)):
            if q.numel():
                error = float((p.detach().double() - q.detach()).abs().max() / max(1.0, float(q.detach().abs().max())))
                assert error <= rtol, f"parameter {i} differs by {error}"
        if isinstance(naive.fires, Trigger) and not half:
            assert float(stats["ema_mean"]) == pytest.approx(naive.fires.mean, rel=100 * rtol)
            assert float(stats["ema_var"]) == pytest.approx(naive.fires.var, rel=1000 * rtol, abs=rtol)
        if isinstance(naive, NaiveSALR) and not half:
            assert float(stats["lr_scale"]) == pytest.approx(naive.ratio, rel=1e4 * rtol)


def run(scenario: Scenario) -> None:
    """Everything, three times; raises where they differ."""
    with warnings.catch_warnings(), sk.use_backend(scenario.backend):
        warnings.simplefilter("ignore")  # of half precision, and steps past total_steps
        ours, straight = Ours(scenario, False), Ours(scenario, True)
        theirs: Theirs | None = Theirs(scenario)
        for event in scenario.events:
            for each in filter(None, (ours, straight, theirs)):
                each.step(event) if isinstance(event, Step) else each.act(event)
            assert_equal(scenario, ours.weights(), straight.weights())
            ours.check_memory()
            if theirs is not None and (theirs.is_ill_conditioned or theirs.went_on_with_nan):
                theirs = None
            if theirs is not None:
                theirs.compare(ours)
        assert_equal(scenario, ours.learnt(), straight.learnt())


def assert_equal(scenario: Scenario, a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """To the bit. But Triton's programs share the blocks of all parameters that are laid out: a frozen one, which a
    copy of the optimizer leaves out, moves the last bits of a norm."""
    frozen = any(isinstance(event, Act) and event.what == "freeze" for event in scenario.events)
    if frozen and scenario.backend == "triton":
        torch.testing.assert_close(a, b, equal_nan=True)
    else:
        assert_same_bits(a, b)


EXAMPLES = int(os.environ.get("SHARPKERN_FUZZ_EXAMPLES", "0"))
profile = settings(
    deadline=None,
    derandomize=not EXAMPLES,  # the same ones on every run, but for `make fuzz`
    print_blob=True,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@settings(profile, max_examples=25)
@given(scenarios())
def test_some_trainings(scenario: Scenario) -> None:
    run(scenario)


@pytest.mark.slow
@settings(profile, max_examples=EXAMPLES or 200)
@given(scenarios())
def test_many_trainings(scenario: Scenario) -> None:
    run(scenario)
