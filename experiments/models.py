"""The networks, by the names that files of settings call them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

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


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp-64-256-256-10-bn": mlp_bn, "mlp-784-512-256-10": mlp}
# The shape of their images tells which data they are for.
IMAGES = {"mlp-64-256-256-10-bn": "digits", "mlp-784-512-256-10": "fashion-mnist"}
