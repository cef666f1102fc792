"""Learning-rate schedules, counted in optimiser steps."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["warmup_cosine", "warmup_cosine_factor"]


def warmup_cosine_factor(step: int, total_steps: int, warmup_fraction: float = 0.1, floor: float = 0.0) -> float:
    r"""Share of the peak learning rate at one step: a linear warm-up, then half a cosine.

    With $W$ warm-up steps of $T$ and the floor $f$, step $s$ (the first is 0) has

    .. math::
        f + (1 - f)\,\frac{s + 1}{W + 1} \quad (s < W), \qquad
        f + (1 - f)\,\frac{1}{2}\Bigl(1 + \cos \pi \frac{s - W}{T - W}\Bigr) \quad (W \le s \le T),

    so no step is wasted at a rate of 0: the peak is reached at step $W$, and the floor when all $T$ steps are done.

    Args:
        step: Steps already taken, at least 0. From `total_steps` on, the factor stays at the floor.
        total_steps: Length of the run, at least 1.
        warmup_fraction: Share of the run that warms up, at least 0 and below 1; rounded to whole steps.
        floor: Lowest share of the peak, 0 to 1.

    Returns:
        The factor, between `floor` and 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [round(warmup_cosine_factor(step, 8, warmup_fraction=0.25), 3) for step in range(9)]
        [0.333, 0.667, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067, 0.0]
    """
    _check(total_steps, warmup_fraction, floor)
    if step < 0:
        raise ValueError(f"step counts the steps taken and cannot be negative, got {step}")
    warmup = min(round(warmup_fraction * total_steps), total_steps - 1)
    if step < warmup:
        share = (step + 1) / (warmup + 1)
    else:
        done = min((step - warmup) / (total_steps - warmup), 1.0)
        share = 0.5 * (1 + math.cos(math.pi * done))
    return min(1.0, floor + (1 - floor) * share)


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup_fraction: float = 0.1, floor: float = 0.0) -> LambdaLR:
    """Schedule an optimiser's learning rates: a linear warm-up, then half a cosine.

    Call the scheduler's ``step()`` once after every optimiser step. The rate that each parameter group was built
    with is its peak. See `warmup_cosine_factor` for the formula.

    Args:
        optimizer: The optimiser whose groups are scheduled.
        total_steps: Optimiser steps in the whole run, at least 1.
        warmup_fraction: Share of the run that warms up, at least 0 and below 1.
        floor: Lowest share of the peak, 0 to 1.

    Returns:
        The scheduler; the optimiser's rates are already those of the first step.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check(total_steps, warmup_fraction, floor)
    factor = partial(warmup_cosine_factor, total_steps=total_steps, warmup_fraction=warmup_fraction, floor=floor)
    return LambdaLR(optimizer, factor)


def _check(total_steps: int, warmup_fraction: float, floor: float) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0 <= warmup_fraction < 1:
        raise ValueError(f"warmup_fraction must be at least 0 and below 1, got {warmup_fraction}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be a share of the peak rate between 0 and 1, got {floor}")
