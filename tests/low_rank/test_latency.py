"""Ranks from times: the rules on made-up tables, what is run, and what is left as it was."""

import copy

import pandas as pd
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from leantrain.low_rank.factors import decompose_model
from leantrain.low_rank.latency import (
    LayerCall,
    around_multiples,
    before_step,
    fastest,
    layer_calls,
    materialise,
    profile_layers,
    runner,
    select_ranks,
    time_ranks,
)

TIMES = st.dictionaries(st.integers(1, 64), st.floats(0.1, 10.0), min_size=1, max_size=12)


def stepped(ranks, step=32):
    """A kernel that works in blocks: time grows with the number of blocks that are begun."""
    return {rank: 1.0 + -(-rank // step) for rank in ranks}


def test_the_rank_below_the_step_is_found():
    assert before_step(stepped(range(20, 60)), original=10.0) == 32
    assert before_step({31: 2.0, 32: 2.0, 33: 3.0, 38: 3.1}, original=10.0) == 32
    # A wide gap is not a step: 0.4 over 8 ranks is flatter than 0.3 over one.
    assert before_step({24: 1.0, 32: 1.4, 33: 1.7}, original=10.0) == 32


def test_a_flat_or_falling_table_gives_the_largest_rank():
    assert before_step({8: 1.0, 9: 1.0, 10: 1.0}, original=2.0) == 10
    assert before_step({8: 1.2, 9: 1.1, 10: 1.0}, original=2.0) == 10
    assert before_step({8: 1.0}, original=2.0) == 8


@given(TIMES)
def test_nothing_is_decomposed_that_does_not_gain(times):
    slowest = min(times.values())
    for rule in (before_step, fastest):
        assert rule(times, slowest) is None
        assert rule(times, 1e3) in times


@given(TIMES, st.floats(0.1, 10.0), st.sampled_from([0.5, 0.9, 1.0]))
def test_the_fastest_rank_near_the_top(times, original, share):
    chosen = fastest(times, original, margin=0.05, at_least=share)
    near = [times[rank] for rank in times if rank >= share * max(times)]
    if chosen is None:
        assert min(near) > 0.95 * original
    else:
        assert chosen >= share * max(times)
        assert times[chosen] == min(near) <= 0.95 * original


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: before_step({}, 1.0), "at least one rank"),
        (lambda: before_step({4: 0.0}, 1.0), "above 0"),
        (lambda: fastest({4: 1.0}, 1.0, margin=1.0), "margin=1.0"),
        (lambda: fastest({4: 1.0}, 1.0, at_least=0), "at_least=0"),
    ],
)
def test_bad_tables_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_ranks_around_multiples():
    assert around_multiples(309, 32) == [309, 289, 288, 257, 256]
    assert around_multiples((38, 40)) == [(38, 38), (33, 33), (32, 32), (17, 17), (16, 16)]
    assert around_multiples(32) == [32, 17, 16]
    assert around_multiples(7) == [7]
    with pytest.raises(ValueError, match="multiple=1"):
        around_multiples(38, 1)


class Twice(nn.Module):
    def __init__(self, other=16):
        super().__init__()
        self.one, self.two, self.never = nn.Linear(16, other), nn.Linear(16, 16), nn.Linear(4, 4)

    def forward(self, x):
        return self.two(self.two(self.one(x)))


def test_shapes_and_calls():
    assert layer_calls(Twice(), (3, 16)) == {"one": LayerCall((3, 16), 1), "two": LayerCall((3, 16), 2)}
    calls = layer_calls(timm.create_model("resnet50"), (2, 3, 224, 224))
    assert len(calls) == 54
    assert calls["layer4.0.conv2"] == LayerCall((2, 512, 14, 14), 1)
    assert calls["fc"] == LayerCall((2, 2048), 1)


