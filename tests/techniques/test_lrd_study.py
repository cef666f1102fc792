"""Merged and branched decompositions: the paper's counts, identities without the non-linearities, bad input."""

import copy

import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet50, resnet101, resnet152

from leantrain.low_rank.factors import decompose
from leantrain.measure.cost import count_macs, count_parameters
from leantrain.techniques.lrd_study import bottlenecks, branches_of, merge_bottleneck, merge_bottlenecks

# Hajimolahoseini and others (2024), table 2, and counts worked out beforehand.
MERGED = {
    "resnet50": (resnet50, 12_396_968, 51.493, 55.44),
    "resnet101": (resnet101, 19_421_096, 56.405, 59.15),
    "resnet152": (resnet152, 25_209_256, 58.119, 60.47),
}


@pytest.mark.parametrize(("name", "library"), [*((name, "torchvision") for name in MERGED), ("resnet50", "timm")])
def test_merged_sizes(name, library):
    build, parameters, fewer, cheaper = MERGED[name]
    with torch.device("meta"):
        model = build() if library == "torchvision" else timm.create_model(name)
        image = torch.empty(1, 3, 224, 224)
    before, macs = count_parameters(model), count_macs(model, image)
    merge_bottlenecks(model)
    assert count_parameters(model) == parameters
    assert 100 * (1 - parameters / before) == pytest.approx(fewer, abs=5e-4)
    assert 100 * (1 - count_macs(model, image) / macs) == pytest.approx(cheaper, abs=0.005)


class Plain(nn.Module):
    """A bottleneck whose normalisations and non-linearities can be left out."""

    def __init__(self, linear, stride=1, bias=False):
        super().__init__()
        self.conv1 = nn.Conv2d(12, 8, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 10, 3, stride=stride, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(10)
        self.conv3 = nn.Conv2d(10, 16, 1, bias=False)
        self.linear = linear

    def forward(self, x):
        if self.linear:
            return self.conv3(self.conv2(self.conv1(x)))
        return self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("ranks", [(8, 10), (3, 4)])
def test_without_what_stands_between_merging_is_the_decomposition(ranks, stride):
    torch.manual_seed(0)
    block = Plain(linear=True, stride=stride)
    thin = copy.deepcopy(block)
    thin.conv2 = decompose(block.conv2, ranks)
    merged = copy.deepcopy(block)
    merge_bottleneck(merged, ranks)
    x = torch.randn(2, 12, 7, 7)
    torch.testing.assert_close(merged(x), thin(x), atol=1e-5, rtol=1e-5)
    if ranks == (8, 10):
        torch.testing.assert_close(merged(x), block(x), atol=1e-5, rtol=1e-5)


def test_a_merged_block_is_whole():
    torch.manual_seed(0)
    block = Plain(linear=False).eval().to(memory_format=torch.channels_last)
    merge_bottleneck(block, (3, 4))
    shapes = [tuple(m.weight.shape) for m in (block.conv1, block.conv2, block.conv3)]
    assert shapes == [(3, 12, 1, 1), (4, 3, 3, 3), (16, 4, 1, 1)]
    assert (block.bn1.num_features, block.bn2.num_features) == (3, 4)
    assert not any(m.training for m in block.modules())
    assert torch.equal(block.conv3.bias, torch.zeros(16))
    assert block.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    block.train()(torch.randn(4, 12, 5, 5)).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_the_other_blocks_of_a_resnet_stay():
    names = [name for name, _ in bottlenecks(timm.create_model("resnet26"))]
    assert names == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert list(bottlenecks(timm.create_model("resnet18"))) == []


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: merge_bottleneck(Plain(False), (9, 4)), r"ranks=\(9, 4\)"),
        (lambda: merge_bottleneck(nn.Linear(2, 2), (1, 1)), "Linear is no bottleneck"),
        (lambda: merge_bottleneck(timm.create_model("resnext50_32x4d").layer1[0], (4, 4)), "32 groups"),
        (lambda: merge_bottlenecks(timm.create_model("resnet18")), "no bottleneck"),
        (lambda: merge_bottlenecks(timm.create_model("resnet26"), share=0), "share=0"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize("bias", [True, False])
def test_branches_add_up(bias):
    torch.manual_seed(0)
    triple = decompose(nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=bias), (8, 4), branches=4)
    branches = branches_of(triple)
    assert [b.rank for b in branches] == [(2, 1)] * 4
    x = torch.randn(2, 12, 9, 9)
    torch.testing.assert_close(sum(b(x) for b in branches), triple(x), atol=1e-5, rtol=1e-5)


def test_one_branch_is_the_triple():
    torch.manual_seed(0)
    triple = decompose(nn.Conv2d(12, 16, 3, padding=1), (8, 4))
    (only,) = branches_of(triple)
    x = torch.randn(2, 12, 9, 9)
    assert torch.equal(only(x), triple(x))
