"""Labelled sentences as batches: cutting, padding, places, orders, subsets, bad input."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader

from leantrain.data import MissingData, sentences
from leantrain.data.sentence_sets import Sentence, collate_sentences

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "very", "the"]
SENTENCES = [("very " * (k % 5) + ("good" if k % 3 else "bad") + " film", 1 if k % 3 else 0) for k in range(30)]


@pytest.fixture
def tokenizer():
    one = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    one.pre_tokenizer = pre_tokenizers.Whitespace()
    one.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return one


@pytest.fixture
def sst2(lay_down):
    lines = "".join(f"{s}\t{y}\n" for s, y in SENTENCES)
    content = f"sentence\tlabel\n{lines}".encode()
    lay_down("glue/sst2", {"glue/SST-2/train.tsv": content, "glue/SST-2/dev.tsv": content})


def options(**changes):
    return {"length": 16, "batch_size": 4, **changes}


def test_a_batch_is_the_sentences_padded_to_the_longest(sst2, tokenizer):
    data = sentences("glue/sst2", tokenizer, **options())
    seen = 0
    for batch in data.val_dataloader():
        assert batch.index.tolist() == list(range(seen, seen + len(batch.y)))
        assert batch.ids.shape == batch.mask.shape == (len(batch.y), int(batch.mask.sum(1).max()))
        for row, place in enumerate(batch.index.tolist()):
            text, label = SENTENCES[place]
            expected = [2, *(WORDS.index(word) for word in text.split()), 3]
            assert batch.ids[row][batch.mask[row].bool()].tolist() == expected
            assert batch.ids[row][~batch.mask[row].bool()].eq(0).all()
            assert batch.mask[row].diff().le(0).all(), "padding is at the end"
            assert batch.y[row] == label
        seen += len(batch.y)
    assert seen == data.val_size == 30
    assert all(part.dtype == torch.int64 for part in batch)


def test_long_sentences_are_cut_and_keep_their_end_mark(sst2, tokenizer):
    data = sentences("glue/sst2", tokenizer, **options(length=5))
    batches = list(data.val_dataloader())
    assert max(batch.ids.shape[1] for batch in batches) == 5
    for batch in batches:
        assert (batch.ids[torch.arange(len(batch.y)), batch.mask.sum(1) - 1] == 3).all()
    assert tokenizer.truncation is None, "the caller's tokenizer is as it was"


def test_pairs_have_one_mark_between_them(lay_down, tokenizer):
    lines = b"index\tsentence1\tsentence2\tlabel\n0\tgood film\tbad film\tnot_entailment\n7\tthe\tvery\tentailment\n"
    lay_down("glue/rte", {"glue/RTE/train.tsv": lines, "glue/RTE/dev.tsv": lines})
    (batch,) = sentences("glue/rte", tokenizer, **options()).val_dataloader()
    assert batch.ids.tolist() == [[2, 4, 6, 3, 5, 6, 3], [2, 8, 3, 7, 3, 0, 0]]
    assert batch.y.tolist() == [1, 0]


def test_an_epoch_is_a_permutation_that_the_seed_and_the_epoch_fix(sst2, tokenizer):
    data = sentences("glue/sst2", tokenizer, **options(batch_size=5))

    def order(seed, epoch):
        data.set_seed(seed)
        data.set_epoch(epoch)
        return torch.cat([batch.index for batch in data.train_dataloader()]).tolist()

    assert sorted(order(0, 0)) == list(range(30))
    torch.manual_seed(99)
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_a_subset_keeps_the_classes_in_proportion(sst2, tokenizer):
    data = sentences("glue/sst2", tokenizer, **options(train_size=9, val_size=6))
    assert (data.train_size, data.val_size) == (9, 6)
    y = torch.cat([batch.y for batch in data.val_dataloader()])
    assert y.sum() == 4, "two thirds of the sentences are good"
    larger = sentences("glue/sst2", tokenizer, **options(train_size=12))
    assert data.train_set.ids == larger.train_set.ids[:9]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*")
def test_the_map_style_set_knows_every_samples_place(sst2, tokenizer, workers):
    data = sentences("glue/sst2", tokenizer, **options())
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3)).tolist()
    loader = DataLoader(data.train_set, batch_size=7, sampler=order, num_workers=workers, collate_fn=collate_sentences)
    batches = list(loader)
    assert torch.cat([batch.index for batch in batches]).tolist() == order
    assert torch.cat([batch.y for batch in batches]).tolist() == [SENTENCES[k][1] for k in order]


def test_the_fingerprint_knows_the_options(sst2, tokenizer):
    first = sentences("glue/sst2", tokenizer, **options()).fingerprint
    assert first == sentences("glue/sst2", tokenizer, **options()).fingerprint
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens(["film film"])
    changed = [
        sentences("glue/sst2", tokenizer, **options(**change)).fingerprint
        for change in ({"length": 15}, {"batch_size": 3}, {"train_size": 20}, {"val_size": 20}, {"split_seed": 1})
    ]
    changed.append(sentences("glue/sst2", other, **options()).fingerprint)
    assert len({first, *changed}) == 7


def test_stand_in_data_needs_no_file(tokenizer):
    data = sentences("glue/cola", tokenizer, **options(stand_in=True))
    assert (data.num_classes, data.vocab_size, data.checksums) == (2, len(WORDS), {})
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batches = list(loader)
        assert [tuple(batch.ids.shape) for batch in batches] == [(4, 16)] * 2
        assert all(batch.mask.all() and batch.ids.max() < len(WORDS) for batch in batches)


@pytest.mark.parametrize(("name", "classes"), [("glue/mnli", 3), ("glue/stsb", 1)])
def test_stand_in_labels_fit_the_task(tokenizer, name, classes):
    data = sentences(name, tokenizer, **options(batch_size=64, stand_in=True))
    y = torch.cat([batch.y for batch in data.train_dataloader()])
    assert data.num_classes == classes
    if classes == 1:
        assert y.dtype == torch.float32
        assert y.min() >= 0
        assert y.max() <= 5
        assert y.unique().numel() > 100
    else:
        assert y.unique().tolist() == [0, 1, 2]


def test_scores_come_as_they_are_and_a_subset_keeps_their_spread(project, tokenizer):
    head = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"]
    rows = [head, *([*"0123456", "good", "bad", f"{k / 8:.3f}"] for k in range(41))]
    content = "".join("\t".join(row) + "\n" for row in rows)
    folder = project / "data/glue/STS-B"
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text(content, encoding="utf-8")
    data = sentences("glue/stsb", tokenizer, **options(train_size=12))
    y = torch.cat([batch.y for batch in data.val_dataloader()])
    assert torch.equal(y, torch.arange(41) / 8)
    assert data.train_set.y.round().unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert set(data.checksums) == {"glue/STS-B/train.tsv", "glue/STS-B/dev.tsv"}


def test_one_sentence_is_a_batch():
    batch = collate_sentences([Sentence([5, 6], 1, 17)])
    assert [part.tolist() for part in batch] == [[[5, 6]], [[1, 1]], [1], [17]]


def test_bad_input(sst2, tokenizer):
    for change, message in (
        ({"length": 4}, "length must be at least 5, got 4"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"train_size": 31}, "train_size must be 1 to 30 or None, got 31"),
        ({"val_size": 0}, "val_size must be 1 to 30 or None, got 0"),
        ({"split_seed": -1}, "split_seed"),
    ):
        with pytest.raises(ValueError, match=message):
            sentences("glue/sst2", tokenizer, **options(**change))
    with pytest.raises(ValueError, match="unknown task 'glue/wnli'; known are glue/sst2"):
        sentences("glue/wnli", tokenizer, **options(stand_in=True))
    with pytest.raises(MissingData, match="glue/rte"):
        sentences("glue/rte", tokenizer, **options())
