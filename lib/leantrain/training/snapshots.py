"""Copies of a model's weights from a few places of a run, for what is measured on them afterwards."""

from __future__ import annotations

import lightning as L
from torch import Tensor, nn

__all__ = ["Snapshots"]


class Snapshots(L.Callback):
    """Keep the weights of a module's `model` after some epochs of a run.

    They lie in the processor's memory and cost as much of it as the model does, each.

    Args:
        count: How many, spread evenly over the epochs of the run, the last epoch among them; at least 1. A run with
            fewer epochs gives one for each.

    Attributes:
        weights: Epoch, from 1 -> state dict, copied.

    Raises:
        ValueError: If `count` is less than 1; at the start of a run, if the run has no last epoch.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.count = count
        self.weights: dict[int, dict[str, Tensor]] = {}
        self._wanted: set[int] = set()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the epochs."""
        last = trainer.max_epochs
        if last is None or last < 1:
            raise ValueError("snapshots are spread over the epochs of a run: give the Trainer max_epochs")
        self.weights = {}
        self._wanted = {-(-last * place // self.count) for place in range(1, self.count + 1)}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the weights, if the epoch is one of those."""
        epoch = trainer.current_epoch + 1
        if epoch in self._wanted:
            if not isinstance(pl_module.model, nn.Module):
                raise ValueError(f"the module's `model` must be a torch module, got {type(pl_module.model).__name__}")
            state = pl_module.model.state_dict()
            self.weights[epoch] = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
