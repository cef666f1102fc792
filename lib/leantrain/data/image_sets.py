"""Image sets, with an order of batches and an augmentation that depend on the seed and the epoch alone."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from leantrain.data.checks import check_images
from leantrain.data.cifar import read_batch
from leantrain.data.digits import read_digits
from leantrain.data.errors import CorruptData
from leantrain.data.fetch import locate
from leantrain.data.registry import dataset
from leantrain.data.seeded import LARGEST_SEED, SeededData, check_seed, epoch_generator, train_batch_count

__all__ = ["ImageData", "images", "random_crop_flip", "stratified_order"]

_DIGITS_TRAIN = 1437
# Processes that decode pictures; the batches do not depend on it.
_WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class _Spec:
    """How a set of images looks and is prepared."""

    shape: tuple[int, int, int]
    num_classes: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool


@dataclass(frozen=True)
class _Split:
    """Images as stored, uint8 ``(N, C, H, W)``, and classes ``(N,)``; `rows` are the places in use, in order."""

    x: Tensor
    y: Tensor
    rows: Tensor


_SPECS = {
    "digits": _Spec((1, 8, 8), 10, 16.0, (0.0,), (1.0,), pad=1, flip=False),
    "mnist": _Spec((1, 28, 28), 10, 255.0, (0.1307,), (0.3081,), pad=2, flip=False),
    "cifar10": _Spec((3, 32, 32), 10, 255.0, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), pad=4, flip=True),
    "imagenet": _Spec((3, 224, 224), 1000, 255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), pad=0, flip=True),
}


class ImageData(SeededData):
    """Images and classes as batches; built by :func:`images`.

    A batch is ``(x, y)``: x float32 ``(B, C, H, W)``, normalised; y int64 ``(B,)``. Every training epoch is a fresh
    permutation.

    Attributes:
        num_classes: Number of classes.
        shape: ``(C, H, W)`` of one image.
    """

    def __init__(
        self,
        *,
        name: str,
        num_classes: int,
        shape: tuple[int, int, int],
        checksums: Mapping[str, str],
        batch_size: int,
        sizes: tuple[int, int],
        options: Mapping[str, Any],
        train_batches: Callable[[int, int], Iterator[tuple[Tensor, Tensor]]],
        val_batches: Callable[[], Iterator[tuple[Tensor, Tensor]]],
    ) -> None:
        super().__init__(
            name=name,
            checksums=checksums,
            batch_size=batch_size,
            sizes=sizes,
            options=options,
            train_batches=train_batches,
            val_batches=val_batches,
        )
        self.num_classes = num_classes
        self.shape = shape


def images(
    name: str,
    *,
    batch_size: int = 128,
    train_size: int | None = None,
    val_size: int | None = None,
    augment: bool = False,
    split_seed: int = 0,
    stand_in: bool = False,
) -> ImageData:
    """An image set by its name, ready to train on.

    `digits` has pixels from 0 to 1 and a fixed split into 1,437 training and 360 validation images. The other sets
    are normalised to the mean and standard deviation of their training pixels by channel, and their validation
    images are those on which papers report: the official test images of `cifar10` and `mnist`, the official
    validation images of `imagenet`.

    Args:
        name: `digits` (8x8, comes with scikit-learn), `mnist` (28x28), `cifar10` (32x32 RGB) or `imagenet` (224x224
            RGB, from the folders `imagenet/train` and `imagenet/val` of the data folder, decoded when needed).
        batch_size: Images in a batch, at least 1.
        train_size: Use that many training images, chosen at random with the classes kept in proportion; None for all.
            A smaller choice is part of a larger one of the same `split_seed`.
        val_size: The same for validation.
        augment: Augment training images. `cifar10`: random crop after padding by 4 black pixels, and random
            horizontal flip; `mnist` and `digits`: crop only, after padding by 2 and by 1; `imagenet`: random crop of 8
            to 100 % of the area, resized, and random horizontal flip.
        split_seed: Seed of the choices that `train_size` and `val_size` make; not of the order of batches.
        stand_in: Random images of the set's real shape and number of classes, two batches in each split, without
            reading any file: to try out a run.

    Raises:
        MissingData: If the set's files are not here; says how to get them.
        CorruptData: If a file is not what it should be.
        ValueError: If the name is unknown or a number is out of range.
    """
    if name not in _SPECS:
        raise ValueError(f"unknown image set {name!r}; the image sets are {', '.join(_SPECS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_seed("split_seed", split_seed)
    spec = _SPECS[name]
    options = {"augment": augment, "split_seed": split_seed, "stand_in": stand_in}
    if name == "imagenet" and not stand_in:
        return _image_folders(spec, batch_size, (train_size, val_size), options)
    if stand_in:
        checksums: dict[str, str] = {}
        train, val = _stand_in(spec, batch_size), _stand_in(spec, batch_size)
        augment = augment and spec.pad > 0
    else:
        checksums = dataset(name).checksums
        train, val = _READERS[name](spec)
        train = _choose(train, train_size, split_seed, "train_size")
        val = _choose(val, val_size, split_seed, "val_size")

    def train_batches(seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return _augmented(spec, train, batch_size, augment, seed, epoch)

    def val_batches() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in val.rows.split(batch_size):
            yield _normalised(spec, val.x[rows]), val.y[rows]

    return ImageData(
        name=name,
        num_classes=spec.num_classes,
        shape=spec.shape,
        checksums=checksums,
        batch_size=batch_size,
        sizes=(len(train.rows), len(val.rows)),
        options=options,
        train_batches=train_batches,
        val_batches=val_batches,
    )


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A random permutation of which every beginning keeps the classes in proportion.

    Args:
        labels: Classes ``(N,)``, integers.
        seed: The permutation depends on it and on the labels only.

    Returns:
        Places ``(N,)``, int64. Among the first n, a class of m items has n * m / N items, give or take one.
    """
    generator = epoch_generator(seed, 0, "split")
    shuffled = torch.randperm(len(labels), generator=generator)
    # Item k of a class of m is due at the share (k + 1/2) / m of the way; ties fall in random order, since the sort
    # is stable and the items come shuffled.
    due = torch.empty(len(labels), dtype=torch.float64)
    of = labels[shuffled]
    for label in of.unique():
        places = (of == label).nonzero().flatten()
        due[places] = (torch.arange(len(places), dtype=torch.float64) + 0.5) / len(places)
    return shuffled[due.argsort(stable=True)]


