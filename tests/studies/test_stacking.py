"""Stacks: all off they are plain training, switched on each technique does what its chapter says, in any company."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from timm.layers.attention import Attention
from torch import nn

from leantrain.low_rank.factors import decompose
from leantrain.measure.cost import count_parameters
from leantrain.studies.stacking import SWITCHES, Stack, StackedClassifier, active_images, stacked
from leantrain.techniques.adan import Adan
from leantrain.techniques.gqkva import GroupedAttention, group_attention
from leantrain.techniques.hardware_aware_resnet9 import TimeBudget
from leantrain.techniques.progressive_layer_dropping import ProgressiveStack
from leantrain.techniques.skipvit import SkipBlocks, skip_tokens
from leantrain.techniques.swiftlearn import SwiftLearn
from leantrain.training import small_vit


def vit(depth=4):
    torch.manual_seed(0)
    model = small_vit(image_size=8, patch_size=2, in_chans=1, num_classes=10, dim=24, depth=depth, heads=6, mlp_ratio=2)
    for parameter in model.parameters():  # timm's class token starts with a look at nothing in particular
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def digits():
    return active_images("digits", batch_size=16, train_size=96, val_size=32)


@pytest.fixture
def images():
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


class Watch(L.Callback):
    """Notes the rate, the loss and the gates of every step."""

    def __init__(self):
        self.rates, self.gates = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(module, data, *callbacks, epochs=3, **options):
    L.seed_everything(0, verbose=False)
    data.set_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, **options,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    return trainer


def classifier(*techniques, rate=1e-2, budget=None, **settings):
    return StackedClassifier(vit(), stacked(techniques, **settings), rate=rate, num_classes=10, budget=budget)


def test_all_off_it_is_the_plain_model_to_the_last_bit(images):
    assert torch.equal(Stack().apply(vit())(images), vit()(images))
    assert Stack().callbacks() == []
    assert stacked([]) == Stack()


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_changes_the_run(name, digits):
    plain, changed = classifier(), classifier(name)
    for module in (plain, changed):
        fit(module, digits, limit_val_batches=0)
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (plain, changed)]
    assert len(weights[0]) != len(weights[1]) or not torch.allclose(*weights)


def test_two_optimisers_are_one_too_many():
    with pytest.raises(ValueError, match="Adan and CLARS both take the place of the optimizer"):
        stacked(["Adan", "GQKVA", "CLARS"])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: stacked(["Adam"]), "unknown technique 'Adam'; known are SkipViT"),
        (lambda: stacked(["GQKVA"], groups=3), "no setting groups; it has centralise"),
        (lambda: Stack(optimizer="sgd"), "expected one of adamw, adan, clars"),
        (lambda: Stack(compression=0.5), "expected 1"),
        (lambda: classifier("layer dropping", budget=TimeBudget(1.0)), "run by the clock does not know"),
    ],
)
def test_bad_input_says_what_to_do(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()


def test_strengths_of_what_is_off_have_no_effect():
    assert stacked(["Adan"], drop_ratio=0.3, keep=0.2, split=2) == Stack(optimizer="adan", split=2)
    assert stacked(["SkipViT"], drop_ratio=0.3).drop_ratio == 0.3


# ---------------------------------------------------------------- SkipViT with GQKVA


def chosen_twice(model, images):
    model.eval()
    with torch.no_grad():
        return [model(images) is not None and model.blocks.kept for _ in range(2)]


def test_the_block_that_scores_the_tokens_keeps_its_attention(images):
    model = stacked(["SkipViT", "GQKVA"], split=2, rejoin=3).apply(vit())
    kinds = [type(block.attn) for block in model.blocks.children()]
    assert kinds == [GroupedAttention, Attention, GroupedAttention, GroupedAttention]
    once, again = chosen_twice(model, images)
    assert torch.equal(once, again)
    assert count_parameters(model) < count_parameters(vit())


def test_without_that_the_choice_of_tokens_silently_becomes_random(images):
    """Why the order and the exception matter: SkipViT falls back to a random score, without a word."""
    model = group_attention(skip_tokens(vit(), split=2, rejoin=3), "GQKVA-3.2")
    once, again = chosen_twice(model, images)
    assert not torch.equal(once, again)
    with pytest.raises(ValueError, match="to give the score"):
        skip_tokens(group_attention(vit(), "GQKVA-3.2"), split=2, rejoin=3)


def test_a_decomposed_projection_cannot_score_the_tokens(images):
    """Why only the MLPs are decomposed."""
    model = skip_tokens(vit(), split=2, rejoin=3)
    model.blocks[1].attn.qkv = decompose(model.blocks[1].attn.qkv, 8)
    with pytest.raises(AttributeError, match="weight"):
        model(images)


# ---------------------------------------------------------------- dropped layers


def test_with_the_bypass_layers_are_dropped_among_its_blocks():
    model = stacked(["SkipViT", "layer dropping"], split=1, rejoin=3).apply(vit())
    (inner,) = [part for part in model.modules() if isinstance(part, ProgressiveStack)]
    assert isinstance(model.blocks, SkipBlocks)
    assert [type(block) for block in model.blocks.children()].index(ProgressiveStack) == 1
    assert (len(inner), len(model.blocks)) == (2, 3)


@pytest.mark.parametrize("partner", ["sharpness-aware", "CLARS"])
def test_all_passes_of_a_step_go_through_the_same_blocks(partner, digits):
    module = classifier("layer dropping", partner, rate=1.0 if partner == "CLARS" else 1e-2)
    seen = {}
    (stack,) = [part for part in module.modules() if isinstance(part, ProgressiveStack)]
    stack.register_forward_hook(lambda *_: seen.setdefault(module.global_step, []).append(stack.gates))
    fit(module, digits, epochs=6, limit_val_batches=0)
    assert all(len(gates) == (2 if partner == "sharpness-aware" else 3) for gates in seen.values())
    assert all(len(set(gates)) == 1 for gates in seen.values())
    assert len({gates[0] for gates in seen.values()}) > 1, "over the steps they change"


# ---------------------------------------------------------------- the run


def test_four_in_one_run_all_at_work(digits):
    module = classifier("SkipViT", "GQKVA", "SwiftLearn", "Adan", warmup=1)
    trainer = fit(module, digits, epochs=4)
    (swiftlearn,) = [c for c in trainer.callbacks if isinstance(c, SwiftLearn)]
    assert swiftlearn.trained_samples == 96 + 48 * 3
    assert trainer.global_step == 6 + 3 * 3
    assert isinstance(module.optimizers().optimizer, Adan)
    assert module.model.blocks.kept.shape[1] == 7
    assert len([p for p in module.modules() if isinstance(p, GroupedAttention)]) == 3


def test_the_rate_rises_and_ends_at_nothing(digits):
    watch = Watch()
    fit(classifier(), digits, watch, epochs=5)
    assert len(watch.rates) == 30
    assert watch.rates[0] < 1e-3
    assert max(watch.rates) == pytest.approx(1e-2, rel=0.02)
    assert watch.rates[-1] < 5e-4


def test_by_the_clock_the_rate_follows_the_time_and_the_run_ends(digits):
    ticks = iter(range(100_000))
    budget = TimeBudget(200.0, clock=lambda: float(next(ticks)))
    watch = Watch()
    module = classifier(budget=budget)
    trainer = fit(module, digits, watch, epochs=1000)
    assert trainer.current_epoch < 1000
    assert watch.rates[-1] < 0.05 * max(watch.rates)
    assert budget.elapsed <= 210
    assert "val_accuracy" in trainer.callback_metrics, "the run is validated when it ends"


def test_time_for_looking_at_all_samples_is_not_taken_for_a_batch(digits):
    module = classifier("SwiftLearn", budget=TimeBudget(5.0))
    kinds = [type(callback) for callback in module.configure_callbacks()]
    assert kinds == [TimeBudget, SwiftLearn]


def test_a_sharpness_aware_step_takes_two_gradients_and_smooths_labels(digits):
    module = classifier("sharpness-aware")
    trainer = fit(module, digits, epochs=1, limit_val_batches=0)
    assert module.passes == 2 * trainer.global_step == 12
    assert module.label_smoothing == 0.1


def test_images_are_the_same_whoever_asks(digits):
    x, y = digits.train.tensors
    assert (x.shape, y.shape) == ((96, 1, 8, 8), (96,))
    again = active_images("digits", batch_size=7, train_size=96, val_size=32)
    assert torch.equal(x.flatten(1).sum(1).sort().values, again.train.tensors[0].flatten(1).sum(1).sort().values)
    assert sum(len(y) for _, y in again.train_dataloader()) == 96
    stand_in = active_images("cifar10", batch_size=3, stand_in=True)
    assert stand_in.train.tensors[0].shape == (6, 3, 32, 32)
