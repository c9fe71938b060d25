"""Every optimizer and every base rule as data. A new optimizer is an entry of METHODS: the contract (tests/contract),
the emulated and the real GPUs take it from there."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from naive import (
    Gradients,
    Look,
    Naive,
    NaiveAverage,
    NaiveESAM,
    NaiveMomentum,
    NaiveNudged,
    NaiveSALR,
    NaiveWSAM,
    Trigger,
    asam,
    dot,
    draws,
    dual,
    every,
    magnitude,
    part,
)

import sharpkern as sk

SGD, Adam, AdamW, RMSprop = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop

RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGD, dict(lr=0.1)),
    "momentum": (SGD, dict(lr=0.05, momentum=0.9, weight_decay=5e-3)),
    "dampening": (SGD, dict(lr=0.05, momentum=0.8, dampening=0.4)),
    "nesterov": (SGD, dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)),
    "adam": (Adam, dict(lr=1e-2, weight_decay=1e-2)),
    "amsgrad": (Adam, dict(lr=1e-2, amsgrad=True, betas=(0.8, 0.9))),
    "adam-decoupled": (Adam, dict(lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True)),
    "adamw": (AdamW, dict(lr=1e-2, weight_decay=0.1)),
    "adamw-amsgrad": (AdamW, dict(lr=1e-2, amsgrad=True, eps=1e-6)),
    "wrapped": (RMSprop, dict(lr=1e-3, momentum=0.5)),
    "wrapped-adagrad": (torch.optim.Adagrad, dict(lr=1e-2)),
    "wrapped-nadam": (torch.optim.NAdam, dict(lr=1e-3)),
}
SGD_RULES = ("sgd", "momentum", "dampening")  # what a class has that steps as SGD does
BASES = ("momentum", "adamw", "wrapped")  # one a kind: most of the contract is held with these


@dataclass(frozen=True)
class Method:
    """One optimizer, as the tests make it.

    Args:
        name: in the tests' names.
        cls: the class.
        options: its arguments; those that its naive version takes are all there.
        naive: the hooks of its naive version, of all its arguments; or that version.
        every: arguments that make every step take its second pass, or measure.
        never: those that make it the base optimizer, where there are any.
        of_length: it is told the number of steps.
        triggered: whether a step takes its second pass depends on its gradient.
        calls: of the closure in a step under ``every``.
        followed: those of them whose gradient is followed.
        by_hand: it has ``first_step`` and ``second_step``.
        radius: the argument that says how far the weights move between two passes.
        state: names of its own in ``opt.state[p]``.
        one_gradient: it moves the weights before its first gradient, along the base rule's momentum: it takes bases
            that have one.
        sgd_only: it steps as SGD does, without nesterov, and takes no base.
        one_pass: no step of it takes a second one.
        prepare: what is done to the optimizer, and to its naive version, before anything else.
        brief: the first tier holds it to the contract with one base rule, that of its turn in TURNS.
        like: the class whose passes it shares: the first tier takes its trajectory only.
    """

    name: str
    cls: Any
    options: dict[str, Any] = field(default_factory=dict)
    naive: Callable[[dict[str, Any]], dict[str, Any]] = lambda o: {}
    oracle_cls: Any = Naive
    every: dict[str, Any] = field(default_factory=dict)
    never: dict[str, Any] | None = None
    of_length: bool = False
    triggered: bool = False
    calls: int = 2
    followed: tuple[int, ...] = (0, 1)
    by_hand: bool = True
    radius: str = "rho"
    state: tuple[str, ...] = ()
    one_gradient: bool = False
    sgd_only: bool = False
    one_pass: bool = False
    prepare: Callable[[Any], None] = lambda opt: None
    brief: bool = False
    like: str = ""

    def __str__(self) -> str:
        return self.name

    def _arguments(self, steps: int, more: dict[str, Any]) -> dict[str, Any]:
        return {**self.options, **({"total_steps": steps} if self.of_length else {}), **more}

    def base_of(self, base: Any, more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A base class and its options, of a class or of a name in RULES."""
        if isinstance(base, str):
            base, options = RULES[base]
            more = {**options, **more}
        if self.sgd_only and (base is not SGD or more.get("nesterov")):
            pytest.skip(f"{self} steps as SGD does")
        if self.one_pass and isinstance(more.get("model"), torch.nn.Module):
            more = {**more, "model": None}  # its buffers are what the one pass left
        if self.one_gradient and inspect.isclass(base) and base not in (SGD, Adam, AdamW):
            pytest.skip(f"{base.__name__} has no momentum that {self} knows of")
        return base, {"momentum": 0.9, **more} if self.one_gradient and base is SGD else more

    def make(self, params: Any, base: Any = SGD, steps: int = 40, **more: Any) -> Any:
        """The optimizer, for a run of so many steps. ``base``: a class, or a name in RULES."""
        base, more = self.base_of(base, more)
        opt = self.cls(params, *(() if self.sgd_only else (base,)), **self._arguments(steps, more))
        self.prepare(opt)
        return opt

    def oracle(self, params: Any, base: Any = SGD, steps: int = 40, **more: Any) -> Any:
        """Its naive version, of the same arguments."""
        base, more = self.base_of(base, more)
        given = self._arguments(steps, more)
        own = {*inspect.signature(self.cls).parameters} - {*inspect.signature(SGD).parameters}
        groups = {key: given[key] for key in ("rho", "eta", "adaptive", "nudge") if key in given}
        rest = {key: value for key, value in given.items() if key not in own or key == "max_grad_norm"}
        naive = self.oracle_cls(params, base, groups, **self.naive(given), **rest)
        self.prepare(naive)
        return naive

    @property
    def two_passes(self) -> bool:
        """Whether a loop by hand with two backward passes is the one for it."""
        return self.by_hand and not (self.one_gradient or self.one_pass)

    @property
    def always(self) -> bool:
        """Whether every step takes its second pass, whatever the options."""
        return not self.every