def test_looking_leaves_the_model_alone():
    model = Twice().train()
    model.never.eval()
    model(torch.randn(2, 16)).sum().backward()
    before, gradient, state = copy.deepcopy(model.state_dict()), model.one.weight.grad.clone(), torch.get_rng_state()
    layer_calls(model, (3, 16))
    runner(model, (3, 16), train=True)()
    profile_layers(model, (3, 16), {"one": [4]}, train=True, repeats=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.never.training) == (True, False)
    assert torch.equal(model.one.weight.grad, gradient)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.one._forward_pre_hooks


def test_inputs_of_two_shapes_are_refused():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x).sum() + self.layer(x[:1]).sum()

    with pytest.raises(ValueError, match="'layer' is called with inputs of shapes"):
        layer_calls(Mixed(), (3, 8))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_runner_runs_what_it_says(precision):
    seen = []

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3)

        def forward(self, x):
            y = self.conv(x)
            layout = x.is_contiguous(memory_format=torch.channels_last)
            seen.append((self.training, torch.is_grad_enabled(), y.dtype, layout, self.conv.weight.grad))
            return y

    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    runner(Probe(), (2, 4, 8, 8), train=False, precision=precision)()
    assert seen[-1] == (False, False, wanted, True, None)
    step = runner(Probe(), (2, 4, 8, 8), train=True, precision=precision, channels_last=False)
    step()
    assert seen[-1] == (True, True, wanted, False, None)
    step()
    assert seen[-1][-1] is None, "gradients are freed before the next step"


def test_a_frozen_weight_gets_no_gradient_when_timed():
    grads = []

    class Keep(nn.Linear):
        def forward(self, x):
            grads.append([p.requires_grad for p in self.parameters()])
            return super().forward(x)

    layer = Keep(4, 4)
    layer.weight.requires_grad_(False)
    runner(layer, (2, 4), train=True)()
    assert grads[-1] == [False, True]


def test_a_materialised_model_can_be_trained():
    with torch.device("meta"):
        model = timm.create_model("resnet26", num_classes=10)
    model = materialise(model).train()
    y = model(torch.randn(2, 3, 64, 64))
    y.square().mean().backward()
    assert 1e-3 < float(y.detach().abs().mean()) < 1e3
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_table_of_times():
    table = time_ranks(nn.Linear(256, 256), (64, 256), [8, 64], train=False, repeats=5)
    assert list(table["rank"]) == [8, 64]
    assert (table["low"] <= table["ratio"]).all()
    assert (table["ratio"] <= table["high"]).all()
    assert (table[["original_s", "factored_s"]] > 0).all(axis=None)
    with pytest.raises(ValueError, match="once"):
        time_ranks(nn.Linear(8, 8), (2, 8), [2, 2], train=False)
    with pytest.raises(ValueError, match="rank=9"):
        time_ranks(nn.Linear(8, 8), (2, 8), [9], train=False)


def test_equal_layers_are_timed_once():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 8))
    table = profile_layers(model, (4, 16), {"0": [2, 4], "2": [2, 4], "3": [2]}, train=False, repeats=3)
    assert list(table["layer"]) == ["0", "0", "2", "2", "3"]
    first, second = (table[table["layer"] == name].drop(columns="layer").reset_index(drop=True) for name in ("0", "2"))
    pd.testing.assert_frame_equal(first, second)
    with pytest.raises(ValueError, match="'1'"):
        profile_layers(model, (4, 16), {"1": [2]}, train=False)


def test_ranks_are_selected_from_a_table():
    rows = [("a", 8, 1.0), ("a", 9, 1.0), ("a", 10, 1.9), ("b", 8, 3.0), ("c", (4, 4), 0.5), ("c", (5, 5), 0.9)]
    table = pd.DataFrame(rows, columns=["layer", "rank", "factored_s"]).assign(calls=1, original_s=2.0)
    assert select_ranks(table, before_step) == {"a": 9, "c": (4, 4)}
    assert select_ranks(table, fastest) == {"a": 9, "c": (5, 5)}
    assert select_ranks(table, lambda times, original: None) == {}
    model = nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(9, 9), "c": nn.Conv2d(6, 6, 3)})
    decompose_model(model, select_ranks(table, before_step))
    assert (model["a"].rank, model["c"].rank) == (9, (4, 4))
