"""Saved activations: known answers of small chains, shared storages, parameters left out."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from leantrain.measure.memory import saved_activation_bytes


@pytest.mark.parametrize("shape", [(7,), (7, 3)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_chain_of_layers_saves_the_input_of_each(shape, device):
    with torch.device(device):
        model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
        x = torch.zeros(*shape, 10)
    rows = torch.Size(shape).numel()
    # The input of the first layer, and the ReLU's output: its own saved result and the second layer's input in one.
    assert saved_activation_bytes(lambda: model(x).sum()) == 4 * rows * (10 + 20)


def test_frozen_parameters_are_left_out_too():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    model[2].requires_grad_(False)
    x = torch.zeros(7, 10)
    # The frozen layer needs its weight for the gradient of its input, but not its input.
    assert saved_activation_bytes(lambda: model(x).sum()) == 4 * 7 * (10 + 20)
    model[0].requires_grad_(False)
    assert saved_activation_bytes(lambda: model(x).sum()) == 0


def test_a_storage_counts_once_and_in_full_however_often_it_is_saved():
    scale = nn.Parameter(torch.ones(()))
    x = torch.zeros(100)
    assert saved_activation_bytes(lambda: (x * scale).sum() + (x * scale).sum()) == 400
    assert saved_activation_bytes(lambda: (x[:10] * scale).sum() + (x[50:60] * scale).sum()) == 400


def test_activations_that_are_freed_on_the_way_do_not_hide_later_ones():
    scale = nn.Parameter(torch.ones(()))

    def many():
        total = torch.zeros(())
        for _ in range(10):
            total = total + (torch.zeros(100) * scale).sum().detach()
        return total

    # Every round saves one fresh tensor of 100 numbers and drops its graph at once, so addresses are used again.
    assert saved_activation_bytes(many) == 10 * 400


def test_half_the_width_of_the_numbers_is_half_the_memory():
    model, x = nn.Sequential(nn.Linear(6, 6), nn.GELU()), torch.zeros(4, 6)
    full = saved_activation_bytes(lambda: model(x).sum())
    half = model.to(torch.bfloat16), x.to(torch.bfloat16)
    assert full == 4 * 4 * (6 + 6)
    assert saved_activation_bytes(lambda: half[0](half[1]).sum()) == full // 2


def test_what_lies_inside_a_checkpoint_is_not_seen():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    x = torch.zeros(5, 8)
    inside = saved_activation_bytes(lambda: model(x).sum())
    outside = saved_activation_bytes(lambda: checkpoint(model, x, use_reentrant=False).sum())
    assert inside == 4 * 5 * 8 * 3
    assert outside < inside


def test_the_gradient_is_the_same_afterwards():
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    results = []
    saved_activation_bytes(lambda: results.append(model(x).sum()) or results[0])
    results[0].backward()
    torch.testing.assert_close(model.weight.grad, torch.full((2, 3), 4.0))


def test_it_refuses_to_measure_where_nothing_can_be_saved():
    with torch.no_grad(), pytest.raises(ValueError, match="no_grad"):
        saved_activation_bytes(lambda: torch.zeros(()))
