"""What sharpkern is measured against: the family as it is usually written, and as well as torch allows.

Every class here has ``first_step()`` and ``second_step()`` on gradients that already lie in ``p.grad``. ASAM
scales tensors of two or more dimensions, as ``sharpkern.ASAM`` does without names.

``Loop`` is not ``tests/naive.py``: that one is an oracle, which sums in float64 and reads a number of every tensor
on the host. Nobody trains with it, and whatever is measured against it looks fast.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

Algorithm = Literal["sam", "asam"]
Base = Literal["sgd", "adamw"]
Closure = Callable[[], Tensor]

LR, MOMENTUM, SGD_DECAY = 0.1, 0.9, 5e-4
ADAM_LR, BETA1, BETA2, ADAM_EPS, ADAM_DECAY = 1e-3, 0.9, 0.999, 1e-8, 1e-2
RHO: dict[Algorithm, float] = {"sam": 0.05, "asam": 0.5}
ETA = 0.01
PERTURB_EPS = 1e-12
# LookSAM's, AE-SAM's, and SALR's with that many steps each way.
ALPHA, DECAY = 0.2, 0.99
STEP_SIZE, BRANCH = 0.002, 5

BASES: dict[Base, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": LR, "momentum": MOMENTUM, "weight_decay": SGD_DECAY}),
    "adamw": (
        torch.optim.AdamW,
        {"lr": ADAM_LR, "betas": (BETA1, BETA2), "eps": ADAM_EPS, "weight_decay": ADAM_DECAY},
    ),
}


class Unavailable(Exception):
    """A contender that cannot run here, or does something else; the message says why."""


class TwoStep(Protocol):
    def first_step(self) -> object: ...

    def second_step(self) -> object: ...


class Loop:
    """The loop over parameters that most training scripts carry along, with torch's optimizer as the base.

    The methods beyond SAM take the norm of the gradient for their decision and once more for the radius, and that of
    g_v whenever they need it, as scripts do.
    """

    def __init__(self, params: Sequence[Tensor], algorithm: Algorithm, base: Base, fused: bool = False) -> None:
        self.params = list(params)
        self.adaptive = algorithm == "asam"
        self.rho = RHO[algorithm]
        self.saved: dict[Tensor, Tensor] = {}
        cls, options = BASES[base]
        self.base_optimizer = cls(self.params, **options, **({"fused": True} if fused else {}))
        self.steps = 0
        self.mean, self.var = 0.0, 1e-10
        self.g_v: dict[Tensor, Tensor] = {}
        self.history: list[float] = []
        self.ratio = 1.0

    def _scale(self, p: Tensor) -> Tensor | float:
        # 1.0 where nothing is scaled: the copies multiply by it all the same.
        return p.abs() + ETA if self.adaptive and p.dim() >= 2 else 1.0

    @torch.no_grad()
    def first_step(self) -> None:
        device = self.params[0].device
        norms = [(self._scale(p) * p.grad).norm(p=2).to(device) for p in self.params if p.grad is not None]
        scale = self.rho / (torch.norm(torch.stack(norms), p=2) + PERTURB_EPS)
        for p in self.params:
            if p.grad is None:
                continue
            e_w = self._scale(p) ** 2 * p.grad * scale.to(p)
            self.saved[p] = p.data.clone()
            p.add_(e_w)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.params:
            if p in self.saved:
                p.data = self.saved.pop(p)
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure: Closure, every: int = 0, trigger: float | None = None, alpha: float | None = None) -> None:
        """A second pass in every so many steps, or where the gradient is large for AE-SAM; a plain step otherwise.

        Args:
            every: 0: never.
            trigger: standard deviations above the mean, in place of ``every``.
            alpha: LookSAM's.
        """
        closure()
        fires = every > 0 and self.steps % every == 0 if trigger is None else self._is_large(trigger)
        self.steps += 1
        grads = {p: p.grad for p in self.params if p.grad is not None}
        if fires:
            first = {} if alpha is None else {p: g.clone() for p, g in grads.items()}
            self.first_step()
            closure()
            if first:
                product = sum((g * p.grad).sum() for p, g in first.items() if p.grad is not None)
                squared = sum(g.square().sum() for g in first.values())
                self.g_v = {p: p.grad - product / squared * g for p, g in first.items() if p.grad is not None}
            self.second_step()
            return
        if alpha is not None:
            factor = alpha * _norm(list(grads.values())) / _norm(list(self.g_v.values()))
            for p, g in grads.items():
                p.grad = g + factor * self.g_v[p]
        self.base_optimizer.step()

    def _is_large(self, deviations: float) -> bool:
        n = _norm([p.grad for p in self.params if p.grad is not None]) ** 2
        self.mean = DECAY * self.mean + (1 - DECAY) * n
        self.var = DECAY * self.var + (1 - DECAY) * (n - self.mean) ** 2
        return n >= self.mean + deviations * math.sqrt(self.var)

    @torch.no_grad()
    def salr(self, closure: Closure, every: int) -> None:
        """SALR, which measures the sharpness in every so many steps."""
        closure()
        if self.steps % every == 0:
            first = {p: p.grad for p in self.params if p.grad is not None}
            old = {p: p.clone() for p in self.params}
            ends = []
            for sign in (-1, 1):
                for _ in range(BRANCH):
                    grads = {p: p.grad for p in self.params if p.grad is not None}
                    length = sign * STEP_SIZE / (_norm(list(grads.values())) + PERTURB_EPS)
                    for p, g in grads.items():
                        p.add_(g, alpha=length)
                    ends.append(float(closure()))
                for p, w in old.items():
                    p.copy_(w)
                for p, g in first.items():
                    p.grad = g
            sharpness = ends[-1] - ends[BRANCH - 1]
            if sharpness > 0:
                self.history.append(sharpness)
                self.ratio = sharpness / statistics.median(self.history)
        self.steps += 1
        for group in self.base_optimizer.param_groups:
            lr, group["lr"] = group["lr"], group["lr"] * self.ratio
            self.base_optimizer.step()
            group["lr"] = lr


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.norm(torch.stack([t.norm(p=2) for t in tensors]), p=2))


# One pass each, over lists. They run eagerly and under torch.compile; a number that changes from step to step
# is a float in the first case (it folds into an operation that is there anyway) and a tensor in the second (a
# float would be compiled in, and fusion makes the extra multiplication free).
Number = float | Tensor


def _add_scaled(to: list[Tensor], of: Sequence[Tensor], scale: Number) -> None:
    if isinstance(scale, Tensor):
        torch._foreach_add_(to, torch._foreach_mul(of, scale))
    else:
        torch._foreach_add_(to, of, alpha=scale)


def foreach_perturb(
    params: list[Tensor], grads: list[Tensor], backup: list[Tensor], scaled: list[int], rho: float, on_host: bool
) -> None:
    """backup = w, w += rho g / ||g||, or rho T^2 g / ||T g|| on the tensors at the indices ``scaled``."""
    directions = list(grads)
    if scaled:
        scales = torch._foreach_abs([params[i] for i in scaled])
        torch._foreach_add_(scales, ETA)
        products = torch._foreach_mul(scales, [grads[i] for i in scaled])
        for i, product in zip(scaled, products, strict=True):
            directions[i] = product
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(directions)))
    if scaled:
        torch._foreach_mul_([directions[i] for i in scaled], scales)
    scale = rho / (norm + PERTURB_EPS)
    torch._foreach_copy_(backup, params)
    _add_scaled(params, directions, scale.item() if on_host else scale)


def foreach_sgd(params: list[Tensor], grads: list[Tensor], backup: list[Tensor], momenta: list[Tensor]) -> None:
    """Restore, then SGD with momentum and weight decay; a momentum of zeros gives torch's first step."""
    torch._foreach_copy_(params, backup)
    torch._foreach_mul_(momenta, MOMENTUM)
    torch._foreach_add_(momenta, grads)
    torch._foreach_add_(momenta, backup, alpha=SGD_DECAY)
    torch._foreach_add_(params, momenta, alpha=-LR)