def random_crop_flip(x: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int) -> Tensor:
    """Pad images with zeros, cut a window of the original size out of each, and mirror some.

    Args:
        x: Images ``(B, C, H, W)``.
        top: First row of the window of each image, ``(B,)``, 0 to ``2 * pad``.
        left: First column, likewise.
        flip: Which windows to mirror left to right, ``(B,)``, bool.
        pad: Zeros on each side, at least 0.

    Returns:
        Images ``(B, C, H, W)`` of the same type.
    """
    height, width = x.shape[-2:]
    # Every window of every image, as a view of the padded images: (B, C, 2 pad + 1, 2 pad + 1, H, W).
    windows = F.pad(x, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    cut = windows[torch.arange(len(x)), :, top, left]
    return torch.where(flip[:, None, None, None], cut.flip(-1), cut)


def _normalised(spec: _Spec, x: Tensor) -> Tensor:
    mean = torch.tensor(spec.mean).view(1, -1, 1, 1)
    std = torch.tensor(spec.std).view(1, -1, 1, 1)
    return x.float().mul_(1 / (spec.scale * std)).sub_(mean / std)


def _augmented(
    spec: _Spec, split: _Split, batch_size: int, augment: bool, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    count = len(split.rows)
    order = torch.randperm(count, generator=epoch_generator(seed, epoch, "order"))
    # Drawn for the whole epoch at once: an image's crop does not depend on the size of the batch.
    draws = epoch_generator(seed, epoch, "augment")
    top, left = torch.randint(0, 2 * spec.pad + 1, (2, count), generator=draws)
    flip = torch.rand(count, generator=draws) < (0.5 if spec.flip else 0.0)
    for batch in range(train_batch_count(count, batch_size)):
        picked = order[batch * batch_size : (batch + 1) * batch_size]
        rows = split.rows[picked]
        x = split.x[rows]
        if augment:
            x = random_crop_flip(x, top[picked], left[picked], flip[picked], spec.pad)
        yield _normalised(spec, x), split.y[rows]


def _choose(split: _Split, size: int | None, seed: int, option: str) -> _Split:
    return _Split(split.x, split.y, _chosen_rows(split.y, split.rows, size, seed, option))


def _chosen_rows(labels: Tensor, rows: Tensor, size: int | None, seed: int, option: str) -> Tensor:
    if size is None:
        return rows
    if not 1 <= size <= len(rows):
        raise ValueError(f"{option} must be 1 to {len(rows)} or None, got {size}")
    return rows[stratified_order(labels[rows], seed)[:size]]


def _stand_in(spec: _Spec, batch_size: int) -> _Split:
    # A few images that come again and again: big sets and batches must not fill the memory.
    pool = min(2 * batch_size, 32)
    generator = epoch_generator(0, 0, "stand-in")
    x = torch.randint(0, int(spec.scale) + 1, (pool, *spec.shape), generator=generator, dtype=torch.uint8)
    y = torch.randint(0, spec.num_classes, (pool,), generator=generator)
    return _Split(x, y, torch.arange(2 * batch_size) % pool)


def _digits(spec: _Spec) -> tuple[_Split, _Split]:
    images, labels = read_digits()
    check_images("digits", images, labels, num_classes=spec.num_classes, shape=spec.shape)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    order = stratified_order(y, 0)
    return _Split(x, y, order[:_DIGITS_TRAIN]), _Split(x, y, order[_DIGITS_TRAIN:])


def _cifar10(spec: _Spec) -> tuple[_Split, _Split]:
    folder = locate("cifar10") / "cifar-10-batches-py"

    def read(*names: str) -> _Split:
        parts = []
        for name in names:
            x, y = read_batch(folder / name)
            check_images(name, x, y, num_classes=spec.num_classes, shape=spec.shape)
            parts.append((x, y))
        return _whole(np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts]))

    return read(*(f"data_batch_{i}" for i in range(1, 6))), read("test_batch")


