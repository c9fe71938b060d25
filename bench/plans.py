"""What a run measures by default, as data: on a CPU, on a GPU, and in sizes without meaning."""

from __future__ import annotations

from functools import partial

import torch

from .models import MODELS, SHAPES, TINY, Training, VisionTransformer, resnet, shapes_of

CPU = ("small400", "resnet18", "vit_s16", "resnet50", "gpt2_small")
GPU = ("resnet50", "vit_b16", "gpt2_small", "small400")
KINDS = ("small400", "resnet18", "resnet50")  # one bound by the host, two by memory


class Plan:
    """What a run measures, and how long; ``tiny``: in sizes that the Triton interpreter gets through in seconds."""

    def __init__(self, cuda: bool, tiny: bool = False, shapes: str = "", every: bool = False) -> None:
        names = shapes.split(",") if shapes else GPU if cuda else CPU
        if unknown := set(names) - set(SHAPES):
            raise ValueError(f"--shapes: no {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
        # Shapes that whole steps run on, and those of them that the family's kinds of step run on.
        self.steps = {"tiny": TINY} if tiny else {name: shapes_of(name) for name in names}
        self.kinds = [name for name in self.steps if every or tiny or name in KINDS]
        # Shapes that take minutes with every base rule.
        self.adamw_only = () if cuda or every else ("gpt2_small",)

        # Label, shapes and dtype of the parameters that single ops run on.
        ops = {f"{millions}M": [(millions * 1_000_000,)] for millions in (1, 5, 25, 100, 500)}
        ops |= {"resnet50": shapes_of("resnet50"), "3k": [(3000,)], "tiny": TINY}
        singles, halves = ("1M", "5M", "25M", "resnet50", "100M", "500M"), ("25M", "100M")
        if tiny or not cuda:
            singles, halves = (("3k", "tiny"), ("3k",)) if tiny else (("25M", "resnet50"), ("25M",))
        self.kernels = [(label, ops[label], torch.float32) for label in singles]
        self.kernels += [(label, ops[label], torch.bfloat16) for label in halves]

        # Whole iterations, and the contenders that train beside ours.
        if cuda:
            batch, size = (2, 32) if tiny else (64, 224)
            convolutions = partial(resnet, (1, 1), True, 4) if tiny else MODELS["resnet50"]
            attention = partial(VisionTransformer, 16, 1, 32) if tiny else MODELS["vit_b16"]
            first = Training(convolutions, "sgd", batch, size, autocast=True, channels_last=True)
            self.iterations = {"resnet50": first, "vit_b16": Training(attention, "adamw", batch, size, autocast=True)}
        else:
            width, depth, batch = (16, 1, 1) if tiny else (256, 4, 4)
            first = Training(partial(resnet, (2, 2, 2, 2), False, width // 4, small=True), "sgd", 2 * batch, 32)
            second = Training(partial(VisionTransformer, width, depth, 128), "sgd", batch, 128)
            self.iterations = {"convnet": first, "transformer": second}
        self.others = ("loop", "foreach, fused base") if cuda else ("loop",)

        # Float32 elements of the copy that is timed beside everything.
        self.copy = 100_000 if tiny else 128_000_000 if cuda else 25_600_000
        # Seconds of all rounds of a measurement; the least and the most of them; seconds of one timed region at
        # least, and calls in it at most.
        self.seconds = 0.0 if tiny else 0.05 if cuda else 1.0
        self.rounds = (2, 2) if tiny else (9, 9) if cuda else (4, 100)
        self.region = (0.0, 1) if tiny else (5e-3 if cuda else 1e-3, 50)
        # Once so many seconds were spent on it, no further contender is compiled.
        self.compile_seconds = float("inf") if every else 0.0 if tiny else 90.0 if cuda else 600.0
        self.compile_all = every  # whatever the algorithm and the base rule
