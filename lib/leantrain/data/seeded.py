"""Data modules whose batches depend on the seed and the epoch alone.

Two arms of a comparison that use the same seed see bit-identical batches, whatever they draw from PyTorch's own
random number generators.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning as L
import torch

__all__ = ["LARGEST_SEED", "Loader", "SeededData", "check_seed", "epoch_generator", "train_batch_count"]

LARGEST_SEED = 2**63 - 1
# Part of every fingerprint: raise it when the same options begin to give other batches.
_VERSION = 1


class Loader:
    """Something with a length that gives a new iterator of batches each time it is iterated."""

    def __init__(self, length: int, batches: Callable[[], Iterator[Any]]) -> None:
        self._length = length
        self._batches = batches

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return self._batches()


class SeededData(L.LightningDataModule):
    """Training and validation batches in an order that the seed and the epoch fix.

    A training batch depends on the data, the options, the seed given to :meth:`set_seed` and the number of the epoch,
    and on nothing else. The epoch is the trainer's while a trainer fits; in a plain loop call :meth:`set_epoch`.
    The last training batch is dropped if it is short, unless it is the only one; validation keeps every sample, in a
    fixed order.

    So a run that goes on from a checkpoint sees the batches it would have seen, with one exception: where its module
    asks for `trainer.estimated_stepping_batches`, Lightning starts the first epoch before it has loaded the number,
    and that epoch has the batches of epoch 0.

    Attributes:
        name: The set's name.
        checksums: File or array -> SHA-256 of what was read, for the record. Empty for stand-in data.
        batch_size: Samples in a batch.
        train_size: Number of training samples.
        val_size: Number of validation samples.

    Args:
        sizes: `train_size` and `val_size`.
        options: What else a batch depends on, as JSON.
        train_batches: Training batches of a seed and an epoch.
        val_batches: Validation batches.
    """

    def __init__(
        self,
        *,
        name: str,
        checksums: Mapping[str, str],
        batch_size: int,
        sizes: tuple[int, int],
        options: Mapping[str, Any],
        train_batches: Callable[[int, int], Iterator[Any]],
        val_batches: Callable[[], Iterator[Any]],
    ) -> None:
        super().__init__()
        self.name = name
        self.checksums = dict(checksums)
        self.batch_size = batch_size
        self.train_size, self.val_size = sizes
        self._options = dict(options)
        self._train_batches = train_batches
        self._val_batches = val_batches
        self._seed = 0
        self._epoch = 0

    def set_seed(self, seed: int) -> None:
        """Fix the order of the training batches and their augmentation, and go back to epoch 0.

        Raises:
            ValueError: If the seed is negative or 2**63 or more.
        """
        check_seed("the seed", seed)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that a loop without a trainer sees next.

        Raises:
            ValueError: If the epoch is negative.
        """
        if epoch < 0:
            raise ValueError(f"the epoch must be at least 0, got {epoch}")
        self._epoch = epoch

    @property
    def epoch(self) -> int:
        """The epoch whose training batches come next."""
        if self.trainer is not None and self.trainer.training:
            return self.trainer.current_epoch
        return self._epoch

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything but seed and epoch that a batch depends on."""
        parts = {
            "version": _VERSION,
            "name": self.name,
            "checksums": self.checksums,
            "sizes": [self.train_size, self.val_size],
            "batch_size": self.batch_size,
            "options": self._options,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def train_dataloader(self) -> Loader:
        """Training batches of the epoch."""
        return Loader(train_batch_count(self.train_size, self.batch_size), self._train)

    def val_dataloader(self) -> Loader:
        """Validation batches, never augmented; the last one may be short."""
        return Loader(-(-self.val_size // self.batch_size), self._val_batches)

    def _train(self) -> Iterator[Any]:
        return self._train_batches(self._seed, self.epoch)


def check_seed(name: str, seed: int) -> None:
    """Refuse a seed that a generator cannot take.

    Raises:
        ValueError: If it is negative or 2**63 or more.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"{name} must be 0 to {LARGEST_SEED}, got {seed}")


def epoch_generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A generator for one purpose in one epoch under one seed."""
    # Hashed, so that neighbouring seeds and epochs have unrelated streams.
    digest = hashlib.sha256(f"{purpose}/{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def train_batch_count(size: int, batch_size: int) -> int:
    """Batches in an epoch: the whole ones, or a short one if there is no other."""
    return max(1, size // batch_size)
