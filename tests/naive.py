"""The family written from the papers, one parameter at a time, over torch's optimizers.

Deliberately slow and plain: the oracle of the trajectory tests. Nothing here comes from the package. A method is a
two-pass step with hooks: ``scale``, how far a weight may move; ``direction``, where to in a ball of which norm;
``fires``, whether a step takes its second pass; ``mix``, what the rule gets of the two gradients. SALR is a step of its
own. A step that meets a squared norm that is not finite changes nothing.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = dict[Tensor, Tensor]
Scale = Callable[[str, Tensor, dict[str, Any]], Tensor | float]
Direction = Callable[[Gradients, float], Gradients]
Fires = Callable[[int, float], bool]
Mix = Callable[[Gradients, Gradients | None], Gradients]


def dot(a: Gradients, b: Gradients) -> float:
    """Over everything that is in both, in float64."""
    return sum(float((x.double() * b[p].double()).sum()) for p, x in a.items() if p in b)


# Hooks: T_w of (name, weights, group).


def plain(name: str, w: Tensor, group: dict[str, Any]) -> Tensor | float:
    """SAM (Foret et al. 2021): T_w = 1."""
    return 1.0


def magnitude(name: str, w: Tensor, group: dict[str, Any]) -> Tensor | float:
    """The common port's adaptive=True, of a group: T_w = |w|."""
    return w.abs() if group.get("adaptive") else 1.0


def part(perturb: Callable[[str, Tensor], bool]) -> Scale:
    """Of some tensors only, as SAM-ON (Mueller et al. 2023) is of norm layers: T_w = 0 on the others."""
    return lambda name, w, group: float(group.get("perturb", True) and perturb(name, w))


def asam(name: str, w: Tensor, group: dict[str, Any]) -> Tensor | float:
    """ASAM (Kwon et al. 2021), as its authors have it: T_w = |w| + eta on weights."""
    return w.abs() + group["eta"] if "weight" in name else 1.0


# Hooks: where to go from (T g, its norm), before T.


def steepest(g: Gradients, norm: float) -> Gradients:
    """In the ball of the 2-norm: along the gradient."""
    return {p: x / (norm + 1e-12) for p, x in g.items()}


def dual(p: float) -> Direction:
    """In that of the p-norm (Foret et al. 2021, eq. 2)."""
    q = 1.0 if math.isinf(p) else p / (p - 1)

    def direction(g: Gradients, norm: float) -> Gradients:
        dual_norm = sum(float(x.abs().pow(q).sum()) for x in g.values()) ** (1 / q)
        return {p: x.sign() * (x.abs() / (dual_norm + 1e-12)) ** (q - 1) for p, x in g.items()}

    return direction


# Hooks: whether the second pass is taken, of (step, squared norm of T g; NaN without any gradient).


def always(t: int, n: float) -> bool:
    return True


def every(k: int) -> Fires:
    return lambda t, n: t % k == 0


