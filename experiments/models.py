"""The networks, by the names that files of settings call them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .data import CLASSES


def mlp_bn() -> nn.Module:
    """For 8x8 images, with batch norm."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256, bias=False),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, 256, bias=False),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, CLASSES),
    )


def mlp() -> nn.Module:
    """For 28x28 images, without."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, CLASSES),
    )


def convnet_bn() -> nn.Module:
    """For 28x28 images: three convolutions that halve the sides, a hidden layer; batch norm after each."""
    widths, layers = (1, 16, 32, 64), []
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        layers += [
            nn.Conv2d(before, after, 3 if i else 5, stride=2, padding=1 if i else 2, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    hidden = nn.Linear(64 * 4 * 4, 128, bias=False)
    return nn.Sequential(*layers, nn.Flatten(), hidden, nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, CLASSES))


class VisionTransformer(nn.Module):
    """For 28x28 images: patches of 7x7, a vector each; layer norm before attention and before the perceptron; the
    vectors' mean goes to the classes."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        vectors = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.layers(vectors).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp-64-256-256-10-bn": mlp_bn,
    "mlp-784-512-256-10": mlp,
    "convnet-16-32-64-bn": convnet_bn,
    "transformer-64-2": VisionTransformer,
}
# The shape of their images tells which data they are for.
IMAGES = {name: "digits" if name == "mlp-64-256-256-10-bn" else "fashion-mnist" for name in MODELS}
