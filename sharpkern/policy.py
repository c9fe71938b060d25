"""When to take the second pass.

A policy is plain data. What most of them decide depends on the step's number alone, so that they are resumed by that
number, and the same on every process; Adaptive's statistics lie with the numbers of the step, and are saved with them.
Every two-pass optimizer takes one as ``policy=``, but for AESAM and AELookSAM, which are names for Adaptive over SAM
and LookSAM.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_count, check_probability, check_real

__all__ = ["Adaptive", "Always", "Bernoulli", "Every", "Policy", "Scheduled"]


class Policy(ABC):
    """Decides for each step. One of your own is a subclass with ``decide``, or of :class:`Scheduled` where the number
    of the step is enough.

    Example::

        class Warmup(Scheduled):
            def second_pass(self, t):
                return t >= 1000  # plain steps first
    """

    @property
    def scalars(self) -> Mapping[str, Tensor]:
        """Numbers that it keeps on the device, by name, with their values at the start."""
        return {}

    @abstractmethod
    def decide(self, step: Any) -> bool:
        """Whether a step whose gradients are there looks at them twice.

        Args:
            step: ``step.t`` is its number, from 0. After ``step.norm()`` the squared norm of the gradient is in
                ``step.scalars["squared_norm"]``, a float64 tensor of the device. What else a step can do is in
                ``optim/measure.py``.
        """


class Scheduled(Policy):
    """A policy that knows beforehand."""

    @abstractmethod
    def second_pass(self, t: int) -> bool:
        """Whether step t (from 0) looks at the gradient twice."""

    def decide(self, step: Any) -> bool:
        return self.second_pass(step.t)


@dataclass(frozen=True)
class Always(Scheduled):
    """Every step does."""

    def second_pass(self, t: int) -> bool:
        return True


@dataclass(frozen=True)
class Every(Scheduled):
    """One step in k does, the first one included.

    Raises:
        ValueError, TypeError: for a k that is no integer from 1 up.
    """

    k: int

    def __post_init__(self) -> None:
        check_count(self.k, "k")

    def second_pass(self, t: int) -> bool:
        return t % self.k == 0


@dataclass(frozen=True)
class Bernoulli(Scheduled):
    """A step does with probability p: when a number u(seed, t), uniform in [0, 1), is below it.

    Args:
        p: the probability, or a function of the step.
        seed: another one gives other draws.

    Raises:
        ValueError, TypeError: for a probability outside of [0, 1], a seed that is no integer.
    """

    p: float | Callable[[int], float]
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed should be an integer, but got {self.seed!r}")
        if not callable(self.p):
            check_probability(self.p, "p")

    def second_pass(self, t: int) -> bool:
        p = self.p
        if callable(p):
            p = p(t)
            check_probability(p, f"p({t})")
        # A hash, not a generator: nothing but the seed and the step has to be saved, or shared between processes.
        digest = hashlib.blake2b(f"{self.seed}:{t}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53 < p


class Statistics(NamedTuple):
    """Of the squared gradient norm, as Adaptive keeps them: exponential averages, and the last threshold."""

    mean: float = 0.0
    var: float = 1e-10
    threshold: float = math.nan


@dataclass(frozen=True)
class Adaptive(Policy):
    r"""AE-SAM's rule: a step does when its squared gradient norm n is large for the time.

    .. math::
        \mu \leftarrow \delta \mu + (1 - \delta)\, n, \qquad
        \sigma^2 \leftarrow \delta \sigma^2 + (1 - \delta)(n - \mu)^2, \qquad
        n \ge \mu + c_t \sigma, \qquad c_t = \tfrac{t}{T} \lambda_\text{end} + (1 - \tfrac{t}{T}) \lambda_\text{start}

    Args:
        total_steps: T, the number of steps of the whole training.
        lambda_start, lambda_end: :math:`\lambda_\text{start}` and :math:`\lambda_\text{end}`, in standard deviations.
            Infinite ones of one sign mean never (plus) or always (minus).
        decay: :math:`\delta`.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Source: Jiang et al. 2023, `An Adaptive Policy to Employ Sharpness-Aware Minimization
    <https://arxiv.org/abs/2304.14647>`_.
    """

    total_steps: int
    lambda_start: float = 1.0
    lambda_end: float = -1.0
    decay: float = 0.9

    def __post_init__(self) -> None:
        check_count(self.total_steps, "total_steps")
        for name in ("lambda_start", "lambda_end"):
            value = getattr(self, name)
            check_real(value, name)
            if math.isnan(value):
                raise ValueError(f"Invalid {name}: {value}")
        if math.isinf(self.lambda_start) and self.lambda_end == -self.lambda_start:
            raise ValueError(f"Invalid lambda_end: {self.lambda_end} after a lambda_start of {self.lambda_start}")
        check_real(self.decay, "decay")
        if not 0 <= self.decay < 1:
            raise ValueError(f"Invalid decay: {self.decay}")

    def coefficient(self, t: int) -> float:
        """c of step t; that of the end from ``total_steps`` on."""
        part = min(t / self.total_steps, 1.0)
        # Not 0 * inf.
        return (part * self.lambda_end if part > 0 else 0.0) + ((1 - part) * self.lambda_start if part < 1 else 0.0)

    @property
    def scalars(self) -> Mapping[str, Tensor]:
        """``ema``: the columns of ``ops.schema.EMA``."""
        return {"ema": torch.tensor([*Statistics(), 0.0], dtype=torch.float64, device="cpu")}

    def decide(self, step: Any) -> bool:
        # The launch that finishes the norm updates the statistics on the device; the answer is all that the host reads.
        if not step.has_gradients and not step.spread:
            return False
        if step.t >= self.total_steps:
            step.warn_once(
                f"the policy was told of total_steps={self.total_steps} and the training takes more: the threshold "
                "stays where it was to end"
            )
        step.norm(ema=(self.decay, self.coefficient(step.t)))
        return bool(step.fired())

    def update(self, statistics: Statistics, t: int, n: float) -> tuple[Statistics, bool]:
        """The statistics with the squared norm n of step t, and whether the step fires. This is the rule as data; in a
        step the norm's kernel computes it on the device, and the tests hold the one to the other.

        An n that is not finite, or whose variance is not, changes nothing and does not fire.
        """
        mean = self.decay * statistics.mean + (1 - self.decay) * n
        var = self.decay * statistics.var + (1 - self.decay) * (n - mean) * (n - mean)
        if not math.isfinite(var):
            return statistics, False
        c, spread = self.coefficient(t), math.sqrt(var)
        threshold = mean + (c * spread if spread > 0 or math.isfinite(c) else c)
        return Statistics(mean, var, threshold), n >= threshold


def choose(policy: Policy | None, make: Callable[[], Policy], **given: Any) -> Policy:
    """``policy``, or where there is none the one that an optimizer's own arguments make.

    Raises:
        TypeError: when ``policy`` is none, or one of those arguments is given, too.
    """
    if policy is None:
        return make()
    if not isinstance(policy, Policy):
        raise TypeError(f"policy should be a sharpkern.policy.Policy, but got {policy!r}")
    for name, value in given.items():
        if value is not None:
            raise TypeError(f"policy= and {name}= both say which steps take the second pass: give one of them")
    return policy


def refuse(owner: object, given: Mapping[str, Any], *names: str) -> None:
    """Raise TypeError for arguments of a class whose own ones say which steps take more than one pass."""
    for name in names:
        if name in given:
            raise TypeError(f"{type(owner).__name__} takes no {name}=: its other arguments say when it looks twice")
