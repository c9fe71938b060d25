r"""Where a perturbation goes: :math:`e = \rho\, T_w^2 g / (\|T_w g\|_2 + \epsilon)`, with :math:`T_w = |w| + \eta` on
the parameters that a direction scales, 0 on those that it leaves out and 1 on the others."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from .checks import check_number, check_real, type_name
from .memory.scalars import Sum
from .ops import schema

Group = Mapping[str, Any]
Predicate = Callable[[str | None, Tensor], bool]
Self = TypeVar("Self", bound="Direction")


class Direction:
    """Along the gradient."""

    options: tuple[str, ...] = ("rho",)  # of a parameter group
    by_name = False  # whether it depends on names what is scaled
    exponent = 1.0  # q - 1 of the dual norm, see PNorm
    scalars: Mapping[str, Any] = {}  # numbers that it needs, see memory/scalars.py
    partial = False  # whether parameters may be left out of it
    whole = "it uses the whole first gradient"  # why they may not
    perturb: Predicate | None = None  # those for which this is false are

    def part(self: Self, perturb: Predicate, owner: str) -> Self:
        """This direction of the parameters for which the predicate is true.

        Raises:
            TypeError: for what cannot be called, or for an optimizer, the ``owner``, that needs the whole gradient.
        """
        if not self.partial:
            raise TypeError(f"{owner} takes no perturb=: {self.whole}")
        if not callable(perturb):
            raise TypeError(f"perturb should be a function of a name and a parameter, but got {perturb!r}")
        part = copy.copy(self)
        part.perturb = perturb
        return part

    def check(self, group: Group) -> None:
        """Raise for an option that is out of range."""
        for name in self.options:
            check_number(group[name], name)
        self._check_perturb(group)

    def _check_perturb(self, group: Group) -> None:
        perturb = group.get("perturb", True)
        if not isinstance(perturb, bool):
            raise TypeError(f"perturb of a group should be a bool, but got {perturb!r}")
        if not (perturb or self.partial):
            raise ValueError(f"Invalid perturb: False, {self.whole}")

    def check_part(self, params: Iterable[Any]) -> None:
        """Raise for tensors, or (name, tensor) pairs, of which the predicate does not say whether they are moved."""
        for entry in params if self.perturb else ():
            name, p = entry if isinstance(entry, tuple) else (None, entry)
            if isinstance(p, Tensor):
                self._perturbs(name, p)

    def scale(self, group: Group, name: str | None, param: Tensor) -> int:
        """Which T_w a parameter has, a value of ``schema.SCALE``."""
        self._check_perturb(group)  # it may have been written since
        if not group.get("perturb", True) or not self._perturbs(name, param):
            return schema.LEFT_OUT
        return schema.SCALED if self.scaled(group, name, param) else schema.PLAIN

    def _perturbs(self, name: str | None, param: Tensor) -> bool:
        if self.perturb is None:
            return True
        found = self.perturb(name, param)
        if not isinstance(found, bool):
            raise TypeError(f"perturb({name!r}, parameter) should return a bool, but got {found!r}")
        return found

    def scaled(self, group: Group, name: str | None, param: Tensor) -> bool:
        """Whether T_w = abs(w) + eta on a parameter."""
        return False

    def key(self, groups: Sequence[Group]) -> Any:
        """Changes when ``scale`` may."""
        named = self.by_name or self.perturb is not None
        return [(group.get("perturb"), tuple(group.get("param_names", ())) if named else None) for group in groups]

    def radius(self, group: Group) -> tuple[float, float]:
        """rho and eta."""
        return group["rho"], 0.0


class Nowhere(Direction):
    """For an algorithm that measures its own lengths."""

    options = ()


class Part(Direction):
    """Along the gradient, or a part of it."""

    partial = True


class Magnitude(Part):
    """T_w = abs(w) on every parameter of a group with ``adaptive``."""

    options = ("rho", "adaptive")

    def check(self, group: Group) -> None:
        check_number(group["rho"], "rho")
        if not isinstance(group["adaptive"], bool):
            raise TypeError(f"adaptive should be a bool, but got {group['adaptive']!r}")
        self._check_perturb(group)

    def scaled(self, group: Group, name: str | None, param: Tensor) -> bool:
        return bool(group["adaptive"])

    def key(self, groups: Sequence[Group]) -> Any:
        return super().key(groups), [group["adaptive"] for group in groups]


class Weights(Part):
    """T_w = abs(w) + eta on parameters whose name contains ``weight``; without names on those of two dimensions up."""

    options = ("rho", "eta")
    by_name = True

    def scaled(self, group: Group, name: str | None, param: Tensor) -> bool:
        return "weight" in name if name is not None else param.dim() >= 2

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

    whole = "the ball of another norm than the 2-norm is that of all parameters"
    # The largest magnitude m, in each layout's part; the sum of (abs(g) / m)^q, so that nothing overflows for any q.
    scalars = {"largest": Sum(), "powers": Sum()}

    def __init__(self, p: float, options: tuple[str, ...]) -> None:
        check_real(p, "p")
        self.p, self.options = math.inf if p > 1e300 else float(p), options
        if not self.p > 1:
            raise ValueError(f"Invalid p: {p}")
        self.exponent = 1 / (self.p - 1)

    def check(self, group: Group) -> None:
        check_number(group["rho"], "rho")
        self._check_adaptive(group)
        self._check_perturb(group)

    def _check_adaptive(self, group: Group) -> None:
        if group.get("adaptive", False) is not False:
            raise ValueError(f"adaptive={group['adaptive']!r} goes with p=2 only, but p is {self.p}")

    def scaled(self, group: Group, name: str | None, param: Tensor) -> bool:
        self._check_adaptive(group)  # it may have been written since
        return False

    def key(self, groups: Sequence[Group]) -> Any:
        return super().key(groups), [group.get("adaptive") for group in groups]


class Share(Part):
    """Along a random share of the tensors, by a radius that is divided by it."""

    def __init__(self, share: float) -> None:
        self.share = share

    def radius(self, group: Group) -> tuple[float, float]:
        return group["rho"] / self.share, 0.0


class Members:
    """A predicate: true for these very parameters."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = set(params)

    def __call__(self, name: str | None, param: Tensor) -> bool:
        return param in self._params


NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def norm_layers(model: nn.Module, *more: type[nn.Module]) -> Predicate:
    r"""SAM-ON: perturb the parameters of the normalisation layers only, ``perturb=norm_layers(model)``.

    .. math::
        e = \rho\, \frac{g_N}{\|g_N\|_2 + \epsilon}, \qquad g_N = g \text{ on the norm layers, else } 0

    The norm is over these parameters, the step with :math:`\nabla L_B(w + e)` is of all. They are known by the type of
    their module (batch, instance, layer, group and RMS norms, and subclasses), and found in the optimizer by identity,
    whatever their names.

    Args:
        model: whose parameters the optimizer has.
        *more: classes of further norm layers, such as a library's own RMS norm.

    Returns:
        The predicate, of a name and a parameter. It can be copied and pickled together with the optimizer.

    Raises:
        TypeError: for what is no module, or no class of modules.
        ValueError: for a model without parameters in such layers.

    Example::

        opt = sk.SAM(model.named_parameters(), perturb=sk.norm_layers(model), rho=0.5, lr=0.1)

    Source: Mueller et al. 2023, `Normalization Layers Are All That Sharpness-Aware Minimization Needs
    <https://arxiv.org/abs/2306.04226>`_.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, but got {type_name(model)}")
    for cls in more:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"norm layers are given by their classes, but got {cls!r}")
    params = [p for m in model.modules() if isinstance(m, (*NORM_LAYERS, *more)) for p in m.parameters()]
    if not params:
        raise ValueError("model has no norm layer with parameters: nothing would be perturbed")
    return Members(params)
