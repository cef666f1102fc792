"""Forward passes in training mode that leave the running statistics of batch normalisation alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["frozen_statistics"]


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """In the block, batch normalisation in training mode uses its batch but records nothing of it.

    For passes that look at the model from the side: at displaced weights, or on a few samples. Layers in evaluation
    mode use their running statistics as ever.

    Args:
        model: Holds the normalisation layers, `nn.BatchNorm1d` to `3d` and their subclasses.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm1d(2)
        >>> with frozen_statistics(norm):
        ...     _ = norm(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> norm.running_mean.tolist(), norm.num_batches_tracked.item()
        ([0.0, 0.0], 0)
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
