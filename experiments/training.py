"""One training, what it costs and what comes of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern as sk

from .data import CHUNK, Data, augmented, hold_out, with_noise
from .flatness import SLICE_RADIUS, hessian_trace, largest_eigenpair, loss_slice, sharpness
from .models import MODELS
from .study import Job, Run, Study, make_optimizer

# A pass without gradients, in passes forward and backward: backward has about twice the multiplications of forward.
FORWARD = 1 / 3

# What is kept of ``stats`` after each step, for the pictures.
TRACED = {
    "AESAM": ("grad_norm", "threshold", "second_passes"),
    "AELookSAM": ("grad_norm", "threshold", "second_passes"),
    "SALR": ("sharpness", "lr_scale"),
}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """One step on a minibatch. Returns the loss of its first pass and how many gradients of the batch it took."""
    evaluations = 0.0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    def losses(index: Tensor | slice = slice(None)) -> Tensor:
        nonlocal evaluations
        found = F.cross_entropy(model(x[index]), y[index], reduction="none")
        evaluations += len(found) / len(y) * (1 if torch.is_grad_enabled() else FORWARD)
        return found

    optimizer.zero_grad()  # torch's optimizers do not do it before they call the closure
    loss = optimizer.step(losses if isinstance(optimizer, sk.ESAM) and optimizer.gamma < 1 else closure)
    return loss, evaluations


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of the examples that the model gets right, in evaluation mode."""
    model.eval()
    right = sum((model(a).argmax(1) == b).sum() for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True))
    return 100.0 * float(right) / len(y)


def schedule(step: int, steps: int, warmup: int) -> float:
    """What the learning rate is multiplied by: a line up to 1, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_model(study: Study, data: Data, seed: int) -> nn.Module:
    """With random weights, or those of the pretraining below random ones of the last layer."""
    torch.manual_seed(seed)
    model = MODELS[study.model]().to(data.train_x.device, memory_format=torch.channels_last)
    if data.weights is not None:
        model.load_state_dict(data.weights)
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        head.reset_parameters()
    return model


def train(data: Data, study: Study, job: Job, tick: Callable[[], None], model: nn.Module | None = None) -> Run:
    """Train a model, a fresh one if none is given, and measure it. Optimizers with the same seed and noise get the same
    of everything."""
    run = Run(job)
    first = data.first_class
    if job.stage == "trial":
        data = hold_out(data, study.held_out, job.seed)
        # Nobody who has wrong labels has a part without: the held-out labels are as wrong as those trained on.
        measured = data.test_x, with_noise(data.test_y, job.noise, 1_000_000 + job.seed, first)
    else:
        measured = data.test_x, data.test_y
    x, y = data.train_x, with_noise(data.train_y, job.noise, job.seed, first)
    model = make_model(study, data, job.seed) if model is None else model
    batch_size = min(study.batch_size, len(y))
    epoch_steps = len(y) // batch_size  # batch norm does badly on a short last batch: it is left out
    run.steps = job.epochs * epoch_steps
    warmup = study.warmup_epochs * epoch_steps
    optimizer = make_optimizer(study, job.optimizer, model, job.arguments, run.steps, job.seed)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, run.steps, warmup))
    shuffle, shift = (torch.Generator().manual_seed(seed) for seed in (job.seed, 3_000_000 + job.seed))
    traced = TRACED.get(job.optimizer, ()) if job.stage == "final" and job.seed == 0 else ()  # for the pictures
    evaluations = seconds = 0.0
    for _ in range(job.epochs):
        model.train()
        batches = torch.randperm(len(y), generator=shuffle).to(x.device).split(batch_size)
        losses = []
        for batch in batches[:epoch_steps]:
            images = augmented(x[batch], shift) if study.augment else x[batch]
            begin = now(x.device)
            loss, count = train_step(model, optimizer, images, y[batch])
            seconds += now(x.device) - begin
            evaluations += count
            losses.append(loss)
            if traced:
                record_step(run.trace, optimizer, traced)
            rates.step()
        run.train_loss.append(finite(torch.stack(losses).mean()))
        run.accuracy.append(accuracy(model, *measured))
        run.seconds.append(round(seconds, 4))
        run.evaluations.append(evaluations)
        tick()
    if job.optimizer != study.base["name"]:
        run.second_pass_share = 100 * float(optimizer.stats["second_passes"]) / run.steps
    # A training that diverged has an accuracy, a bad one, but no minimum to look at.
    if job.stage == "final" and run.train_loss[-1] is not None:
        run.sharpness = finite(sharpness(model, x, y))
        curved = x[: study.hessian_examples], y[: study.hessian_examples]
        eigenvalue, direction = largest_eigenpair(model, *curved)
        run.hessian_eigenvalue = finite(eigenvalue)
        run.hessian_trace = finite(hessian_trace(model, *curved))
        if job.optimizer in (study.base["name"], "SAM"):
            run.slice_loss = loss_slice(model, *curved, direction, SLICE_RADIUS)
    run.ended = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return run


def now(device: torch.device) -> float:
    """Seconds: of the clock on a GPU, which is waited for; on a CPU the process's own, whatever else is at work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def finite(value: Tensor | float) -> float | None:
    """What JSON has; it has no NaN."""
    return float(value) if math.isfinite(value) else None


def record_step(trace: dict[str, list[float | None]], optimizer: torch.optim.Optimizer, keys: Sequence[str]) -> None:
    """Append a step's statistics and learning rate to the trace: what a picture shows, not all of a double's digits."""
    stats = optimizer.stats
    for key, value in {"lr": optimizer.param_groups[0]["lr"], **{key: stats[key] for key in keys}}.items():
        trace.setdefault(key, []).append(finite(float(f"{float(value):.6g}")))
