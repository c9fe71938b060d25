"""The data sets, in memory and on the device; and the wrong labels."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

CLASSES = 10
CHUNK = 500  # examples a pass when the whole set is wanted; more do not fit a CPU's caches


class Failure(Exception):
    """Why there is no comparison, in one line: mostly something the user gave that cannot be used."""


@dataclass
class Data:
    """A data set, in memory and on the device."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    first_class: int = 0  # there are none below it
    weights: Mapping[str, Tensor] | None = None  # that a training starts from; None: random ones
    digest: str = ""  # of all examples before they are standardized, those of the pretraining, too

    def tensors(self) -> tuple[Tensor, ...]:
        return self.train_x, self.train_y, self.test_x, self.test_y


def digits() -> Data:
    """The 8x8 digits that come with scikit-learn: 1257 to train on, 540 to test, always the same ones."""
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images.astype(np.float32).reshape(-1, 1, 8, 8), labels, test_size=540, stratify=labels, random_state=0
    )
    return Data(*(torch.from_numpy(a) for a in (train_x, train_y, test_x, test_y)))


def read_idx(folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """The bytes of ``folder/name`` or ``folder/name.gz``, an IDX file of n items of a given shape."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise Failure(f"--data-dir {folder}: there is no {name} and no {name}.gz")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as e:
        raise Failure(f"{path} cannot be read: {e}") from None
    # Two zeros, the type (8 is unsigned byte), the number of dimensions, then their sizes in big-endian order.
    header = 4 + 4 * (1 + len(shape))
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, 1 + len(shape))):
        raise Failure(f"{path} is not an IDX file of bytes in {1 + len(shape)} dimensions")
    sizes = struct.unpack(f">{1 + len(shape)}I", raw[4:header])
    if sizes[1:] != shape or sizes[0] == 0:
        raise Failure(f"{path} holds items of shape {sizes[1:]}, {sizes[0]} of them; expected shape {shape}")
    if len(raw) - header != math.prod(sizes):
        raise Failure(f"{path} holds {len(raw) - header} bytes of data; its header says {math.prod(sizes)}")
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).reshape(sizes)


def fashion_mnist(folder: Path) -> Data:
    """Fashion-MNIST, or anything else in the same four files."""
    if not folder.is_dir():
        raise Failure(f"--data-dir {folder}: there is no such folder")
    tensors = []
    for part in ("train", "t10k"):
        images = read_idx(folder, f"{part}-images-idx3-ubyte", (28, 28))
        labels = read_idx(folder, f"{part}-labels-idx1-ubyte", ())
        if len(images) != len(labels):
            raise Failure(f"--data-dir {folder}: {len(images)} {part} images, but {len(labels)} {part} labels")
        if int(labels.max()) >= CLASSES:
            raise Failure(f"--data-dir {folder}: a {part} label is {int(labels.max())}; the largest allowed is 9")
        tensors += [images.float().unsqueeze(1), labels.long()]
    return Data(*tensors)


def load_data(
    dataset: str,
    folder: Path | None,
    train_size: int | None,
    device: torch.device,
    first_class: int = 0,
    pretraining: bool = False,
) -> Data:
    """The data set on the device, standardized: of the classes from ``first_class`` on, cut to ``train_size``, or all
    of those below it, for the pretraining."""
    whole = digits() if folder is None else fashion_mnist(folder)
    data = of_classes(whole, first_class, CLASSES)
    available = len(data.train_y)
    if train_size is not None:
        if train_size > available:
            raise Failure(f"{train_size} training examples are wanted: {dataset} has {available}")
        chosen = torch.randperm(available, generator=torch.Generator().manual_seed(0))[:train_size]
        data.train_x, data.train_y = data.train_x[chosen], data.train_y[chosen]
    before = of_classes(whole, 0, first_class)  # for the pretraining
    digest = digest_of(tensor for part in (data, before) for tensor in part.tensors())
    mean, std = data.train_x.mean(), data.train_x.std().clamp_min(1e-6)
    data = before if pretraining else data
    return replace(
        data,
        train_x=((data.train_x - mean) / std).to(device),
        train_y=data.train_y.to(device),
        test_x=((data.test_x - mean) / std).to(device),
        test_y=data.test_y.to(device),
        digest=digest,
    )


def digest_of(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def of_classes(data: Data, first: int, end: int) -> Data:
    train, test = ((first <= y) & (y < end) for y in (data.train_y, data.test_y))
    return Data(data.train_x[train], data.train_y[train], data.test_x[test], data.test_y[test], first)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to two pixels along both sides, and mirrored or not, at random."""
    n, _, height, width = images.shape
    down, right = torch.randint(0, 5, (2, n, 1), generator=generator)
    mirrored = torch.randint(0, 2, (n, 1), generator=generator).bool()
    columns = torch.arange(width)
    rows = torch.arange(height) + down
    columns = torch.where(mirrored, columns.flip(0), columns) + right
    padded = F.pad(images, (2, 2, 2, 2), value=float(images.min()))  # black
    which = torch.arange(n)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def with_noise(labels: Tensor, percent: float, seed: int, first_class: int = 0) -> Tensor:
    """Symmetric noise: this share of the labels, drawn at random, becomes another class, all equally likely."""
    # Seeds of its own: the same draw as that of the minibatches would bring all wrong labels first.
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    count = round(len(labels) * percent / 100)
    wrong = torch.randperm(len(labels), generator=generator)[:count].to(labels.device)
    classes = CLASSES - first_class
    shift = torch.randint(1, classes, (count,), generator=generator).to(labels.device)
    noisy = labels.clone()
    noisy[wrong] = first_class + (labels[wrong] - first_class + shift) % classes
    return noisy


def hold_out(data: Data, count: int, seed: int) -> Data:
    """The training part alone: so many of it, drawn at random, stand where the test part was."""
    if count >= len(data.train_y) - 1:
        raise Failure(f"held_out {count}: there are {len(data.train_y)} training examples")
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(2_000_000 + seed))
    held, kept = order[:count].to(data.train_y.device), order[count:].to(data.train_y.device)
    x, y = data.train_x, data.train_y
    return replace(data, train_x=x[kept], train_y=y[kept], test_x=x[held], test_y=y[held])
