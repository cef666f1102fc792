"""The weight store: what goes in comes out, by content, and damage is noticed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from leantrain.experiment import describe
from leantrain.training import WeightStore


def net(seed=0, width=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Embedding(4, 2).bfloat16())
    model[2].weight.requires_grad_(False)
    return model


def test_weights_come_back_to_the_bit(tmp_path):
    store = WeightStore(tmp_path / "weights")
    number = store.save(net(0))
    assert float(number) == number < 2**48
    other = store.load(net(1), float(number))
    for name, tensor in net(0).state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_the_number_is_that_of_the_content(tmp_path):
    store = WeightStore(tmp_path)
    assert store.save(net(0)) == store.save(net(0)) == WeightStore(tmp_path / "elsewhere").save(net(0))
    assert store.save(net(1)) != store.save(net(0))
    assert len(list(tmp_path.glob("*.pt"))) == 2
    assert not list(tmp_path.glob("*.partial"))


def test_it_serves_an_experiment(tmp_path):
    store = WeightStore(tmp_path)
    row = store(SimpleNamespace(model=net(0)))
    assert torch.equal(store.load(net(1), row["weights"])[0].weight, net(0)[0].weight)
    assert describe(store) == describe(WeightStore(tmp_path / "elsewhere")), "a finished run is recognised anywhere"
    with pytest.raises(ValueError, match="str"):
        store(SimpleNamespace(model="none"))


def test_missing_damaged_and_unfitting_weights_are_refused(tmp_path):
    store = WeightStore(tmp_path)
    with pytest.raises(ValueError, match="000000000007"):
        store.load(net(), 7)
    first, second = store.save(net(0)), store.save(net(1))
    with pytest.raises(ValueError, match="do not fit"):
        store.load(net(width=4), first)
    (tmp_path / f"{first:012x}.pt").write_bytes((tmp_path / f"{second:012x}.pt").read_bytes())
    with pytest.raises(ValueError, match="does not hold"):
        store.load(net(), first)
