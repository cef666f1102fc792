"""Frozen statistics: same output in training, untouched buffers, everything back in place afterwards."""

import pytest
import torch
from torch import nn

from leantrain.training import frozen_statistics


def model():
    torch.manual_seed(0)
    untracked = nn.BatchNorm2d(4, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(untracked)).train()


def test_outputs_are_those_of_training_and_buffers_stay():
    net, x = model(), torch.randn(5, 3, 8, 8)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with frozen_statistics(net):
        frozen = net(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert torch.equal(frozen, net(x))
    assert net[1].num_batches_tracked == 1, "the pass after the block is recorded again"


def test_evaluation_uses_the_running_statistics_as_ever():
    net, x = model(), torch.randn(5, 3, 8, 8)
    net(x)
    net.eval()
    expected = net(x)
    with frozen_statistics(net):
        assert torch.equal(net(x), expected)


def test_layers_come_back_also_after_an_error():
    net = model()
    with pytest.raises(RuntimeError, match="inside"), frozen_statistics(net):
        raise RuntimeError("inside")
    assert net[1].track_running_stats
    assert not net[3][0].track_running_stats
