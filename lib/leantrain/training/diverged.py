"""The error that ends a training run whose loss is no longer a number."""

from __future__ import annotations

__all__ = ["Diverged"]


class Diverged(RuntimeError):
    """Training stopped because its loss became infinite or not a number.

    An experiment keeps such a run as a miss; it is never dropped.

    Args:
        step: Number of optimiser steps taken before the loss was computed; the first batch is step 0.
        loss: The loss that was found.
    """

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(step, loss)  # the plain arguments, so that the error can be pickled between processes
        self.step = step
        self.loss = loss

    def __str__(self) -> str:
        return f"the training loss became {self.loss} at step {self.step}: lower the learning rate or warm up longer"
