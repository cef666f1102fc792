"""Snapshots: which epochs, and that what was kept does not change afterwards."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from leantrain.training import MaskedLanguageModel, MaskedTransformer, Snapshots


def fit(snapshots: Snapshots, epochs: int) -> tuple[MaskedLanguageModel, list[torch.Tensor]]:
    """Train and return the module and its token embeddings after every epoch."""
    seen: list[torch.Tensor] = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            seen.append(pl_module.model.tokens.weight.detach().clone())

    torch.manual_seed(0)
    model = MaskedTransformer(nn.Identity(), vocab_size=9, max_length=4, dim=8)
    module = MaskedLanguageModel(
        model, partial(torch.optim.AdamW, lr=0.1), vocab_size=9, mask_id=0, callbacks=[snapshots, Watch()]
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    texts = DataLoader(torch.randint(1, 9, (8, 4), generator=torch.Generator().manual_seed(0)), batch_size=4)
    trainer.fit(module, texts, texts)
    return module, seen


@pytest.mark.parametrize(
    ("count", "epochs", "kept"), [(1, 3, [3]), (3, 7, [3, 5, 7]), (5, 5, [1, 2, 3, 4, 5]), (9, 2, [1, 2])]
)
def test_they_are_spread_evenly_and_end_with_the_run(count: int, epochs: int, kept: list[int]) -> None:
    snapshots = Snapshots(count)
    module, seen = fit(snapshots, epochs)
    assert list(snapshots.weights) == kept
    for epoch, weights in snapshots.weights.items():
        assert weights.keys() == module.model.state_dict().keys()
        assert torch.equal(weights["tokens.weight"], seen[epoch - 1]), "a copy, not the weights that train on"


def test_a_second_run_starts_anew() -> None:
    snapshots = Snapshots(2)
    fit(snapshots, 4)
    fit(snapshots, 1)
    assert list(snapshots.weights) == [1]


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Snapshots(0)
