"""Targeted decomposition: policies counted, selection and prediction on a made-up table, bad input."""

import copy

import pandas as pd
import pytest
import timm
import torch
from torch import nn

from leantrain.low_rank.factors import decompose, decompose_model
from leantrain.low_rank.latency import fastest, select_ranks
from leantrain.measure.cost import count_macs, count_parameters
from leantrain.techniques.hardware_aware_lrd import (
    forward_cost,
    policy,
    predicted_time,
    rank_candidates,
    relative_error,
    until_fast_enough,
)

# Worked out beforehand for ResNet-50 and a compression of two: per cent fewer parameters and multiply-accumulates.
COUNTS = {("all", 1): (44.7, 42.9), ("late", 1): (42.1, 24.3), ("late", 32): (46.8, 28.2)}


@pytest.mark.parametrize(("name", "multiple"), COUNTS)
def test_counts_of_the_policies(name, multiple):
    with torch.device("meta"):
        model, image = timm.create_model("resnet50"), torch.empty(1, 3, 224, 224)
    parameters, macs = count_parameters(model), count_macs(model, image)
    decompose_model(model, policy(model, name, multiple=multiple))
    fewer, cheaper = COUNTS[name, multiple]
    assert 100 * (1 - count_parameters(model) / parameters) == pytest.approx(fewer, abs=0.06)
    assert 100 * (1 - count_macs(model, image) / macs) == pytest.approx(cheaper, abs=0.06)


def test_none_leaves_the_model_as_it_is():
    torch.manual_seed(0)
    model = timm.create_model("resnet26", num_classes=10).eval()
    same = decompose_model(copy.deepcopy(model), policy(model, "none"))
    x = torch.randn(1, 3, 64, 64)
    assert [type(m) for m in same.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(same(x), model(x))


def test_the_static_rule():
    model = timm.create_model("resnet50")
    chosen = policy(model, "static")
    assert all(name.endswith("conv2") for name in chosen)
    assert not any(name.startswith("layer1") for name in chosen)


def test_strided_layers_keep_their_output():
    with torch.device("meta"):
        model, x = timm.create_model("resnet26").eval(), torch.randn(1, 3, 64, 64)
    thin = decompose_model(copy.deepcopy(model), policy(model, "all"))
    assert thin.forward_features(x).shape == model.forward_features(x).shape


TABLE = pd.DataFrame(
    [
        ("a", 2, 102, 10.0, 9.8),
        ("a", 2, 96, 10.0, 6.0),
        ("b", 1, (38, 38), 5.0, 5.5),
        ("c", 3, 51, 4.0, 3.8),
        ("c", 3, 48, 4.0, 3.0),
        ("d", 1, 25, 8.0, 7.0),
    ],
    columns=["layer", "calls", "rank", "original_s", "factored_s"],
)


def test_selected_layers_are_those_that_gain():
    assert select_ranks(TABLE, fastest) == {"a": 96, "c": 48, "d": 25}
    everything_slow = TABLE.assign(factored_s=TABLE["original_s"])
    assert select_ranks(everything_slow, fastest) == {}


def test_predicted_time_is_the_sum():
    assert predicted_time(TABLE, {}, 100.0) == 100.0
    assert predicted_time(TABLE, {"a": 96, "b": (38, 38), "c": 48}, 100.0) == pytest.approx(100 - 2 * 4 + 0.5 - 3 * 1)
    with pytest.raises(ValueError, match="0 rows for layer 'a' at rank 64"):
        predicted_time(TABLE, {"a": 64}, 100.0)


def test_the_order_of_gain_for_loss():
    ranks, errors = {"a": 96, "c": 48, "d": 25}, {"a": 0.8, "c": 0.1, "d": 0.5}
    # Saved per call and layer: a 8, c 3, d 1; for what they lose: c 30, a 10, d 2.
    assert list(until_fast_enough(TABLE, ranks, errors, 100.0, 98.0)) == ["c"]
    assert list(until_fast_enough(TABLE, ranks, errors, 100.0, 90.0)) == ["c", "a"]
    assert list(until_fast_enough(TABLE, ranks, errors, 100.0, 10.0)) == ["c", "a", "d"]
    assert until_fast_enough(TABLE, ranks, errors, 100.0, 100.0) == {}
    with pytest.raises(ValueError, match=r"\['d'\] are missing"):
        until_fast_enough(TABLE, ranks, {"a": 1.0, "c": 1.0}, 100.0, 10.0)


def test_work_and_traffic_by_hand():
    conv = nn.Conv2d(64, 256, 1, bias=False)
    positions = 2 * 7 * 7
    assert forward_cost([conv], (2, 64, 7, 7)) == (positions * 64 * 256, positions * (64 + 256) + 64 * 256)
    macs, moved = forward_cost(decompose(conv, 25), (2, 64, 7, 7))
    assert macs == positions * 25 * (64 + 256)
    assert moved == positions * (64 + 2 * 25 + 256) + 25 * (64 + 256)
    triple = decompose(nn.Conv2d(8, 16, 3, stride=2, padding=1), (4, 6))
    assert forward_cost(triple, (1, 8, 6, 6))[0] == 36 * 8 * 4 + 9 * 9 * 4 * 6 + 9 * 6 * 16


def test_candidates():
    assert rank_candidates(309) == [309, 304, 288, 256]
    assert rank_candidates((38, 38)) == [(38, 38), (32, 32)]
    assert rank_candidates(7) == [7]
    assert rank_candidates(16, multiples=(16,)) == [16]
    with pytest.raises(ValueError, match="multiples"):
        rank_candidates(16, multiples=(0,))


def test_the_error_is_that_of_the_discarded_values():
    torch.manual_seed(0)
    layer = nn.Linear(20, 12)
    values = torch.linalg.svdvals(layer.weight.detach())
    assert relative_error(layer, 5) == pytest.approx(float(values[5:].norm() / values.norm()), rel=1e-5)
    assert relative_error(layer, 12) < 1e-6


def test_an_unknown_policy_is_named():
    with pytest.raises(ValueError, match=r"'some'.*none, all, late, static"):
        policy(timm.create_model("resnet26"), "some")
    with pytest.raises(ValueError, match="compression=0"):
        policy(timm.create_model("resnet26"), "all", compression=0)
