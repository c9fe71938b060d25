"""``python -m bench.memory``: what an optimizer holds in memory beside parameters and gradients, and at most within a
step, as the operating system sees it. On Linux.

Bytes a parameter, of one of 25 million. A closure makes a gradient anew in each pass, as autograd does; it goes when
the next one is made, so that "at most" is beside one gradient.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sharpkern as sk

COUNT = 25_000_000
STEPS = 6
SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
BASES: dict[str, tuple[Any, dict[str, Any]]] = {"SGD-m": (SGD, {"momentum": 0.9}), "AdamW": (AdamW, {})}
# (class, its options, what these make of it).
CLASSES: list[tuple[Any, dict[str, Any], str]] = [
    *((cls, {}, "") for cls in (sk.SAM, sk.ASAM, sk.SSSAM, sk.StableSAM)),
    (sk.AESAM, {"total_steps": STEPS, "lambda_start": -9.0, "lambda_end": -9.0}, ""),
    (sk.LookSAM, {"k": 1}, ", refresh every step"),
    (sk.LookSAM, {"k": 2}, ""),
    (sk.AELookSAM, {"total_steps": STEPS, "lambda_start": -9.0, "lambda_end": -9.0}, ""),
    (sk.ESAM, {"gamma": 1.0}, ""),
    *((cls, {}, "") for cls in (sk.GSAM, sk.WSAM, sk.FriendlySAM, sk.VaSSO, sk.MomentumSAM, sk.SALR)),
]


def _memory(field: str) -> int:
    """Bytes: VmRSS, what is there; VmHWM, the most there was."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(make: Callable[[list[nn.Parameter]], Any], dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """(held, at most within a step): bytes a parameter beyond parameter and gradient."""
    p = nn.Parameter(torch.ones(COUNT, dtype=dtype))
    p.grad = torch.ones_like(p)

    def closure() -> Tensor:
        p.grad = None
        p.grad = torch.full_like(p, 1e-3)
        return torch.ones(())

    gc.collect()
    before = _memory("VmRSS")
    opt = make([p])
    opt.zero_grad()
    for step in range(STEPS):
        if step == 2:  # what is made once is there
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the most
        opt.step(closure)
    return (_memory("VmRSS") - before) / COUNT, (_memory("VmHWM") - before) / COUNT


def rows() -> list[tuple[str, str, tuple[float, float], tuple[float, float]]]:
    """(class, base rule, its own numbers, the base rule's)."""
    found = []
    measure(lambda params: sk.SAM(params, SGD, lr=1e-3))  # code that is loaded with the first step
    for name, (rule, options) in BASES.items():
        base = measure(lambda params: rule(params, lr=1e-3, **options))  # noqa: B023
        for cls, more, note in CLASSES:
            own = measure(lambda params: cls(params, rule, lr=1e-3, **options, **more))  # noqa: B023
            found.append((cls.__name__ + note, name, own, base))
    return found


def main() -> None:
    print(
        "| | base rule | held, bytes | at most within a step | beyond the base rule, held |\n|---|---|---:|---:|---:|"
    )
    for label, name, (held, most), (base, _) in rows():
        print(f"| {label} | {name} | {held:.1f} | {most:.1f} | {held - base:.1f} |", flush=True)


if __name__ == "__main__":
    main()
