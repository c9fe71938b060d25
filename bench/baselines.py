"""What sharpkern is measured against: the family as it is usually written, and as well as torch allows.

Every class here has ``first_step()`` and ``second_step()`` on gradients that already lie in ``p.grad``. ASAM
scales tensors of two or more dimensions, as ``sharpkern.ASAM`` does without names.

``Loop`` is not ``tests/naive.py``: that one is an oracle, which sums in float64 and reads a number of every tensor
on the host: 1.9 times the CPU time of ``Loop`` at ResNet-18. Nobody trains with it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

Algorithm = Literal["sam", "asam"]
Base = Literal["sgd", "adamw"]
Closure = Callable[[], Tensor]
TwoStep = Any  # has first_step() and second_step()

LR, MOMENTUM, SGD_DECAY = 0.1, 0.9, 5e-4
ADAM_LR, BETA1, BETA2, ADAM_EPS, ADAM_DECAY = 1e-3, 0.9, 0.999, 1e-8, 1e-2
RHO: dict[Algorithm, float] = {"sam": 0.05, "asam": 0.5}
ETA, PERTURB_EPS = 0.01, 1e-12
# LookSAM's, AE-SAM's, and SALR's with that many steps each way.
ALPHA, DECAY, STEP_SIZE, BRANCH = 0.2, 0.99, 0.002, 5

_ADAM = {"lr": ADAM_LR, "betas": (BETA1, BETA2), "eps": ADAM_EPS, "weight_decay": ADAM_DECAY}
BASES: dict[Base, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": LR, "momentum": MOMENTUM, "weight_decay": SGD_DECAY}),
    "adamw": (torch.optim.AdamW, _ADAM),
}


class Unavailable(Exception):
    """A contender that cannot run here, or does something else; the message says why."""


class Loop:
    """The loop over parameters that most training scripts carry along, with torch's optimizer as the base.

    The methods beyond SAM take the norm of the gradient for their decision and once more for the radius, and that of
    g_v whenever they need it, as scripts do.
    """

    def __init__(self, params: Sequence[Tensor], algorithm: Algorithm, base: Base, fused: bool = False) -> None:
        self.params = list(params)
        self.adaptive, self.rho = algorithm == "asam", RHO[algorithm]
        self.saved: dict[Tensor, Tensor] = {}
        cls, options = BASES[base]
        self.base_optimizer = cls(self.params, **options, **({"fused": True} if fused else {}))
        self.steps, self.mean, self.var, self.ratio = 0, 0.0, 1e-10, 1.0
        self.g_v: dict[Tensor, Tensor] = {}
        self.history: list[float] = []

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

    def _gradients(self) -> dict[Tensor, Tensor]:
        return {p: p.grad for p in self.params if p.grad is not None}

    @torch.no_grad()
    def step(self, closure: Closure, every: int = 0, trigger: float | None = None, alpha: float | None = None) -> None:
        """A second pass in every so many steps (0: never), or where AE-SAM's trigger fires; LookSAM has an alpha."""
        closure()
        fires = every > 0 and self.steps % every == 0 if trigger is None else self._is_large(trigger)
        self.steps += 1
        grads = self._gradients()
        if fires:
            first = {} if alpha is None else {p: g.clone() for p, g in grads.items()}
            self.first_step()
            closure()
            if first:
                product = sum((first[p] * g).sum() for p, g in self._gradients().items())
                squared = sum(g.square().sum() for g in first.values())
                self.g_v = {p: g - product / squared * first[p] for p, g in self._gradients().items()}
            self.second_step()
            return
        if alpha is not None:
            factor = alpha * _norm(grads) / _norm(self.g_v)
            for p, g in grads.items():
                p.grad = g + factor * self.g_v[p]
        self.base_optimizer.step()

    def _is_large(self, deviations: float) -> bool:
        n = _norm(self._gradients()) ** 2
        self.mean = DECAY * self.mean + (1 - DECAY) * n
        self.var = DECAY * self.var + (1 - DECAY) * (n - self.mean) ** 2
        return n >= self.mean + deviations * math.sqrt(self.var)

    @torch.no_grad()
    def nudged(self, closure: Closure, directions: Sequence[Sequence[Tensor]], nudge: float) -> None:
        """SGD's step, then what is to be scaled of it along each direction."""
        closure()
        self.base_optimizer.step()
        buffers = [self.base_optimizer.state[p]["momentum_buffer"] for p in self.params]
        for direction in directions:
            along = sum((v * e).sum() for v, e in zip(buffers, direction, strict=True))
            for p, e in zip(self.params, direction, strict=True):
                p.sub_(LR * (nudge - 1) * along * e)

    @torch.no_grad()
    def salr(self, closure: Closure, every: int) -> None:
        """SALR, which measures the sharpness in every so many steps."""
        closure()
        if self.steps % every == 0:
            first, old = self._gradients(), {p: p.clone() for p in self.params}
            ends = []
            for sign in (-1, 1):
                for _ in range(BRANCH):
                    grads = self._gradients()
                    length = sign * STEP_SIZE / (_norm(grads) + PERTURB_EPS)
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


