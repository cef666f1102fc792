"""Tests of the workloads: layer tables against torchvision and the cost counter, the small networks, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leantrain.hardware.workloads import (
    NETWORKS,
    TORCHVISION_NETWORKS,
    TRANSFORMERS,
    Layer,
    build_network,
    build_torchvision,
    build_transformer,
    dense_net,
    fire_net,
    layers_of,
    network,
    plain_cnn,
    prune_weights,
)
from leantrain.measure.cost import count_macs

CONV_MMACS = {
    "alexnet": 655.566528,
    "vgg16": 15346.630656,
    "resnet18": 1813.561344,
    "resnet50": 4087.136256,
    "squeezenet1_0": 818.924576,
    "squeezenet1_1": 349.151936,
    "densenet121": 2833.137664,
    "googlenet": 1497.352192,
    "mobilenet_v2": 299.494272,
}


@pytest.mark.parametrize("name", TORCHVISION_NETWORKS)
def test_layer_tables_of_the_torchvision_networks(name):
    layers = network(name)
    assert sum(layer.macs for layer in layers if layer.kind == "conv") / 1e6 == CONV_MMACS[name]
    assert [layer.needs_dgrad for layer in layers] == [False] + [True] * (len(layers) - 1)
    assert layers[0].products == ("forward", "wgrad")
    with torch.device("meta"):
        model = build_torchvision(name)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    shapes = [layer.weight_shape for layer in layers]
    assert sum(k * c * h * w for k, c, h, w in shapes) == weights


def test_layer_table_of_a_transformer_has_the_macs_outside_attention():
    layers = network("vit-small")
    with torch.device("meta"):
        model = build_transformer("vit-small")
        total = count_macs(model, torch.zeros(1, 3, 224, 224))
    attention = 12 * 2 * 197 * 197 * 384  # scores and weighted values of 12 blocks, 197 tokens of 384 features
    assert sum(layer.macs for layer in layers) == total - attention
    assert {layer.in_size for layer in layers[1:-1]} == {(197, 1)}
    with pytest.raises(ValueError, match="network 'vit-huge' is unknown"):
        build_transformer("vit-huge")


@pytest.mark.parametrize(
    "model",
    [plain_cnn(), plain_cnn(batch_norm=True), fire_net(), dense_net()],
    ids=["plain", "batch norm", "fire", "dense"],
)
def test_small_networks_have_the_macs_that_torch_counts(model):
    x = torch.zeros(1, 3, 32, 32)
    assert model(x).shape == (1, 10)
    assert sum(layer.macs for layer in layers_of(model, (3, 32, 32))) == count_macs(model, x)
    assert not any(getattr(module, "inplace", False) for module in model.modules())


def test_geometry_is_read_from_the_call():
    model = nn.Sequential(
        nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 1), groups=2),
        nn.Conv2d(8, 8, 3, padding="same", dilation=2),
        nn.Conv2d(8, 6, 3, padding="valid"),
    )
    first, same, valid = layers_of(model, (4, 9, 10))
    assert first == Layer(
        "0", "conv", 4, 8, (3, 5), (2, 1), (1, 2), groups=2, in_size=(9, 10), out_size=(5, 10), needs_dgrad=False
    )
    assert (same.padding, same.dilation, same.out_size) == ((2, 2), (2, 2), (5, 10))
    assert (valid.padding, valid.out_size) == ((0, 0), (3, 8))


def test_pruned_weights_stay_zero_and_keep_the_scale():
    torch.manual_seed(0)
    model = prune_weights(plain_cnn(), 0.9)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert (convs[0].weight != 0).all()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = [conv.weight.detach().clone() for conv in convs]
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    model(torch.randn(1, 3, 32, 32))
    for conv, old in zip(convs[1:], before[1:], strict=True):
        assert (conv.weight == 0).float().mean() == pytest.approx(0.9, abs=0.001)
        assert ((conv.weight == 0) == (old == 0)).all()
        assert not torch.equal(conv.weight, old)
    fan_in = convs[2].weight[0].numel()
    assert before[2].var().item() == pytest.approx(2 / fan_in, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "pool"}, "kind is 'pool'"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"stride": (0, 1)}, "stride is"),
        ({"padding": (-1, 0)}, "padding is"),
        ({"kernel": (3,)}, "kernel is"),
        ({"groups": 3}, "3 groups do not divide"),
    ],
)
def test_bad_layers_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Layer(**({"name": "a", "kind": "conv", "in_channels": 4, "out_channels": 4} | change))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_built_by_name(name):
    full = name in TORCHVISION_NETWORKS or name in TRANSFORMERS
    with torch.device("meta") if full else torch.device("cpu"):
        model = build_network(name, in_channels=3 if full else 1, image_size=224 if full else 8, num_classes=7)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == NETWORKS[name]
    shape = (3, 224, 224) if full else (1, 8, 8)
    *_, last = layers_of(model, shape)
    assert last.out_channels == 7


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="network 'lenet' is unknown"):
        build_network("lenet")
    with pytest.raises(ValueError, match="images of 3 channels, not 1"):
        build_network("vgg16", in_channels=1)
    with pytest.raises(ValueError, match="network 'lenet' is unknown"):
        build_torchvision("lenet")
    with pytest.raises(ValueError, match="pads with 'reflect'"):
        layers_of(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), (3, 8, 8))
    with pytest.raises(ValueError, match="only a linear layer"):
        Layer("a", "conv", 4, 4).batch_as_image(2)
    with pytest.raises(ValueError, match=r"fraction is 1\.0"):
        prune_weights(plain_cnn(), 1.0)
    with pytest.raises(ValueError, match="cannot be halved"):
        plain_cnn(image_size=4)
