"""Masked-language modelling: BERT's shares, fixed questions, the tied head, the loss against a plain computation."""

from __future__ import annotations

import math
from functools import partial

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from leantrain.measure import count_parameters
from leantrain.techniques.progressive_layer_dropping import pre_ln_bert
from leantrain.training import Diverged, MaskedLanguageModel, MaskedTransformer, PretrainedClassifier, mask_tokens

V = 30


def texts(count: int = 20, length: int = 8) -> Tensor:
    return torch.randint(1, V, (count, length), generator=torch.Generator().manual_seed(0))


def tiny(**options: object) -> MaskedTransformer:
    torch.manual_seed(0)
    return MaskedTransformer(nn.Identity(), **{"vocab_size": V, "max_length": 8, "dim": 16, "dropout": 0.0, **options})


def fit(module: L.LightningModule, epochs: int = 1, **options: object) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(texts(), batch_size=4), DataLoader(texts(10), batch_size=5))
    return trainer


def module(model: nn.Module | None = None, lr: float = 1e-2, **options: object) -> MaskedLanguageModel:
    optimizer = partial(torch.optim.AdamW, lr=lr)
    return MaskedLanguageModel(model or tiny(), optimizer, vocab_size=V, mask_id=0, **options)


# ---------------------------------------------------------------- the masks


def test_fifteen_per_cent_are_chosen_and_hidden_in_berts_shares() -> None:
    ids = torch.full((400, 250), 7)
    hidden, chosen = mask_tokens(ids, vocab_size=1000, mask_id=3, generator=torch.Generator().manual_seed(0))
    n = chosen.sum().item()
    assert n / ids.numel() == pytest.approx(0.15, abs=0.004)
    assert (hidden[chosen] == 3).sum().item() / n == pytest.approx(0.8, abs=0.015)
    assert (hidden[chosen] == 7).sum().item() / n == pytest.approx(0.1, abs=0.012)
    drawn = hidden[chosen & (hidden != 3) & (hidden != 7)]
    assert len(drawn) / n == pytest.approx(0.1, abs=0.012)
    assert len(drawn.unique()) > 600, "random tokens come from the whole vocabulary"
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert (ids == 7).all(), "the input is not changed"


@given(st.integers(0, 1000), st.floats(0.01, 1), st.integers(1, 4), st.integers(1, 12))
def test_special_tokens_are_neither_chosen_nor_drawn(seed: int, share: float, rows: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 10, (rows, length), generator=generator)
    hidden, chosen = mask_tokens(
        ids, vocab_size=10, mask_id=0, special_ids=(4, 5), probability=share, generator=generator
    )
    special = (ids == 0) | (ids == 4) | (ids == 5)
    assert not (chosen & special).any()
    assert chosen.any() or special.all()
    changed = hidden != ids
    assert not (changed & ~chosen).any()
    assert not ((hidden[changed] == 4) | (hidden[changed] == 5)).any()


def test_a_text_in_which_chance_chose_nothing_still_asks_for_one_token() -> None:
    ids = torch.tensor([[0, 4, 0]])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        _, chosen = mask_tokens(ids, vocab_size=9, mask_id=0, probability=1e-6, generator=generator)
        assert chosen.tolist() == [[False, True, False]]


