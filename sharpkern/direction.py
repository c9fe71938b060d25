r"""Where a perturbation goes: :math:`e = \rho\, T_w^2 g / (\|T_w g\|_2 + \epsilon)`, with :math:`T_w = |w| + \eta` on
the parameters that a direction scales and 1 on the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .checks import check_number, check_real
from .memory.scalars import Sum

Group = Mapping[str, Any]


class Direction:
    """Along the gradient."""

    options: tuple[str, ...] = ("rho",)  # of a parameter group
    by_name = False  # whether it depends on names what is scaled
    exponent = 1.0  # q - 1 of the dual norm, see PNorm
    scalars: Mapping[str, Any] = {}  # numbers that it needs, see memory/scalars.py

    def check(self, group: Group) -> None:
        """Raise for an option that is out of range."""
        for name in self.options:
            check_number(group[name], name)

    def scaled(self, group: Group, name: str | None, param: Tensor) -> bool:
        """Whether T_w = abs(w) + eta on a parameter."""
        return False

    def key(self, groups: Sequence[Group]) -> Any:
        """Changes when ``scaled`` may."""
        return None

    def radius(self, group: Group) -> tuple[float, float]:
        """rho and eta."""
        return group["rho"], 0.0


class Nowhere(Direction):
    """For an algorithm that measures its own lengths."""

    options = ()


class Magnitude(Direction):
    """T_w = abs(w) on every parameter of a group with ``adaptive``."""

    options = ("rho", "adaptive")

    def check(self, group: Group) -> None:
        check_number(group["rho"], "rho")
        if not isinstance(group["adaptive"], bool):
            raise TypeError(f"adaptive should be a bool, but got {group['adaptive']!r}")

    def scaled(self, group: Group, name: str | None, param: Tensor) -> bool:
        return bool(group["adaptive"])

    def key(self, groups: Sequence[Group]) -> Any:
        return tuple(group["adaptive"] for group in groups)


class Weights(Direction):
    """T_w = abs(w) + eta on parameters whose name contains ``weight``; without names on those of two dimensions up."""

    options = ("rho", "eta")
    by_name = True

    def scaled(self, group: Group, name: str | None, param: Tensor) -> bool:
        return "weight" in name if name is not None else param.dim() >= 2

    def key(self, groups: Sequence[Group]) -> Any:
        return tuple(tuple(group.get("param_names", ())) for group in groups)

    def radius(self, group: Group) -> tuple[float, float]:
        return group["rho"], group["eta"]


class PNorm(Direction):
    r"""The steepest one in the ball of a p-norm: :math:`e = \rho\, \operatorname{sign}(g)\, |g|^{q - 1} /
    (\|g\|_q + \epsilon)^{q - 1}` with :math:`q = p / (p - 1)`, the dual exponent.

    Args:
        p: above 1; ``math.inf``: :math:`e = \rho\, \operatorname{sign}(g)`.
        options: of a parameter group; one that scales may not be on.

    Raises:
        ValueError, TypeError: for a p that is no number above 1.
    """

    # The largest magnitude m, in each layout's part; the sum of (abs(g) / m)^q, so that nothing overflows for any q.
    scalars = {"largest": Sum(), "powers": Sum()}

    def __init__(self, p: float, options: tuple[str, ...]) -> None:
        check_real(p, "p")
        if not float(p) > 1:
            raise ValueError(f"Invalid p: {p}")
        self.p, self.options = float(p), options
        self.exponent = 1 / (self.p - 1)

    def check(self, group: Group) -> None:
        check_number(group["rho"], "rho")
        if "adaptive" in self.options and group["adaptive"] is not False:
            raise ValueError(f"adaptive={group['adaptive']!r} goes with p=2 only, but p is {self.p}")
