"""SwiftLearn: known answers of the criteria, invariants of the selection, equality with plain training to the bit."""

from __future__ import annotations

import logging
import math
from collections import Counter
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from leantrain.data import images
from leantrain.techniques.swiftlearn import (
    CRITERIA,
    ActiveData,
    ActiveSampler,
    Criterion,
    SwiftLearn,
    el2n,
    evaluate_all,
    importance_epochs,
    kept_count,
    output_change,
    sample_loss,
    sample_passes,
    select,
    selection_epochs,
)
from leantrain.training import Diverged, ImageClassifier
from leantrain.training.schedules import warmup_cosine_factor

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


# ------------------------------------------------------------------ criteria


def test_output_change_of_three_samples_by_hand():
    new, old = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), torch.zeros(3, 2)
    assert output_change(new, old).tolist() == [0, 1, 2]
    assert select(output_change(new, old), keep=1 / 3).tolist() == [2]
    assert output_change(torch.tensor([[5.0], [1.0]]), torch.tensor([[2.0], [1.0]])).tolist() == [3, 0]
    with pytest.raises(ValueError, match="one shape"):
        output_change(new, old[:2])


@given(st.integers(0, 2**31), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_el2n_and_loss_against_numpy(seed, classes):
    rng = np.random.default_rng(seed)
    logits, y = rng.normal(0, 3, (7, classes)), rng.integers(0, classes, 7)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.sqrt(((p - np.eye(classes)[y]) ** 2).sum(1))
    found = el2n(torch.tensor(logits), torch.tensor(y)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert (found >= 0).all()
    assert (found <= math.sqrt(2) + 1e-12).all()
    losses = sample_loss(torch.tensor(logits), torch.tensor(y))
    np.testing.assert_allclose(losses.numpy(), -np.log(p[np.arange(7), y]), rtol=1e-9)


def test_el2n_of_the_certain_and_right_is_zero_and_of_the_wrong_root_two():
    logits = torch.tensor([[200.0, 0.0], [200.0, 0.0]])
    assert el2n(logits, torch.tensor([0, 1])).tolist() == pytest.approx([0.0, math.sqrt(2)])


def test_the_default_compares_probabilities():
    new, old = torch.randn(5, 3), torch.randn(5, 3)
    assert torch.equal(
        CRITERIA["output_change"].score(new + 7, old, None), output_change((new + 7).softmax(1), old.softmax(1))
    )
    assert torch.equal(CRITERIA["logit_change"].score(new, old, None), output_change(new, old))


# ------------------------------------------------------------------ selection


@given(st.integers(1, 200), st.floats(0.001, 1), st.integers(0, 2**31), st.booleans())
@settings(max_examples=80, deadline=None)
def test_the_selection_is_the_top_and_has_its_size(n, keep, seed, balanced):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randint(0, 10, (n,), generator=generator).float()  # with many ties
    labels = torch.randint(0, 3, (n,), generator=generator) if balanced else None
    rows = select(importance, keep, labels)
    assert len(rows) == kept_count(n, keep) == math.ceil(round(keep * n, 9))
    assert rows.diff().gt(0).all()
    for label in range(3):
        of = torch.ones(n, dtype=torch.bool) if labels is None else labels == label
        kept = torch.zeros(n, dtype=torch.bool)
        kept[rows] = True
        inside, outside = importance[of & kept], importance[of & ~kept]
        if len(inside) and len(outside):
            assert inside.min() >= outside.max()
        if labels is not None:
            assert abs(len(inside) - len(rows) * int(of.sum()) / n) <= 1.0 + 1e-9


def test_ties_go_to_the_first_and_order_does_not_matter():
    assert select(torch.tensor([1.0, 1.0, 1.0, 1.0]), 0.5).tolist() == [0, 1]
    importance = torch.rand(50, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert sorted(order[select(importance[order], 0.2)].tolist()) == select(importance, 0.2).tolist()


@pytest.mark.parametrize(
    ("n", "keep", "count"), [(1437, 0.1, 144), (100, 0.07, 7), (5, 0.01, 1), (3, 1.0, 3), (1, 0.5, 1)]
)
def test_counts(n, keep, count):
    assert kept_count(n, keep) == count


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused(keep):
    for call in (partial(select, torch.ones(4)), partial(kept_count, 4), lambda keep: SwiftLearn(keep=keep)):
        with pytest.raises(ValueError, match="keep"):
            call(keep)
    with pytest.raises(ValueError, match="without NaN"):
        select(torch.tensor([1.0, float("nan")]), 0.5)
    with pytest.raises(ValueError, match="labels"):
        select(torch.ones(3), 0.5, torch.ones(2))


# ------------------------------------------------------------------ plan and cost


def test_when_samples_are_measured_and_chosen():
    assert selection_epochs(25, 5) == [4]
    assert selection_epochs(25, 5, 5) == [4, 9, 14, 19]
    assert selection_epochs(5, 5, 1) == [], "with a warm-up to the end nothing is chosen"
    assert selection_epochs(4, 1, 1) == [0, 1, 2], "never after the last epoch"
    assert importance_epochs(25, 5, 5, looks=2) == [3, 4, 9, 14, 19]
    assert importance_epochs(25, 5, 5, looks=1) == [4, 9, 14, 19]
    assert importance_epochs(5, 1, looks=2) == [-1, 0]
    assert importance_epochs(5, 1, looks=0) == importance_epochs(5, 5) == []
    for arguments, message in (((5, 0), "warmup"), ((5, 6), "warmup"), ((5, 1, -1), "refresh")):
        with pytest.raises(ValueError, match=message):
            selection_epochs(*arguments)


def test_the_cost_in_samples_is_that_of_the_paper_scale():
    kept = kept_count(1437, 0.1)
    assert 5 * 1437 + 20 * kept == 10_065
    assert 25 / sample_passes(25, 5, 0.1) == pytest.approx(35_925 / 10_065, rel=1e-3)
    assert [round(25 / sample_passes(25, 5, r), 2) for r in (0.1, 0.3, 0.5)] == [3.57, 2.27, 1.67]
    assert 5 / sample_passes(5, 1, 0.1, evaluations=2, forward_cost=1 / 3) == pytest.approx(2.42, abs=0.005)
    assert sample_passes(5, 5, 0.1) == 5
    with pytest.raises(ValueError, match="evaluations"):
        sample_passes(5, 1, 0.1, evaluations=-1)


# ------------------------------------------------------------------ sampler and data


def test_the_sampler_hands_out_the_active_set_in_an_order_of_seed_and_epoch():
    sampler = ActiveSampler(20, seed=3)
    assert sorted(sampler) == list(range(20))
    sampler.active = torch.tensor([7, 2, 11])
    assert (len(sampler), sorted(sampler), sampler.active.tolist()) == (3, [2, 7, 11], [2, 7, 11])
    sampler.active = torch.arange(20)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = list(sampler)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert list(sampler) == first == sampler.order.tolist()
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(ActiveSampler(20, seed=4)) != first


@pytest.mark.parametrize("rows", [[], [0, 0], [-1], [4], [[0, 1]]])
def test_a_bad_active_set_is_refused(rows):
    sampler = ActiveSampler(4)
    with pytest.raises(ValueError, match="active set"):
        sampler.active = torch.tensor(rows, dtype=torch.int64)
    assert len(sampler) == 4
    with pytest.raises(ValueError, match="at least one sample"):
        ActiveSampler(0)
    with pytest.raises(ValueError, match="seed"):
        ActiveSampler(4, seed=-1)


def test_active_data_has_the_orders_of_the_source_and_its_own_key():
    digits = images("digits", batch_size=1437)
    train = TensorDataset(*next(iter(digits.train_dataloader())))
    data = ActiveData(digits, train, batch_size=32)
    same = ActiveData(digits, train, batch_size=32)
    other = ActiveData(digits, train, batch_size=16)
    assert data.fingerprint == same.fingerprint != other.fingerprint
    assert data.fingerprint != digits.fingerprint
    assert data.checksums == digits.checksums
    data.set_seed(1)
    data.sampler.active = torch.arange(40)
    assert [len(y) for _, y in data.train_dataloader()] == [32, 8]
    data.set_seed(1)
    assert len(data.train_dataloader()) == 45, "a new seed makes all samples active"
    assert len(data.val_dataloader()) == len(digits.val_dataloader())


# ------------------------------------------------------------------ evaluation leaves no trace


class Noisy(nn.Module):
    """Dropout, batch normalisation, and a part that the user keeps in evaluation mode."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))
        self.fixed = nn.Dropout(0.9)
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.fixed(self.body(x)))


def samples(n, seed=0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    return TensorDataset(torch.randn(n, 4, generator=generator) + y[:, None], y)


def test_evaluation_sees_all_samples_in_order_and_leaves_no_trace():
    torch.manual_seed(0)
    model, data = Noisy(), samples(23)
    model.fixed.eval()
    model(data.tensors[0]).sum().backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    loader = DataLoader(data, batch_size=5, generator=torch.Generator())
    z, y = evaluate_all(model, loader, lambda m, b: m(b[0]), lambda b: b[1])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))
    assert (model.training, model.body.training, model.fixed.training) == (True, True, False)
    assert not z.requires_grad
    assert torch.equal(y, data.tensors[1])
    torch.testing.assert_close(z, model.eval()(data.tensors[0]).detach())


def test_the_mode_comes_back_after_an_error():
    model = Noisy()
    with pytest.raises(ZeroDivisionError):
        evaluate_all(model, [0], lambda m, b: 1 / b)
    assert model.training


def test_half_precision_outputs_are_kept_in_single_precision_and_rows_become_columns():
    z, y = evaluate_all(nn.Identity(), [torch.ones(3).bfloat16()], lambda m, b: m(b))
    assert (z.dtype, tuple(z.shape), y) == (torch.float32, (3, 1), None)


# ------------------------------------------------------------------ the callback in real runs


def run(
    callback,
    *,
    data=None,
    epochs=6,
    seed=0,
    batch_size=8,
    net=None,
    callbacks=(),
    drop_last=False,
    workers=0,
    **options,
):
    data = samples(60) if data is None else data
    torch.manual_seed(seed)
    net = Noisy() if net is None else net
    module = ImageClassifier(net, partial(torch.optim.AdamW, lr=0.01), num_classes=3)
    sampler = ActiveSampler(len(data), seed=seed)
    loader = DataLoader(data, batch_size=batch_size, sampler=sampler, drop_last=drop_last, num_workers=workers)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        enable_model_summary=False,
        callbacks=[*callbacks, *([] if callback is None else [callback])],
        **{**quiet, **options},
    )
    trainer.fit(module, loader, DataLoader(samples(10, seed=1), batch_size=10))
    return module, trainer, sampler


class Spy(L.Callback):
    """What was trained on, at which rate, and how often validation ran."""

    def __init__(self):
        self.x, self.rates, self.validations = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.x.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.x[-1].append(batch[0].clone())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer, pl_module):
        self.validations.append(trainer.current_epoch)

    def sizes(self):
        return [sum(len(x) for x in epoch) for epoch in self.x]


@pytest.mark.parametrize(
    "callback",
    [
        pytest.param(lambda: SwiftLearn(0.1, 6), id="warm-up to the end"),
        pytest.param(lambda: SwiftLearn(1.0, 1), id="keep everything"),
        pytest.param(lambda: SwiftLearn(1.0, 2, refresh=1, criterion="el2n"), id="keep everything, measure often"),
        pytest.param(lambda: SwiftLearn(1.0, 2, observe="training"), id="keep everything, listen"),
    ],
)
def test_switched_off_it_is_plain_training_to_the_last_bit(callback):
    spies = Spy(), Spy()
    plain, trainer, _ = run(None, callbacks=[spies[0]])
    callback = callback()
    other, same, _ = run(callback, callbacks=[spies[1]])
    assert all(torch.equal(a, b) for a, b in zip(*([torch.cat(e) for e in spy.x] for spy in spies), strict=True))
    assert spies[0].rates == spies[1].rates
    for (name, a), b in zip(plain.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert callback.trained_samples == 6 * 60
    assert trainer.global_step == same.global_step


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("drop_last", [False, True])
def test_after_the_warm_up_only_the_active_set_is_trained_on(criterion, drop_last):
    spy = Spy()
    callback = SwiftLearn(0.2, 2, criterion=criterion, refresh=2)
    _, trainer, sampler = run(callback, callbacks=[spy], drop_last=drop_last, batch_size=9)
    warm, few = (54, 9) if drop_last else (60, 12)
    assert spy.sizes() == [warm] * 2 + [few] * 4
    assert callback.trained_samples == 2 * warm + 4 * few
    assert callback.evaluated_samples == 60 * {0: 0, 1: 2, 2: 3}[CRITERIA[criterion].looks]
    assert spy.validations == list(range(6)), "every epoch is validated, the short ones too"
    kept = {tuple(x) for x in samples(60).tensors[0][sampler.active].tolist()}
    assert {tuple(x) for batch in spy.x[-1] for x in batch.tolist()} <= kept
    assert len(sampler) == 12
    metrics = {k: v.item() for k, v in trainer.callback_metrics.items()}
    assert (metrics["trained_samples"], metrics["evaluated_samples"]) == (
        callback.trained_samples,
        callback.evaluated_samples,
    )
    assert metrics["importance_s"] == pytest.approx(callback.importance_s, rel=1e-3)


def test_the_schedule_comes_to_its_end():
    spy = Spy()
    callback = SwiftLearn(0.1, 1)
    _, trainer, _ = run(callback, callbacks=[spy])
    assert trainer.global_step == callback.planned_steps == 8 + 5 * 1 == len(spy.rates)
    assert spy.rates == pytest.approx([0.01 * warmup_cosine_factor(step, 13) for step in range(13)])
    assert (len(spy.x), trainer.max_steps) == (6, -1)


def test_a_limit_of_the_users_own_holds():
    callback = SwiftLearn(0.1, 1)
    _, trainer, _ = run(callback, max_steps=10)
    assert (trainer.global_step, callback.planned_steps, trainer.max_steps) == (10, 10, 10)


@pytest.mark.parametrize(("batches", "every"), [(None, 3), (2, 1)])
def test_updates_are_planned_with_accumulation_and_limits(batches, every):
    options = {} if batches is None else {"limit_train_batches": batches}
    spy = Spy()
    callback = SwiftLearn(0.3, 2)
    _, trainer, _ = run(callback, callbacks=[spy], accumulate_grad_batches=every, **options)
    expected = 2 * 3 + 4 * 1 if batches is None else 6 * 2
    assert trainer.global_step == callback.planned_steps == expected
    assert len(spy.x) == 6


class Constant(L.LightningModule):
    """A module of its own kind: no schedule, its own batch form, one update rule that is known."""

    def __init__(self, lr=0.0):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.lr = lr
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["place"])
        return F.cross_entropy(self.linear(batch["x"]), batch["label"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Places(Dataset):
    """Samples as dictionaries."""

    def __init__(self, n=30):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 2, generator=generator)
        self.label = torch.randint(2, (n,), generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, place):
        return {"x": self.x[place], "label": self.label[place], "place": place}


def outputs_of(module, batch):
    return module.linear(batch["x"])


def label_of(batch):
    return batch["label"]


def fit(module, callback, epochs=4, workers=0, **options):
    data = Places()
    sampler = ActiveSampler(len(data), seed=1)
    loader = DataLoader(data, batch_size=7, sampler=sampler, num_workers=workers)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[callback], enable_model_summary=False, **{**quiet, **options}
    )
    trainer.fit(module, loader)
    return data, sampler


def test_nothing_trained_means_no_change():
    callback = SwiftLearn(0.2, 2, outputs=outputs_of, targets=label_of)
    _, sampler = fit(Constant(lr=0.0), callback)
    assert callback.importance.eq(0).all()
    assert sampler.active.tolist() == [0, 1, 2, 3, 4, 5], "all alike: the first ones"


@pytest.mark.parametrize("warmup", [1, 2])
def test_the_change_is_that_between_the_right_stages(warmup):
    torch.manual_seed(0)
    module, twin = Constant(lr=0.5), Constant()
    twin.load_state_dict(module.state_dict())
    data = Places()
    stages = [twin.linear(data.x).softmax(1).detach()]
    order = ActiveSampler(30, seed=1)
    for epoch in range(warmup):
        order.set_epoch(epoch)
        for rows in torch.tensor(list(order)).split(7):
            loss = F.cross_entropy(twin.linear(data.x[rows]), data.label[rows])
            grads = torch.autograd.grad(loss, list(twin.parameters()))
            with torch.no_grad():
                for p, g in zip(twin.parameters(), grads, strict=True):
                    p.sub_(0.5 * g)
        stages.append(twin.linear(data.x).softmax(1).detach())
    callback = SwiftLearn(0.2, warmup, outputs=outputs_of, targets=label_of)
    fit(module, callback, epochs=warmup + 1)
    torch.testing.assert_close(callback.importance, (stages[-1] - stages[-2]).norm(dim=1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("workers", [0, 2])
def test_listening_finds_the_outputs_of_the_training_passes(workers):
    class Called(Constant):
        def forward(self, x):
            return self.linear(x)

        def training_step(self, batch, batch_idx):
            self.seen.append((batch["place"], self(batch["x"])))
            return F.cross_entropy(self.seen[-1][1], batch["label"])

    torch.manual_seed(0)
    module = Called(lr=0.3)
    callback = SwiftLearn(0.2, 2, observe="training", criterion="logit_change")
    _, sampler = fit(module, callback, workers=workers)
    expected = torch.zeros(2, 30, 2)
    for epoch in range(2):
        for places, found in module.seen[5 * epoch : 5 * epoch + 5]:
            expected[epoch, places] = found.detach()
    torch.testing.assert_close(callback.importance, (expected[1] - expected[0]).norm(dim=1))
    assert callback.evaluated_samples == 0
    assert len(sampler) == 6
    assert not module._forward_hooks


def test_listening_needs_one_call_a_step():
    with pytest.raises(ValueError, match="calls the module once"):
        fit(Constant(), SwiftLearn(0.2, 2, observe="training"))


def test_samples_that_were_never_seen_rank_last():
    callback = SwiftLearn(0.5, 1, observe="training", criterion="loss")
    _, _, sampler = run(callback, epochs=2, limit_train_batches=5)
    assert callback.importance.isinf().sum() == 20
    assert callback.importance[sampler.active].isfinite().all()


def test_a_dropped_sample_returns():
    """The importance is set by hand: at a refresh, other samples matter."""
    wanted = [torch.arange(6), torch.arange(20, 26)]
    calls = []

    def score(new, old, y):
        calls.append(len(new))
        importance = torch.zeros(30)
        importance[wanted[len(calls) - 1]] = 1.0
        return importance

    module = Constant()
    callback = SwiftLearn(0.2, 1, refresh=1, criterion=Criterion(1, False, score), outputs=outputs_of)
    _, sampler = fit(module, callback, epochs=3)
    assert calls == [30, 30]
    trained = [sorted(torch.cat(module.seen[i:j]).tolist()) for i, j in ((0, 5), (5, 6), (6, 7))]
    assert trained == [list(range(30)), wanted[0].tolist(), wanted[1].tolist()]
    assert sampler.active.tolist() == wanted[1].tolist()


def test_random_is_redrawn_at_a_refresh_and_follows_the_seed():
    sets = {}
    for seed in (0, 1):
        for refresh in (0, 1):
            _, _, sampler = run(SwiftLearn(0.2, 1, criterion="random", refresh=refresh), seed=seed, epochs=3)
            sets[seed, refresh] = tuple(sampler.active.tolist())
    assert len(set(sets.values())) == 4


def test_random_choices_are_uniform():
    counts = Counter()
    sampler = ActiveSampler(20)
    callback = SwiftLearn(0.25, 1, criterion="random")
    for seed in range(400):
        sampler.seed = seed
        counts.update(callback._choose(sampler, 0, 0).tolist())
    assert sum(counts.values()) == 400 * 5
    assert all(65 < counts[place] < 135 for place in range(20)), counts  # 100 expected, standard deviation 8.7


def test_balanced_keeps_every_class():
    data = samples(60)
    _, _, free = run(SwiftLearn(0.2, 2, criterion="loss"), data=data)
    _, _, balanced = run(SwiftLearn(0.2, 2, criterion="loss", balanced=True), data=data)
    share = torch.bincount(data.tensors[1], minlength=3) / 60 * 12
    found = torch.bincount(data.tensors[1][balanced.active], minlength=3)
    assert (found - share).abs().max() <= 1
    assert len(balanced.active) == len(free.active) == 12


def test_one_sample_may_be_left():
    callback = SwiftLearn(0.001, 1)
    run(callback, epochs=3, net=nn.Linear(4, 3))
    assert callback.trained_samples == 60 + 2


def test_a_run_goes_on_where_it_stopped(tmp_path):
    def net():
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def callback():
        return SwiftLearn(0.2, 2, refresh=2)

    whole, straight, _ = run(callback(), net=net(), epochs=6)
    spies = Spy(), Spy()
    run(callback(), net=net(), epochs=6, callbacks=[Save(tmp_path / "half.ckpt", 3), spies[0]])
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert any(key.startswith("SwiftLearn") for key in saved["callbacks"])

    data = samples(60)
    torch.manual_seed(99)  # a different start: loading must replace it
    module = ImageClassifier(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), partial(torch.optim.AdamW, lr=0.7), num_classes=3
    )
    again = callback()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        max_epochs=6, accelerator="cpu", callbacks=[again, spies[1]], enable_model_summary=False, **quiet
    )
    loader = DataLoader(data, batch_size=8, sampler=ActiveSampler(60, seed=0))
    validation = DataLoader(samples(10, seed=1), batch_size=10)
    trainer.fit(module, loader, validation, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert spies[1].sizes() == [12] * 3
    assert spies[1].validations == [3, 4, 5]
    for (name, a), b in zip(whole.state_dict().items(), module.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert again.trained_samples == 2 * 60 + 4 * 12
    assert trainer.global_step == straight.global_step


class Save(L.Callback):
    """Saves a checkpoint after some epochs."""

    def __init__(self, path, epochs):
        self.path, self.epochs = path, epochs

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": 0}, "warmup must be at least 1"),
        ({"refresh": -1}, "refresh"),
        ({"criterion": "importance"}, "unknown criterion 'importance'; known are output_change"),
        ({"observe": "dreaming"}, "observe must be 'evaluation' or 'training'"),
        ({"observe": "training", "warmup": 1}, "warmup must be at least 2 to see every sample 2 times"),
        ({"observe": "training", "warmup": 2, "refresh": 1}, "do not see dropped samples"),
        ({"criterion": "random", "balanced": True}, "balanced on average"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SwiftLearn(**{"keep": 0.1, **options})


def test_runs_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="warmup must be 1 to the number of epochs, 3, got 4"):
        run(SwiftLearn(0.1, 4), epochs=3)
    with pytest.raises(ValueError, match="max_epochs"):
        run(SwiftLearn(0.1), epochs=-1, max_steps=3)
    with pytest.raises(ValueError, match="drop_last=True leaves none"):
        run(SwiftLearn(0.1), drop_last=True)
    plain = DataLoader(samples(20), batch_size=4, shuffle=True)
    module = ImageClassifier(Noisy(), partial(torch.optim.SGD, lr=0.1), num_classes=3)
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[SwiftLearn()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="sampler=ActiveSampler"):
        trainer.fit(module, plain)


@pytest.mark.parametrize("criterion", ["output_change", "el2n", "loss"])
def test_a_single_output_has_no_probabilities(criterion):
    with pytest.raises(ValueError, match="use criterion='logit_change'"):
        run(SwiftLearn(0.2, 1, criterion=criterion, outputs=lambda module, batch: module(batch[0])[:, :1]), epochs=2)
    callback = SwiftLearn(0.2, 1, criterion="logit_change", outputs=lambda module, batch: module(batch[0])[:, :1])
    run(callback, epochs=2)
    assert callback.importance.shape == (60,)


def test_an_importance_that_is_no_number_is_a_divergence():
    bad = Criterion(1, False, lambda new, old, y: new[:, 0] * float("nan"))
    with pytest.raises(Diverged):
        run(SwiftLearn(0.2, 1, criterion=bad), epochs=2)
