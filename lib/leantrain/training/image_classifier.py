"""The image classifier that every chapter on vision trains, so that arms differ in the technique alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from leantrain.training.diverged import Diverged
from leantrain.training.schedules import warmup_cosine

__all__ = ["ImageClassifier"]


class ImageClassifier(L.LightningModule):
    """Train a model that returns logits with cross-entropy, a warm-up and a cosine schedule.

    What an epoch logs, once and on average over its samples: ``train_loss``, ``val_loss`` (plain cross-entropy,
    also when the training loss smooths its labels) and ``val_accuracy`` (top-1, in per cent, 0 to 100).

    Args:
        model: Maps images ``(B, C, H, W)`` to logits ``(B, num_classes)``.
        optimizer: Builds the optimiser from a list of parameter groups, for instance
            ``functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.05)``. Its learning rate is the peak of
            the schedule. Only parameters that require a gradient are handed over.
        num_classes: Number of classes, at least 2.
        warmup_fraction: Share of the optimiser steps that warm up, at least 0 and below 1.
        label_smoothing: Share of the target that is spread over all classes, at least 0 and below 1.
        decay_1d: Whether the weight decay also acts on tensors of fewer than two dimensions (biases and the
            scales of normalisation layers). If not, they form a second group with ``weight_decay=0``.
        channels_last: Whether images and convolution weights are kept in the channels-last memory format, which
            is faster for convolutions on many processors. The results differ by rounding only.

    Raises:
        ValueError: If a number is out of range.
        Diverged: In training, if the loss is infinite or not a number.

    Example:
        >>> from functools import partial
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(256, 1, 4, 4)
        >>> y = (x.mean(dim=(1, 2, 3)) > 0).long()
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> classifier = ImageClassifier(net, partial(torch.optim.AdamW, lr=0.1), num_classes=2)
        >>> trainer = L.Trainer(max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> data = DataLoader(TensorDataset(x, y), batch_size=32)
        >>> trainer.fit(classifier, data, data)
        >>> trainer.callback_metrics["val_accuracy"].item() > 90
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        num_classes: int,
        warmup_fraction: float = 0.1,
        label_smoothing: float = 0.0,
        decay_1d: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if not 0 <= warmup_fraction < 1:
            raise ValueError(f"warmup_fraction must be at least 0 and below 1, got {warmup_fraction}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        self.model = model.to(memory_format=torch.channels_last) if channels_last else model
        self.build_optimizer = optimizer
        self.num_classes = num_classes
        self.warmup_fraction = warmup_fraction
        self.label_smoothing = label_smoothing
        self.decay_1d = decay_1d
        self.channels_last = channels_last
        # "disable" lets a NaN through to the mean; the default would leave it out. It also ignores weights
        # (torchmetrics 1.9), so these means are fed one loss per sample, not batch means with weights.
        self._train_loss = MeanMetric(nan_strategy="disable")
        self._val_loss = MeanMetric(nan_strategy="disable")
        # The loss has already checked the targets' range.
        self._val_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    @property
    def train_loss(self) -> float:
        """Mean training loss per sample, over the samples seen so far in this epoch; NaN before the first."""
        return float(self._train_loss.compute()) if self._train_loss.update_called else float("nan")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, C, H, W)``."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.model(x)

    def on_train_epoch_start(self) -> None:
        """Start the epoch's mean loss afresh."""
        self._train_loss.reset()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Training loss of one batch.

        Args:
            batch: Images ``(B, C, H, W)`` and their classes ``(B,)``, int64.
            batch_idx: Number of the batch in its epoch; unused.

        Returns:
            The mean loss of the batch, a scalar.

        Raises:
            Diverged: If the loss is infinite or not a number.
            ValueError: If the model's output is not ``(B, num_classes)``.
        """
        x, y = batch
        losses = F.cross_entropy(self._logits(x), y, label_smoothing=self.label_smoothing, reduction="none")
        loss = losses.mean()
        if not torch.isfinite(loss):
            raise Diverged(self.global_step, loss.item())
        self._train_loss.update(losses.detach())
        # Logged here, not when the epoch ends: callbacks look at an epoch's metrics before this module's own hook.
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count one batch's hits and add up its loss.

        Args:
            batch: Images ``(B, C, H, W)`` and their classes ``(B,)``, int64.
            batch_idx: Number of the batch; unused.

        Raises:
            ValueError: If the model's output is not ``(B, num_classes)``.
        """
        x, y = batch
        logits = self._logits(x)
        self._val_loss.update(F.cross_entropy(logits, y, reduction="none"))
        self._val_accuracy.update(logits, y)

    def on_validation_epoch_end(self) -> None:
        """Log accuracy and loss over all validation samples."""
        self.log("val_accuracy", 100 * self._val_accuracy.compute())
        self.log("val_loss", self._val_loss.compute())
        self._val_accuracy.reset()
        self._val_loss.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser over the parameter groups, and its schedule over the whole run.

        Raises:
            ValueError: If the trainer has no end, so that no schedule can be laid over it.
        """
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise ValueError("the schedule needs the length of the run: give the Trainer max_epochs or max_steps")
        optimizer = self.build_optimizer(self.parameter_groups())
        schedule = warmup_cosine(optimizer, int(total_steps), self.warmup_fraction)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trainable parameters as the optimiser gets them, with the undecayed ones apart.

        Returns:
            One group, or two of which the second has ``weight_decay`` 0. Empty groups are left out.
        """
        trainable = [p for p in self.parameters() if p.requires_grad]
        if self.decay_1d:
            return [{"params": trainable}]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trainable if p.ndim >= 2]},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def _logits(self, x: Tensor) -> Tensor:
        logits = self(x)
        if logits.shape != (len(x), self.num_classes):
            raise ValueError(
                f"the model must return logits of shape {(len(x), self.num_classes)}, got {tuple(logits.shape)}"
            )
        # Half precision is too coarse for a loss; float64 must stay as it is.
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
