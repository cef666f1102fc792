"""UCF-101, from folders of frames.

The authors give out videos. Decoding them would need a further library; the frames are read as pictures instead, laid
down beforehand with any tool, such as ``ffmpeg -i CLIP.avi -q:v 2 CLIP/%05d.jpg``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from leantrain.data.errors import CorruptData, MissingData
from leantrain.data.fetch import locate
from leantrain.data.image_sets import stratified_order
from leantrain.data.seeded import LARGEST_SEED, check_seed, epoch_generator, train_batch_count
from leantrain.data.video_sets import VideoData

__all__ = ["FrameFolders", "segment_places", "ucf101"]

_CLASSES = 101
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LAYOUT = (
    "Each clip is a folder of its frames, ucf101/frames/<class>/<clip>/<frame>.jpg, with the authors' names of classes "
    "and clips; their lists of clips lie beside them, ucf101/ucfTrainTestlist/classInd.txt, trainlist01.txt and so on."
)
# Processes that decode pictures; the batches do not depend on it.
_WORKERS = min(8, os.cpu_count() or 1)


def segment_places(count: int, frames: int, within: Tensor | None = None) -> list[int]:
    """Which frames of a clip are shown: one of each of T segments of equal length.

    Args:
        count: Frames that the clip has, at least 1.
        frames: T, at least 1; a shorter clip shows frames several times.
        within: Where in its segment each frame lies, from 0 to below 1, ``(T,)``; None takes the middle.

    Returns:
        T places from 0 to ``count - 1``, never falling.

    Example:
        >>> segment_places(12, 4)
        [1, 4, 7, 10]
        >>> segment_places(2, 4)
        [0, 0, 1, 1]
    """
    within = torch.full((frames,), 0.5) if within is None else within
    places = ((torch.arange(frames) + within) * (count / frames)).long()
    return places.clamp_(max=count - 1).tolist()


class FrameFolders(Dataset[tuple[Tensor, int]]):
    """Clips from folders of pictures, as uint8 ``(T, 3, size, size)`` with their class.

    Without `seeds`, the middle of each of T segments is shown, and of each frame the middle, after its shorter side was
    resized to 8/7 of the size. With them, a random frame of each segment, cropped at a random place and mirrored at
    random, alike for all frames of a clip; all this depends on the clip's own seed only.

    Args:
        samples: Folder and class of each clip.
        frames: Frames T to show.
        size: Height and width of what comes out, in pixels.
        seeds: One seed for each clip, int64 ``(N,)``, or None.
    """

    def __init__(
        self, samples: Sequence[tuple[Path, int]], frames: int, size: int, seeds: Tensor | None = None
    ) -> None:
        self._samples = samples
        self._frames = frames
        self._seeds = seeds
        cut = [v2.CenterCrop(size)] if seeds is None else [v2.RandomCrop(size), v2.RandomHorizontalFlip()]
        self._transform = v2.Compose([v2.Resize(round(size * 8 / 7)), *cut])

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        """Decode the clip at a place.

        Raises:
            CorruptData: If its folder holds no pictures, one cannot be read, or they differ in size.
        """
        folder, label = self._samples[place]
        files = sorted(folder.glob("*.jpg"))
        if not files:
            raise CorruptData(f"{folder} holds no frames (*.jpg)")
        with torch.random.fork_rng(devices=[]):
            within = None
            if self._seeds is not None:
                torch.manual_seed(int(self._seeds[place]))
                within = torch.rand(self._frames)
            shown = [files[i] for i in segment_places(len(files), self._frames, within)]
            try:
                pictures = [v2.functional.pil_to_tensor(default_loader(str(file))) for file in shown]
                clip = torch.stack(pictures)
            except (OSError, RuntimeError) as error:
                raise CorruptData(f"{folder}: its frames cannot be read as one clip: {error}") from error
            return self._transform(clip), label


def ucf101(
    *,
    batch_size: int = 16,
    frames: int = 16,
    size: int = 243,
    split: int = 1,
    train_size: int | None = None,
    val_size: int | None = None,
    split_seed: int = 0,
    stand_in: bool = False,
) -> VideoData:
    """UCF-101: 13,320 clips of 101 human actions, in one of the authors' three splits.

    The frames must lie in the data folder; the data card says how. Pixels are normalised with the mean and standard
    deviation that are customary for ImageNet. Validation clips are the test clips of the split.

    Args:
        batch_size: Clips in a batch, at least 1.
        frames: Frames T to show of each clip, see `FrameFolders`.
        size: Height and width of a frame in pixels.
        split: 1, 2 or 3.
        train_size: Use that many training clips, chosen at random with the classes kept in proportion; None for all.
        val_size: The same for validation.
        split_seed: Seed of these choices.
        stand_in: Random clips of the real shape and number of classes, two batches in each split, without reading any
            file: to try out a run.

    Raises:
        MissingData: If the frames or the lists are not here; says how they must lie.
        CorruptData: If the lists name clips that are not there, or not 101 classes.
        ValueError: If a number is out of range.
    """
    if batch_size < 1 or frames < 1 or size < 1 or split not in (1, 2, 3):
        raise ValueError(
            f"batch_size={batch_size}, frames={frames}, size={size}, split={split}: expected at least 1, "
            "and a split of 1 to 3"
        )
    check_seed("split_seed", split_seed)
    shape = (frames, 3, size, size)
    options = {"split": split, "split_seed": split_seed, "stand_in": stand_in, "shape": shape}
    if stand_in:
        return _stand_in(shape, batch_size, options)
    splits, checksums = [], {}
    for part, listed in (("train", train_size), ("test", val_size)):
        samples, checksums[f"ucf101/{part} {split:02}, list of clips"] = _listed(part, split)
        splits.append(_chosen(samples, listed, split_seed, "train_size" if part == "train" else "val_size"))
    train, val = splits

    def read(clips: FrameFolders, order: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            clips,
            batch_size=batch_size,
            sampler=order,
            num_workers=_WORKERS,
            # Its own generator: a loader without one draws from the global one.
            generator=epoch_generator(0, 0, "workers"),
        )
        for x, y in loader:
            yield _normalised(x), y

    def train_batches(seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(train), generator=epoch_generator(seed, epoch, "order")).tolist()
        kept = order[: train_batch_count(len(train), batch_size) * batch_size]
        seeds = torch.randint(0, LARGEST_SEED, (len(train),), generator=epoch_generator(seed, epoch, "augment"))
        return read(FrameFolders(train, frames, size, seeds), kept)

    return VideoData(
        name="ucf101",
        num_classes=_CLASSES,
        shape=shape,
        checksums=checksums,
        batch_size=batch_size,
        sizes=(len(train), len(val)),
        options=options,
        train_batches=train_batches,
        val_batches=lambda: read(FrameFolders(val, frames, size), list(range(len(val)))),
    )


def _listed(part: str, split: int) -> tuple[list[tuple[Path, int]], str]:
    """Folder and class of the clips in one of the authors' lists, and the list's SHA-256."""
    try:
        home = locate("ucf101") / "ucf101"
    except MissingData as error:
        raise MissingData(f"{error}\n{_LAYOUT}") from error
    lists = home / "ucfTrainTestlist"
    try:
        classes = (lists / "classInd.txt").read_text(encoding="utf-8").split()[1::2]
        clips = [
            Path(line.split()[0]) for line in (lists / f"{part}list{split:02}.txt").read_text("utf-8").splitlines()
        ]
    except OSError as error:
        raise MissingData(f"{error}\n{_LAYOUT}") from error
    if len(classes) != _CLASSES:
        raise CorruptData(f"{lists / 'classInd.txt'} names {len(classes)} classes, expected {_CLASSES}")
    number = {name: place for place, name in enumerate(classes)}
    samples = []
    for clip in clips:
        folder = home / "frames" / clip.parent.name / clip.stem
        if clip.parent.name not in number or not folder.is_dir():
            raise CorruptData(f"{part}list{split:02}.txt names {clip}, but there is no folder {folder}. {_LAYOUT}")
        samples.append((folder, number[clip.parent.name]))
    names = [[folder.relative_to(home).as_posix(), label] for folder, label in samples]
    return samples, hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _chosen(samples: list[tuple[Path, int]], size: int | None, seed: int, option: str) -> list[tuple[Path, int]]:
    if size is None:
        return samples
    if not 1 <= size <= len(samples):
        raise ValueError(f"{option} must be 1 to {len(samples)} or None, got {size}")
    order = stratified_order(torch.tensor([label for _, label in samples]), seed)
    return [samples[place] for place in order[:size].tolist()]


def _normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (_MEAN, _STD))
    return (x.float() / 255 - mean) / std


def _stand_in(shape: tuple[int, int, int, int], batch_size: int, options: dict[str, object]) -> VideoData:
    # A few clips that come again and again: big batches must not fill the memory.
    pool, generator = min(2 * batch_size, 4), epoch_generator(0, 0, "stand-in")
    x = torch.randint(0, 256, (pool, *shape), generator=generator, dtype=torch.uint8)
    y = torch.randint(0, _CLASSES, (pool,), generator=generator)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in (torch.arange(2 * batch_size) % pool).split(batch_size):
            yield _normalised(x[rows]), y[rows]

    return VideoData(
        name="ucf101",
        num_classes=_CLASSES,
        shape=shape,
        checksums={},
        batch_size=batch_size,
        sizes=(2 * batch_size, 2 * batch_size),
        options=options,
        train_batches=lambda seed, epoch: batches(),
        val_batches=batches,
    )
