"""The yardstick's network: its size, its cost, its identity start, bad input."""

import pytest
import torch
from torch import nn

from leantrain.measure.cost import count_macs, count_parameters
from leantrain.training import AirbenchNet


def test_size_and_cost_are_those_of_the_record():
    with torch.device("meta"):
        model = AirbenchNet()
        image = torch.empty(1, 3, 32, 32)
    convolutions = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    scales_and_biases = 2 * (64 + 256 + 256)
    assert count_parameters(model, trainable_only=True) == convolutions + 2560 + scales_and_biases + 24
    assert count_parameters(model) == 1_971_352 + 12 * 24 + scales_and_biases
    # 9.9 epochs of 50,000 images, three times the forward pass, two FLOPs each: the 0.36 PFLOP of the script's head
    # hold within a tenth.
    assert 6 * count_macs(model, image) * 9.9 * 50_000 == pytest.approx(0.36e15, rel=0.1)


def test_first_channels_pass_through_the_first_convolution_of_a_group():
    torch.manual_seed(0)
    model = AirbenchNet(32)
    first = model.groups[1][0]
    x = torch.randn(2, 24, 8, 8)
    torch.testing.assert_close(first(x)[:, :24], x)
    assert not torch.allclose(first.weight[24:], torch.zeros(()))


def test_normalisations_have_no_trained_scale_and_a_short_memory():
    norms = [m for m in AirbenchNet(8).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 6
    assert all(not m.weight.requires_grad and m.bias.requires_grad and m.momentum == 0.4 for m in norms)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        AirbenchNet(0)
    with pytest.raises(ValueError, match="num_classes"):
        AirbenchNet(8, num_classes=0)
    with pytest.raises(ValueError, match="at least 9 pixels"):
        AirbenchNet(8)(torch.zeros(1, 3, 8, 8))
