"""The small residual network: its shape, that its width and depth are what was asked for, bad input."""

import pytest
import torch
from torch import nn

from leantrain.techniques.lrd_study import bottlenecks
from leantrain.training import small_resnet


@pytest.mark.parametrize("widths", [(8,), (8, 16), (8, 16, 32), (8, 16, 32, 32)])
def test_shape_of_every_stage(widths):
    torch.manual_seed(0)
    model = small_resnet(in_chans=2, num_classes=5, widths=widths, blocks=2).eval()
    features = model.forward_features(torch.randn(3, 2, 16, 16))
    side = 16 // 2 ** (len(widths) - 1)
    assert features.shape == (3, 4 * widths[-1], side, side)
    assert model(torch.randn(3, 2, 16, 16)).shape == (3, 5)
    found = [block.conv2.in_channels for _, block in bottlenecks(model)]
    assert found == [width for width in widths for _ in range(2)]


def test_the_stem_keeps_the_size():
    model = small_resnet(num_classes=3, widths=(16, 32))
    assert isinstance(model.maxpool, nn.Identity)
    assert model.conv1(torch.zeros(1, 3, 9, 9)).shape == (1, 16, 9, 9)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"widths": ()}, r"widths=\(\)"),
        ({"widths": (8, 0)}, r"widths=\(8, 0\)"),
        ({"widths": (8,) * 5}, "one to 4"),
        ({"blocks": 0}, "blocks must be positive"),
        ({"in_chans": 0}, "in_chans"),
    ],
)
def test_bad_sizes_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        small_resnet(num_classes=3, **options)
