"""What modules that train on text share: one schedule, one rule for large gradients, and a loss that must be finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from leantrain.training.diverged import Diverged
from leantrain.training.schedules import warmup_cosine

__all__ = ["ScheduledModule", "scheduled"]


class ScheduledModule(L.LightningModule):
    """A model, its optimiser with a warm-up and a cosine schedule, and a limit for its gradient.

    Args:
        model: What is trained.
        optimizer: Builds the optimiser from a list of parameter groups, see :func:`scheduled`.
        warmup_fraction: Share of the optimiser steps that warm up, at least 0 and below 1.
        clip: Largest norm of the gradient; larger ones are scaled down. None for no limit.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        warmup_fraction: float,
        clip: float | None,
    ) -> None:
        super().__init__()
        if not 0 <= warmup_fraction < 1:
            raise ValueError(f"warmup_fraction must be at least 0 and below 1, got {warmup_fraction}")
        if clip is not None and not 0 < clip < float("inf"):
            raise ValueError(f"clip must be positive and finite, or None, got {clip}")
        self.model = model
        self.build_optimizer = optimizer
        self.warmup_fraction = warmup_fraction
        self.clip = clip

    def checked(self, loss: Tensor, samples: int) -> Tensor:
        """Log a batch's training loss and give it back.

        Args:
            loss: A scalar.
            samples: Its weight in the epoch's mean.

        Raises:
            Diverged: If the loss is infinite or not a number.
        """
        if not torch.isfinite(loss):
            raise Diverged(self.global_step, loss.item())
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=samples)
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Scale a gradient of too large a norm down; the trainer's own setting comes first."""
        limit = self.clip if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, gradient_clip_val=limit, gradient_clip_algorithm=gradient_clip_algorithm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser over the parameter groups, and its schedule over the whole run.

        Raises:
            ValueError: If the trainer has no end, so that no schedule can be laid over it.
        """
        return scheduled(self, self.build_optimizer, self.warmup_fraction)


def scheduled(
    module: L.LightningModule, optimizer: Callable[[list[dict[str, Any]]], Optimizer], warmup_fraction: float
) -> OptimizerLRScheduler:
    """An optimiser over a module's trainable parameters, with a warm-up and a cosine schedule over the whole run.

    Args:
        module: A module that is being fitted.
        optimizer: Builds the optimiser from parameter groups; tensors of fewer than two dimensions are in a group of
            their own that is not decayed.
        warmup_fraction: Share of the steps that warm up.

    Raises:
        ValueError: If the trainer has no end, so that no schedule can be laid over it.
    """
    total_steps = module.trainer.estimated_stepping_batches
    if total_steps == float("inf"):
        raise ValueError("the schedule needs the length of the run: give the Trainer max_epochs or max_steps")
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2]},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    built = optimizer([group for group in groups if group["params"]])
    schedule = warmup_cosine(built, int(total_steps), warmup_fraction)
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
