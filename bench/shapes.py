"""Parameter shapes of real models, derived from their architectures: no model is built, no file is read."""

from __future__ import annotations

import math
from collections.abc import Callable

Shape = tuple[int, ...]


def _affine(width: int) -> list[Shape]:
    """Scale and shift of a norm layer."""
    return [(width,), (width,)]


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _resnet(depths: tuple[int, ...], bottleneck: bool) -> list[Shape]:
    """ResNet v1 for ImageNet: stem, four stages, classifier; convolutions without bias, each with a batch norm."""

    def conv(inputs: int, outputs: int, kernel: int) -> list[Shape]:
        return [(outputs, inputs, kernel, kernel), *_affine(outputs)]

    shapes = conv(3, 64, 7)
    inputs = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        outputs = 4 * width if bottleneck else width
        for block in range(depth):
            if bottleneck:
                shapes += conv(inputs, width, 1) + conv(width, width, 3) + conv(width, outputs, 1)
            else:
                shapes += conv(inputs, width, 3) + conv(width, outputs, 3)
            if block == 0 and inputs != outputs:
                shapes += conv(inputs, outputs, 1)  # the shortcut
            inputs = outputs
    return shapes + _linear(inputs, 1000)


def _transformer(width: int, depth: int) -> list[Shape]:
    """Blocks of attention and a four times wider MLP, each behind a layer norm, and the last layer norm."""
    block = _affine(width) + _linear(width, 3 * width) + _linear(width, width)
    block += _affine(width) + _linear(width, 4 * width) + _linear(4 * width, width)
    return block * depth + _affine(width)


def resnet18() -> list[Shape]:
    return _resnet((2, 2, 2, 2), bottleneck=False)


def resnet50() -> list[Shape]:
    return _resnet((3, 4, 6, 3), bottleneck=True)


def _vit16(width: int) -> list[Shape]:
    """A ViT with patches of 16 x 16 at 224 x 224: class token, 14 x 14 patches, 12 blocks."""
    tokens: list[Shape] = [(1, 1, width), (1, 1 + 14 * 14, width)]
    patches: list[Shape] = [(width, 3, 16, 16), (width,)]
    return tokens + patches + _transformer(width, 12) + _linear(width, 1000)


def vit_s16() -> list[Shape]:
    return _vit16(384)


def vit_b16() -> list[Shape]:
    return _vit16(768)


def gpt2_small() -> list[Shape]:
    """GPT-2 small: the head is the token embedding, so it adds nothing."""
    width = 768
    return [(50257, width), (1024, width), *_transformer(width, 12)]


def small400() -> list[Shape]:
    """400 tensors of a few hundred elements: what is left is the work around the kernels."""
    return [shape for _ in range(200) for shape in ((20, 20), (300,))]


def tiny() -> list[Shape]:
    """For ``--quick``: every kind of shape, nothing to wait for."""
    return [(8, 3, 3, 3), *_affine(8), *_linear(8, 10), (1, 1, 8), (40, 50)]


SHAPES: dict[str, Callable[[], list[Shape]]] = {
    "small400": small400,
    "resnet18": resnet18,
    "vit_s16": vit_s16,
    "resnet50": resnet50,
    "vit_b16": vit_b16,
    "gpt2_small": gpt2_small,
}

# What a run measures unless it is told otherwise.
CPU = ("small400", "resnet18", "vit_s16", "resnet50", "gpt2_small")
GPU = ("resnet50", "vit_b16", "gpt2_small", "small400")


def count(shapes: list[Shape]) -> int:
    """Parameters in all."""
    return sum(math.prod(shape) for shape in shapes)


def chosen(names: str, default: tuple[str, ...]) -> dict[str, list[Shape]]:
    """The shapes of a comma-separated list, of ``default`` for an empty one.

    Raises:
        ValueError: for shapes that are not there.
    """
    wanted = [name for name in names.split(",") if name] or default
    if unknown := set(wanted) - set(SHAPES):
        raise ValueError(f"--shapes: no {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    return {name: SHAPES[name]() for name in wanted}
