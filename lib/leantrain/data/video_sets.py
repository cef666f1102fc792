"""Clips as batches, and a generated set of them whose classes no single frame can tell.

A digit lies on a torus and rolls over it with a constant velocity: what leaves on the right comes back on the left. The
class is the velocity. The place where a clip starts is drawn evenly from all places of the torus, so the place of the
digit in frame t, the start moved by t steps, is spread evenly as well, *whatever the class is*. A frame by itself
therefore has the same distribution in every class, and whoever sees one frame only can but guess. Only the change from
frame to frame tells the classes apart.

>>> data = moving_digits(MovingDigits(frames=8, side=12), batch_size=4)
>>> clips, classes = next(iter(data.val_dataloader()))
>>> tuple(clips.shape), classes.tolist()
((4, 8, 1, 12, 12), [0, 1, 2, 3])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from leantrain.data.digits import read_digits
from leantrain.data.image_sets import stratified_order
from leantrain.data.registry import dataset
from leantrain.data.seeded import SeededData, check_seed, epoch_generator, train_batch_count

__all__ = ["DIRECTIONS", "Clips", "MovingDigits", "Order", "VideoData", "moving_digits", "roll_images", "velocities"]

#: Rows down and columns to the right of a step in each of the eight directions, clockwise from "to the right".
DIRECTIONS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
#: How the frames of a clip are shown: as they follow each other, in a random order, or the first one all the time.
Order = Literal["forward", "shuffled", "single"]

# The split of the set that `images("digits")` has too.
_TRAIN_DIGITS = 1437
_DIGIT_SIDE, _WHITE = 8, 16


class VideoData(SeededData):
    """Clips and classes as batches; built by :func:`moving_digits` and :func:`leantrain.data.ucf101`.

    A batch is ``(x, y)``: x float32 ``(B, T, C, H, W)``, so that ``x.flatten(0, 1)`` are all frames as images, without
    a copy; y int64 ``(B,)``. Every training epoch is a fresh permutation.

    Attributes:
        num_classes: Number of classes.
        shape: ``(T, C, H, W)`` of one clip.
    """

    def __init__(
        self,
        *,
        name: str,
        num_classes: int,
        shape: tuple[int, int, int, int],
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


@dataclass(frozen=True)
class Clips:
    """Generated clips, with what they were made of.

    Attributes:
        x: Frames, float32 ``(N, T, 1, H, W)``.
        y: Classes, int64 ``(N,)``: rows of :func:`velocities`.
        source: Places of the digits in scikit-learn's set, int64 ``(N,)``.
        start: Rows and columns by which the digit of the first frame is moved, int64 ``(N, 2)``.
    """

    x: Tensor
    y: Tensor
    source: Tensor
    start: Tensor


@dataclass(frozen=True)
class MovingDigits:
    """How clips of moving digits are made.

    Attributes:
        frames: Frames T of a clip, at least 1.
        side: Height and width of a frame in pixels, at least ``8 * scale``.
        scale: Pixels of a frame along one pixel of a digit, at least 1.
        speeds: Pixels that a digit moves from frame to frame (in both axes, on a diagonal), each with all eight
            `DIRECTIONS`.
        noise: Standard deviation of what is added to every pixel of every frame, at least 0; the digits' own values are
            0 to 1. It is nearly normal: a sum of four even draws, of integers, and so the same on every machine.
        order: `forward`; `shuffled`, the frames of each clip in a random order, which hides which of two opposite
            directions it is; or `single`, the first frame all the time, which hides the class altogether. All three
            are made of the same frames.
        clip_seed: Seed of all draws; not of the order of the batches.

    Raises:
        ValueError: If a number is out of range, or two classes move alike on a torus of this size.
    """

    frames: int = 8
    side: int = 12
    scale: int = 1
    speeds: tuple[int, ...] = (1,)
    noise: float = 0.3
    order: Order = "forward"
    clip_seed: int = 0

    def __post_init__(self) -> None:
        if self.frames < 1 or self.scale < 1 or self.side < _DIGIT_SIDE * self.scale:
            raise ValueError(
                f"frames={self.frames}, scale={self.scale}, side={self.side}: expected at least one frame, a scale of "
                "at least 1, and a side that holds a digit, 8 * scale"
            )
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be at least 0 and finite, got {self.noise}")
        if self.order not in get_args(Order):
            raise ValueError(f"order={self.order!r}: expected one of {', '.join(get_args(Order))}")
        check_seed("clip_seed", self.clip_seed)
        steps = velocities(self.speeds)
        if len((steps % self.side).unique(dim=0)) < len(steps):
            raise ValueError(f"speeds={self.speeds}: two classes would move alike on a torus of {self.side} pixels")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(T, 1, H, W)`` of a clip."""
        return self.frames, 1, self.side, self.side

    def clips(self, split: Literal["train", "val"], count: int) -> Clips:
        """Make clips.

        Digit and start are drawn evenly and without regard to the class; the classes take turns.

        Args:
            split: `train` takes the 1,437 training images of the digits, `val` the 360 others.
            count: Clips to make, at least one for each class.

        Returns:
            The clips. The same recipe, split and count give the same bytes.

        Raises:
            CorruptData: If scikit-learn's arrays are not those that the registry knows.
            ValueError: If the split is unknown or the count too small.
        """
        steps = velocities(self.speeds)
        if split not in ("train", "val") or count < len(steps):
            raise ValueError(f"split={split!r}, count={count}: expected train or val, and at least {len(steps)} clips")
        images, labels = (torch.from_numpy(array) for array in read_digits())
        places = stratified_order(labels, 0)
        places = places[:_TRAIN_DIGITS] if split == "train" else places[_TRAIN_DIGITS:]
        draws = epoch_generator(self.clip_seed, 0, f"moving digits, {split}")
        source = places[torch.randint(len(places), (count,), generator=draws)]
        start = torch.randint(self.side, (count, 2), generator=draws)
        y = torch.arange(count) % len(steps)
        digits = images[source, 0].float() / _WHITE
        digits = digits.repeat_interleave(self.scale, dim=1).repeat_interleave(self.scale, dim=2)
        torus = torch.zeros(count, self.side, self.side)
        torus[:, : digits.shape[1], : digits.shape[2]] = digits
        x = roll_images(torus, start, steps[y], self.frames)
        x = x + self.noise * _noise(x.shape, draws)
        if self.order == "single":
            x = x[:, :1].expand_as(x).contiguous()
        if self.order == "shuffled":
            turns = torch.rand(count, self.frames, generator=epoch_generator(self.clip_seed, 0, f"turns, {split}"))
            x = x[torch.arange(count)[:, None], turns.argsort(dim=1)]
        return Clips(x[:, :, None], y, source, start)


