"""Masked-language modelling as in BERT: hide some tokens of a text and let the model restore them.

The masks come from generators of their own. They depend on a seed and the place of the batch alone, so every arm of an
experiment is asked the same questions, and the validation's questions are the same after every epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from leantrain.training.diverged import Diverged
from leantrain.training.scheduled import scheduled

__all__ = ["MaskedLanguageModel", "MaskedTransformer", "PretrainedClassifier", "mask_tokens"]


def mask_tokens(
    ids: Tensor,
    *,
    vocab_size: int,
    mask_id: int,
    special_ids: Sequence[int] = (),
    probability: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose tokens to predict and hide them: 80 % become the mask, 10 % a random token, 10 % stay (BERT's rule).

    Args:
        ids: Token ids `(B, N)`, int64, each below `vocab_size`.
        vocab_size: Number of tokens V.
        mask_id: Id of the mask token.
        special_ids: Ids that are never chosen and never drawn as a random token. The mask is always among them.
        probability: Share of the tokens that are chosen, above 0 and at most 1.
        generator: Source of the random numbers, on the CPU; None for PyTorch's own.

    Returns:
        The hidden text `(B, N)`, int64, and a boolean mask `(B, N)` of the chosen places. If by chance no token was
        chosen although some could be, one of these is, so that a loss over the chosen places is a number. The
        input is not changed.

    Raises:
        ValueError: If a number is out of range, or no token is ordinary.

    Example:
        >>> text = torch.arange(1, 11).view(1, 10)
        >>> hidden, chosen = mask_tokens(text, vocab_size=30, mask_id=0, generator=torch.Generator().manual_seed(2))
        >>> hidden.tolist()  # the 8 is masked, the 10 became another token
        [[1, 2, 3, 4, 5, 6, 7, 0, 9, 25]]
        >>> chosen.nonzero()[:, 1].tolist()
        [7, 9]
    """
    special = sorted({mask_id, *special_ids})
    if not 0 < probability <= 1:
        raise ValueError(f"probability is the share of tokens to predict, above 0 and at most 1; got {probability}")
    if special[0] < 0 or special[-1] >= vocab_size:
        raise ValueError(f"special ids must be from 0 to {vocab_size - 1}, got {special}")
    ordinary = torch.ones(vocab_size, dtype=torch.bool)
    ordinary[special] = False
    drawn_from = ordinary.nonzero().flatten()
    if not len(drawn_from):
        raise ValueError(f"all {vocab_size} tokens are special: there is none to predict")
    # All numbers are drawn on the CPU and whatever the text holds, so one seed means one set of draws everywhere.
    chance, kind = torch.rand(2, *ids.shape, generator=generator)
    random_ids = drawn_from[torch.randint(len(drawn_from), ids.shape, generator=generator)]
    chance, kind, random_ids, ordinary = (t.to(ids.device) for t in (chance, kind, random_ids, ordinary))
    allowed = ordinary[ids]
    chosen = (chance < probability) & allowed
    if not chosen.any():
        first = torch.where(allowed, chance, 2.0).argmin()
        chosen.view(-1)[first] = allowed.view(-1)[first]
    hidden = torch.where(chosen & (kind < 0.8), mask_id, ids)
    hidden = torch.where(chosen & (kind >= 0.9), random_ids, hidden)
    return hidden, chosen


class MaskedTransformer(nn.Module):
    """BERT around any encoder: token and position embeddings, the encoder, a last norm, a head tied to the tokens.

    The head is BERT's: a dense layer, GELU and a norm, then the product with the token embeddings and a bias. It is
    computed at the places that are asked for only. There are no segment embeddings and no pooled sentence: the
    task is the masked words alone.

    Args:
        encoder: Maps `(B, N, D)` to `(B, N, D)`.
        vocab_size: Number of tokens V.
        max_length: Most tokens in a text.
        dim: Width D.
        dropout: Probability with which an element of the embedding is dropped in training, at least 0 and below 1.

    Weights of all linear and embedding layers, the encoder's included, start normal with standard deviation
    0.02 * sqrt(768 / D); biases zero. At BERT-base's width D = 768 this is BERT's own
    0.02. A narrower model keeps the gain of BERT-base's layers; with 0.02 its blocks would begin as almost nothing.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, encoder: nn.Module, *, vocab_size: int, max_length: int, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("max_length", max_length), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(max_length, dim)
        self.embedding_norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.encoder = encoder
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.transform = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim, eps=1e-12))
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.apply(partial(_start, std=_gain(dim)))

    def forward(self, ids: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Logits over the vocabulary.

        Args:
            ids: Token ids `(B, N)`, int64, with N at most `max_length`.
            chosen: Boolean `(B, N)`, the places to predict; None for all.

        Returns:
            `(M, V)` for M chosen places in the order of the text, or `(B, N, V)` for all.

        Raises:
            ValueError: If the text is longer than `max_length`.
        """
        x = self.encode(ids)
        if chosen is not None:
            x = x[chosen]
        return F.linear(self.transform(self.norm(x)), self.tokens.weight, self.bias)

    def encode(self, ids: Tensor, *context: Tensor) -> Tensor:
        """What leaves the encoder, before the last norm.

        Args:
            ids: Token ids `(B, N)`, int64, with N at most `max_length`.
            context: Handed to the encoder as it is, such as a mask of the tokens that may be seen.

        Returns:
            `(B, N, D)`.

        Raises:
            ValueError: If the text is longer than `max_length`.
        """
        if ids.shape[1] > self.positions.num_embeddings:
            raise ValueError(f"the model reads {self.positions.num_embeddings} tokens at most, got {ids.shape[1]}")
        places = self.positions.weight[: ids.shape[1]]
        x = self.dropout(self.embedding_norm(self.tokens(ids) + places))
        return self.encoder(x, *context)