def _ae_sam(o: dict[str, Any]) -> Any:
    return Trigger(o["total_steps"], o["lambda_start"], o["lambda_end"])


def _gsam(alpha: float) -> Any:
    """GSAM (Zhuang et al. 2022): the part of the first gradient that is across the second one is taken away."""

    def mix(g: Gradients, g_s: Gradients | None) -> Gradients:
        if g_s is None:
            return g
        along = dot(g, g_s) / max(dot(g_s, g_s), 1e-24)
        return {p: x - alpha * (g.get(p, 0 * x) - along * x) for p, x in g_s.items()}

    return mix


def no_convolution(name: str | None, p: torch.Tensor) -> bool:
    """The tensors that SAM on a part of them perturbs."""
    return p.dim() < 4


def _stable(g: Gradients, g_s: Gradients | None) -> Gradients:
    """StableSAM (Tan et al. 2024): the second gradient has the first one's length."""
    if g_s is None:
        return g
    n = dot(g_s, g_s) ** 0.5
    return {p: x * (dot(g, g) ** 0.5 / n if n > 1e-12 else 0) for p, x in g_s.items()}


def _coupled(gamma: float) -> Any:
    """WSAM (Yue et al. 2023) in one step, along a g_s + (1 - a) g."""
    a = gamma / (1 - gamma)

    def mix(g: Gradients, g_s: Gradients | None) -> Gradients:
        return g if g_s is None else {p: a * x + (1 - a) * g.get(p, 0 * x) for p, x in g_s.items()}

    return mix


def _friendly(sigma: float, lam: float) -> dict[str, Any]:
    """Friendly-SAM (Li et al. 2024): what is kept is an average of the gradients, not of the directions."""
    return {"direct": lambda g, m: g - sigma * m, "keep": lambda g, m, d: lam * m + (1 - lam) * g}


