"""Models from ``torch.nn`` alone, for whole iterations, and the shapes of their parameters for steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .baselines import Base

Shape = tuple[int, ...]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size, or divides it by ``stride``, and its batch norm."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, body: list[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = nn.Sequential(*_conv(inputs, outputs, 1, stride)) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(depths: Sequence[int], bottleneck: bool, width: int = 64, small: bool = False) -> nn.Module:
    """ResNet v1.5: 1000 classes; ``small``: for 32 x 32 images, ten classes."""
    stem = _conv(3, width, 3) if small else [*_conv(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)]
    layers, inputs = [*stem, nn.ReLU()], width
    for stage, depth in enumerate(depths):
        inner = width << stage
        outputs = 4 * inner if bottleneck else inner
        for block in range(depth):
            stride = 2 if stage and not block else 1
            if bottleneck:
                body = [*_conv(inputs, inner, 1), nn.ReLU(), *_conv(inner, inner, 3, stride)]
                body += [nn.ReLU(), *_conv(inner, outputs, 1)]
            else:
                body = [*_conv(inputs, inner, 3, stride), nn.ReLU(), *_conv(inner, outputs, 3)]
            layers.append(Residual(inputs, outputs, stride, body))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10 if small else 1000))


def _blocks(width: int, depth: int) -> list[nn.Module]:
    """Attention with heads of 64 and a four times wider MLP, each behind a layer norm; no dropout."""
    block = partial(nn.TransformerEncoderLayer, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    return [block(width, max(1, width // 64), 4 * width) for _ in range(depth)]


class VisionTransformer(nn.Module):
    """A ViT with patches of 16 x 16: class token, blocks, 1000 classes."""

    def __init__(self, width: int, depth: int = 12, size: int = 224) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 1 + (size // 16) ** 2, width) * 0.02)
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.body = nn.Sequential(*_blocks(width, depth), nn.LayerNorm(width))
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.body(x)[:, 0])


def _gpt2_small() -> nn.Module:
    """The parameters of GPT-2 small: the head is the token embedding, so it adds nothing."""
    return nn.Sequential(nn.Embedding(50257, 768), nn.Embedding(1024, 768), *_blocks(768, 12), nn.LayerNorm(768))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": partial(resnet, (2, 2, 2, 2), False),
    "vit_s16": partial(VisionTransformer, 384),
    "resnet50": partial(resnet, (3, 4, 6, 3), True),
    "vit_b16": partial(VisionTransformer, 768),
    "gpt2_small": _gpt2_small,
}

TINY: list[Shape] = [(8, 3, 3, 3), (8,), (8,), (10, 8), (10,), (1, 1, 8), (40, 50)]
SHAPES = ("small400", *MODELS)


def shapes_of(name: str) -> list[Shape]:
    """The parameters' shapes; no memory is taken for them. ``small400``: what is left is the work around kernels."""
    with torch.device("meta"):
        return [tuple(p.size()) for p in MODELS[name]().parameters()] if name in MODELS else [(20, 20), (300,)] * 200


def count(shapes: Sequence[Shape]) -> int:
    """Parameters in all."""
    return sum(math.prod(shape) for shape in shapes)


@dataclass(frozen=True)
class Training:
    """A whole iteration's model."""

    make: Callable[[], nn.Module]
    base: Base
    batch: int
    size: int  # of the square images
    autocast: bool = False  # bf16, and the peak memory beside the time
    channels_last: bool = False
