"""A whole SAM iteration under bf16 autocast against two plain forward and backward passes, and its peak memory.

One would be the optimizer for free. Rounds alternate, as in ``steps.py``.
"""

from __future__ import annotations

import statistics

import torch
from torch.nn import functional as F

from ..contenders import GPU_CONTENDERS
from ..device import Function
from .run import COPY, Model, Run, Timed

OTHERS = ("loop", "foreach, fused base")


def run_iterations(run: Run) -> None:
    """Rows of every model and contender."""
    # As whoever trains on images of one size does.
    torch.backends.cudnn.benchmark = True
    contenders: dict[str, str | None] = {**run.ours(), **dict.fromkeys(OTHERS)}
    for name, model in run.plan.models.items():
        for contender, backend in contenders.items():
            with run.attempt(f"iteration, {name}, {contender}"), run.on(backend):
                _iteration(run, name, model, contender, backend)
            run.clean()


def _iteration(run: Run, name: str, plan: Model, contender: str, backend: str | None) -> None:
    machine, device = run.machine, run.machine.torch_device
    torch.manual_seed(0)
    held = machine.held_bytes()  # by what is no part of the iteration: the copy beside it
    order = torch.channels_last if plan.channels_last else torch.contiguous_format
    model = plan.make().to(device).to(memory_format=order)
    inputs = torch.randn(plan.batch, 3, plan.size, plan.size, device=device).contiguous(memory_format=order)
    targets = torch.randint(1000, (plan.batch,), device=device)
    losses: list[torch.Tensor] = []

    def evaluate() -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        losses[:] = [loss.detach()]

    def plain() -> None:
        evaluate()
        evaluate()

    plain()
    plain_peak = machine.peak_bytes(plain)
    params = list(model.parameters())
    optimizer = GPU_CONTENDERS["ours" if backend else contender].make(params, "sam", plan.base)

    def sam() -> None:
        evaluate()
        optimizer.first_step()
        evaluate()
        optimizer.second_step()

    sam()
    peak = machine.peak_bytes(sam)
    functions: dict[str, Function] = {"plain": plain, "sam": sam}
    times = run.time({key: Timed(function, backend) for key, function in functions.items()})
    plain_seconds = statistics.median(times["plain"])
    run.add(
        "iteration",
        [name, contender],
        times["sam"],
        model=name,
        batch=plan.batch,
        params=sum(p.numel() for p in params),
        base=plan.base,
        contender=contender,
        backend=backend,
        plain_ms=1e3 * plain_seconds,
        ratio=statistics.median(times["sam"]) / plain_seconds,
        peak_gib=(peak - held) / 2**30,
        plain_peak_gib=(plain_peak - held) / 2**30,
        finite=bool(losses[0].isfinite()),
        copy_gb_per_s=run.copier.bytes / statistics.median(times[COPY]) / 1e9,
    )