def _vasso(theta: float) -> dict[str, Any]:
    """VaSSO (Li and Giannakis 2023): the direction is the average."""
    return {"direct": lambda g, d: (1 - theta) * d + theta * g, "keep": lambda g, m, d: d}


def orthonormal(params: Iterable[torch.Tensor], k: int) -> torch.Tensor:
    """Directions ``[k, n]`` of n elements of parameters, in float64; fewer where there are fewer elements."""
    n, generator = sum(p.numel() for p in params), torch.Generator("cpu").manual_seed(5)
    rows = torch.randn(n, min(k, n), generator=generator, dtype=torch.float64, device="cpu")
    return torch.linalg.qr(rows).Q.t().to(torch.get_default_device())


def _directed(opt: Any) -> None:
    """Nudged SGD along three directions; a parameter without memory has none."""
    params = [p for group in opt.param_groups for p in group["params"]]
    if params and not any(p.is_meta for p in params):
        opt.refresh(orthonormal(params, 3))


_ALWAYS = {"lambda_start": -9.0, "lambda_end": -9.0}
_NEVER = {"lambda_start": 9.0, "lambda_end": 9.0}
_LIST = [
    Method("sam", sk.SAM, dict(rho=0.05), lambda o: {"scale": magnitude}),
    Method("sam-adaptive", sk.SAM, dict(rho=0.5, adaptive=True), lambda o: {"scale": magnitude}, brief=True),
    Method("sam-p", sk.SAM, dict(rho=0.03, p=3.0), lambda o: {"direction": dual(o["p"])}, brief=True),
    Method("asam", sk.ASAM, dict(rho=0.5, eta=0.01), lambda o: {"scale": asam}),
    Method(
        "sssam", sk.SSSAM, dict(rho=0.05, p=0.4, seed=7),
        lambda o: {"scale": magnitude, "fires": draws(o["p"], o["seed"])},
        every={"p": 1.0}, never={"p": 0.0}, brief=True,
    ),
    Method(
        "aesam", sk.AESAM, dict(rho=0.05, lambda_start=1.0, lambda_end=-1.0), lambda o: {"fires": _ae_sam(o)},
        every=_ALWAYS, never=_NEVER, of_length=True, triggered=True,
    ),
    Method(
        "looksam", sk.LookSAM, dict(rho=0.05, k=3, alpha=0.4),
        lambda o: {"fires": every(o["k"]), "mix": Look(o["alpha"])}, every={"k": 1}, state=("g_v",),
    ),
    Method(
        "aelooksam", sk.AELookSAM, dict(rho=0.05, alpha=0.4, lambda_start=2.0, lambda_end=0.0),
        lambda o: {"fires": _ae_sam(o), "mix": Look(o["alpha"])}, every=_ALWAYS, never=_NEVER, of_length=True,
        triggered=True, state=("g_v",), brief=True,
    ),
    Method("gsam", sk.GSAM, dict(rho=0.05, alpha=0.4), lambda o: {"mix": _gsam(o["alpha"])}),
    Method(
        "sam-part", sk.SAM, dict(rho=0.05, perturb=no_convolution), lambda o: {"scale": part(o["perturb"])}, brief=True,
    ),
    # With draws of no tensor among them.
    Method(
        "esam", sk.ESAM, dict(rho=0.05, beta=0.2, gamma=1.0, seed=35),
        lambda o: {"perturb_eps": 1e-7} | {key: o[key] for key in ("beta", "gamma", "seed", "perturb_eps") if key in o},
        NaiveESAM,
        every={"beta": 1.0, "perturb_eps": 1e-12}, never={"policy": sk.policy.Bernoulli(0.0)}, brief=True,
    ),
    Method("stablesam", sk.StableSAM, dict(rho=0.05), lambda o: {"mix": _stable}, like="sam"),
    Method("wsam", sk.WSAM, dict(rho=0.05, gamma=0.6), lambda o: {"gamma": o["gamma"]}, NaiveWSAM, brief=True),
    Method(
        "wsam-coupled", sk.WSAM, dict(rho=0.05, gamma=0.6, decouple=False), lambda o: {"mix": _coupled(o["gamma"])},
        like="gsam",
    ),
    Method(
        "friendlysam", sk.FriendlySAM, dict(rho=0.05, sigma=0.8, lam=0.7), lambda o: _friendly(o["sigma"], o["lam"]),
        NaiveAverage, state=("friendly_m",), brief=True,
    ),
    Method(
        "vasso", sk.VaSSO, dict(rho=0.05, theta=0.4), lambda o: _vasso(o["theta"]), NaiveAverage, state=("vasso_d",),
        like="friendlysam",
    ),
    Method(
        "momentumsam", sk.MomentumSAM, dict(rho=0.05), lambda o: {}, NaiveMomentum, calls=1, followed=(0,),
        one_gradient=True, brief=True,
    ),
    # w, two descents, their end, one ascent, its end.
    Method(
        "salr", sk.SALR, dict(n_ascent=2, n_descent=3, step_size=0.02, every=2),
        lambda o: {key: o[key] for key in ("n_ascent", "n_descent", "step_size", "every", "max_lr_scale") if key in o},
        NaiveSALR,
        every={"every": 1}, calls=6, followed=(0, 1, 2, 4), by_hand=False, radius="step_size",
    ),
    Method(
        "nudged", sk.NudgedSGD, dict(nudge=0.1, k=4), lambda o: {}, NaiveNudged, calls=1, followed=(0,), radius="",
        state=tuple(f"eigenvector_{i}" for i in range(4)), sgd_only=True, one_pass=True, prepare=_directed,
    ),
]  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in _LIST}

