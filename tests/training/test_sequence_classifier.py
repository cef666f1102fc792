"""The classifier of token sequences in real Lightning runs, and the encoders that it fine-tunes."""

import logging
from functools import partial
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from sklearn.metrics import matthews_corrcoef
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from leantrain.data import MissingData, SentenceBatch
from leantrain.data.errors import CorruptData
from leantrain.training import Diverged, SequenceClassifier, encoders
from leantrain.training.schedules import warmup_cosine_factor

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

SGD = partial(torch.optim.SGD, lr=0.1)


class Bag(nn.Module):
    """Mean of the embeddings of the tokens that the mask shows, and a linear layer."""

    def __init__(self, bare=False, classes=2):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.head = nn.Linear(8, classes)
        self.bare = bare

    def forward(self, input_ids, attention_mask):
        shown = attention_mask[:, :, None]
        logits = self.head((self.table(input_ids) * shown).sum(1) / shown.sum(1))
        return logits if self.bare else SimpleNamespace(logits=logits)


def batch(size, seed=0, length=6):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (size,), generator=generator)
    ids = torch.randint(10, (size, length), generator=generator) + 10 * y[:, None]
    lengths = torch.randint(1, length + 1, (size,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return SentenceBatch(ids * mask, mask, y, torch.arange(size))


def loader(sizes, seed=0):
    return DataLoader([batch(size, seed + k) for k, size in enumerate(sizes)], batch_size=None)


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(**{"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False, **quiet, **options})


def test_validation_metrics_equal_an_independent_computation():
    torch.manual_seed(0)
    classifier = SequenceClassifier(Bag(), SGD, num_classes=2)
    metrics = trainer().validate(classifier, loader([8, 8, 5]), verbose=False)[0]
    parts = [batch(size, k) for k, size in enumerate([8, 8, 5])]
    with torch.no_grad():
        logits = torch.cat([classifier(p.ids, p.mask) for p in parts])
    y = torch.cat([p.y for p in parts])
    assert metrics["val_accuracy"] == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item(), rel=1e-6)
    assert metrics["val_loss"] == pytest.approx(F.cross_entropy(logits.double(), y).item(), rel=1e-6)
    assert metrics["val_matthews"] == pytest.approx(matthews_corrcoef(y, logits.argmax(1)), abs=1e-6)


def scored(part):
    """The batch with scores: its classes as numbers, a little moved."""
    return part._replace(y=5.0 * part.y - part.index / 100)


def test_scores_are_fitted_by_their_square_and_measured_by_their_correlation():
    torch.manual_seed(0)
    parts = [scored(batch(size, k)) for k, size in enumerate([8, 8, 5])]
    loaded = DataLoader(parts, batch_size=None)
    module = SequenceClassifier(Bag(classes=1), SGD, num_classes=1)
    metrics = trainer().validate(module, loaded, verbose=False)[0]
    with torch.no_grad():
        found = torch.cat([module(p.ids, p.mask)[:, 0] for p in parts])
    y = torch.cat([p.y for p in parts])
    assert metrics["val_loss"] == pytest.approx(((found - y) ** 2).mean().item(), rel=1e-5)
    assert metrics["val_pearson"] == pytest.approx(np.corrcoef(found, y)[0, 1], abs=1e-5)
    assert module.loss(parts[0]).item() == pytest.approx(((found[:8] - y[:8]) ** 2).mean().item(), rel=1e-5)
    run = trainer(max_epochs=30)
    run.fit(SequenceClassifier(module.model, partial(torch.optim.AdamW, lr=0.05), num_classes=1), loaded, loaded)
    assert run.callback_metrics["val_pearson"] > 0.95
    constant = SequenceClassifier(Bag(classes=1), SGD, num_classes=1)
    torch.nn.init.zeros_(constant.model.head.weight)
    assert trainer().validate(constant, loaded, verbose=False)[0]["val_pearson"] == 0


def test_it_learns_and_reports_the_mean_training_loss():
    torch.manual_seed(0)
    classifier = SequenceClassifier(Bag(bare=True), partial(torch.optim.AdamW, lr=0.05), num_classes=2)
    run = trainer(max_epochs=15)
    run.fit(classifier, loader([16] * 4), loader([32], seed=9))
    assert run.callback_metrics["val_accuracy"] == 100
    assert run.callback_metrics["val_matthews"] == 1
    frozen = SequenceClassifier(Bag(), partial(torch.optim.SGD, lr=0.0), num_classes=2)
    run = trainer()
    run.fit(frozen, loader([8, 8]))
    with torch.no_grad():
        expected = np.mean([frozen.loss(batch(8, k)).item() for k in range(2)])
    assert run.callback_metrics["train_loss"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("own", "trainers", "expected"), [(0.01, None, 0.01), (0.01, 0.002, 0.002), (None, None, None)]
)
def test_the_gradient_is_clipped(own, trainers, expected):
    torch.manual_seed(0)
    classifier = SequenceClassifier(Bag(), partial(torch.optim.SGD, lr=1.0), num_classes=2, warmup_fraction=0, clip=own)
    before = [p.detach().clone() for p in classifier.parameters()]
    part = batch(8)
    grads = torch.autograd.grad(classifier.loss(part), list(classifier.parameters()))
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])).item()
    trainer(gradient_clip_val=trainers).fit(classifier, loader([8]))
    moved = [(a - b).norm() for a, b in zip(before, classifier.parameters(), strict=True)]
    moved = torch.linalg.vector_norm(torch.stack(moved)).item()
    assert norm > 0.01
    assert moved == pytest.approx(norm if expected is None else expected, rel=1e-3)


