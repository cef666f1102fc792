"""The language model: its loss against a loop, perplexity of known models, metrics, clipping, groups, divergence."""

from __future__ import annotations

import logging
import math
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from leantrain.training import Diverged, LanguageModel, next_token_loss, perplexity
from leantrain.training.language_model import logits_of
from leantrain.training.scheduled import scheduled

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

SGD = partial(torch.optim.SGD, lr=0.1)
ADAMW = partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1)


class Bigram(nn.Module):
    """Logits of the next token from a table, row by row."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table.clone())

    def forward(self, ids):
        return self.table[ids]


def counting(vocab=5, blocks=12, length=9):
    return (torch.arange(length) + torch.arange(blocks)[:, None]) % vocab


def trainer(**options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", num_sanity_val_steps=0, **{"max_epochs": 1, **quiet, **options})


def loader(data, batch_size=4):
    return DataLoader(data, batch_size=batch_size)


def test_the_loss_is_that_of_a_loop_over_tokens():
    logits = torch.randn(3, 6, 7, dtype=torch.float64)
    ids = torch.randint(7, (3, 6))
    expected = [sum(-math.log(logits[b, n].softmax(-1)[ids[b, n + 1]].item()) for n in range(5)) / 5 for b in range(3)]
    torch.testing.assert_close(next_token_loss(logits, ids), torch.tensor(expected, dtype=torch.float64))


def test_predicting_the_token_itself_earns_nothing():
    ids = counting()
    itself, following = nn.functional.one_hot(ids, 5) * 50.0, nn.functional.one_hot((ids + 1) % 5, 5) * 50.0
    assert next_token_loss(itself, ids).min() > 49
    assert next_token_loss(following, ids).max() < 1e-6


def test_the_last_prediction_and_the_first_token_do_not_count():
    logits = torch.randn(2, 5, 4)
    ids = torch.randint(4, (2, 5))
    expected = next_token_loss(logits, ids)
    logits[:, -1] = torch.randn(2, 4)
    ids[:, 0] = (ids[:, 0] + 1) % 4
    assert torch.equal(next_token_loss(logits, ids), expected)


def test_half_precision_is_widened_and_double_stays():
    ids = torch.randint(7, (2, 6))
    logits = torch.randn(2, 6, 7)
    assert next_token_loss(logits.bfloat16(), ids).dtype == torch.float32
    assert next_token_loss(logits.double(), ids).dtype == torch.float64


@pytest.mark.parametrize(
    ("logits", "ids"), [((2, 5), (2, 5)), ((2, 5, 4), (2, 4)), ((2, 1, 4), (2, 1)), ((2, 5, 4), (3, 5))]
)
def test_shapes_that_do_not_fit_are_named(logits, ids):
    with pytest.raises(ValueError, match=r"\(B, N, V\)"):
        next_token_loss(torch.zeros(logits), torch.zeros(ids, dtype=torch.long))


def test_logits_are_found_alone_and_in_an_output():
    x = torch.zeros(2)
    assert logits_of(x) is x
    assert logits_of(SimpleNamespace(logits=x)) is x


def test_perplexity_of_models_that_are_known():
    uniform = Bigram(torch.zeros(5, 5))
    assert perplexity(uniform, loader(counting())) == pytest.approx(5)
    half = Bigram(torch.full((5, 5), -math.inf))
    with torch.no_grad():
        for i in range(5):
            half.table[i, (i + 1) % 5] = half.table[i, i] = 0.0
    assert perplexity(half, loader(counting())) == pytest.approx(2)


def test_perplexity_weighs_blocks_alike_evaluates_without_dropout_and_restores_the_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 8), nn.Dropout(0.5), nn.Linear(8, 5))
    model[2].eval()
    data = torch.randint(5, (10, 6))
    values = {perplexity(model, data.split(size)) for size in (1, 3, 10)}
    assert max(values) == pytest.approx(min(values), rel=1e-6)
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="at least one batch"):
        perplexity(model, [])


def test_training_learns_to_count_and_logs_the_perplexity_of_all_blocks():
    torch.manual_seed(0)
    module = LanguageModel(Bigram(torch.zeros(5, 5)), ADAMW)
    run = trainer(max_epochs=60)
    run.fit(module, loader(counting()), loader(counting(blocks=10)))
    metrics = run.callback_metrics
    assert metrics["val_perplexity"] < 1.3
    assert metrics["val_perplexity"].item() == pytest.approx(perplexity(module.model, [counting(blocks=10)]), rel=1e-5)
    assert metrics["val_loss"].exp().item() == pytest.approx(metrics["val_perplexity"].item(), rel=1e-6)
    assert "train_loss" in metrics


def test_a_validation_of_a_divergent_model_is_not_a_number():
    module = LanguageModel(Bigram(torch.full((5, 5), math.nan)), SGD)
    (found,) = trainer().validate(module, loader(counting()), verbose=False)
    assert math.isnan(found["val_perplexity"])


def test_a_loss_that_is_not_finite_ends_the_run():
    module = LanguageModel(Bigram(torch.full((5, 5), math.nan)), SGD)
    with pytest.raises(Diverged, match="0"):
        trainer().fit(module, loader(counting()))


def grown(clip, **options):
    """Length of a single step of plain gradient descent with the rate 1."""
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)) * 20
    module = LanguageModel(Bigram(table), partial(torch.optim.SGD, lr=1.0), warmup_fraction=0, clip=clip)
    trainer(max_steps=1, **options).fit(module, loader(counting(), 12))
    return (module.model.table.detach() - table).norm().item()


def test_the_gradient_is_clipped_to_its_norm_and_the_trainer_comes_first():
    free = grown(None)
    assert free > 0.3
    assert grown(0.01) == pytest.approx(0.01, rel=1e-3)
    assert grown(1e6) == pytest.approx(free)
    assert grown(0.01, gradient_clip_val=0.2) == pytest.approx(0.2, rel=1e-3)


def test_vectors_and_what_is_frozen_are_left_out_of_the_decay():
    net = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    net[0].weight.requires_grad_(False)
    module = LanguageModel(net, ADAMW)
    trainer(max_steps=1).fit(module, loader(counting()))
    decayed, others = module.optimizers().param_groups
    assert [p.shape for p in decayed["params"]] == [(5, 4)]
    assert decayed["params"][0] is net[2].weight
    assert others["weight_decay"] == 0
    assert {id(p) for p in others["params"]} == {id(net[1].weight), id(net[1].bias), id(net[2].bias)}


def test_the_schedule_spans_the_run_and_needs_an_end():
    module = LanguageModel(Bigram(torch.zeros(5, 5)), SGD, warmup_fraction=0.5)
    trainer(max_epochs=2).fit(module, loader(counting()))
    assert module.lr_schedulers().get_last_lr()[0] == pytest.approx(0, abs=1e-6)
    endless = SimpleNamespace(trainer=SimpleNamespace(estimated_stepping_batches=math.inf))
    with pytest.raises(ValueError, match="max_epochs or max_steps"):
        scheduled(endless, SGD, 0.1)


@pytest.mark.parametrize(
    ("options", "named"), [({"warmup_fraction": 1.0}, "1.0"), ({"clip": 0.0}, "0.0"), ({"clip": math.nan}, "nan")]
)
def test_numbers_out_of_range_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        LanguageModel(Bigram(torch.zeros(2, 2)), SGD, **options)
