"""The classifier of token sequences that the chapters on text fine-tune, and its twin for scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import CatMetric, MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassMatthewsCorrCoef

from leantrain.data.sentence_sets import SentenceBatch
from leantrain.training.language_model import logits_of
from leantrain.training.scheduled import ScheduledModule

__all__ = ["SequenceClassifier"]


class SequenceClassifier(ScheduledModule):
    """Fine-tune a model that classifies token sequences or scores them, with a warm-up and a cosine schedule.

    What an epoch logs: ``train_loss`` and ``val_loss``; for classes, the cross-entropy, ``val_accuracy`` (in per cent)
    and ``val_matthews`` (Matthews' correlation, -1 to 1, the measure of CoLA); for scores, the squared error and
    ``val_pearson`` (Pearson's correlation, -1 to 1, a measure of STS-B).

    Args:
        model: Called with ``input_ids`` and ``attention_mask``, both ``(B, N)``; returns logits ``(B, num_classes)``,
            or an output that has them as ``logits``, as the classifiers of transformers do.
        optimizer: Builds the optimiser from a list of parameter groups. Its learning rate is the peak of the schedule.
            Tensors of fewer than two dimensions are not decayed.
        num_classes: Number of classes; 1 if the only logit is a score.
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
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self._val_loss = MeanMetric(nan_strategy="disable")
        if num_classes > 1:
            self._val_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
            self._val_matthews = MulticlassMatthewsCorrCoef(num_classes, validate_args=False)
        else:
            self._val_scores = CatMetric()

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
        return self._losses(self(batch.ids, batch.mask), batch.y).mean()

    def _losses(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.num_classes == 1:
            return F.mse_loss(logits[:, 0], y.to(logits.dtype), reduction="none")
        return F.cross_entropy(logits, y, reduction="none")

    def training_step(self, batch: SentenceBatch, batch_idx: int) -> Tensor:
        """Training loss of one batch.

        Raises:
            Diverged: If the loss is infinite or not a number.
        """
        return self.checked(self.loss(batch), len(batch.y))

    def validation_step(self, batch: SentenceBatch, batch_idx: int) -> None:
        """Compare one batch's logits with its labels."""
        logits = self(batch.ids, batch.mask)
        self._val_loss.update(self._losses(logits, batch.y))
        if self.num_classes == 1:
            self._val_scores.update(torch.stack([logits[:, 0].double(), batch.y.double()], dim=1))
        else:
            self._val_accuracy.update(logits, batch.y)
            self._val_matthews.update(logits, batch.y)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all validation samples."""
        self.log("val_loss", self._val_loss.compute())
        self._val_loss.reset()
        if self.num_classes == 1:
            scores = self._val_scores.compute().T
            # Equal predictions have no correlation with anything; rounding would give them one.
            constant = (scores == scores[:, :1]).all(dim=1).any()
            self.log("val_pearson", scores.new_zeros(()) if constant else torch.corrcoef(scores)[0, 1])
            self._val_scores.reset()
            return
        self.log("val_accuracy", 100 * self._val_accuracy.compute())
        self.log("val_matthews", self._val_matthews.compute().float())
        self._val_accuracy.reset()
        self._val_matthews.reset()