def _mnist(spec: _Spec) -> tuple[_Split, _Split]:
    folder = locate("mnist") / "MNIST" / "raw"

    def read(part: str) -> _Split:
        file = f"{part}-images-idx3-ubyte"
        x = _read_idx(folder / file, 3)[:, None]
        y = _read_idx(folder / f"{part}-labels-idx1-ubyte", 1).astype(np.int64)
        check_images(file, x, y, num_classes=spec.num_classes, shape=spec.shape)
        return _whole(x, y)

    return read("train"), read("t10k")


def _whole(x: np.ndarray, y: np.ndarray) -> _Split:
    return _Split(torch.from_numpy(x), torch.from_numpy(y), torch.arange(len(y)))


def _image_folders(
    spec: _Spec, batch_size: int, sizes: tuple[int | None, int | None], options: Mapping[str, Any]
) -> ImageData:
    from leantrain.data.pictures import Pictures, list_pictures

    folder = locate("imagenet") / "imagenet"
    splits, listings = [], {}
    for part, size in zip(("train", "val"), sizes, strict=True):
        samples = list_pictures(folder / part, spec.num_classes)
        labels = torch.tensor([label for _, label in samples])
        rows = _chosen_rows(labels, torch.arange(len(labels)), size, options["split_seed"], f"{part}_size")
        splits.append([samples[row] for row in rows.tolist()])
        names = [[Path(path).relative_to(folder).as_posix(), label] for path, label in samples]
        listings[f"imagenet/{part}, list of files"] = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    train, val = splits

    def read(pictures: Pictures, order: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            pictures,
            batch_size=batch_size,
            sampler=order,
            num_workers=_WORKERS,
            # Its own generator: a loader without one draws from the global one.
            generator=epoch_generator(0, 0, "workers"),
        )
        for x, y in loader:
            yield _normalised(spec, x), y

    def train_batches(seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(train), generator=epoch_generator(seed, epoch, "order")).tolist()
        kept = order[: train_batch_count(len(train), batch_size) * batch_size]
        seeds = torch.randint(0, LARGEST_SEED, (len(train),), generator=epoch_generator(seed, epoch, "augment"))
        return read(Pictures(train, spec.shape[1], seeds if options["augment"] else None), kept)

    return ImageData(
        name="imagenet",
        num_classes=spec.num_classes,
        shape=spec.shape,
        checksums=listings,
        batch_size=batch_size,
        sizes=(len(train), len(val)),
        options=options,
        train_batches=train_batches,
        val_batches=lambda: read(Pictures(val, spec.shape[1]), list(range(len(val)))),
    )


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An array of unsigned bytes in the idx format: a magic number, the sizes (big-endian), the content."""
    content = path.read_bytes()
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes([0, 0, 8, dimensions]):
        raise CorruptData(f"{path.name}: not an idx file of unsigned bytes with {dimensions} dimensions")
    sizes = struct.unpack(f">{dimensions}I", content[4:head])
    if int(np.prod(sizes)) != len(content) - head:
        raise CorruptData(f"{path.name}: its head promises {sizes}, but {len(content) - head} bytes follow")
    # A copy, because torch wants memory that can be written to.
    return np.frombuffer(content, np.uint8, offset=head).reshape(sizes).copy()


_READERS: dict[str, Callable[[_Spec], tuple[_Split, _Split]]] = {
    "digits": _digits,
    "mnist": _mnist,
    "cifar10": _cifar10,
}
