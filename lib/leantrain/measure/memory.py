"""Memory that training needs beyond the weights: what autograd keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["saved_activation_bytes"]


def saved_activation_bytes(fn: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves for the backward pass while a function runs.

    Every storage counts once and in full, however many operations save it or a view of it. Parameters are left out,
    since they are there anyway; buffers and copies of parameters (autocast makes some) are not. Not seen are tensors
    that an autograd function keeps as attributes instead of saving them, and what lies inside a checkpointed block.

    Args:
        fn: Runs the forward pass and returns its result, usually the loss.

    Returns:
        Bytes of the distinct storages.

    Raises:
        ValueError: If gradients are switched off, so that nothing could be saved.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> saved_activation_bytes(lambda: layer(torch.ones(5, 3)))  # its input: 5 * 3 numbers of 4 bytes
        60
    """
    if not torch.is_grad_enabled():
        raise ValueError("gradients are switched off here, so nothing is saved: call this outside torch.no_grad()")
    # The storages are held here until the end: a freed one's address could be given to the next.
    saved: dict[int, torch.UntypedStorage] = {}
    parameters: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            parameters.add(storage._cdata)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = fn()
    del result
    return sum(storage.nbytes() for key, storage in saved.items() if key not in parameters)