def _norm(tensors: Mapping[Tensor, Tensor]) -> float:
    return float(torch.norm(torch.stack([t.norm(p=2) for t in tensors.values()]), p=2))


# One pass each, over lists. They run eagerly and under torch.compile; a number that changes from step to step
# is a float in the first case (it folds into an operation that is there anyway) and a tensor in the second (a
# float would be compiled in, and fusion makes the extra multiplication free).
Number = float | Tensor
Tensors = list[Tensor]


def foreach_perturb(
    params: Tensors, grads: Tensors, backup: Tensors, scaled: list[int], rho: float, host: bool
) -> None:
    """backup = w, w += rho g / ||g||, or rho T^2 g / ||T g|| on the tensors at the indices ``scaled``."""
    directions = list(grads)
    if scaled:
        scales = torch._foreach_abs([params[i] for i in scaled])
        torch._foreach_add_(scales, ETA)
        for i, product in zip(scaled, torch._foreach_mul(scales, [grads[i] for i in scaled]), strict=True):
            directions[i] = product
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(directions)))
    if scaled:
        torch._foreach_mul_([directions[i] for i in scaled], scales)
    scale = rho / (norm + PERTURB_EPS)
    torch._foreach_copy_(backup, params)
    if host:
        torch._foreach_add_(params, directions, alpha=scale.item())
    else:
        torch._foreach_add_(params, torch._foreach_mul(directions, scale))


def foreach_sgd(params: Tensors, grads: Tensors, backup: Tensors, momenta: Tensors) -> None:
    """Restore, then SGD with momentum and weight decay; a momentum of zeros gives torch's first step."""
    torch._foreach_copy_(params, backup)
    torch._foreach_mul_(momenta, MOMENTUM)
    torch._foreach_add_(momenta, grads)
    torch._foreach_add_(momenta, backup, alpha=SGD_DECAY)
    torch._foreach_add_(params, momenta, alpha=-LR)


def foreach_adamw(
    params: Tensors, grads: Tensors, backup: Tensors, means: Tensors, squares: Tensors, length: Number, eps: Number
) -> None:
    """Restore, then AdamW; both bias corrections are folded into ``length`` and ``eps``, which saves a pass."""
    torch._foreach_copy_(params, backup)
    torch._foreach_mul_(params, 1 - ADAM_LR * ADAM_DECAY)
    torch._foreach_lerp_(means, grads, 1 - BETA1)
    torch._foreach_mul_(squares, BETA2)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - BETA2)
    roots = torch._foreach_sqrt(squares)
    torch._foreach_add_(roots, eps)
    if isinstance(length, Tensor):
        torch._foreach_div_(roots, length)
        length = 1.0
    torch._foreach_addcdiv_(params, means, roots, value=-length)


