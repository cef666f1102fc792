"""The network of airbench94, a public record for the cheapest training to 94 % on CIFAR-10, as a yardstick."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["AirbenchNet"]

_SHRINK = 9  # the first convolution takes one pixel, three poolings of two the rest


class AirbenchNet(nn.Module):
    """Six convolutions of 3x3 in three groups behind a layer of 2x2 whitening filters.

    ========== ============================================================== ===================
    block      layers                                                         output at 32 pixels
    ========== ============================================================== ===================
    `whiten`   frozen convolution 2x2 with a trained bias, GELU               24 x 31 x 31
    `groups`   three times: convolution, pool, norm, GELU, convolution, norm, w x 15 x 15,
               GELU                                                           4w x 7 x 7, 4w x 3 x 3
    `head`     maximum over the picture, linear layer, divided by nine        num_classes
    ========== ============================================================== ===================

    The first convolutions start as the identity on as many channels as they can, the rest of their weights and all
    others at random. The normalisations have a bias but no scale, and running statistics of a short memory. The filters
    are the whitening filters of 2x2 patches and their negatives; until they are filled in, they are random.

    The form is that of the script `airbench94.py` by Keller Jordan (repository cifar10-airbench).

    Args:
        width: Channels w of the first group, at least 1. 64 is the record's.
        num_classes: Number of logits, at least 1.

    Raises:
        ValueError: If a size is less than 1.

    Example:
        >>> model = AirbenchNet()
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        1971352
    """

    def __init__(self, width: int = 64, *, num_classes: int = 10) -> None:
        super().__init__()
        for name, size in {"width": width, "num_classes": num_classes}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        self.whiten.bias = nn.Parameter(torch.zeros(24))
        widths = [24, width, 4 * width, 4 * width]
        groups = [_group(*pair) for pair in pairwise(widths)]
        self.groups = nn.Sequential(nn.GELU(), *groups)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 3, H, W)`.

        Raises:
            ValueError: If a side of the images is shorter than 9 pixels.
        """
        if min(x.shape[-2:]) < _SHRINK:
            raise ValueError(f"images must have at least {_SHRINK} pixels a side, got {tuple(x.shape[-2:])}")
        x = self.groups(self.whiten(x))
        x = nn.functional.max_pool2d(x, (x.shape[-2], x.shape[-1])).flatten(1)
        return self.head(x) / 9


def _group(channels: int, out: int) -> nn.Sequential:
    convolution = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
    norm = partial(nn.BatchNorm2d, eps=1e-12, momentum=0.4)
    layers = [convolution(channels, out), nn.MaxPool2d(2), norm(out), nn.GELU(), convolution(out, out), norm(out)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight.data[: layer.in_channels])
        elif isinstance(layer, nn.BatchNorm2d):
            layer.weight.requires_grad_(False)
    return nn.Sequential(*layers, nn.GELU())