def test_masks_depend_on_the_generator_alone() -> None:
    def draw(seed: int) -> tuple[Tensor, Tensor]:
        torch.rand(seed + 1)
        return mask_tokens(texts(), vocab_size=V, mask_id=0, generator=torch.Generator().manual_seed(seed))

    assert all(torch.equal(a, b) for a, b in zip(draw(1), draw(1), strict=True))
    assert not torch.equal(draw(1)[1], draw(2)[1])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"probability": 0.0}, "above 0 and at most 1; got 0"),
        ({"probability": math.nan}, "got nan"),
        ({"mask_id": V}, "from 0 to 29"),
        ({"special_ids": (-1,)}, "from 0 to 29"),
        ({"special_ids": tuple(range(V))}, "all 30 tokens are special"),
    ],
)
def test_impossible_masks_are_refused(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        mask_tokens(texts(), **{"vocab_size": V, "mask_id": 0, **options})


# ---------------------------------------------------------------- the model


def test_logits_at_chosen_places_are_those_of_all_places() -> None:
    model, ids = tiny(), texts(3)
    _, chosen = mask_tokens(ids, vocab_size=V, mask_id=0)
    torch.testing.assert_close(model(ids, chosen), model(ids)[chosen])
    assert model(ids).shape == (3, 8, V)


def test_the_head_is_tied_to_the_token_embeddings() -> None:
    model = tiny()
    sizes = {"tokens": V * 16, "positions": 8 * 16, "norms": 3 * 32, "dense": 16 * 16 + 16, "bias": V}
    assert count_parameters(model) == sum(sizes.values())
    before = model(texts(1))
    with torch.no_grad():
        model.tokens.weight[29] *= -2  # a token that does not stand in the text
    ids = texts(1)
    assert not (ids == 29).any()
    after = model(ids)
    torch.testing.assert_close(after[..., :29], before[..., :29])
    torch.testing.assert_close(after[..., 29], -2 * before[..., 29])


@pytest.mark.parametrize(("dim", "std"), [(768, 0.02), (192, 0.04)])
def test_weights_start_as_in_bert_with_the_same_gain_at_every_width(dim: int, std: float) -> None:
    model = MaskedTransformer(nn.Linear(dim, dim), vocab_size=500, max_length=64, dim=dim)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert parameter.unique().tolist() in ([0.0], [1.0]), name


@pytest.mark.parametrize(
    ("options", "named"),
    [({"vocab_size": 0}, "vocab_size"), ({"max_length": 0}, "max_length"), ({"dim": 0}, "dim"), ({"dropout": 1}, "1")],
)
def test_impossible_sizes_are_refused(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny(**options)


def test_a_text_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="8 tokens at most, got 9"):
        tiny()(texts(1, 9))


# ---------------------------------------------------------------- the classifier


def test_a_classifier_reads_the_mean_of_the_tokens_and_no_padding() -> None:
    torch.manual_seed(0)
    bert = pre_ln_bert(V, max_length=8, dim=16, depth=2, heads=2, dropout=0.0)
    classifier = PretrainedClassifier(bert, 3).eval()
    ids, other = texts(2), texts(2)
    seen = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    other[1, 5:] = 1 + other[1, 5:] % (V - 1)
    assert not torch.equal(ids, other)
    logits = classifier(ids, seen)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(classifier(other, seen), logits)
    alone = classifier(ids[1:, :5], torch.ones(1, 5))
    torch.testing.assert_close(alone, logits[1:])
    mean = bert.eval().norm(bert.encode(ids[:1])).mean(1)
    torch.testing.assert_close(logits[:1], mean @ classifier.classify.weight.T + classifier.classify.bias)


def test_fine_tuning_reaches_all_weights_but_the_head_for_tokens() -> None:
    model = PretrainedClassifier(pre_ln_bert(V, max_length=8, dim=16, depth=2, heads=2), 2)
    model(texts(4), torch.ones(4, 8)).square().mean().backward()
    without = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is None}
    assert without == {"transform", "bias"}


