"""Freezing by epoch: what moves and when, what it saves, and that it can be switched off."""

import copy
from itertools import pairwise

import lightning as L
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from leantrain.low_rank.factors import choose_ranks, decompose_model
from leantrain.techniques.lrd_rank_freeze import FactorFreezing, saved_share, trained_part


class Small(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16)
        self.model = decompose_model(nn.Sequential(*layers), {"0": (2, 3), "4": 4})
        self.epochs = []

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def on_train_epoch_end(self):
        self.epochs.append(copy.deepcopy(dict(self.model.named_parameters())))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def trained(callbacks, epochs=4, **options):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 3, 4, 4, generator=generator), torch.randint(0, 16, (24,), generator=generator)
    module = Small()
    first = copy.deepcopy(dict(module.model.named_parameters()))
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=8))
    return module, [first, *module.epochs]


INNER = {"0.core.weight", "4.second.weight"}
OUTER = {"0.first.weight", "0.last.weight", "4.first.weight"}
ALWAYS = {"0.last.bias", "1.weight", "1.bias", "4.second.bias"}


def moved(states):
    return [
        {name for name in before if not torch.equal(before[name], after[name])} for before, after in pairwise(states)
    ]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}])
def test_parts_take_turns(options):
    _, states = trained([FactorFreezing("sequential")], **options)
    assert moved(states) == [INNER | ALWAYS, OUTER | ALWAYS] * 2


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_period_and_start():
    _, states = trained([FactorFreezing("sequential", period=2, start="outer")])
    assert moved(states) == [OUTER | ALWAYS] * 2 + [INNER | ALWAYS] * 2


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_fixed_freezing_never_moves_the_other_part():
    module, states = trained([FactorFreezing("fixed")])
    assert moved(states) == [INNER | ALWAYS] * 4
    assert all(p.requires_grad for p in module.parameters()), "free again after training"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_switched_off_it_is_ordinary_training():
    _, off = trained([FactorFreezing("off")])
    _, without = trained([])
    assert all(torch.equal(off[-1][name], without[-1][name]) for name in without[-1])


def test_turns():
    turns = [trained_part("sequential", epoch, period=2) for epoch in range(6)]
    assert turns == ["inner", "inner", "outer", "outer", "inner", "inner"]
    assert {trained_part("fixed", epoch, start="outer") for epoch in range(4)} == {"outer"}
    assert trained_part("off", 3) is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("never", 0), "schedule='never'"),
        (("fixed", -1), "epoch=-1"),
        (("fixed", 0, 0), "period=0"),
        (("fixed", 0, 1, "middle"), "start='middle'"),
    ],
)
def test_bad_input_is_named(arguments, named):
    schedule, epoch, *rest = arguments
    with pytest.raises(ValueError, match=named):
        trained_part(schedule, epoch, **dict(zip(("period", "start"), rest, strict=False)))
    if epoch == 0:
        with pytest.raises(ValueError, match=named):
            FactorFreezing(schedule, **dict(zip(("period", "start"), rest, strict=False)))


@pytest.mark.parametrize(
    ("name", "inner", "outer"),
    [("resnet50", 10.7, 15.8), ("resnet101", 11.5, 18.0), ("resnet152", 11.9, 18.8)],
)
def test_saved_multiply_accumulates(name, inner, outer):
    """Shares worked out beforehand for a compression of two, the shortcuts and the stem dense."""
    with torch.device("meta"):
        model = timm.create_model(name)
    ranks = choose_ranks(model, compression=2, where=lambda n, m: n == "fc" or ("layer" in n and "downsample" not in n))
    decompose_model(model, ranks)
    shape = (1, 3, 224, 224)
    assert 100 * saved_share(model, shape, "inner") == pytest.approx(inner, abs=0.06)
    assert 100 * saved_share(model, shape, "outer") == pytest.approx(outer, abs=0.06)


def test_saved_share_of_a_pair():
    """By hand: C/(3(C+S)) with the first factor frozen, S/(3(C+S)) with the second."""
    model = decompose_model(nn.Sequential(nn.Linear(30, 10)), {"0": 4})
    assert saved_share(model, (7, 30), "inner") == pytest.approx(30 / (3 * 40))
    assert saved_share(model, (7, 30), "outer") == pytest.approx(10 / (3 * 40))
    assert all(p.requires_grad for p in model.parameters())
