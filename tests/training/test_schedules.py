"""The warm-up and cosine schedule: known values, bounds, shape, and what an optimiser sees."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leantrain.training.schedules import warmup_cosine, warmup_cosine_factor


def rates(total_steps, **options):
    """The learning rates that an optimiser uses for its steps, and the one left afterwards."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = warmup_cosine(optimizer, total_steps, **options)
    used = []
    for _ in range(total_steps + 1):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return used


def test_known_rates_at_start_peak_middle_and_end():
    used = rates(110, warmup_fraction=10 / 110)
    assert used[0] == pytest.approx(0.5 / 11)
    assert used[9] == pytest.approx(0.5 * 10 / 11)
    assert used[10] == 0.5
    assert used[60] == pytest.approx(0.25)  # half-way down the cosine
    assert used[85] == pytest.approx(0.5 * 0.5 * (1 + math.cos(0.75 * math.pi)))
    assert used[109] > 0
    assert used[110] == pytest.approx(0, abs=1e-16)


def test_the_floor_is_where_the_run_ends():
    used = rates(20, warmup_fraction=0.0, floor=0.2)
    assert used[0] == 0.5
    assert used[20] == pytest.approx(0.1)


def test_every_group_keeps_its_own_peak():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    warmup_cosine(optimizer, 4, warmup_fraction=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1 / 3, 0.1 / 3])


@given(
    total=st.integers(1, 500),
    fraction=st.floats(0, 1, exclude_max=True),
    floor=st.floats(0, 1),
    beyond=st.integers(0, 5),
)
def test_the_factor_rises_to_one_then_falls_to_the_floor(total, fraction, floor, beyond):
    factors = [warmup_cosine_factor(step, total, fraction, floor) for step in range(total + beyond + 1)]
    assert all(floor <= factor <= 1 for factor in factors)
    peak = factors.index(max(factors[:total]))
    assert factors[peak] == pytest.approx(1)
    assert peak <= max(round(fraction * total), 0)
    assert all(left <= right for left, right in pairwise(factors[: peak + 1]))
    assert all(left >= right for left, right in pairwise(factors[peak:]))
    assert factors[total] == pytest.approx(floor, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps"),
        ({"warmup_fraction": 1.0}, "warmup_fraction"),
        ({"warmup_fraction": -0.1}, "warmup_fraction"),
        ({"warmup_fraction": math.nan}, "warmup_fraction"),
        ({"floor": 1.5}, "floor"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        warmup_cosine_factor(0, **({"total_steps": 10} | options))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=message):
        warmup_cosine(optimizer, **({"total_steps": 10} | options))


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="step counts"):
        warmup_cosine_factor(-1, 10)


def test_the_schedule_resumes_from_its_state():
    full = rates(12)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = warmup_cosine(optimizer, 12)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    resumed = warmup_cosine(other, 12)
    resumed.load_state_dict(schedule.state_dict())
    other.load_state_dict(optimizer.state_dict())
    other.step()
    resumed.step()
    assert other.param_groups[0]["lr"] == full[6]
