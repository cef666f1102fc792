"""ResNet-9: the small residual network of the races for the fastest training on CIFAR-10, at any width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

__all__ = ["ResNet9"]

_SHRINK = 8  # three poolings of two


class ResNet9(nn.Module):
    """Eight 3x3 convolutions and a linear layer, two of the blocks residual.

    ========== ==================================================== ============
    block      layers                                               output
    ========== ==================================================== ============
    `whiten`   frozen convolution 3x3 (with `whitening`, else none) 9c x H x W
    `prep`     convolution (1x1 with `whitening`, else 3x3)         w x H x W
    `layer1`   convolution, pool; residual                          2w, H/2, W/2
    `layer2`   convolution, pool                                    4w, H/4, W/4
    `layer3`   convolution, pool; residual                          8w, H/8, W/8
    `head`     maximum over the picture, linear layer, times scale  num_classes
    ========== ==================================================== ============

    Every convolution but the frozen one is followed by a normalisation and an activation; a pooling by two stands
    between the convolution and its normalisation. A residual part is two convolutions of 3x3, added to their input
    after the second activation. No layer but the normalisations has a bias.

    Until its weight is given filters, the frozen layer `whiten` copies each pixel's neighbourhood into channels. Its
    output and the 1x1 convolution behind it are then one convolution of 3x3, and under one seed the network computes
    what the one without whitening does.

    Args:
        width: Channels w behind the first layer, at least 1; the network grows with its square. 64 is the usual one.
        in_chans: Colour channels c of the images, at least 1.
        num_classes: Number of logits, at least 1.
        whitening: Whether a frozen layer for whitening filters comes first.
        activation: Makes an activation.
        norm: Makes a normalisation for a number of channels; `nn.Identity` for none.
        scale: What the logits are multiplied with, positive.

    Raises:
        ValueError: If a size is less than 1 or the scale is not positive and finite.

    Example:
        >>> model = ResNet9(width=64)
        >>> sum(p.numel() for p in model.parameters())
        6573120
        >>> ResNet9(width=8)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        width: int = 64,
        *,
        in_chans: int = 3,
        num_classes: int = 10,
        whitening: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        scale: float = 0.125,
    ) -> None:
        super().__init__()
        for name, size in {"width": width, "in_chans": in_chans, "num_classes": num_classes}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be positive and finite, got {scale}")

        def block(channels: int, out: int, *, kernel: int = 3, pool: bool = False) -> nn.Sequential:
            convolution = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
            return nn.Sequential(convolution, *[nn.MaxPool2d(2)] * pool, norm(out), activation())

        def residual(channels: int) -> _Residual:
            return _Residual(block(channels, channels), block(channels, channels))

        patch = 9 * in_chans
        self.scale = scale
        self.whiten: nn.Conv2d | None = _neighbourhood(in_chans) if whitening else None
        self.prep = block(patch, width, kernel=1) if whitening else block(in_chans, width)
        self.layer1 = nn.Sequential(block(width, 2 * width, pool=True), residual(2 * width))
        self.layer2 = block(2 * width, 4 * width, pool=True)
        self.layer3 = nn.Sequential(block(4 * width, 8 * width, pool=True), residual(8 * width))
        self.head = nn.Linear(8 * width, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, in_chans, H, W)`.

        Raises:
            ValueError: If a side of the images is shorter than 8 pixels.
        """
        if min(x.shape[-2:]) < _SHRINK:
            raise ValueError(f"images must have at least {_SHRINK} pixels a side, got {tuple(x.shape[-2:])}")
        if self.whiten is not None:
            x = self.whiten(x)
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))
        # A kernel of the picture's size: unlike adaptive pooling it is deterministic on every device.
        x = F.max_pool2d(x, (x.shape[-2], x.shape[-1])).flatten(1)
        return self.scale * self.head(x)


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _neighbourhood(in_chans: int) -> nn.Conv2d:
    """A frozen convolution whose outputs are the pixels of its window, one a channel."""
    patch, device = 9 * in_chans, torch.get_default_device()
    # No random numbers are drawn, so that the layers behind start alike with and without it.
    layer = skip_init(nn.Conv2d, in_chans, patch, 3, padding=1, bias=False, device=device)
    layer.weight = nn.Parameter(torch.eye(patch).view(patch, in_chans, 3, 3), requires_grad=False)
    return layer
