"""A residual network of any width, for runs that a laptop can finish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from timm.models.resnet import Bottleneck, ResNet
from torch import nn

__all__ = ["small_resnet"]

_STAGES = 4  # timm's forward pass names four stages


def small_resnet(
    *, in_chans: int = 3, num_classes: int, widths: Sequence[int] = (16, 32, 64), blocks: int = 2
) -> ResNet:
    """Build timm's residual network with bottleneck blocks and a stem for small images.

    The stem is one 3x3 convolution without stride, as is usual for images of 32 pixels or fewer. Every stage but the
    first halves height and width. A block of width w has w channels inside and 4w outside.

    Args:
        in_chans: Colour channels of the images.
        num_classes: Number of logits.
        widths: Width of each stage, one to four stages; each at least 1.
        blocks: Blocks in a stage, at least 1.

    Returns:
        The model. It maps images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``.

    Raises:
        ValueError: If a size is not positive, or there are no stages or more than four.

    Example:
        >>> model = small_resnet(in_chans=1, num_classes=10, widths=(16, 32))
        >>> sum(p.numel() for p in model.parameters())
        52922
    """
    for name, size in {"in_chans": in_chans, "num_classes": num_classes, "blocks": blocks}.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
    if not 1 <= len(widths) <= _STAGES or min(widths) < 1:
        raise ValueError(f"widths={tuple(widths)}: expected one to {_STAGES} widths, each at least 1")
    empty = _STAGES - len(widths)
    model = ResNet(
        Bottleneck,  # type: ignore[arg-type]  # timm means the class and says an instance
        layers=(*[blocks] * len(widths), *[0] * empty),
        channels=(*widths, *[widths[-1]] * empty),
        in_chans=in_chans,
        num_classes=num_classes,
        stem_type="deep",
        stem_width=max(1, widths[0] // 2),
    )
    stem = nn.Conv2d(in_chans, cast(nn.BatchNorm2d, model.bn1).num_features, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule("conv1", stem)
    model.set_submodule("maxpool", nn.Identity())
    return model
