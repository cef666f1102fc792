r"""Sequential freezing and rank quantisation: train decomposed networks faster.

Paper: Hajimolahoseini, Ahmed and Liu, "Training Acceleration of Low-Rank Decomposed Networks using Sequential Freezing
and Rank Quantization", arXiv 2309.03824.

A training step passes through every layer three times: forward, gradient of the input, gradient of the weight. A
factor whose weight is frozen needs no weight gradient, and its input need not be kept. *Fixed* freezing trains one part
of each decomposed layer, the second factor of an SVD pair and the core of a Tucker triple, and leaves the other where
the decomposition put it. *Sequential* freezing takes turns, so that every weight is trained at the price of about half
of them. With :math:`m_f` multiply-accumulates in the frozen factors and :math:`m` in the whole network, forward, the
step saves the share :math:`m_f / 3m`.

Rank quantisation is measured: see `leantrain.low_rank.latency`.

>>> from leantrain.low_rank.factors import choose_ranks, decompose_model
>>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
>>> model = decompose_model(model, choose_ranks(model, compression=2))
>>> trainer = L.Trainer(callbacks=[FactorFreezing("sequential")], logger=False, enable_checkpointing=False)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, cast, get_args

import lightning as L
import torch
from torch import nn

from leantrain.low_rank.factors import Part, TuckerTriple, factors_of, train_part
from leantrain.measure.cost import count_macs

__all__ = ["FactorFreezing", "Schedule", "saved_share", "trained_part"]

Schedule = Literal["off", "fixed", "sequential"]


def trained_part(schedule: Schedule, epoch: int, *, period: int = 1, start: Part = "inner") -> Part | None:
    """Which part of the decomposed layers trains in an epoch.

    Args:
        schedule: `off` trains all, `fixed` always the starting part, `sequential` the two parts in turn.
        epoch: Counted from 0.
        period: Epochs before it is the other part's turn; at least 1.
        start: The part of the first epochs.

    Returns:
        A part as `leantrain.low_rank.factors.train_part` takes it, or None for all.

    Raises:
        ValueError: If an argument is out of range.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule={schedule!r}: expected one of {', '.join(get_args(Schedule))}")
    if start not in get_args(Part):
        raise ValueError(f"start={start!r}: expected one of {', '.join(get_args(Part))}")
    if period < 1 or epoch < 0:
        raise ValueError(f"period={period}, epoch={epoch}: expected a period of at least 1 and an epoch of at least 0")
    if schedule == "off":
        return None
    other: Part = "outer" if start == "inner" else "inner"
    return other if schedule == "sequential" and epoch // period % 2 else start


class FactorFreezing(L.Callback):
    """Freeze one part of the decomposed layers, by epoch.

    The optimiser must hold all weights. A frozen weight has no gradient, so optimisers skip it, weight decay included,
    and keep its state as it was. After training all weights can be trained again.

    Args:
        schedule: See `trained_part`.
        period: See `trained_part`.
        start: See `trained_part`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, schedule: Schedule, *, period: int = 1, start: Part = "inner") -> None:
        trained_part(schedule, 0, period=period, start=start)
        self.schedule: Schedule = schedule
        self.period = period
        self.start: Part = start

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Freeze before the first forward pass of the epoch."""
        part = trained_part(self.schedule, trainer.current_epoch, period=self.period, start=self.start)
        if self.schedule != "off":
            train_part(pl_module, part)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave a model that can be trained on."""
        if self.schedule != "off":
            train_part(pl_module, None)


def saved_share(model: nn.Module, shape: Sequence[int], trained: Part) -> float:
    """Share of a training step's multiply-accumulates that freezing saves.

    The step counts as three times the forward pass: the gradient of the network's input, which training does not need,
    is counted too.

    Args:
        model: A model with decomposed layers that takes one tensor; it is not changed.
        shape: Shape of that tensor, with the batch.
        trained: The part that trains; the other is frozen.

    Returns:
        From 0 to 1/3.

    Raises:
        ValueError: If there is no such part, or no decomposed layer.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    train_part(shadow, trained)
    frozen = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal frozen
        weight = cast(torch.Tensor, module.weight)
        # Every value of the output is a sum over one row of the weight.
        frozen += output.numel() * (weight.numel() // weight.shape[0])

    for factored in factors_of(shadow).values():
        inner = factored.core if isinstance(factored, TuckerTriple) else factored.second
        for factor in factored:
            if (factor is inner) != (trained == "inner"):
                factor.register_forward_hook(count)
    total = count_macs(shadow, torch.empty(*shape, device="meta"))
    return frozen / (3 * total)
