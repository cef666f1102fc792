"""Blocks of tokens: the vocabulary, the cutting, the order of the batches, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leantrain.data import own_tokens, text, tokens
from leantrain.data.errors import CorruptData
from leantrain.data.token_sets import byte_pair_tokenizer

POEM = "the cat sat on the mat; the cat ate.\nthe mat sat on the cat?\n" * 40


@pytest.fixture
def shakespeare(lay_down):
    lay_down("tinyshakespeare", {"tinyshakespeare/input.txt": POEM.encode()})


def test_the_vocabulary_starts_with_the_special_tokens_and_the_bytes():
    tokenizer = byte_pair_tokenizer(POEM, 300, ("<unk>", "[MASK]"))
    assert [tokenizer.token_to_id(t) for t in ("<unk>", "[MASK]")] == [0, 1]
    assert tokenizer.get_vocab_size() <= 300
    assert len(tokenizer.encode(" cat").ids) == 1, "a frequent word is one token"
    assert tokenizer.encode("a [MASK] b").ids.count(1) == 1


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_every_text_survives_encoding(given_text):
    tokenizer = byte_pair_tokenizer(POEM, 280)
    ids = tokenizer.encode(given_text).ids
    if "<unk>" not in given_text:
        assert tokenizer.decode(ids, skip_special_tokens=False) == given_text


def test_blocks_are_the_running_text(shakespeare):
    data = tokens("tinyshakespeare", vocab_size=290, block=8, batch_size=4)
    whole = torch.cat([batch.flatten() for batch in data.val_dataloader()])
    assert (
        data.tokenizer.decode(whole.tolist())
        == text("tinyshakespeare", "val")[: len(data.tokenizer.decode(whole.tolist()))]
    )
    assert all(batch.dtype == torch.int64 and batch.shape[1] == 8 for batch in data.val_dataloader())
    first, again = list(data.train_dataloader()), list(data.train_dataloader())
    assert len(first) == len(data.train_dataloader()) == data.train_size // 4
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    data.set_epoch(1)
    other = torch.cat(list(data.train_dataloader()))
    assert not torch.equal(torch.cat(first), other)
    blocks = {tuple(row) for row in torch.cat(first).tolist()}
    assert blocks <= {tuple(row) for row in other.tolist()} or data.train_size % 4


def test_an_epoch_sees_every_block_once(shakespeare):
    data = tokens("tinyshakespeare", vocab_size=290, block=8, batch_size=1)
    rows = sorted(map(tuple, torch.cat(list(data.train_dataloader())).tolist()))
    data.set_seed(5)
    assert sorted(map(tuple, torch.cat(list(data.train_dataloader())).tolist())) == rows
    assert len(rows) == data.train_size


def test_the_fingerprint_knows_the_options(shakespeare):
    options = {"vocab_size": 290, "block": 8, "batch_size": 2}
    first = tokens("tinyshakespeare", **options).fingerprint
    assert first == tokens("tinyshakespeare", **options).fingerprint
    for change in ({"vocab_size": 291}, {"block": 9}, {"batch_size": 3}, {"train_blocks": 5}, {"special": ("<s>",)}):
        assert tokens("tinyshakespeare", **{**options, **change}).fingerprint != first


def test_stand_in_data_needs_no_file():
    data = tokens("wikitext-2", vocab_size=50257, block=32, batch_size=3, special=("[MASK]",), stand_in=True)
    assert (data.vocab_size, data.checksums) == (50257, {})
    assert [tuple(b.shape) for b in data.train_dataloader()] == [(3, 32)] * 2
    assert data.tokenizer.token_to_id("[MASK]") == 0


def test_docstrings_are_there_without_a_download_and_are_verified(monkeypatch):
    from leantrain.data import docstrings
    from leantrain.data.registry import DataSet

    train, val = text("docstrings", "train"), text("docstrings", "val")
    assert "Fit the model" in train
    assert 0.05 < len(val) / len(train) < 0.2
    wrong = DataSet("docstrings", "", "embedded", "", "", "", arrays={"docstrings of sklearn": "0" * 64})
    monkeypatch.setattr(docstrings, "dataset", lambda name: wrong)
    docstrings.read_docstrings.cache_clear()
    with pytest.raises(CorruptData, match="is this another scikit-learn"):
        docstrings.read_docstrings()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "war-and-peace"}, "unknown text 'war-and-peace'"),
        ({"block": 1}, "block must be at least 2, got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"vocab_size": 256}, "vocab_size must be at least 257"),
        ({"special": ("<s>", "<s>")}, "special tokens must be different"),
        ({"train_blocks": 0}, "train_blocks must be 1 to"),
        ({"val_blocks": 10**6}, "val_blocks must be 1 to"),
        ({"block": 10**6}, "fewer than a block"),
    ],
)
def test_bad_options_are_refused(shakespeare, change, message):
    options = {"name": "tinyshakespeare", "vocab_size": 290, "block": 8, "batch_size": 2} | change
    with pytest.raises(ValueError, match=message):
        tokens(options.pop("name"), **options)


def test_parts_divide_a_pass_into_epochs(shakespeare):
    options = {"vocab_size": 290, "block": 8, "batch_size": 2}
    whole, parted = tokens("tinyshakespeare", **options), tokens("tinyshakespeare", **options, parts=3)
    assert parted.train_size == whole.train_size // 3
    assert parted.fingerprint != whole.fingerprint
    seen = []
    for epoch in range(6):
        parted.set_epoch(epoch)
        assert len(parted.train_dataloader()) == parted.train_size // 2
        seen.append(torch.cat(list(parted.train_dataloader())))
    whole.set_epoch(1)
    second_pass = torch.cat(list(whole.train_dataloader()))
    size = len(seen[3])
    assert torch.equal(seen[3], second_pass[:size]), "the first part of a pass is how the pass begins"
    assert not torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]))
    with pytest.raises(ValueError, match="parts must be 1 to"):
        tokens("tinyshakespeare", **options, parts=10_000)


def test_parts_of_a_pass_do_not_overlap():
    blocks = " ".join(f"{i:05}" for i in range(40)) + " "
    tokenizer = byte_pair_tokenizer("", 257)
    data = own_tokens("numbers", tokenizer, blocks, blocks, block=6, batch_size=1, parts=4)
    rows = []
    for epoch in range(4):
        data.set_epoch(epoch)
        rows += [tokenizer.decode(row) for batch in data.train_dataloader() for row in batch.tolist()]
    assert sorted(rows) == [f"{i:05} " for i in range(40)]


def test_own_texts_are_cut_as_named_ones_are(shakespeare):
    named = tokens("tinyshakespeare", vocab_size=290, block=8, batch_size=4)
    texts = text("tinyshakespeare", "train"), text("tinyshakespeare", "val")
    own = own_tokens("mine", named.tokenizer, *texts, block=8, batch_size=4)
    for a, b in ((named.train_dataloader(), own.train_dataloader()), (named.val_dataloader(), own.val_dataloader())):
        assert torch.equal(torch.cat(list(a)), torch.cat(list(b)))
    assert (own.train_size, own.val_size, own.block) == (named.train_size, named.val_size, 8)
    assert own.fingerprint != own_tokens("mine", named.tokenizer, texts[1], texts[1], block=8, batch_size=4).fingerprint
    assert set(own.checksums) == {"mine, train", "mine, val"}
    for change, message in (
        ({"block": 1}, "block"),
        ({"batch_size": 0}, "batch_size"),
        ({"train_blocks": 10**6}, "train_blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            own_tokens("mine", named.tokenizer, *texts, **{"block": 8, "batch_size": 4} | change)