def foreach_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    backup: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    step_size: Number,
    eps: Number,
) -> None:
    """Restore, then AdamW; both bias corrections are folded into ``step_size`` and ``eps``, which saves a pass."""
    torch._foreach_copy_(params, backup)
    torch._foreach_mul_(params, 1 - ADAM_LR * ADAM_DECAY)
    torch._foreach_lerp_(means, grads, 1 - BETA1)
    torch._foreach_mul_(squares, BETA2)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - BETA2)
    roots = torch._foreach_sqrt(squares)
    torch._foreach_add_(roots, eps)
    if isinstance(step_size, Tensor):
        torch._foreach_div_(roots, step_size)
        torch._foreach_addcdiv_(params, means, roots, value=-1.0)
    else:
        torch._foreach_addcdiv_(params, means, roots, value=-step_size)


class Foreach:
    """A careful rewrite with ``torch._foreach``: buffers that stay, no Python per parameter.

    Args:
        compiled: run the two passes under torch.compile, one function each.
    """

    def __init__(self, params: Sequence[Tensor], algorithm: Algorithm, base: Base, compiled: bool = False) -> None:
        self.leaves = list(params)
        # Aliases that never require grad, so that the compiled functions need no no_grad region inside.
        self.params = [p.detach() for p in params]
        self.backup = [torch.empty_like(p) for p in self.params]
        self.states = [[torch.zeros_like(p) for p in self.params] for _ in range(1 if base == "sgd" else 2)]
        self.scaled = [i for i, p in enumerate(self.params) if algorithm == "asam" and p.dim() >= 2]
        self.rho = RHO[algorithm]
        self.base = base
        self.device = self.params[0].device
        self.compiled = compiled
        # From another device the host would have to wait for a number.
        self.on_host = not compiled and self.device.type == "cpu"
        self.steps = 0
        descend = foreach_sgd if base == "sgd" else foreach_adamw
        self._perturb = _compile(foreach_perturb, self.device) if compiled else foreach_perturb
        self._descend: Callable[..., None] = _compile(descend, self.device) if compiled else descend

    @property
    def _grads(self) -> list[Tensor]:
        return [cast(Tensor, p.grad) for p in self.leaves]

    @torch.no_grad()
    def first_step(self) -> None:
        self._perturb(self.params, self._grads, self.backup, self.scaled, self.rho, self.on_host)

    @torch.no_grad()
    def second_step(self) -> None:
        numbers: list[Number] = []
        if self.base == "adamw":
            self.steps += 1
            root = math.sqrt(1 - BETA2**self.steps)
            numbers = [ADAM_LR * root / (1 - BETA1**self.steps), ADAM_EPS * root]
            if self.compiled:
                # Filled where it is used: a copy from the host would be waited for.
                numbers = [torch.full((), x, dtype=self.params[0].dtype, device=self.device) for x in numbers]
        self._descend(self.params, self._grads, self.backup, *self.states, *numbers)


