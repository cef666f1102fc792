"""The image classifier in real Lightning runs: metrics against numpy, groups, seeds, divergence, precision."""

import logging
import math
import pickle
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from leantrain.training import Diverged, ImageClassifier, small_vit
from leantrain.training.schedules import warmup_cosine_factor

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

SGD = partial(torch.optim.SGD, lr=0.1)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.05)


def images(count, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (count,), generator=generator)
    return torch.randn(count, 1, 4, 4, generator=generator) + y.view(-1, 1, 1, 1), y


def batches(count, batch_size=8, seed=0):
    return DataLoader(TensorDataset(*images(count, seed=seed)), batch_size=batch_size)


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(**{"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False, **quiet, **options})


def softmax_losses(logits, y):
    """Cross-entropy of every sample in float64, written out."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(y)), y]


def test_validation_metrics_equal_a_numpy_computation():
    # 21 samples in batches of 8 leave a short last batch, which a mean over batches would weigh too much.
    torch.manual_seed(0)
    classifier = ImageClassifier(linear(), SGD, num_classes=3, label_smoothing=0.3)
    run = trainer()
    metrics = run.validate(classifier, batches(21), verbose=False)[0]
    x, y = images(21)
    weight, bias = (p.detach().double().numpy() for p in classifier.model[1].parameters())
    logits = x.flatten(1).double().numpy() @ weight.T + bias
    hits = (logits.argmax(axis=1) == y.numpy()).sum()
    assert 0 < hits < 21
    assert metrics["val_accuracy"] == pytest.approx(100 * hits / 21, rel=1e-6)
    assert metrics["val_loss"] == pytest.approx(softmax_losses(logits, y.numpy()).mean(), rel=1e-5)


def test_the_training_loss_is_the_mean_over_the_epochs_samples():
    class Watch(L.Callback):
        """The sum of losses over samples, collected batch by batch, and what the module says after each epoch."""

        def __init__(self):
            self.total, self.count, self.epochs = 0.0, 0, []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.total += outputs["loss"].item() * len(batch[1])
            self.count += len(batch[1])

        def on_train_epoch_end(self, trainer, module):
            logged = trainer.callback_metrics["train_loss"].item()
            self.epochs.append((module.train_loss, logged, self.total / self.count))
            self.total, self.count = 0.0, 0

    torch.manual_seed(0)
    watch = Watch()
    classifier = ImageClassifier(linear(), SGD, num_classes=3, label_smoothing=0.1)
    assert math.isnan(classifier.train_loss)
    run = trainer(max_epochs=3, callbacks=[watch])
    run.fit(classifier, batches(19))
    assert len(watch.epochs) == 3
    for said, logged, expected in watch.epochs:
        assert (said, logged) == pytest.approx((expected, expected), rel=1e-6)
    assert watch.epochs[2][0] < watch.epochs[0][0]


def test_the_smoothed_loss_follows_its_formula():
    torch.manual_seed(0)
    classifier = ImageClassifier(linear(), SGD, num_classes=3, label_smoothing=0.3)
    x, y = images(8)
    with torch.no_grad():
        log_p = classifier(x).log_softmax(dim=1).double().numpy()
    targets = 0.7 * np.eye(3)[y.numpy()] + 0.3 / 3
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(classifier, DataLoader(TensorDataset(x, y), batch_size=8))
    assert classifier.train_loss == pytest.approx(-(targets * log_p).sum(axis=1).mean(), rel=1e-5)


def test_weight_decay_spares_biases_and_scales():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    model[3].weight.requires_grad = False
    decayed, spared = ImageClassifier(model, ADAMW, num_classes=3).parameter_groups()
    assert decayed["params"] == [model[0].weight]
    assert all(
        a is b
        for a, b in zip(spared["params"], [model[0].bias, model[1].weight, model[1].bias, model[3].bias], strict=True)
    )
    assert "weight_decay" not in decayed
    assert spared["weight_decay"] == 0.0
    (whole,) = ImageClassifier(model, ADAMW, num_classes=3, decay_1d=True).parameter_groups()
    assert len(whole["params"]) == 5
    (only,) = ImageClassifier(nn.Linear(4, 3, bias=False), ADAMW, num_classes=3).parameter_groups()
    assert len(only["params"]) == 1


def test_the_optimiser_gets_the_groups_and_the_schedule_steps_with_it():
    class Rates(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    rates = Rates()
    classifier = ImageClassifier(linear(), ADAMW, num_classes=3, warmup_fraction=0.25)
    run = trainer(max_epochs=2, callbacks=[rates])
    run.fit(classifier, batches(32))
    assert [group["weight_decay"] for group in run.optimizers[0].param_groups] == [0.05, 0.0]
    expected = [0.01 * warmup_cosine_factor(step, 8, 0.25) for step in range(8)]
    assert [seen[0] for seen in rates.seen] == pytest.approx(expected)
    assert [seen[1] for seen in rates.seen] == pytest.approx(expected)


def trained_weights(seed, **options):
    L.seed_everything(seed, verbose=False)
    model = small_vit(image_size=4, patch_size=2, in_chans=1, num_classes=3, dim=12, depth=2, heads=2, mlp_ratio=2)
    classifier = ImageClassifier(model, ADAMW, num_classes=3)
    trainer(max_epochs=2, **options).fit(classifier, batches(24))
    return nn.utils.parameters_to_vector(model.parameters())


def test_the_same_seed_gives_the_same_weights_to_the_last_bit():
    first, again, other = trained_weights(3), trained_weights(3), trained_weights(4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_mixed_bfloat16_trains_close_to_float32_and_keeps_the_loss_in_float32():
    full, mixed = trained_weights(3), trained_weights(3, precision="bf16-mixed")
    assert mixed.dtype == torch.float32
    assert not torch.equal(full, mixed)
    # Six AdamW steps at 0.01 move a weight by at most 0.06; rounding may turn some, not most of them.
    assert (full - mixed).abs().mean() < 0.005


def test_channels_last_changes_the_memory_format_and_not_the_result():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    x = torch.randn(5, 2, 6, 6)
    expected = model(x)
    seen = []
    model[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    classifier = ImageClassifier(model, SGD, num_classes=3, channels_last=True)
    torch.testing.assert_close(classifier(x), expected)
    assert seen == [True]
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(poison):
    x, y = images(32)
    x[20] = poison  # the third batch of eight
    with pytest.raises(Diverged, match="at step 2") as caught:
        trainer().fit(ImageClassifier(linear(), SGD, num_classes=3), DataLoader(TensorDataset(x, y), batch_size=8))
    assert caught.value.step == 2
    assert not math.isfinite(caught.value.loss)


def test_a_validation_loss_that_is_no_number_is_shown_not_left_out():
    x, y = images(16)
    x[3] = math.nan
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    metrics = trainer().validate(ImageClassifier(linear(), SGD, num_classes=3), data, verbose=False)[0]
    assert math.isnan(metrics["val_loss"])


def test_diverged_survives_pickling():
    error = pickle.loads(pickle.dumps(Diverged(7, math.inf)))
    assert (error.step, error.loss) == (7, math.inf)
    assert "became inf at step 7" in str(error)


def test_a_run_without_an_end_is_refused():
    classifier = ImageClassifier(linear(), SGD, num_classes=3)
    with pytest.raises(ValueError, match="max_epochs or max_steps"):
        trainer(max_epochs=-1, limit_val_batches=0).fit(classifier, batches(8))


def test_a_model_with_the_wrong_number_of_logits_is_named():
    classifier = ImageClassifier(linear(), SGD, num_classes=4)
    with pytest.raises(ValueError, match=r"\(8, 4\), got \(8, 3\)"):
        trainer().fit(classifier, batches(8))


@pytest.mark.parametrize(
    "options",
    [{"num_classes": 1}, {"warmup_fraction": 1.0}, {"label_smoothing": 1.0}, {"label_smoothing": math.nan}],
)
def test_bad_settings_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        ImageClassifier(linear(), SGD, **({"num_classes": 3} | options))