BY_HAND = [m for m in _LIST if m.two_passes]
# What a loop that clips the last gradient makes of it is what max_grad_norm= does: no other gradient is added, and it
# is not scaled.
CLIPPED = [m for m in BY_HAND if m.name not in ("gsam", "stablesam", "wsam", "wsam-coupled")]
DECIDING = [m for m in BY_HAND if not m.always]  # some steps take a second pass, and some do not
TRIGGERED = [m for m in _LIST if m.triggered]
LOOKING = [m for m in _LIST if "g_v" in m.state]


def is_slow(method: Method, base: str | None) -> bool:
    """Whether a test of a class, with a base rule where there is one, is left to the slow tier."""
    return bool(method.like) or (method.brief and base is not None and base != FIRST.get(method.name, base))


def over(methods: Iterable[Method]) -> Any:
    return pytest.mark.parametrize("method", list(methods), ids=str)


every_method = over(_LIST)
every_by_hand = over(BY_HAND)
every_deciding = over(DECIDING)
every_base = pytest.mark.parametrize("base", BASES)
# Each class with one base rule, each rule with some class: for what has nothing to do with the rule.
TURNS = [
    (m, "momentum" if m.sgd_only or (m.one_gradient and base == "wrapped") else base)
    for m, base in zip(_LIST, itertools.cycle(BASES), strict=False)
]
FIRST = {method.name: base for method, base in TURNS}
each_method = pytest.mark.parametrize(
    ("method", "base"), [pytest.param(m, base, id=f"{m}-{base}") for m, base in TURNS]
)


def _over_calls(calls: Callable[[Method], Iterable[int]]) -> Any:
    return pytest.mark.parametrize(
        ("method", "call"), [pytest.param(m, call, id=f"{m}-{call}") for m in _LIST for call in calls(m)]
    )


# Of a step under ``every``: its calls of the closure, those after the first, those whose gradient is followed.
every_call = _over_calls(lambda m: range(m.calls))
every_later_call = _over_calls(lambda m: range(1, m.calls))
every_followed = _over_calls(lambda m: m.followed)