def moving_digits(
    recipe: MovingDigits | None = None, *, batch_size: int = 32, train_size: int = 600, val_size: int = 600
) -> VideoData:
    """Clips of digits that roll over a torus; the class is the direction, and the speed if there are several.

    The clips are made once, and every epoch shows them in a new order.

    Args:
        recipe: How they are made; by default that of :class:`MovingDigits`.
        batch_size: Clips in a batch, at least 1.
        train_size: Training clips, at least one for each class.
        val_size: Validation clips, at least one for each class.

    Raises:
        CorruptData: If scikit-learn's arrays are not those that the registry knows.
        ValueError: If a number is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    recipe = MovingDigits() if recipe is None else recipe
    train, val = recipe.clips("train", train_size), recipe.clips("val", val_size)

    def train_batches(seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        places = torch.randperm(train_size, generator=epoch_generator(seed, epoch, "order"))
        for batch in range(train_batch_count(train_size, batch_size)):
            picked = places[batch * batch_size : (batch + 1) * batch_size]
            yield train.x[picked], train.y[picked]

    def val_batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(val.x.split(batch_size), val.y.split(batch_size), strict=True)

    return VideoData(
        name="moving-digits",
        num_classes=len(velocities(recipe.speeds)),
        shape=recipe.shape,
        checksums=dataset("digits").checksums,
        batch_size=batch_size,
        sizes=(train_size, val_size),
        options=dataclasses.asdict(recipe),
        train_batches=train_batches,
        val_batches=val_batches,
    )


def velocities(speeds: Sequence[int] = (1,)) -> Tensor:
    """Rows and columns that a digit moves from frame to frame, class by class.

    Args:
        speeds: Pixels along an axis, each at least 1.

    Returns:
        int64 ``(8 * len(speeds), 2)``: the eight `DIRECTIONS` at the first speed, then at the next.

    Raises:
        ValueError: If there is no speed, one stands twice or is below 1.
    """
    if not speeds or min(speeds) < 1 or len(set(speeds)) < len(speeds):
        raise ValueError(f"speeds={tuple(speeds)}: expected different numbers of pixels, each at least 1")
    return torch.tensor([[speed * step for step in direction] for speed in speeds for direction in DIRECTIONS])


def roll_images(images: Tensor, start: Tensor, velocity: Tensor, frames: int) -> Tensor:
    """Roll images over the torus that their edges, joined, make.

    Args:
        images: ``(N, H, W)``.
        start: Rows and columns by which each image is moved in its first frame, integers ``(N, 2)``.
        velocity: Rows and columns that are added from frame to frame, integers ``(N, 2)``.
        frames: Frames T.

    Returns:
        ``(N, T, H, W)``: frame t is the image rolled by ``start + t * velocity``.
    """
    height, width = images.shape[1:]
    moved = start[:, None] + torch.arange(frames)[:, None] * velocity[:, None]
    rows = (torch.arange(height) - moved[..., :1]) % height
    columns = (torch.arange(width) - moved[..., 1:]) % width
    which = torch.arange(len(images))[:, None, None, None]
    return images[which, rows[..., None], columns[:, :, None]]


def _noise(shape: Sequence[int], draws: torch.Generator) -> Tensor:
    """Nearly normal noise of mean 0 and variance 1, equal on every machine: sums of four even draws of integers."""
    levels, summed = 256, 4
    total = torch.zeros(*shape, dtype=torch.int16)
    for _ in range(summed):
        total += torch.randint(levels, tuple(shape), generator=draws, dtype=torch.int16)
    deviation = (summed * (levels**2 - 1) / 12) ** 0.5
    return (total.float() - summed * (levels - 1) / 2) / deviation
