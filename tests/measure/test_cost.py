"""Counted cost against formulas: parameters, multiply-accumulates, optimiser state."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from leantrain.measure.cost import count_macs, count_parameters, optimizer_state_bytes


def test_a_full_size_vision_transformer_costs_what_its_formula_says():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224")
        image = torch.empty(1, 3, 224, 224)
    tokens, dim = 197, 384
    block = 4 * tokens * dim**2 + 2 * tokens**2 * dim + 2 * tokens * dim * 4 * dim
    expected = 196 * (16 * 16 * 3) * dim + 12 * block + dim * 1000
    macs = count_macs(model, image)
    assert macs == expected
    assert macs == pytest.approx(4.599e9, abs=1e6)
    assert count_parameters(model) == 22_050_664


@given(
    channels=st.integers(1, 4),
    per_group=st.integers(1, 3),
    groups=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    batch=st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_a_convolution_costs_its_formula(channels, per_group, groups, kernel, stride, batch):
    with torch.device("meta"):
        conv = nn.Conv2d(channels * groups, per_group * groups, kernel, stride, groups=groups)
        x = torch.empty(batch, channels * groups, 9, 7)
    height, width = ((size - kernel) // stride + 1 for size in (9, 7))
    assert count_macs(conv, x) == batch * height * width * (per_group * groups) * channels * kernel**2


def test_a_linear_layer_costs_the_product_of_its_sizes():
    assert count_macs(nn.Linear(3, 2), torch.zeros(5, 7, 3)) == 5 * 7 * 3 * 2


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_attention_core_is_counted_also_where_the_processor_has_a_fused_kernel(device):
    q, k, v = (torch.zeros(2, 3, n, 8, device=device) for n in (5, 7, 7))
    assert count_macs(Attention(), q, k, v) == 2 * 3 * (5 * 7 * 8 + 5 * 7 * 8)


def test_the_fused_paths_of_torchs_own_layers_are_counted():
    x = torch.zeros(1, 5, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    assert count_macs(attention, x, x, x) == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8
    assert count_macs(nn.LSTM(8, 6, batch_first=True), x) == 5 * 4 * 6 * (8 + 6)


def test_the_fused_paths_are_back_afterwards_even_when_the_model_fails():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count_macs(nn.Linear(3, 2), torch.zeros(1, 4))
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.filterwarnings("error")
def test_counting_warns_of_nothing():
    assert count_macs(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2)) == 4


def test_counting_leaves_the_model_and_the_random_state_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    count_macs(model, torch.randn(6, 4, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_mode_of_the_model_decides_what_is_counted():
    class HalfInTraining(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x[: len(x) // 2] if self.training else x)

    model, x = HalfInTraining(), torch.zeros(6, 4)
    assert count_macs(model.train(), x) == 3 * 16
    assert count_macs(model.eval(), x) == 6 * 16


def test_shared_parameters_count_once_and_frozen_ones_on_request():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    assert count_parameters(model) == 16 + 16 + 8
    model[1].weight = model[0].weight
    assert count_parameters(model) == 16 + 8
    model[0].weight.requires_grad_(False)
    assert count_parameters(model, trainable_only=True) == 8


def stepped(build, parameters):
    optimizer = build(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("build", "copies"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (torch.optim.AdamW, 2),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 3),
    ],
)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float64, 8)])
def test_optimiser_state_is_a_number_of_copies_of_the_parameters(build, copies, dtype, size):
    parameters = [nn.Parameter(torch.zeros(3, 5, dtype=dtype)), nn.Parameter(torch.zeros(2, dtype=dtype))]
    assert optimizer_state_bytes(stepped(build, parameters)) == copies * 17 * size


def test_nested_and_repeated_state_is_counted_once():
    optimizer = torch.optim.SGD([parameter := nn.Parameter(torch.zeros(4))], lr=0.1)
    history = torch.zeros(10)
    optimizer.state[parameter] = {
        "old": [history, history],
        "more": {"a": (torch.zeros(3),)},
        "step": torch.tensor(1.0),
    }
    assert optimizer_state_bytes(optimizer) == (10 + 3) * 4