def test_the_schedule_spans_the_run_and_small_tensors_are_not_decayed():
    rates = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    classifier = SequenceClassifier(
        Bag(), partial(torch.optim.SGD, lr=0.1, weight_decay=0.5), num_classes=2, warmup_fraction=0.25
    )
    run = trainer(max_epochs=2, callbacks=[Watch()])
    run.fit(classifier, loader([4] * 4))
    assert rates == pytest.approx([0.1 * warmup_cosine_factor(k, 8, 0.25) for k in range(8)])
    groups = run.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [p.ndim for group in groups for p in group["params"]] == [2, 2, 1]


def test_a_loss_that_is_no_number_stops_the_run():
    classifier = SequenceClassifier(Bag(), SGD, num_classes=2)
    with torch.no_grad():
        classifier.model.head.bias.fill_(float("nan"))
    with pytest.raises(Diverged):
        trainer().fit(classifier, loader([4]))


def test_double_precision_stays_double():
    part = batch(3)
    assert SequenceClassifier(Bag().double(), SGD, num_classes=2)(part.ids, part.mask).dtype == torch.float64
    assert SequenceClassifier(Bag().bfloat16(), SGD, num_classes=2)(part.ids, part.mask).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"warmup_fraction": 1.0}, "warmup_fraction"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"clip": float("nan")}, "clip must be positive"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SequenceClassifier(Bag(), SGD, **{"num_classes": 2, **options})


def test_a_model_of_other_classes_is_refused():
    part = batch(3)
    with pytest.raises(ValueError, match=r"logits of shape \(3, 2\), got \(3, 5\)"):
        SequenceClassifier(Bag(classes=5), SGD, num_classes=2).loss(part)


# ------------------------------------------------------------------ encoders


def test_the_small_encoder_knows_what_sentences_mean(capfd):
    tokenizer = encoders.sentence_tokenizer("minilm")
    torch.manual_seed(0)
    model = encoders.sentence_encoder("minilm", 2).eval()
    assert capfd.readouterr() == ("", ""), "loading is silent"
    assert sum(p.numel() for p in model.parameters()) == 22_566_146
    texts = ["a wonderful film", "a great movie", "the interest rate rose"]
    found = [torch.tensor([tokenizer.encode(text).ids]) for text in texts]
    with torch.no_grad():
        means = torch.cat([model.bert(ids).last_hidden_state.mean(1) for ids in found])
    near, far = F.cosine_similarity(means[:1], means[1:])
    assert near > 0.5
    assert far < 0.2


def test_a_loaded_encoder_is_in_training_mode():
    model = encoders.sentence_encoder("minilm", 2)
    assert all(part.training for part in model.modules())


def test_the_mean_is_that_of_the_tokens_alone():
    """Padding changes nothing."""
    torch.manual_seed(0)
    model = encoders.sentence_encoder("minilm", 2, untrained=True).eval()
    ids = torch.tensor([[101, 2023, 3185, 102]])
    padded = torch.cat([ids, torch.full((1, 3), 7)], 1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        bare = model(ids, torch.ones_like(ids)).logits
        hidden = model.bert(ids).last_hidden_state
        torch.testing.assert_close(bare, model.classifier(hidden.mean(1)))
        torch.testing.assert_close(model(padded, mask).logits, bare, rtol=1e-4, atol=1e-5)


def test_the_new_layer_depends_on_the_seed_alone():
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(encoders.sentence_encoder("minilm", 2).classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_bert_base_has_its_size_without_any_file():
    with torch.device("meta"):
        model = encoders.sentence_encoder("bert-base", 2, untrained=True)
        small = encoders.sentence_encoder("minilm", 2, untrained=True)
    assert sum(p.numel() for p in model.parameters()) == 109_483_778
    assert sum(p.numel() for p in small.parameters()) == 22_566_146


def test_missing_and_changed_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LEANTRAIN_DATA", str(tmp_path))
    with pytest.raises(MissingData, match=r"model\.safetensors"):
        encoders.sentence_encoder("bert-base", 2)
    with pytest.raises(ValueError, match="unknown encoder 'gpt'"):
        encoders.sentence_tokenizer("gpt")
    with pytest.raises(ValueError, match="num_classes"):
        encoders.sentence_encoder("minilm", 0, untrained=True)
    assert set(encoders.encoder_checksums("minilm")) == {"minilm/model.safetensors", "minilm/tokenizer.json"}
    monkeypatch.setitem(encoders._SHA256, "tokenizer.json", "0" * 64)
    with pytest.raises(CorruptData, match=r"tokenizer\.json"):
        encoders.sentence_tokenizer("minilm")
