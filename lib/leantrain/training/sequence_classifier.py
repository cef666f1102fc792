"""The classifier of token sequences that the chapters on text fine-tune."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassMatthewsCorrCoef

from leantrain.data.sentence_sets import SentenceBatch
from leantrain.training.language_model import logits_of
from leantrain.training.scheduled import ScheduledModule

__all__ = ["SequenceClassifier"]


class SequenceClassifier(ScheduledModule):
    """Fine-tune a model that classifies token sequences, with a warm-up and a cosine schedule.

    What an epoch logs: ``train_loss``, ``val_loss``, ``val_accuracy`` (in per cent) and ``val_matthews`` (Matthews'
    correlation, -1 to 1, the measure of CoLA).

    Args:
        model: Called with ``input_ids`` and ``attention_mask``, both ``(B, N)``; returns logits ``(B, num_classes)``,
            or an output that has them as ``logits``, as the classifiers of transformers do.
        optimizer: Builds the optimiser from a list of parameter groups. Its learning rate is the peak of the schedule.
            Tensors of fewer than two dimensions are not decayed.
        num_classes: Number of classes, at least 2.
        warmup_fraction: Share of the optimiser steps that warm up, at least 0 and below 1.
        clip: Largest norm of the gradient; larger ones are scaled down. None for no limit.

    Raises:
        ValueError: If a number is out of range.
        Diverged: In training, if the loss is infinite or not a number.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        num_classes: int,
        warmup_fraction: float = 0.06,
        clip: float | None = 1.0,
    ) -> None:
        super().__init__(model, optimizer, warmup_fraction=warmup_fraction, clip=clip)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        self._val_loss = MeanMetric(nan_strategy="disable")
        self._val_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self._val_matthews = MulticlassMatthewsCorrCoef(num_classes, validate_args=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of ids and their mask, both ``(B, N)``.

        Raises:
            ValueError: If the model's logits have another shape.
        """
        logits = logits_of(self.model(input_ids=ids, attention_mask=mask))
        if logits.shape != (len(ids), self.num_classes):
            raise ValueError(
                f"the model must return logits of shape {(len(ids), self.num_classes)}, got {tuple(logits.shape)}"
            )
        # Half precision is too coarse for a loss; float64 must stay as it is.
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits

    def loss(self, batch: SentenceBatch) -> Tensor:
        """Training loss of one batch, a scalar; what a technique replaces."""
        return F.cross_entropy(self(batch.ids, batch.mask), batch.y)

    def training_step(self, batch: SentenceBatch, batch_idx: int) -> Tensor:
        """Training loss of one batch.

        Raises:
            Diverged: If the loss is infinite or not a number.
        """
        return self.checked(self.loss(batch), len(batch.y))

    def validation_step(self, batch: SentenceBatch, batch_idx: int) -> None:
        """Count one batch's hits and add up its loss."""
        logits = self(batch.ids, batch.mask)
        self._val_loss.update(F.cross_entropy(logits, batch.y, reduction="none"))
        self._val_accuracy.update(logits, batch.y)
        self._val_matthews.update(logits, batch.y)

    def on_validation_epoch_end(self) -> None:
        """Log loss, accuracy and correlation over all validation samples."""
        self.log("val_loss", self._val_loss.compute())
        self.log("val_accuracy", 100 * self._val_accuracy.compute())
        self.log("val_matthews", self._val_matthews.compute().float())
        for metric in (self._val_loss, self._val_accuracy, self._val_matthews):
            metric.reset()
