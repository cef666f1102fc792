r"""Low-rank networks that are also fast: merged and branched decompositions.

Paper: Hajimolahoseini and others, "Accelerating the Low-Rank Decomposed Models", NeurIPS ENLSP workshop 2024,
PMLR 262, arXiv 2407.20266.

Decomposing every layer halves the parameters of a network and more than doubles its layers, so that little time is
won. The paper lists four remedies. Two need nothing but `leantrain.low_rank`: ranks that the hardware likes
(`leantrain.low_rank.latency`) and training one factor only (`leantrain.low_rank.factors.train_part`). The other two
stand here.

*Merging.* Of a bottleneck block only the 3x3 convolution is decomposed, :math:`W \approx X \times_C U \times_S V`, and
the outer factors are multiplied into the 1x1 convolutions beside it:

.. math:: \tilde W_1 = W_1 U, \qquad \tilde W_2 = X, \qquad \tilde W_3 = V^\top W_3 ,

so the block keeps three layers and becomes narrower. Batch normalisation and ReLU stand between the layers, and no
matrix can be moved through them: a merged block starts near the old one and must be fine-tuned.

*Branching.* The core of a Tucker decomposition with ranks :math:`N R_1, N R_2` is cut into :math:`N` blocks on its
diagonal, which one grouped convolution computes. The blocks off the diagonal are dropped.

>>> import timm
>>> narrow = merge_bottlenecks(timm.create_model("resnet50"), share=0.5, sweeps=0)
>>> sum(p.numel() for p in narrow.parameters())
12396968
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from leantrain.low_rank.factors import TuckerTriple, tucker_factors

__all__ = ["bottlenecks", "branches_of", "merge_bottleneck", "merge_bottlenecks"]


def bottlenecks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The bottleneck blocks of a ResNet: modules with 1x1, larger and 1x1 convolutions `conv1` to `conv3`.

    Args:
        model: A ResNet of timm or torchvision.

    Yields:
        Name and block, in the model's order.
    """
    for name, module in model.named_modules():
        convs = [getattr(module, f"conv{i}", None) for i in (1, 2, 3)]
        norms = [getattr(module, f"bn{i}", None) for i in (1, 2)]
        if all(type(c) is nn.Conv2d for c in convs) and all(isinstance(n, nn.BatchNorm2d) for n in norms):
            sizes = [cast(nn.Conv2d, c).kernel_size for c in convs]
            if sizes[0] == sizes[2] == (1, 1) != sizes[1]:
                yield name, module


def _like(conv: nn.Conv2d, weight: Tensor, bias: bool) -> nn.Conv2d:
    new = nn.utils.skip_init(
        nn.Conv2d, weight.shape[1], weight.shape[0], conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        bias=bias, padding_mode=conv.padding_mode, device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    layout = torch.channels_last
    if conv.weight.is_contiguous(memory_format=layout) and not conv.weight.is_contiguous():
        new.to(memory_format=layout)
    with torch.no_grad():
        new.weight.copy_(weight)
        if new.bias is not None:
            new.bias.zero_() if conv.bias is None else new.bias.copy_(conv.bias)
    return new.train(conv.training)


def merge_bottleneck(block: nn.Module, ranks: tuple[int, int], *, sweeps: int = 5) -> None:
    """Decompose the middle convolution of a block and multiply its outer factors into the neighbours, in place.

    The two normalisations between the convolutions are made anew for the narrower width: run some batches through the
    network in training mode, or `torch.optim.swa_utils.update_bn`, before it is evaluated. The third convolution gets a
    bias, zero at first; with it the paper's parameter counts are met.

    Args:
        block: A bottleneck block, see `bottlenecks`; its middle convolution must not be grouped.
        ranks: New widths before and after the middle convolution.
        sweeps: See `leantrain.low_rank.factors.tucker_factors`.

    Raises:
        ValueError: If this is not such a block, or the ranks do not fit.
    """
    if not any(module is block for _, module in bottlenecks(block)):
        raise ValueError(f"{type(block).__name__} is no bottleneck block: expected convolutions 1x1, 3x3, 1x1")
    first, middle, last = (cast(nn.Conv2d, getattr(block, f"conv{i}")) for i in (1, 2, 3))
    if middle.groups != 1:
        raise ValueError(f"the middle convolution is in {middle.groups} groups: expected groups=1")
    if not (1 <= ranks[0] <= middle.in_channels and 1 <= ranks[1] <= middle.out_channels):
        most = (middle.in_channels, middle.out_channels)
        raise ValueError(f"ranks={ranks}: expected a pair from (1, 1) to {most}")
    if middle.weight.is_meta:
        shapes = (middle.in_channels, ranks[0]), (middle.out_channels, ranks[1])
        before, after = (middle.weight.new_empty(s, dtype=torch.float64) for s in shapes)
        core = middle.weight.new_empty(ranks[1], ranks[0], *middle.kernel_size)
    else:
        before, after, core = tucker_factors(middle.weight, ranks, sweeps)
    block.conv1 = _like(first, torch.einsum("cr,cihw->rihw", before, first.weight.detach().double()), False)
    block.conv2 = _like(middle, core, middle.bias is not None)
    block.conv3 = _like(last, torch.einsum("oshw,sr->orhw", last.weight.detach().double(), after), True)
    for name, width in zip(("bn1", "bn2"), ranks, strict=True):
        old = cast(nn.BatchNorm2d, getattr(block, name))
        new = nn.BatchNorm2d(width, old.eps, old.momentum, device=old.weight.device, dtype=old.weight.dtype)
        setattr(block, name, new.train(old.training))


def merge_bottlenecks(model: nn.Module, share: float = 0.5, *, sweeps: int = 5) -> nn.Module:
    """Merge all bottleneck blocks of a model, in place.

    Args:
        model: A ResNet of timm or torchvision with bottleneck blocks.
        share: Ranks as a share of the middle convolution's channels, rounded down; above 0, at most 1. The paper's
            compression of two is a half.
        sweeps: See `merge_bottleneck`.

    Returns:
        The same model.

    Raises:
        ValueError: If the share is out of range, or there is no bottleneck block.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: expected above 0 and at most 1")
    blocks = list(bottlenecks(model))
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no bottleneck block: expected convolutions 1x1, 3x3, 1x1")
    for _, block in blocks:
        middle = cast(nn.Conv2d, block.conv2)
        ranks = max(1, int(share * middle.in_channels)), max(1, int(share * middle.out_channels))
        merge_bottleneck(block, ranks, sweeps=sweeps)
    return model


def branches_of(triple: TuckerTriple) -> list[TuckerTriple]:
    """The branches of a triple whose core is grouped, each a triple of its own.

    The sum of what they compute is what the triple computes; the bias is in the first.

    Args:
        triple: From `leantrain.low_rank.factors.decompose` with branches; it is not changed.

    Returns:
        As many triples as the core has groups.
    """
    groups = triple.core.groups
    firsts, cores = triple.first.weight.chunk(groups), triple.core.weight.chunk(groups)
    lasts = triple.last.weight.chunk(groups, dim=1)
    branches = []
    for i, (first, core, last) in enumerate(zip(firsts, cores, lasts, strict=True)):
        one = TuckerTriple(
            _like(triple.first, first, False),
            _like(triple.core, core, False),
            _like(triple.last, last, triple.last.bias is not None and i == 0),
        )
        branches.append(one)
    return branches
