"""Data that goes on: the batches of one long run, a fingerprint of its own, bad input."""

import pytest
import torch

from leantrain.data import tokens
from leantrain.data.onward import onward


def made(parts=3):
    return tokens("docstrings", vocab_size=258, block=8, batch_size=2, train_blocks=12, val_blocks=3, parts=parts)


def batches(data, seed, epoch):
    data.set_seed(seed)
    data.set_epoch(epoch)
    return torch.stack(list(data.train_dataloader()))


@pytest.mark.parametrize("first", [0, 1, 2, 5])
def test_a_chain_of_runs_sees_one_long_run(first):
    """Five epochs on is past the end of the first pass: a fresh permutation."""
    data, later = made(), onward(made(), first)
    for seed in (0, 3):
        for epoch in range(4):
            assert torch.equal(batches(later, seed, epoch), batches(data, seed, first + epoch))
    assert not torch.equal(batches(data, 0, 0), batches(data, 0, 5)), "the comparison would see a difference"
    assert all(torch.equal(a, b) for a, b in zip(later.val_dataloader(), data.val_dataloader(), strict=True))
    assert (later.train_size, later.val_size, later.batch_size) == (data.train_size, data.val_size, data.batch_size)
    assert later.checksums == data.checksums


def test_the_place_belongs_to_the_fingerprint():
    data = made()
    marks = [onward(data, first).fingerprint for first in range(4)]
    assert len(set(marks)) == 4
    assert marks[0] == data.fingerprint
    assert onward(onward(data, 1), 2).fingerprint == marks[3]
    assert torch.equal(batches(onward(onward(data, 1), 2), 7, 0), batches(data, 7, 3))


def test_a_negative_place_is_refused():
    with pytest.raises(ValueError, match="got -1"):
        onward(made(), -1)
