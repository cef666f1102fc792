"""The causal language model that the chapters on text train, so that arms differ in the technique alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from leantrain.training.scheduled import ScheduledModule

__all__ = ["LanguageModel", "logits_of", "next_token_loss", "perplexity"]


def logits_of(output: Any) -> Tensor:
    """The logits of a model that returns them alone or as a field of its output, as transformers' models do."""
    return output if isinstance(output, Tensor) else output.logits


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of every token given those before it.

    Args:
        logits: ``(B, N, V)``; those at a position predict the token at the next one.
        ids: The tokens, int64 ``(B, N)``.

    Returns:
        Loss of each block in nats per predicted token, ``(B,)``.

    Raises:
        ValueError: If the shapes do not fit, or a block has fewer than two tokens.
    """
    if logits.ndim != 3 or logits.shape[:2] != ids.shape or ids.shape[1] < 2:
        raise ValueError(
            f"expected logits (B, N, V) and ids (B, N) with N of at least 2, got {tuple(logits.shape)} and "
            f"{tuple(ids.shape)}"
        )
    predictions = logits[:, :-1].flatten(0, 1)
    # Half precision is too coarse for a loss; float64 must stay as it is.
    predictions = predictions.float() if predictions.dtype in (torch.bfloat16, torch.float16) else predictions
    losses = F.cross_entropy(predictions, ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(dim=1)


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """Perplexity of a model on blocks of tokens: the exponential of the mean loss of a token.

    The model is evaluated as it is, on its own device, in evaluation mode; its mode is put back.

    Args:
        model: Maps ids ``(B, N)`` to logits, or to an output that has them as ``logits``.
        batches: Ids, int64 ``(B, N)`` with one N for all.

    Returns:
        The perplexity, at least 1; infinite or not a number if the loss is.

    Raises:
        ValueError: If there is no batch.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    losses = [next_token_loss(logits_of(model(ids.to(device))), ids.to(device)) for ids in batches]
    for module, mode in modes:
        module.training = mode
    if not losses:
        raise ValueError("perplexity needs at least one batch, got none")
    return float(torch.cat(losses).double().mean().exp())


class LanguageModel(ScheduledModule):
    """Train a model to predict the next token, with a warm-up and a cosine schedule.

    What an epoch logs: ``train_loss``, ``val_loss`` (nats per token) and ``val_perplexity`` (its exponential). A
    validation before training logs the last two as well.

    Args:
        model: Maps ids ``(B, N)`` to logits ``(B, N, V)``, or to an output that has them as ``logits``.
        optimizer: Builds the optimiser from a list of parameter groups, for instance
            ``functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)``. Its learning rate is the peak of the
            schedule. Tensors of fewer than two dimensions are not decayed.
        warmup_fraction: Share of the optimiser steps that warm up, at least 0 and below 1.
        clip: Largest norm of the gradient; larger ones are scaled down. None for no limit.

    Raises:
        ValueError: If a number is out of range.
        Diverged: In training, if the loss is infinite or not a number.

    Example:
        >>> from functools import partial
        >>> import lightning as L
        >>> from torch.utils.data import DataLoader
        >>> _ = torch.manual_seed(0)
        >>> count = torch.arange(64).remainder(4).view(8, 8)
        >>> net = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4))
        >>> module = LanguageModel(net, partial(torch.optim.AdamW, lr=0.1))
        >>> trainer = L.Trainer(max_epochs=40, accelerator="cpu", logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> data = DataLoader(count, batch_size=8)
        >>> trainer.fit(module, data, data)
        >>> trainer.callback_metrics["val_perplexity"].item() < 1.1
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        warmup_fraction: float = 0.1,
        clip: float | None = 1.0,
    ) -> None:
        super().__init__(model, optimizer, warmup_fraction=warmup_fraction, clip=clip)
        # "disable" lets a NaN through to the mean; the default would leave it out.
        self._val_loss = MeanMetric(nan_strategy="disable")

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(B, N, V)`` of ids ``(B, N)``."""
        return logits_of(self.model(ids))

    def loss(self, ids: Tensor) -> Tensor:
        """Training loss of one batch, a scalar; what a technique replaces."""
        return next_token_loss(self(ids), ids).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Training loss of one batch of ids ``(B, N)``.

        Raises:
            Diverged: If the loss is infinite or not a number.
        """
        return self.checked(self.loss(batch), len(batch))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add up the loss of one batch of ids ``(B, N)``."""
        self._val_loss.update(next_token_loss(self(batch), batch))

    def on_validation_epoch_end(self) -> None:
        """Log loss and perplexity over all validation blocks."""
        loss = self._val_loss.compute()
        self.log("val_loss", loss)
        self.log("val_perplexity", loss.exp())
        self._val_loss.reset()