def draws(p: float | Callable[[int], float], seed: int) -> Fires:
    """SS-SAM (Zhao et al. 2022): a number in [0, 1) made of the seed and the step is below p."""

    def fires(t: int, n: float) -> bool:
        digest = hashlib.blake2b(f"{seed}:{t}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53 < (p(t) if callable(p) else p)

    return fires


class Trigger:
    """AE-SAM (Jiang et al. 2023): the mean first, the variance around the new mean."""

    def __init__(self, total_steps: int, start: float, end: float, decay: float = 0.9) -> None:
        self.total_steps, self.start, self.end, self.decay = total_steps, start, end, decay
        self.n, self.mean, self.var, self.threshold = math.nan, 0.0, 1e-10, math.nan

    def __call__(self, t: int, n: float) -> bool:
        if not math.isfinite(n):
            return False
        self.n = n
        self.mean = self.decay * self.mean + (1 - self.decay) * n
        self.var = self.decay * self.var + (1 - self.decay) * (n - self.mean) ** 2
        part = min(t / self.total_steps, 1.0)
        self.threshold = self.mean + (part * self.end + (1 - part) * self.start) * self.var**0.5
        return n >= self.threshold


# Hooks: the gradient that the rule takes, of (the first, the second or None).


def last(g: Gradients, g_s: Gradients | None) -> Gradients:
    return g if g_s is None else g_s


def first(g: Gradients, g_s: Gradients | None) -> Gradients:
    """Of what the second pass has, too."""
    return g if g_s is None else {p: g.get(p, 0 * x) for p, x in g_s.items()}


class Look:
    """LookSAM (Liu et al. 2022): what the second gradient has beside the first one is used again."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.g_v: Gradients = {}
        self.share = math.inf  # how long g_v is, in norms of the gradient that it is a part of

    def __call__(self, g: Gradients, g_s: Gradients | None) -> Gradients:
        n = dot(g, g)
        if g_s is not None:
            if n > 0:
                along = dot(g, g_s) / n
                self.g_v = {p: g_s.get(p, 0 * g.get(p, 0)) - along * g.get(p, 0) for p in {**g, **g_s}}
                self.share = (dot(self.g_v, self.g_v) / max(dot(g_s, g_s), 1e-300)) ** 0.5
            return g_s
        norm = dot(self.g_v, self.g_v) ** 0.5
        if norm <= 1e-12:
            return g
        return {p: x + self.alpha * n**0.5 / norm * self.g_v.get(p, 0) for p, x in g.items()}


class Naive:
    """A two-pass step.

    Args:
        params: as torch takes them, (name, tensor) pairs where ``scale`` asks for names.
        base: torch optimizer class.
        own: options of the method that a group may have of its own: ``rho``, ``eta``.
        scale, direction, fires, mix: the hooks.
        max_grad_norm: of the gradient of the last pass.
        kwargs: of the base optimizer.
    """

    def __init__(
        self,
        params: Any,
        base: type[torch.optim.Optimizer],
        own: dict[str, float],
        scale: Scale = plain,
        direction: Direction = steepest,
        fires: Fires = always,
        mix: Mix = last,
        max_grad_norm: float = float("inf"),
        **kwargs: Any,
    ) -> None:
        params = list(params)
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        kwargs = {"foreach": False, **kwargs} if base.__module__.startswith("torch.") else kwargs
        self.own = own
        self.base = base([{**own, **group} for group in groups], **kwargs)
        self.param_groups = self.base.param_groups
        self.scale, self.direction, self.fires, self.mix = scale, direction, fires, mix
        self.max_grad_norm = max_grad_norm
        self.dtypes: dict[Tensor, torch.dtype] = {}  # of parameters whose weights are rounded whenever they change
        self.t = self.skipped = 0
        self.decisions: list[bool] = []

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.base.add_param_group({**self.own, **group})

    def params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def all(self) -> list[tuple[Tensor, str, dict[str, Any]]]:
        """Every parameter, with its name and its group."""
        return [
            (p, name, group)
            for group in self.param_groups
            for p, name in zip(group["params"], group.get("param_names") or [""] * len(group["params"]), strict=True)
        ]

    def entries(self) -> list[tuple[Tensor, str, dict[str, Any]]]:
        """Of those that have a gradient."""
        return [entry for entry in self.all() if entry[0].grad is not None]

    def scales(self) -> Gradients:
        """T of every parameter that is a part of the direction: what the others' first gradients are, finite or not, is
        not looked at."""
        scales = {p: self.scale(name, p, group) for p, name, group in self.all()}
        return {p: t for p, t in scales.items() if isinstance(t, Tensor) or t != 0}

    def gradients(self) -> Gradients:
        return {p: p.grad.clone() for p, _, _ in self.entries()}

    @torch.no_grad()
    def norm(self) -> float:
        """Of T g."""
        scaled = [t * p.grad for p, t in self.scales().items() if p.grad is not None]
        return sum(float(x.double().pow(2).sum()) for x in scaled) ** 0.5

    @torch.no_grad()
    def move(self, length: Callable[[dict[str, Any]], float]) -> None:
        """Every weight by length T d(T g); the steepest direction d(x) is x / norm(x)."""
        norm = self.norm()
        scales = self.scales()
        directions = self.direction({p: t * p.grad for p, t in scales.items() if p.grad is not None}, norm)
        for p, _, group in self.entries() if math.isfinite(norm) else ():
            if p in directions:
                sign = -1.0 if group["maximize"] else 1.0
                p.add_(sign * length(group) * scales[p] * directions[p])
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """Weights to the nearest of the dtypes that they stand for."""
        for p, dtype in self.dtypes.items():
            p.copy_(p.to(dtype))

    def weights(self) -> Gradients:
        return {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    def put_back(self, weights: Gradients) -> None:
        for p, w in weights.items():
            p.data.copy_(w)

    def step(self, closure: Callable[[], Tensor], cancel: bool = False) -> Tensor:
        """``cancel``: the step is given up after its decision."""
        self.base.zero_grad()
        loss = closure()
        g, g_s = self.gradients(), None
        fired = self.fires(self.t, self.norm() ** 2 if any(x.numel() for x in g.values()) else math.nan)
        self.t += 1
        self.decisions.append(fired)
        if cancel:
            return loss
        if fired:
            old = self.weights()
            self.move(lambda group: group["rho"])
            self.base.zero_grad()
            try:
                closure()
            finally:
                self.put_back(old)
            g_s = self.gradients()
        self.descend(g, g_s)
        return loss

    def descend(self, g: Gradients, g_s: Gradients | None = None) -> None:
        """The base optimizer's step."""
        taken = last(g, g_s)
        scales = self.scales()
        g_1 = g if g_s is None else {p: x for p, x in g.items() if p in scales}
        if not (math.isfinite(dot(g_1, g_1)) and math.isfinite(dot(taken, taken))):
            self.skipped += 1
            return
        clip = min(1.0, self.max_grad_norm / (dot(taken, taken) ** 0.5 + 1e-6))
        for p, x in self.mix(g, g_s).items():
            p.grad = clip * x
        self.base.step()
        self.round()

    def base_step(self) -> None:
        """Without a closure: the base optimizer's, of the gradients that are there."""
        mix, self.mix = self.mix, last
        self.descend(self.gradients())
        self.mix = mix


class NaiveESAM(Naive):
    """ESAM (Du et al. 2022): a random share beta of the tensors is perturbed, by rho / beta; the second gradient is of
    the share gamma of the samples whose loss rose most. A closure returns their losses where gamma is below 1."""

    def __init__(self, *args: Any, beta: float, seed: int, gamma: float, perturb_eps: float, **kwargs: Any) -> None:
        super().__init__(*args, direction=lambda g, norm: {p: x / (norm + perturb_eps) for p, x in g.items()}, **kwargs)
        self.beta, self.seed, self.gamma = beta, seed, gamma
        self.draw()

    def draw(self) -> None:
        """The tensors of step t: a number made of the seed, the step and the place among all is below beta."""
        drawn = hashlib.shake_128(f"{self.seed}:{self.t}".encode()).digest(8 * len(self.params()))
        numbers = [int.from_bytes(drawn[i : i + 8], "little") >> 11 for i in range(0, len(drawn), 8)]
        kept = {id(p) for p, u in zip(self.params(), numbers, strict=True) if u / 2**53 < self.beta}
        self.scale = lambda name, w, group: float(id(w) in kept)
        self.fires = lambda t, n: (
            not (there := [p for p, _, _ in self.entries() if p.numel()]) or any(id(p) in kept for p in there)
        )

    def picking(self, closure: Callable[..., Tensor]) -> Callable[[], Tensor]:
        before: list[float] = []

        def one_pass() -> Tensor:
            if before:
                rises = [y - x for x, y in zip(before, closure().tolist(), strict=True)]
                largest = sorted(range(len(rises)), key=lambda i: -rises[i])[: max(1, int(self.gamma * len(rises)))]
                losses = closure(torch.tensor(largest))
            else:
                losses = closure()
                before.extend(losses.tolist())
            losses.mean().backward()
            return losses.mean()

        return one_pass

    def step(self, closure: Callable[..., Tensor], cancel: bool = False) -> Tensor:
        self.draw()
        return super().step(self.picking(closure) if self.gamma < 1 else closure, cancel)

    def move(self, length: Callable[[dict[str, Any]], float]) -> None:
        super().move(lambda group: length(group) / self.beta)


class NaiveWSAM(Naive):
    """WSAM (Yue et al. 2023), decoupled: the base optimizer's step with g, then w -= lr a (g_s - g)."""

    def __init__(self, *args: Any, gamma: float, **kwargs: Any) -> None:
        super().__init__(*args, mix=first, **kwargs)
        self.a = gamma / (1 - gamma)

    @torch.no_grad()
    def descend(self, g: Gradients, g_s: Gradients | None = None) -> None:
        skipped = self.skipped
        super().descend(g, g_s)
        if g_s is None or self.skipped > skipped:
            return
        clip = min(1.0, self.max_grad_norm / (dot(g_s, g_s) ** 0.5 + 1e-6))
        for group in self.param_groups:
            sign = -1.0 if group.get("maximize") else 1.0
            for p in group["params"]:
                if p in g_s:
                    p.sub_(sign * group["lr"] * self.a * clip * (g_s[p] - g.get(p, 0)))
        self.round()


class NaiveAverage(Naive):
    """Along a direction d of the gradient and of a running average m; both are the gradient in the first step.

    Args:
        direct: d of (g, m).
        keep: the next m of (g, m, d).
    """

    def __init__(self, *args: Any, direct: Callable[..., Any], keep: Callable[..., Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.direct, self.keep = direct, keep
        self.m: Gradients = {}

    def move(self, length: Callable[[dict[str, Any]], float]) -> None:
        known = dot(self.m, self.m) > 1e-24
        self.next = dict(self.m)
        for p, g in self.gradients().items():
            m = self.m.get(p, torch.zeros_like(g))
            p.grad = self.direct(g, m) if known else g
            self.next[p] = self.keep(g, m, p.grad) if known else g
        super().move(length)

    def descend(self, g: Gradients, g_s: Gradients | None = None) -> None:
        skipped = self.skipped
        super().descend(g, g_s)
        if g_s is not None and self.skipped == skipped:
            self.m = self.next


class NaiveMomentum(Naive):
    """Momentum-SAM (Becker et al. 2024): one gradient, at w - rho v / norm(v), v the base optimizer's momentum."""

    def step(self, closure: Callable[[], Tensor], cancel: bool = False) -> Tensor:
        old, self.t = self.weights(), self.t + 1
        self.decisions.append(False)
        for p in old:
            entry = self.base.state.get(p, {})
            p.grad = entry.get("momentum_buffer", entry.get("exp_avg")) if p.requires_grad else None
        # What v is to be followed with, maximized or not, is in it already.
        self.move(lambda group: group["rho"] if group["maximize"] else -group["rho"])
        self.base.zero_grad()
        try:
            loss = closure()
        finally:
            self.put_back(old)
        if not cancel:
            self.descend(self.gradients())
        return loss


class NaiveSALR(Naive):
    """SALR (Yue et al. 2020): the learning rate of a step is scaled by its sharpness over the median."""

    def __init__(
        self,
        *args: Any,
        n_ascent: int,
        n_descent: int,
        step_size: float,
        every: int,
        max_lr_scale: float = float("inf"),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.branches = {-1.0: n_descent, 1.0: n_ascent}
        self.step_size, self.every, self.max_lr_scale = step_size, every, max_lr_scale
        self.history: list[float] = []
        self.ratio = 1.0
        self.finite = True  # whether every gradient that was followed in this step is

    def put_gradients(self, g: Gradients) -> None:
        self.base.zero_grad()
        for p, x in g.items():
            p.grad = x.clone()

    def branch(self, sign: float, closure: Callable[[], Tensor], g: Gradients) -> float:
        """The loss at the end of a branch that begins along g; weights and gradients are those at w afterwards."""
        old, losses = self.weights(), []
        try:
            for _ in range(self.branches[sign]):
                self.finite = self.finite and math.isfinite(self.norm())
                self.move(lambda group: sign * self.step_size)
                self.base.zero_grad()
                losses.append(float(closure().detach()))
        finally:
            self.put_back(old)
            self.put_gradients(g)
        return -losses[-1] if self.param_groups[0]["maximize"] else losses[-1]

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        self.base.zero_grad()
        loss, self.finite = closure(), True
        g = self.gradients()
        if self.t % self.every == 0 and any(x.numel() for x in g.values()):
            sharpness = -self.branch(-1.0, closure, g) + self.branch(1.0, closure, g)
            if self.finite and math.isfinite(sharpness) and sharpness > 0:
                self.history.append(sharpness)
                self.ratio = min(sharpness / statistics.median(self.history), self.max_lr_scale)
        self.t += 1
        if self.finite:
            self.descend(g)
        else:
            self.skipped += 1
        return loss

    def descend(self, g: Gradients, g_s: Gradients | None = None) -> None:
        lrs = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"] * self.ratio
        super().descend(g, g_s)
        for group, lr in zip(self.param_groups, lrs, strict=True):
            group["lr"] = lr


class NaiveNudged(Naive):
    """Nudged SGD (Jastrzebski et al. 2019) by SGD's own recursion: its step is scaled along directions."""

    vectors: list[Gradients] = []

    def refresh(self, directions: Tensor) -> None:
        """Of all parameters in the order of the groups, a row a direction."""
        params = [p for group in self.param_groups for p in group["params"]]
        rows = [flat.split([p.numel() for p in params]) for flat in directions]
        self.vectors = [{p: x.view(p.shape).to(p) for p, x in zip(params, row, strict=True)} for row in rows]

    def step(self, closure: Callable[[], Tensor], cancel: bool = False) -> Tensor:
        self.base.zero_grad()
        loss = closure()
        self.t += 1
        self.decisions.append(False)
        if not cancel:
            self.descend(self.gradients())
        return loss

    @torch.no_grad()
    def descend(self, g: Gradients, g_s: Gradients | None = None) -> None:
        n = dot(g, g)
        if not math.isfinite(n):
            self.skipped += 1
            return
        clip = min(1.0, self.max_grad_norm / (n**0.5 + 1e-6))
        entries, v = self.entries(), {}
        for p, _, group in entries:
            p.grad = clip * g[p]
            v[p] = (-p.grad if group["maximize"] else p.grad) + group["weight_decay"] * p
        self.base.step()
        v = {p: self.base.state[p].get("momentum_buffer") if group["momentum"] else v[p] for p, _, group in entries}
        for e, along in [(e, dot(v, e)) for e in self.vectors]:
            for p, _, group in entries:
                if p in e:
                    p.sub_(group["lr"] * (group["nudge"] - 1) * along * e[p])
        self.round()
