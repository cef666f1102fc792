"""ResNet-9: its size at every width by known counts, its blocks, and the whitening layer before it is filled."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from leantrain.measure.cost import count_macs, count_parameters
from leantrain.training import ResNet9


@pytest.mark.parametrize(
    ("width", "whitening", "parameters", "megamacs"),
    [
        (64, True, 6_573_849, 380.0),
        (64, False, 6_573_120, 379.3),
        (32, True, 1_646_841, 96.0),
        (16, True, 413_673, 24.8),
        (16, False, 412_944, 24.0),
    ],
)
def test_known_sizes(width, whitening, parameters, megamacs):
    with torch.device("meta"):
        model = ResNet9(width, whitening=whitening)
        image = torch.empty(1, 3, 32, 32)
    assert count_parameters(model) == parameters
    assert count_parameters(model, trainable_only=True) == parameters - (27 * 27 if whitening else 0)
    assert count_macs(model, image) == pytest.approx(megamacs * 1e6, abs=0.05e6)


def test_batch_normalisation_with_fixed_scales_leaves_the_known_number_of_trainable_parameters():
    with torch.device("meta"):
        model = ResNet9(64, whitening=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_(False)
    assert count_parameters(model, trainable_only=True) == 6_570_880


def test_the_forward_pass_is_the_table_written_out():
    torch.manual_seed(0)
    model = ResNet9(4, num_classes=7, activation=lambda: nn.CELU(0.3), scale=0.0625).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.bias)
    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    layers = iter(zip(convolutions, norms, strict=True))

    def step(x, pool=False):
        weight, norm = next(layers)
        x = F.conv2d(x, weight, padding=1)
        return F.celu(norm(F.max_pool2d(x, 2) if pool else x), 0.3)

    x = torch.randn(3, 3, 32, 32)
    expected = step(step(x), pool=True)
    assert expected.shape == (3, 8, 16, 16)
    expected = expected + step(step(expected))
    expected = step(step(expected, pool=True), pool=True)
    assert expected.shape == (3, 32, 4, 4)
    expected = expected + step(step(expected))
    expected = expected.amax(dim=(2, 3)) @ model.head.weight.T / 16
    torch.testing.assert_close(model(x), expected)


def test_an_unfilled_whitening_layer_changes_nothing():
    models = []
    for whitening in (False, True):
        torch.manual_seed(0)
        models.append(ResNet9(4, in_chans=2, whitening=whitening))
    plain, whitened = models
    x = torch.randn(5, 2, 16, 8)
    torch.testing.assert_close(whitened(x), plain(x))
    assert not whitened.whiten.weight.requires_grad


def test_no_norm_means_that_images_do_not_see_each_other():
    torch.manual_seed(0)
    model = ResNet9(4, norm=lambda channels: nn.Identity()).train()
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))
    assert not list(model.buffers())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"width": 0}, "width must be at least 1"),
        ({"in_chans": 0}, "in_chans"),
        ({"num_classes": 0}, "num_classes"),
        ({"scale": 0.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        ResNet9(**options)


def test_small_images_are_named():
    with pytest.raises(ValueError, match=r"at least 8 pixels a side, got \(16, 4\)"):
        ResNet9(4)(torch.zeros(1, 3, 16, 4))