class ForeachFused(Foreach):
    """The first pass of ``Foreach``, then a restore and torch's optimizer with ``fused=True``."""

    def __init__(self, params: Sequence[Tensor], algorithm: Algorithm, base: Base) -> None:
        super().__init__(params, algorithm, base)
        self.states = []
        cls, options = BASES[base]
        self.base_optimizer = cls(self.leaves, **options, fused=True)

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.params, self.backup)
        self.base_optimizer.step()


def _compile(function: Callable[..., None], device: torch.device) -> Callable[..., None]:
    _check_compiler(device)
    # fullgraph: an error, not a silent eager run, where it cannot compile or has compiled too often.
    return torch.compile(function, fullgraph=True, dynamic=False)


# What is wrong with torch.compile on a device type; nothing: an empty string.
_compilers: dict[str, str] = {}


def _check_compiler(device: torch.device) -> None:
    """Try torch.compile once on something small.

    Raises:
        Unavailable: with what it said.
    """
    if device.type not in _compilers:
        try:
            torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(64, device=device))
            _compilers[device.type] = ""
        except Exception as error:  # whatever the toolchain does
            _compilers[device.type] = f"torch.compile does not work here: {type(error).__name__}"
    if _compilers[device.type]:
        raise Unavailable(_compilers[device.type])


def make_compiled(params: Sequence[Tensor], algorithm: Algorithm, base: Base) -> TwoStep:
    """``Foreach`` under torch.compile; forgets what was compiled for the contender before it.

    Raises:
        Unavailable: when there is no working compiler.
    """
    torch._dynamo.reset()
    return Foreach(params, algorithm, base, compiled=True)


def make_pytorch_optimizer(
    params: Sequence[Tensor], algorithm: Algorithm, base: Base, foreach: bool | None = None
) -> TwoStep:
    """``pytorch_optimizer.SAM``.

    Raises:
        Unavailable: when it is not installed, and for ASAM.
    """
    try:
        from pytorch_optimizer import SAM
    except ImportError:
        raise Unavailable("pytorch_optimizer is not installed") from None
    if algorithm == "asam":
        raise Unavailable("pytorch_optimizer has no ASAM: its adaptive=True scales every tensor, without eta")
    cls, options = BASES[base]
    return cast(TwoStep, SAM(params, cls, rho=RHO["sam"], perturb_eps=PERTURB_EPS, foreach=foreach, **options))
