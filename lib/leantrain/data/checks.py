"""Checks of what a data set holds: ranges and shapes, equal items, and items that two splits share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from leantrain.data.errors import CorruptData

if TYPE_CHECKING:
    import numpy as np

__all__ = ["check_images", "check_labels", "duplicates", "overlap"]


def check_labels(where: str, labels: np.ndarray, num_classes: int) -> None:
    """Refuse labels outside 0 to ``num_classes - 1``.

    Args:
        where: Name of the file, for the message.
        labels: Integers ``(N,)``.
        num_classes: Number of classes, at least 1.

    Raises:
        CorruptData: If there is no label, or one is out of range; names the file and the first such row.
    """
    if labels.ndim != 1 or not len(labels):
        raise CorruptData(f"{where}: expected a row of labels, got an array of shape {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise CorruptData(f"{where}: labels must be integers, got {labels.dtype}")
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        row = int(wrong.argmax())
        raise CorruptData(f"{where}: row {row} has the label {labels[row]}, expected 0 to {num_classes - 1}")


def check_images(
    where: str, images: np.ndarray, labels: np.ndarray, *, num_classes: int, shape: tuple[int, int, int]
) -> None:
    """Refuse images of a wrong shape, with pixels that are not finite, or with labels out of range.

    Args:
        where: Name of the file, for the message.
        images: ``(N, C, H, W)``, uint8 or floating point.
        labels: Integers ``(N,)``.
        num_classes: Number of classes.
        shape: The expected ``(C, H, W)``.

    Raises:
        CorruptData: Names the file and, where there is one, the first wrong row.
    """
    import numpy as np

    check_labels(where, labels, num_classes)
    if images.shape[1:] != shape:
        raise CorruptData(f"{where}: images have the shape {images.shape[1:]}, expected {shape}")
    if len(images) != len(labels):
        raise CorruptData(f"{where}: {len(images)} images, but {len(labels)} labels")
    if images.dtype.kind == "f":
        finite = np.isfinite(images).reshape(len(images), -1).all(axis=1)
        if not finite.all():
            raise CorruptData(f"{where}: row {int((~finite).argmax())} has pixels that are not finite")
    elif images.dtype != np.uint8:
        raise CorruptData(f"{where}: images must be uint8 or floating point, got {images.dtype}")


def duplicates(items: Iterable[Any]) -> list[tuple[int, int]]:
    """Items with equal content.

    Args:
        items: Arrays (compared with shape and type), texts or bytes.

    Returns:
        Pairs ``(first, later)`` of places; one pair for each item that stood before.
    """
    first: dict[bytes, int] = {}
    found = []
    for place, key in enumerate(_digests(items)):
        if key in first:
            found.append((first[key], place))
        else:
            first[key] = place
    return found


def overlap(train: Iterable[Any], test: Iterable[Any]) -> list[tuple[int, int]]:
    """Items of a test split whose content also stands in the training split.

    Args:
        train: Arrays, texts or bytes.
        test: The same kind.

    Returns:
        Pairs of places ``(in train, in test)``; the first place in train where there are several.
    """
    first: dict[bytes, int] = {}
    for place, key in enumerate(_digests(train)):
        first.setdefault(key, place)
    return [(first[key], place) for place, key in enumerate(_digests(test)) if key in first]


def _digests(items: Iterable[Any]) -> Iterator[bytes]:
    for item in items:
        if isinstance(item, str | bytes):
            content = item.encode("utf-8") if isinstance(item, str) else item
        else:
            import numpy as np

            array = np.ascontiguousarray(item)
            content = f"{array.dtype.str}{array.shape}".encode() + array.tobytes()
        yield hashlib.blake2b(content, digest_size=20).digest()
