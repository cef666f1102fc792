"""Cost that is counted, not timed: parameters, multiply-accumulates, optimiser state.

Models may live on the meta device, so that a paper's full-size model costs neither memory nor time to count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs", "count_parameters", "optimizer_state_bytes"]


def count_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """Number of scalar parameters of a model; a shared parameter counts once, buffers do not count.

    Args:
        model: The model, on any device.
        trainable_only: Whether to leave out parameters that require no gradient.

    Returns:
        The number of parameters.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def count_macs(model: nn.Module, *inputs: Any) -> int:
    """Multiply-accumulates of one forward pass, the attention core included.

    Counted are products of matrices, convolutions and attention, as PyTorch's FLOP counter sees them, at two FLOPs
    per multiply-accumulate. Not counted are bias, normalisation, activation, softmax, and the product of a matrix and
    a single vector. The counter does not know the CPU's fused kernels for attention and recurrent layers, hence
    both are computed in their plain form here.

    The model runs in the mode (training or evaluation) that it is in, because some techniques save only in
    training. Its buffers and the global random state of the CPU stay as they were.

    Args:
        model: The model, on any device, the meta device included.
        inputs: Its positional arguments, on the same device. The batch size is part of the count.

    Returns:
        The number of multiply-accumulates.

    Example:
        >>> with torch.device("meta"):
        ...     count_macs(nn.Linear(3, 2), torch.empty(5, 3))
        30
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _plain_kernels(), counter:
        functional_call(model, buffers, inputs)
    return counter.get_total_flops() // 2


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors that an optimiser keeps between steps.

    Most optimisers create their state in the first step: call this after one. Scalars (step counters) are not
    counted, the parameters and their gradients neither.

    Args:
        optimizer: The optimiser.

    Returns:
        Bytes of all state tensors with at least one dimension, lists and dictionaries of tensors included;
        a tensor that is kept twice counts once.

    Example:
        >>> layer = nn.Linear(3, 2)  # 8 parameters of 4 bytes; Adam keeps two moments of each
        >>> optimizer = torch.optim.Adam(layer.parameters())
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> optimizer_state_bytes(optimizer)
        64
    """
    tensors = {id(tensor): tensor for state in optimizer.state.values() for tensor in _tensors(state)}
    return sum(tensor.nbytes for tensor in tensors.values() if tensor.ndim > 0)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Switch off the fused kernels that the FLOP counter does not know; afterwards all is as it was."""
    fast_path = torch.backends.mha.get_fastpath_enabled()  # nn.MultiheadAttention in evaluation
    one_dnn = torch.backends.mkldnn.enabled  # recurrent layers
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.backends.mkldnn.set_flags(_enabled=one_dnn, _fp32_precision=None)


def _tensors(state: object) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for part in state.values():
            yield from _tensors(part)
    elif isinstance(state, list | tuple):
        for part in state:
            yield from _tensors(part)