@pytest.mark.parametrize(("options", "named"), [({"num_classes": 1}, "got 1"), ({"dropout": 1.0}, "got 1.0")])
def test_impossible_classifiers_are_refused(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PretrainedClassifier(tiny(), **{"num_classes": 2, **options})


# ---------------------------------------------------------------- the training


def test_validation_is_the_mean_over_predicted_tokens_and_asks_the_same_after_every_epoch() -> None:
    trained = module()
    first = fit(trained).callback_metrics
    losses, hits = [], []
    model = trained.model.eval()
    for index, batch in enumerate(texts(10).split(5)):
        hidden, chosen = trained.masked(batch, "val", index)
        for row, place in chosen.nonzero().tolist():
            logits = model(hidden)[row, place]
            losses.append(-logits.log_softmax(0)[batch[row, place]].item())
            hits.append(logits.argmax() == batch[row, place])
    assert first["val_loss"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert first["val_accuracy"].item() == pytest.approx(100 * sum(hits) / len(hits))
    assert 0 < len(losses) < 80


def test_training_masks_depend_on_seed_epoch_and_batch_and_validation_masks_on_the_batch() -> None:
    ids = texts()
    a, b = module(seed=0), module(seed=1)
    assert torch.equal(a.masked(ids, "val", 3)[1], b.masked(ids, "val", 3)[1])
    assert not torch.equal(a.masked(ids, "val", 3)[1], a.masked(ids, "val", 4)[1])
    assert torch.equal(a.masked(ids, "train", 0, 1, 2)[0], b.masked(ids, "train", 0, 1, 2)[0])
    assert not torch.equal(a.masked(ids, "train", 0, 1, 2)[1], a.masked(ids, "train", 0, 2, 1)[1])

    class Asked(L.Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            self.losses.append(float(outputs["loss"]))

    runs = [Asked() for _ in range(3)]
    for seed, seen in zip((0, 0, 1), runs, strict=True):
        fit(module(seed=seed, lr=1e-30, callbacks=[seen]), epochs=2, max_steps=-1)
    assert runs[0].losses == runs[1].losses != runs[2].losses
    assert runs[0].losses[:5] != runs[0].losses[5:], "an epoch has masks of its own"


def test_the_gradient_is_clipped_and_norms_are_not_decayed() -> None:
    norms: list[float] = []

    class Steep(MaskedTransformer):
        def forward(self, ids: Tensor, chosen: Tensor | None = None) -> Tensor:
            return 100 * super().forward(ids, chosen)

    class Norm(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            grads = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
            norms.append(torch.stack(grads).norm().item())
            first, second = trainer.optimizers[0].param_groups
            assert second["weight_decay"] == 0 < first["weight_decay"]
            assert {p.ndim for p in first["params"]} == {2}
            assert {p.ndim for p in second["params"]} == {1}

    for limit in (0.5, None):
        model = Steep(nn.Identity(), vocab_size=V, max_length=8, dim=16)
        fit(module(model, clip=limit, callbacks=[Norm()]))
    clipped, free = norms[:5], norms[5:]
    assert len(clipped) == len(free) == 5
    assert max(clipped) <= 0.5 + 1e-4
    assert min(free) > 0.5


def test_it_learns_what_the_neighbours_tell() -> None:
    """Every text repeats one token: the model must copy it from the places that are not hidden."""

    class MeanOfOthers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.mean(1, keepdim=True)

    torch.manual_seed(0)
    model = MaskedTransformer(MeanOfOthers(), vocab_size=V, max_length=8, dim=32, dropout=0.0)
    ids = torch.randint(1, V, (256, 1)).expand(-1, 8).contiguous()
    trainer = L.Trainer(
        max_epochs=20,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module(model, lr=2e-2), DataLoader(ids, batch_size=32), DataLoader(ids, batch_size=64))
    assert trainer.callback_metrics["val_accuracy"] > 90
    assert trainer.callback_metrics["val_loss"] < math.log(V) / 4


def test_a_loss_that_is_no_number_ends_the_run() -> None:
    class Broken(MaskedTransformer):
        def forward(self, ids: Tensor, chosen: Tensor | None = None) -> Tensor:
            return super().forward(ids, chosen) / 0

    with pytest.raises(Diverged):
        fit(module(Broken(nn.Identity(), vocab_size=V, max_length=8, dim=16)))


def test_losses_are_computed_in_32_bits_under_autocast() -> None:
    model, ids = tiny(), texts(4)
    trained = module(model)
    trained.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    trained._trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert trained.training_step(ids, 0).dtype == torch.float32
    hidden, chosen = trained.masked(ids, "train", 0, 0, 0)
    expected = F.cross_entropy(model(hidden, chosen), ids[chosen])
    torch.testing.assert_close(trained.training_step(ids, 0), expected)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"warmup_fraction": 1.0}, "warmup_fraction"), ({"clip": 0.0}, "clip")],
)
def test_impossible_recipes_are_refused(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        module(**options)