class Foreach:
    """A careful rewrite with ``torch._foreach``: buffers that stay, no Python per parameter.

    Args:
        compiled: run the two passes under torch.compile, one function each.
        fused: torch's optimizer with ``fused=True`` in place of the second pass, after a restore.
    """

    def __init__(
        self, params: Sequence[Tensor], algorithm: Algorithm, base: Base, compiled: bool = False, fused: bool = False
    ) -> None:
        self.leaves = list(params)
        # Aliases that never require grad, so that the compiled functions need no no_grad region inside.
        self.params = [p.detach() for p in params]
        self.backup = [torch.empty_like(p) for p in self.params]
        self.scaled = [i for i, p in enumerate(self.params) if algorithm == "asam" and p.dim() >= 2]
        self.rho, self.base, self.compiled, self.steps = RHO[algorithm], base, compiled, 0
        # From another device the host would have to wait for a number.
        self.on_host = not compiled and self.params[0].device.type == "cpu"
        self._perturb: Callable[..., None] = foreach_perturb
        self._descend: Callable[..., None] = foreach_sgd if base == "sgd" else foreach_adamw
        if compiled:
            # fullgraph: an error, not a silent eager run, where it cannot compile or has compiled too often.
            compiler = partial(torch.compile, fullgraph=True, dynamic=False)
            self._perturb, self._descend = compiler(self._perturb), compiler(self._descend)
        cls, options = BASES[base]
        self.optimizer = cls(self.leaves, **options, fused=True) if fused else None
        states = 0 if fused else 1 if base == "sgd" else 2
        self.states = [[torch.zeros_like(p) for p in self.params] for _ in range(states)]

    @property
    def _grads(self) -> Tensors:
        return [p.grad for p in self.leaves]

    @torch.no_grad()
    def first_step(self) -> None:
        self._perturb(self.params, self._grads, self.backup, self.scaled, self.rho, self.on_host)

    @torch.no_grad()
    def second_step(self) -> None:
        if self.optimizer is not None:
            torch._foreach_copy_(self.params, self.backup)
            self.optimizer.step()
            return
        numbers: list[Number] = []
        if self.base == "adamw":
            self.steps += 1
            root = math.sqrt(1 - BETA2**self.steps)
            numbers = [ADAM_LR * root / (1 - BETA1**self.steps), ADAM_EPS * root]
            if self.compiled:
                # Filled where it is used: a copy from the host would be waited for.
                numbers = [torch.full((), x, dtype=self.params[0].dtype, device=self.params[0].device) for x in numbers]
        self._descend(self.params, self._grads, self.backup, *self.states, *numbers)


def make_compiled(params: Sequence[Tensor], algorithm: Algorithm, base: Base) -> TwoStep:
    """``Foreach`` under torch.compile; forgets what was compiled for the contender before it."""
    torch._dynamo.reset()
    try:
        torch.compile(torch.sin)(torch.zeros(64, device=params[0].device))
    except Exception as error:  # whatever the toolchain does
        raise Unavailable(f"torch.compile does not work here: {type(error).__name__}") from None
    return Foreach(params, algorithm, base, compiled=True)


def make_pytorch_optimizer(
    params: Sequence[Tensor], algorithm: Algorithm, base: Base, foreach: bool | None = None
) -> TwoStep:
    """``pytorch_optimizer.SAM``."""
    try:
        from pytorch_optimizer import SAM
    except ImportError:
        raise Unavailable("pytorch_optimizer is not installed") from None
    if algorithm == "asam":
        raise Unavailable("pytorch_optimizer has no ASAM: its adaptive=True scales every tensor, without eta")
    cls, options = BASES[base]
    return SAM(params, cls, rho=RHO["sam"], perturb_eps=PERTURB_EPS, foreach=foreach, **options)
