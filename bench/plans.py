"""What a run measures by default, as data: on a CPU, on a GPU, and in sizes without meaning."""

from __future__ import annotations

from functools import partial

import torch

from .measure import Plan
from .models import MODELS, SHAPES, TINY, Training, VisionTransformer, resnet, shapes_of

CPU = ("small400", "resnet18", "vit_s16", "resnet50", "gpt2_small")
GPU = ("resnet50", "vit_b16", "gpt2_small", "small400")
# One bound by the host, two by memory.
KINDS = ("small400", "resnet18", "resnet50")

OPS = [(f"{millions}M", [(millions * 1_000_000,)]) for millions in (1, 5, 25, 100, 500)]


def plan(cuda: bool, tiny: bool = False, shapes: str = "", every: bool = False) -> Plan:
    """The plan for a device; ``tiny``: in sizes that the Triton interpreter gets through in seconds.

    Raises ValueError for shapes that are not there.
    """
    if unknown := set(filter(None, shapes.split(","))) - set(SHAPES):
        raise ValueError(f"--shapes: no {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    names = shapes.split(",") if shapes else GPU if cuda else CPU
    steps = {"tiny": TINY} if tiny else {name: shapes_of(name) for name in names}
    kinds = tuple(name for name in steps if every or tiny or name in KINDS)
    if tiny:
        kernels = [("3k", [(3000,)], torch.float32), ("tiny", TINY, torch.float32), ("3k", [(3000,)], torch.bfloat16)]
    elif cuda:
        sizes = [*OPS[:3], ("resnet50", shapes_of("resnet50")), *OPS[3:]]
        kernels = [(label, size, torch.float32) for label, size in sizes]
        kernels += [(label, size, torch.bfloat16) for label, size in (OPS[2], OPS[3])]
    else:
        kernels = [(*OPS[2], torch.float32), ("resnet50", shapes_of("resnet50"), torch.float32)]
        kernels.append((*OPS[2], torch.bfloat16))
    if cuda:
        batch, size = (2, 32) if tiny else (64, 224)
        convolutions = partial(resnet, (1, 1), True, 4) if tiny else MODELS["resnet50"]
        attention = partial(VisionTransformer, 16, 1, 32) if tiny else MODELS["vit_b16"]
        iterations = {
            "resnet50": Training(convolutions, "sgd", batch, size, autocast=True, channels_last=True),
            "vit_b16": Training(attention, "adamw", batch, size, autocast=True),
        }
    else:
        width, depth = (32, 1) if tiny else (256, 4)
        iterations = {
            "convnet": Training(partial(resnet, (2, 2, 2, 2), False, width // 4, small=True), "sgd", 8, 32),
            "transformer": Training(partial(VisionTransformer, width, depth, 128), "sgd", 4, 128),
        }
    return Plan(
        steps=steps,
        kinds=kinds,
        kernels=kernels,
        iterations=iterations,
        others=("loop", "foreach, fused base") if cuda else ("loop",),
        copy=100_000 if tiny else 128_000_000 if cuda else 25_600_000,
        seconds=0.0 if tiny else 0.05 if cuda else 1.0,
        rounds=(2, 2) if tiny else (9, 9) if cuda else (4, 100),
        region=(0.0, 1) if tiny else (5e-3 if cuda else 1e-3, 50),
        compile_seconds=0.0 if tiny else 90.0 if cuda else 600.0,
        adamw_only=() if cuda else ("gpt2_small",),
    )
