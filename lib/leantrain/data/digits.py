"""The digits that come with scikit-learn."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from leantrain.data.errors import CorruptData
from leantrain.data.registry import dataset

if TYPE_CHECKING:
    import numpy as np

__all__ = ["read_digits"]


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``(1797, 1, 8, 8)`` from 0 to 16, and classes int64 ``(1797,)``.

    Raises:
        CorruptData: If scikit-learn's arrays are not those that the registry knows.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.int64)
    for (what, expected), array in zip(dataset("digits").arrays.items(), (images, labels), strict=True):
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        if digest != expected:
            raise CorruptData(f"{what}: SHA-256 {digest}, expected {expected}; is this another scikit-learn?")
    return images[:, None], labels