class PretrainedClassifier(nn.Module):
    """A pre-trained masked-language model that classifies texts: a new linear layer on the mean over their tokens.

    The layer is drawn as all others are. The head that restored tokens is not used.

    Args:
        pretrained: The model, trained further from where it stands. Its encoder takes a mask as its second argument, as
            transformer blocks do.
        num_classes: Number of classes, at least 2.
        dropout: Probability with which an element of the mean is dropped in training, at least 0 and below 1.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, pretrained: MaskedTransformer, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.pretrained = pretrained
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(pretrained.tokens.embedding_dim, num_classes)
        _start(self.classify, std=_gain(pretrained.tokens.embedding_dim))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `(B, num_classes)`.

        Args:
            input_ids: Token ids `(B, N)`, int64.
            attention_mask: `(B, N)`, 1 for a token and 0 for padding; at least one token in every text.
        """
        seen = attention_mask.bool()
        x = self.pretrained.norm(self.pretrained.encode(input_ids, seen[:, None, None]))
        mean = (x * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)
        return self.classify(self.dropout(mean))


class MaskedLanguageModel(L.LightningModule):
    """Train a model to restore hidden tokens, with a warm-up and a cosine schedule.

    What an epoch logs, once and on average over the predicted tokens: `train_loss`, `val_loss` (cross-entropy in nats)
    and `val_accuracy` (tokens restored, in per cent).

    Args:
        model: Maps ids `(B, N)` and the chosen places `(B, N)` to logits `(M, V)`, such as :class:`MaskedTransformer`.
        optimizer: Builds the optimiser from a list of parameter groups. Its learning rate is the schedule's peak.
        vocab_size: Number of tokens V.
        mask_id: Id of the mask token.
        special_ids: Ids that are never predicted.
        probability: Share of the tokens that are predicted.
        seed: Seed of the training masks. The validation masks do not depend on it.
        warmup_fraction: Share of the optimiser steps that warm up, at least 0 and below 1.
        clip: The gradient is scaled down to this norm where it is larger; None for never.
        callbacks: Callbacks that belong to the model, such as a technique's schedule.

    Weight decay acts on weights of two or more dimensions only.

    Raises:
        ValueError: If a number is out of range.
        Diverged: In training, if the loss is infinite or not a number.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        vocab_size: int,
        mask_id: int,
        special_ids: Sequence[int] = (),
        probability: float = 0.15,
        seed: int = 0,
        warmup_fraction: float = 0.1,
        clip: float | None = 1.0,
        callbacks: Sequence[L.Callback] = (),
    ) -> None:
        super().__init__()
        if not 0 <= warmup_fraction < 1:
            raise ValueError(f"warmup_fraction must be at least 0 and below 1, got {warmup_fraction}")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be above 0, or None for no clipping; got {clip}")
        self.model = model
        self.build_optimizer = optimizer
        self.masking: dict[str, Any] = {
            "vocab_size": vocab_size,
            "mask_id": mask_id,
            "special_ids": tuple(special_ids),
            "probability": probability,
        }
        self.seed = seed
        self.warmup_fraction = warmup_fraction
        self.clip = clip
        self.callbacks = list(callbacks)
        # "disable" lets a NaN through to the mean; the default would leave it out.
        self._val_loss = MeanMetric(nan_strategy="disable")
        self._val_hits = MeanMetric(nan_strategy="disable")

    def forward(self, ids: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Logits of the model."""
        return self.model(ids, chosen)

    def masked(self, ids: Tensor, *place: object) -> tuple[Tensor, Tensor]:
        """The hidden text and the chosen places of a batch; `place` names the batch, such as `("val", 3)`."""
        # A hash, so that neighbouring places have unrelated generators.
        digest = hashlib.sha256(repr(place).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return mask_tokens(ids, generator=generator, **self.masking)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean loss over the predicted tokens of a batch of ids `(B, N)`.

        Raises:
            Diverged: If the loss is infinite or not a number.
        """
        hidden, chosen = self.masked(batch, "train", self.seed, self.current_epoch, batch_idx)
        loss = F.cross_entropy(self(hidden, chosen).float(), batch[chosen])
        if not torch.isfinite(loss):
            raise Diverged(self.global_step, loss.item())
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=int(chosen.sum()))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add up losses and hits of a batch of ids `(B, N)`, under masks that are the same in every epoch."""
        hidden, chosen = self.masked(batch, "val", batch_idx)
        logits, targets = self(hidden, chosen).float(), batch[chosen]
        self._val_loss.update(F.cross_entropy(logits, targets, reduction="none"))
        self._val_hits.update((logits.argmax(1) == targets).float())

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracy over all predicted tokens of the validation text."""
        self.log("val_loss", self._val_loss.compute())
        self.log("val_accuracy", 100 * self._val_hits.compute())
        self._val_loss.reset()
        self._val_hits.reset()

    def configure_callbacks(self) -> list[L.Callback]:
        """The callbacks that belong to the model."""
        return self.callbacks

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient's norm to `clip`."""
        if self.clip is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser over the parameter groups, and its schedule over the whole run.

        Raises:
            ValueError: If the trainer has no end, so that no schedule can be laid over it.
        """
        return scheduled(self, self.build_optimizer, self.warmup_fraction)


def _gain(dim: int) -> float:
    return 0.02 * math.sqrt(768 / dim)


def _start(module: nn.Module, std: float) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
