"""The experiment: order, fairness, resumption, divergence."""

from __future__ import annotations

import dataclasses
import json

import lightning as L
import pandas as pd
import pytest
import torch
from torch import nn

from leantrain.experiment import Arm, Experiment, describe, final
from leantrain.training import Diverged

SEEN: list[tuple] = []


class Points(L.LightningDataModule):
    """Sixteen points on a line; the batch order is drawn from the seed and the epoch."""

    fingerprint = "points-1"
    checksums = {"points": "0" * 64}

    def set_seed(self, seed):
        self.seed = seed

    def _loader(self, shuffle):
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.linspace(-1, 1, 16)[:, None]
        data = torch.utils.data.TensorDataset(x, 3 * x)
        return torch.utils.data.DataLoader(data, batch_size=4, shuffle=shuffle, generator=generator)

    def train_dataloader(self):
        return self._loader(True)

    def val_dataloader(self):
        return self._loader(False)


class Line(L.LightningModule):
    def __init__(self, rate, waste=0, poison=False):
        super().__init__()
        torch.rand(waste)  # an arm that draws more random numbers than another
        self.layer = nn.Linear(1, 1)
        self.rate, self.poison, self.first = rate, poison, []

    def training_step(self, batch, index):
        x, y = batch
        self.first.append(x.flatten().tolist())
        loss = ((self.layer(x) - y) ** 2).mean()
        if self.poison and self.global_step == 5:
            raise Diverged(5, float("nan"))
        return loss

    def on_fit_end(self):
        SEEN.append((self.rate, self.first, torch.rand(1).item()))

    def validation_step(self, batch, index):
        x, y = batch
        self.log("val_loss", ((self.layer(x) - y) ** 2).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def slow(seed):
    return Line(0.01)


def fast(seed):
    return Line(0.1, waste=7)


def experiment(tmp_path=None, **changes):
    options = {"arms": {"slow": slow, "fast": fast}, "data": Points(), "seeds": [0, 1], "epochs": 3, "cache": tmp_path}
    return Experiment(**{**options, **changes})


@pytest.fixture(autouse=True)
def _clear():
    SEEN.clear()


def test_the_table_is_tidy_and_the_arms_are_interleaved():
    frame = experiment().run()
    assert list(frame.columns) == ["arm", "seed", "epoch", "step", "train_s", "diverged", "val_loss"]
    assert len(frame) == 2 * 2 * 3
    order = frame.drop_duplicates(["arm", "seed"])[["arm", "seed"]].values.tolist()
    assert order == [["slow", 0], ["fast", 0], ["slow", 1], ["fast", 1]]
    one = frame[(frame.arm == "slow") & (frame.seed == 0)]
    assert one.epoch.tolist() == [1, 2, 3]
    assert one.step.tolist() == [4, 8, 12]
    assert one.train_s.is_monotonic_increasing


def test_every_arm_of_a_seed_sees_the_same_batches_and_random_numbers():
    experiment().run()
    (_, slow0, draw_slow), (_, fast0, draw_fast), (_, slow1, _), _ = SEEN
    assert slow0 == fast0
    assert draw_slow == draw_fast
    assert slow0 != slow1


def test_two_runs_are_equal_to_the_last_bit():
    first, second = (experiment().run().drop(columns="train_s") for _ in range(2))
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_an_interrupted_experiment_goes_on_where_it_stopped(tmp_path):
    def breaks(seed):
        if seed == 1:
            raise KeyboardInterrupt
        return Line(0.1)

    whole = experiment().run()
    with pytest.raises(KeyboardInterrupt):
        experiment(tmp_path, arms={"slow": slow, "fast": breaks}).run()
    assert len(list(tmp_path.iterdir())) == 3, "slow 0, fast 0 and slow 1 were finished"
    again = experiment(tmp_path)
    frame = again.run()
    # `fast` is another function than `breaks`, so only the two runs of `slow` are reused.
    assert (again.reused, again.trained) == (2, 2)
    pd.testing.assert_frame_equal(frame.drop(columns="train_s"), whole.drop(columns="train_s"))
    last = experiment(tmp_path)
    last.run()
    assert (last.reused, last.trained) == (4, 0)


def test_an_arm_may_have_its_own_length_and_data():
    short = Arm(slow, epochs=1)
    other = Points()
    exp = experiment(arms={"slow": slow, "short": short, "same": Arm(slow, epochs=3), "other": Arm(slow, data=other)})
    frame = exp.run()
    assert frame.groupby("arm")["epoch"].max().to_dict() == {"slow": 3, "short": 1, "same": 3, "other": 3}
    assert frame.drop_duplicates(["arm", "seed"])["arm"].tolist() == ["slow", "short", "same", "other"] * 2
    assert exp.sources == [exp.data, other]
    assert exp.key("slow", 0) == exp.key("same", 0) != exp.key("short", 0)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0 for arm 'none'"):
        experiment(arms={"none": Arm(slow, epochs=0)})


def test_a_torn_cache_file_is_trained_again(tmp_path):
    experiment(tmp_path, seeds=[0]).run()
    for file in tmp_path.iterdir():
        file.write_text(file.read_text()[:20])
    again = experiment(tmp_path, seeds=[0])
    again.run()
    assert (again.reused, again.trained) == (0, 2)


@pytest.mark.parametrize(
    "change",
    [{"epochs": 4}, {"precision": "bf16-mixed"}, {"salt": "x"}, {"limit_batches": 1}, {"after": lambda m: {"a": 1.0}}],
)
def test_the_key_depends_on_everything_a_run_depends_on(change):
    assert experiment().key("slow", 0) != experiment(**change).key("slow", 0)


def test_the_key_depends_on_arm_seed_and_data():
    base = experiment()
    assert base.key("slow", 0) != base.key("slow", 1)
    assert base.key("slow", 0) != base.key("fast", 0)
    other = Points()
    other.fingerprint = "points-2"
    assert base.key("slow", 0) != experiment(data=other).key("slow", 0)


def test_a_diverged_run_is_kept_as_a_miss(tmp_path):
    arms = {"slow": slow, "bad": lambda seed: Line(0.1, poison=True)}
    frame = experiment(tmp_path, arms=arms, seeds=[0]).run()
    bad = frame[frame.arm == "bad"]
    assert bad.diverged.tolist() == [False, True]
    with pytest.raises(ValueError, match="these runs diverged: bad seed 0"):
        final(frame, "val_loss")
    assert final(frame, "val_loss", miss=99.0).loc[0, "bad"] == 99.0
    again = experiment(tmp_path, arms=arms, seeds=[0])
    assert again.run().diverged.sum() == 1, "divergence is read back from the disk too"
    assert again.trained == 0
    for file in tmp_path.iterdir():
        json.loads(file.read_text(), parse_constant=pytest.fail)


def test_final_takes_the_last_row_of_each_run():
    frame = experiment().run()
    table = final(frame, "val_loss")
    assert list(table.columns) == ["slow", "fast"]
    expected = frame[(frame.arm == "fast") & (frame.seed == 1) & (frame.epoch == 3)].val_loss.item()
    assert table.loc[1, "fast"] == expected
    with pytest.raises(ValueError, match="no column 'accuracy'"):
        final(frame, "accuracy")


def test_after_adds_columns_to_the_last_row():
    frame = experiment(seeds=[0], after=lambda module: {"rate": module.rate}).run()
    assert frame.groupby("arm").rate.last().to_dict() == {"slow": 0.01, "fast": 0.1}
    assert frame.rate.notna().sum() == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arms": {}}, "at least one arm"),
        ({"seeds": []}, "at least one, got"),
        ({"seeds": [1, 1]}, "different"),
        ({"seeds": [-1]}, "non-negative"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"limit_batches": 0}, "limit_batches"),
    ],
)
def test_bad_input_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        experiment(**change)


def _make(rate):
    return lambda seed: Line(rate)


def test_descriptions_tell_functions_apart_by_what_they_compute():
    assert describe(_make(0.1)) == describe(_make(0.1))
    assert describe(_make(0.1)) != describe(_make(0.2))
    assert describe(lambda s, k=1: k) != describe(lambda s, k=2: k)
    assert describe(lambda s: s + 1) != describe(lambda s: s + 2)
    assert describe({"a": [1, (2.5, None)], "b": {3, 4}}) == {"a": [1, [2.5, None]], "b": [3, 4]}


def test_descriptions_follow_helpers_and_dataclasses():
    @dataclasses.dataclass
    class Plan:
        width: int

    def user(plan):
        def helper(x):
            return x * plan.width

        return lambda seed: helper(seed)

    assert describe(user(Plan(1))) == describe(user(Plan(1)))
    assert describe(user(Plan(1))) != describe(user(Plan(2)))


def test_what_cannot_be_described_is_refused():
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="cannot tell what Linear"):
        describe(lambda seed: model)
