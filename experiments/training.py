"""One training, what it costs and what comes of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import CHUNK, Data, Failure, with_noise
from .flatness import largest_eigenpair, loss_slice, sharpness
from .recipes import Recipe, make_optimizer


class Meter:
    """Counts steps and gradient evaluations, and takes the time of steps and of the optimizer's part in them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.steps = 0
        self.evaluations = 0  # a forward and a backward pass each
        self.seconds = 0.0
        self.optimizer_seconds = 0.0

    def _now(self) -> float:
        # A GPU works on after the call returns: without waiting, one part would be billed for another.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def step(self) -> Iterator[None]:
        begin = self._now()
        yield
        seconds = self._now() - begin
        self.steps += 1
        self.seconds += seconds
        self.optimizer_seconds += seconds

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Within a step: what the optimizer calls, but is not its own work."""
        begin = self._now()
        yield
        self.evaluations += 1
        self.optimizer_seconds -= self._now() - begin


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, meter: Meter) -> Tensor:
    """One step on a minibatch. Returns the loss of its first pass."""

    def closure() -> Tensor:
        with meter.evaluation():
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss.detach()

    with meter.step():
        optimizer.zero_grad()  # torch's optimizers do not do it before they call the closure
        return optimizer.step(closure)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of the examples that the model gets right, in evaluation mode."""
    model.eval()
    right = sum((model(a).argmax(1) == b).sum() for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True))
    return 100.0 * float(right) / len(y)


# What is kept of ``stats`` after each step, for the pictures.
TRACED = {
    "AESAM": ("grad_norm", "threshold", "second_passes"),
    "AELookSAM": ("grad_norm", "threshold", "second_passes"),
    "SALR": ("sharpness", "lr_scale"),
}
SLICED = ("SGD", "SAM")


@dataclass
class Run:
    """One training and what came of it. Curves have one value an epoch."""

    noise: float
    optimizer: str
    seed: int
    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of the training steps so far, nothing else
    evaluations: list[int] = field(default_factory=list)  # of the gradient, so far
    final_accuracy: float = math.nan
    best_accuracy: float = math.nan
    sharpness: float = math.nan
    hessian_eigenvalue: float = math.nan
    second_pass_share: float = math.nan
    evaluations_per_step: float = math.nan
    epoch_seconds: float = math.nan
    step_ms: float = math.nan
    optimizer_ms: float = math.nan
    trace: dict[str, list[float | None]] = field(default_factory=dict)  # one value a step
    slice_loss: list[float] = field(default_factory=list)  # along the eigenvector


def train(
    data: Data, recipe: Recipe, epochs: int, noise: float, optimizer_name: str, seed: int, tick: Callable[[], None]
) -> Run:
    """Train a fresh model and measure it. Optimizers with the same seed and noise get the same of everything."""
    run = Run(noise, optimizer_name, seed)
    x, y = data.train_x, with_noise(data.train_y, noise, seed)
    torch.manual_seed(seed)
    model = recipe.model().to(x.device)
    optimizer = make_optimizer(optimizer_name, model, recipe, recipe.steps(len(y), epochs), seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    shuffle = torch.Generator().manual_seed(seed)
    batch_size = min(recipe.batch_size, len(y))
    meter = Meter(x.device)
    traced = TRACED.get(optimizer_name, ()) if seed == 0 else ()  # the pictures show one run
    for _ in range(epochs):
        model.train()
        batches = torch.randperm(len(y), generator=shuffle).to(x.device).split(batch_size)
        losses = []
        for batch in batches[: len(y) // batch_size]:  # the full ones
            losses.append(train_step(model, optimizer, x[batch], y[batch], meter))
            if traced:
                record_step(run.trace, optimizer, traced)
        schedule.step()
        run.train_loss.append(float(torch.stack(losses).mean()))
        if not math.isfinite(run.train_loss[-1]):
            raise Failure(f"{optimizer_name} diverged with seed {seed} and {noise:g} % label noise")
        run.test_accuracy.append(accuracy(model, data.test_x, data.test_y))
        run.seconds.append(meter.seconds)
        run.evaluations.append(meter.evaluations)
        tick()
    run.final_accuracy = run.test_accuracy[-1]
    run.best_accuracy = max(run.test_accuracy)
    run.sharpness = sharpness(model, x, y)
    curved = x[: recipe.hessian_examples], y[: recipe.hessian_examples]
    run.hessian_eigenvalue, direction = largest_eigenpair(model, *curved)
    if optimizer_name in SLICED:
        run.slice_loss = loss_slice(model, *curved, direction, recipe.slice_radius)
    second_passes = float(optimizer.stats["second_passes"]) if optimizer_name != "SGD" else 0.0
    run.second_pass_share = 100.0 * second_passes / meter.steps
    run.evaluations_per_step = meter.evaluations / meter.steps
    # Means: steps of one optimizer differ in what they do.
    run.epoch_seconds = meter.seconds / epochs
    run.step_ms = 1e3 * meter.seconds / meter.steps
    run.optimizer_ms = 1e3 * meter.optimizer_seconds / meter.steps
    return run


def record_step(trace: dict[str, list[float | None]], optimizer: torch.optim.Optimizer, keys: Sequence[str]) -> None:
    """Append a step's statistics and learning rate to the trace."""
    stats = optimizer.stats
    values = {"lr": float(optimizer.param_groups[0]["lr"]), **{key: float(stats[key]) for key in keys}}
    for key, value in values.items():
        # What a picture shows, not all of a double's digits; JSON has no NaN, which is what nothing measured yet is.
        trace.setdefault(key, []).append(float(f"{value:.6g}") if math.isfinite(value) else None)
