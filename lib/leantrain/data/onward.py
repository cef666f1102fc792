"""The data of a run that goes on from another, from where that one stopped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from leantrain.data.seeded import SeededData

__all__ = ["onward"]


def onward(data: SeededData, first: int) -> SeededData:
    """The same data from a later epoch on.

    Epoch 0 of what comes back has the batches that `data` has in epoch `first` under the same seed, epoch 1 those of
    the epoch after it, and so on. A chain of runs, each with the data from where the one before stopped, sees the
    batches of one long run.

    Args:
        data: Any data whose batches depend on the seed and the epoch.
        first: The epoch to begin with, at least 0.

    Returns:
        `data` itself for 0, else a data module of its own. The validation batches are the same.

    Raises:
        ValueError: If `first` is negative.
    """
    if first < 0:
        raise ValueError(f"the first epoch must be at least 0, got {first}")
    if first == 0:
        return data
    train_batches, options = data._train_batches, data._options

    def later(seed: int, epoch: int) -> Iterator[Any]:
        return train_batches(seed, epoch + first)

    return SeededData(
        name=data.name,  # type: ignore[arg-type]  # Lightning says None for what has no name; ours has one
        checksums=data.checksums,
        batch_size=data.batch_size,
        sizes=(data.train_size, data.val_size),
        options={**options, "first_epoch": options.get("first_epoch", 0) + first},
        train_batches=later,
        val_batches=data._val_batches,
    )
