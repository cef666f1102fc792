"""Trained weights on disk, for runs that go on from other runs: fine-tuning, distillation, truncation."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

__all__ = ["WeightStore"]

_DIGITS = 12  # of the hash; 48 bits, which a float holds exactly


class WeightStore:
    """Keeps weights under a number made of their content.

    A table of runs can hold the number, and the weights are found by it: also those of a run that was not repeated
    because its rows were on disk. As `after` of an experiment, the store saves ``module.model`` of every run and puts
    the number into the column `weights`.

    Args:
        folder: Where the files lie; made when the first is written.

    Attributes:
        fingerprint: The same for all stores: weights do not depend on where they are kept.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = WeightStore(Path(folder))
        ...     layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
        ...     number = store.save(layer)
        ...     torch.equal(store.load(other, number).weight, layer.weight)
        True
    """

    fingerprint = "weight store"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, module: L.LightningModule) -> dict[str, float]:
        """Save the weights of a module's `model`; gives the column `weights`."""
        if not isinstance(module.model, nn.Module):
            raise ValueError(f"the module's `model` must be a torch module, got {type(module.model).__name__}")
        return {"weights": float(self.save(module.model))}

    def save(self, model: nn.Module) -> int:
        """Save a model's weights and return their number."""
        weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        number = _number_of(weights)
        file = self._file(number)
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=self.folder, suffix=".partial")
            os.close(handle)
            try:
                torch.save(weights, partial)
                os.replace(partial, file)
            finally:
                Path(partial).unlink(missing_ok=True)
        return number

    def load(self, model: nn.Module, number: float) -> nn.Module:
        """Put weights into a model of the same shape and return it.

        Args:
            model: Where to; changed.
            number: What :meth:`save` returned.

        Raises:
            ValueError: If there are no such weights, the file holds others, or they do not fit the model.
        """
        file = self._file(int(number))
        if not file.exists():
            raise ValueError(
                f"no weights {file.name} in {self.folder.name}: the run that made them was kept, its weights were not; "
                f"delete the folder {self.folder.parent.name} of finished runs and run again"
            )
        weights = torch.load(file, map_location="cpu", weights_only=True)
        if _number_of(weights) != int(number):
            raise ValueError(f"{file.name} does not hold the weights of that number; delete it and run again")
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"the weights {file.name} do not fit this {type(model).__name__}: {error}") from error
        return model

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:0{_DIGITS}x}.pt"


def _number_of(weights: Mapping[str, Tensor]) -> int:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return int(digest.hexdigest()[:_DIGITS], 16)
