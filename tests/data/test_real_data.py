"""What holds of the real sets; skipped where they are not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from leantrain.data import duplicates, images, labelled_pictures, overlap, table, text
from leantrain.data.registry import DATASETS

FOLDER = os.environ.get("LEANTRAIN_DATA")


@pytest.fixture
def real(project, monkeypatch):
    def need(name: str) -> None:
        if not FOLDER:
            pytest.skip(f"LEANTRAIN_DATA is not set: {name} is not checked")
        if not all((Path(FOLDER) / path).is_file() for path in DATASETS[name].files):
            pytest.skip(f"LEANTRAIN_DATA does not hold {name}")
        monkeypatch.setenv("LEANTRAIN_DATA", FOLDER)

    return need


def pixels(loader, mean, std) -> np.ndarray:
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
    return torch.cat([((x * std + mean) * 255).round_().byte() for x, _ in loader]).numpy()


@pytest.mark.parametrize(
    ("name", "mean", "std", "counts"),
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), [1000] * 10),
        ("mnist", (0.1307,), (0.3081,), [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
    ],
)
def test_image_sets_are_whole_normalised_and_without_leak(real, name, mean, std, counts):
    real(name)
    data = images(name, batch_size=1000)
    train, val = (pixels(loader, mean, std) for loader in (data.train_dataloader(), data.val_dataloader()))
    assert (len(train), len(val)) == ({"cifar10": 50_000, "mnist": 60_000}[name], 10_000)
    values = np.arange(256) / 255
    for channel in range(data.shape[0]):
        histogram = np.bincount(train[:, channel].ravel(), minlength=256) / train[:, channel].size
        centre = histogram @ values
        assert centre == pytest.approx(mean[channel], abs=6e-5)
        assert (histogram @ (values - centre) ** 2) ** 0.5 == pytest.approx(std[channel], abs=6e-5)
    assert torch.cat([y for _, y in data.val_dataloader()]).bincount().tolist() == counts
    assert overlap(train, val) == []
    assert duplicates(train) == []


def test_an_augmented_epoch_of_cifar10_is_fast(real):
    real("cifar10")
    data = images("cifar10", augment=True)
    started = time.process_time()
    count = sum(len(y) for _, y in data.train_dataloader())
    assert count == 390 * 128
    # Two seconds on one core of 2024; the bound leaves room for a slow machine.
    assert time.process_time() - started < 12


def test_texts(real):
    real("wikitext-2")
    counts = {
        split: len(text("wikitext-2", split).replace("\n", " <eos> ").split()) for split in ("train", "valid", "test")
    }
    assert counts == {"train": 2_088_628, "valid": 217_646, "test": 245_569}
    real("tinyshakespeare")
    assert (len(text("tinyshakespeare", "train")), len(text("tinyshakespeare", "val"))) == (1_003_854, 111_540)


@pytest.mark.parametrize(
    ("name", "train", "dev"),
    [
        ("glue/sst2", [29_780, 37_569], [428, 444]),
        ("glue/cola", [2_528, 6_023], [322, 721]),
        ("glue/rte", [1_249, 1_241], [146, 131]),
    ],
)
def test_tables(real, name, train, dev):
    real(name)
    for split, counts in (("train", train), ("dev", dev)):
        assert np.bincount(table(name, split)["label"]).tolist() == counts


def test_blood_cells(monkeypatch):
    if not FOLDER or not (Path(FOLDER) / "BCCD").is_dir():
        pytest.skip("LEANTRAIN_DATA does not hold bccd")
    monkeypatch.setenv("LEANTRAIN_DATA", FOLDER)
    data = labelled_pictures("bccd", size=60)
    assert (data.train_size, data.val_size) == (88, 42)
    test = torch.cat([target["labels"] for _, target in data.scenes("test", 0)])
    assert test.bincount().tolist() == [0, 805, 71, 69]
