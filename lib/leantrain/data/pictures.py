"""Pictures in class folders, decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from leantrain.data.errors import CorruptData, MissingData

__all__ = ["Pictures", "list_pictures"]


def list_pictures(folder: Path, num_classes: int) -> list[tuple[str, int]]:
    """Path and class of every picture, in the order of the names; classes are numbered in the order of theirs.

    Args:
        folder: Holds one folder for each class.
        num_classes: How many there must be.

    Raises:
        MissingData: If there are no class folders, or one has no picture.
        CorruptData: If there are more or fewer than `num_classes`.
    """
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise MissingData(f"{folder} has no pictures in class folders: {error}") from error
    if len(found.classes) != num_classes:
        raise CorruptData(f"{folder} has {len(found.classes)} class folders, expected {num_classes}")
    return found.samples


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures as uint8 ``(3, size, size)`` with their class.

    Grey pictures are turned into RGB. Without `seeds`, the middle of the picture is taken, after its shorter side
    was resized to 8/7 of the size. With them, a random crop and a random horizontal flip are; they depend on the
    picture's own seed only, not on the process that decodes it or on the state of PyTorch's generators.

    Args:
        samples: Path and class of each picture.
        size: Height and width of what comes out, in pixels.
        seeds: One seed for each picture, int64 ``(N,)``, or None.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], size: int, seeds: Tensor | None = None) -> None:
        self._samples = samples
        self._seeds = seeds
        self._transform = (
            v2.Compose([v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)])
            if seeds is None
            else v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])
        )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        """Decode the picture at a place.

        Raises:
            CorruptData: If it is not a readable picture.
        """
        path, label = self._samples[place]
        try:
            picture = default_loader(path)
        except OSError as error:
            raise CorruptData(f"{path} is not a readable picture: {error}") from error
        with torch.random.fork_rng(devices=[]):
            if self._seeds is not None:
                torch.manual_seed(int(self._seeds[place]))
            return v2.functional.pil_to_tensor(self._transform(picture)), label
