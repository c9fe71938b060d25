"""When to take the second pass. A policy is plain data: what it decides depends on the step's number alone, so
that it is resumed by that number, and the same on every process."""

from __future__ import annotations

import hashlib
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass


class Policy(ABC):
    """Decides for each step."""

    @abstractmethod
    def second_pass(self, t: int) -> bool:
        """Whether step t (from 0) looks at the gradient twice."""


@dataclass(frozen=True)
class Always(Policy):
    """Every step does."""

    def second_pass(self, t: int) -> bool:
        return True


@dataclass(frozen=True)
class Bernoulli(Policy):
    """A step does with probability p: when a number u(seed, t), uniform in [0, 1), is below it.

    Args:
        p: the probability, or a function of the step.
        seed: another one gives other draws.

    Raises:
        ValueError, TypeError: for a probability outside of [0, 1], a seed that is no integer.
    """

    p: float | Callable[[int], float]
    seed: int

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed should be an integer, but got {self.seed!r}")
        if not callable(self.p):
            _check_probability(self.p, "p")

    def second_pass(self, t: int) -> bool:
        p = self.p
        if callable(p):
            p = p(t)
            _check_probability(p, f"p({t})")
        # A hash, not a generator: nothing but the seed and the step has to be saved, or shared between processes.
        digest = hashlib.blake2b(f"{self.seed}:{t}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53 < p


def _check_probability(p: object, name: str) -> None:
    if isinstance(p, bool) or not isinstance(p, numbers.Real):
        raise TypeError(f"{name} should be a number, but got {p!r}")
    if not 0 <= float(p) <= 1:
        raise ValueError(f"Invalid {name}: {p}")
