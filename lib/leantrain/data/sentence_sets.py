"""Labelled sentences and pairs of sentences as batches of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from leantrain.data.image_sets import stratified_order
from leantrain.data.seeded import SeededData, check_seed, epoch_generator, train_batch_count
from leantrain.data.text_sets import TABLES, table, table_checksums

__all__ = ["Sentence", "SentenceBatch", "SentenceData", "SentenceSet", "collate_sentences", "sentences"]


class Sentence(NamedTuple):
    """A labelled token sequence.

    Attributes:
        ids: Token ids.
        y: Class, or score.
        index: Place in its split.
    """

    ids: list[int]
    y: float
    index: int  # type: ignore[assignment]


class SentenceBatch(NamedTuple):
    """A batch of labelled token sequences, padded to the longest of them.

    Attributes:
        ids: Token ids, int64 ``(B, N)``; 0 where there is none.
        mask: 1 for a token and 0 for padding, int64 ``(B, N)``.
        y: Classes, int64 ``(B,)``; or scores, float32.
        index: Places of the samples in their split, int64 ``(B,)``.
    """

    ids: Tensor
    mask: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]


class SentenceSet(Dataset[Sentence]):
    """A split as a map-style data set, for a DataLoader with :func:`collate_sentences`.

    Args:
        ids: Token ids of every sample.
        y: Classes, int64 ``(n,)``; or scores, float32.
    """

    def __init__(self, ids: list[list[int]], y: Tensor) -> None:
        self.ids = ids
        self.y = y

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sentence:
        return Sentence(self.ids[index], self.y[index].item(), index)


def collate_sentences(samples: Sequence[Sentence]) -> SentenceBatch:
    """A batch of the samples, in their order."""
    chosen = [torch.tensor(sample.ids) for sample in samples]
    lengths = torch.tensor([len(ids) for ids in chosen])
    ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    y, index = (torch.tensor([sample[part] for sample in samples]) for part in (1, 2))
    return SentenceBatch(ids, mask, y, index)


class SentenceData(SeededData):
    """Labelled sentences as batches; built by :func:`sentences`.

    A batch is a `SentenceBatch`. Every training epoch is a fresh permutation.

    Attributes:
        num_classes: Number of classes; 1 if `y` is a score.
        vocab_size: Number of token ids.
        train_set: The training samples as a map-style data set.
    """

    def __init__(
        self,
        *,
        name: str,
        num_classes: int,
        vocab_size: int,
        train_set: SentenceSet,
        checksums: Mapping[str, str],
        batch_size: int,
        sizes: tuple[int, int],
        options: Mapping[str, Any],
        train_batches: Callable[[int, int], Iterator[SentenceBatch]],
        val_batches: Callable[[], Iterator[SentenceBatch]],
    ) -> None:
        super().__init__(
            name=name,
            checksums=checksums,
            batch_size=batch_size,
            sizes=sizes,
            options=options,
            train_batches=train_batches,
            val_batches=val_batches,
        )
        self.num_classes = num_classes
        self.vocab_size = vocab_size
        self.train_set = train_set


def sentences(
    name: str,
    tokenizer: Tokenizer,
    *,
    length: int,
    batch_size: int,
    train_size: int | None = None,
    val_size: int | None = None,
    split_seed: int = 0,
    stand_in: bool = False,
) -> SentenceData:
    """A GLUE task by its name, tokenised and ready to train on; its dev sentences are for validation.

    Args:
        name: A GLUE task, such as `glue/sst2`; see :func:`leantrain.data.table`.
        tokenizer: Turns a sentence, or a pair, into ids, special tokens included. Of a tokenizer of transformers, give
            its `backend_tokenizer`. It is not changed.
        length: Tokens at which a sequence is cut; at least the special tokens of a pair and one of each sentence.
        batch_size: Sequences in a batch, at least 1.
        train_size: Use that many training sentences, chosen at random with the classes (or the scores, rounded) kept in
            proportion; None for all.
        val_size: The same for validation.
        split_seed: Seed of these choices; not of the order of batches.
        stand_in: Random ids of full length with random labels in two batches of each split, without reading any file.

    Raises:
        MissingData: If the set's files are not here; says how to get them.
        CorruptData: If a file is not what it should be.
        ValueError: If the name is unknown or a number is out of range.
    """
    shortest = tokenizer.num_special_tokens_to_add(True) + 2
    for option, value, least in (("length", length, shortest), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")
    check_seed("split_seed", split_seed)
    if name not in TABLES:
        raise ValueError(f"unknown task {name!r}; known are {', '.join(TABLES)}")
    classes = TABLES[name]
    described = tokenizer.to_str()
    own = Tokenizer.from_str(described)
    own.no_padding()
    own.enable_truncation(length)
    if stand_in:
        generator = epoch_generator(0, 0, "stand-in")
        shape = (2 * batch_size, length)

        def drawn() -> SentenceSet:
            ids = torch.randint(0, own.get_vocab_size(), shape, generator=generator)
            scores = torch.rand(shape[0], generator=generator)
            return SentenceSet(ids.tolist(), (classes * scores).long() if classes > 1 else 5 * scores)

        train, val = drawn(), drawn()
    else:
        train = _read(name, "train", own, train_size, split_seed)
        val = _read(name, "dev", own, val_size, split_seed)

    def train_batches(seed: int, epoch: int) -> Iterator[SentenceBatch]:
        order = torch.randperm(len(train.y), generator=epoch_generator(seed, epoch, "order"))
        kept = order[: train_batch_count(len(order), batch_size) * batch_size]
        yield from (_batch(train, rows) for rows in kept.split(batch_size))

    def val_batches() -> Iterator[SentenceBatch]:
        yield from (_batch(val, rows) for rows in torch.arange(len(val.y)).split(batch_size))

    return SentenceData(
        name=name,
        num_classes=classes,
        vocab_size=own.get_vocab_size(),
        train_set=train,
        checksums={} if stand_in else table_checksums(name),
        batch_size=batch_size,
        sizes=(len(train.y), len(val.y)),
        options={
            "tokenizer": hashlib.sha256(described.encode()).hexdigest(),
            "length": length,
            "split_seed": split_seed,
            "stand_in": stand_in,
        },
        train_batches=train_batches,
        val_batches=val_batches,
    )


def _read(name: str, split: str, tokenizer: Tokenizer, size: int | None, seed: int) -> SentenceSet:
    frame = table(name, split)
    y = torch.from_numpy(frame["label"].to_numpy(copy=True))
    if y.is_floating_point():
        y = y.float()
    if size is not None:
        if not 1 <= size <= len(y):
            option = "train_size" if split == "train" else "val_size"
            raise ValueError(f"{option} must be 1 to {len(y)} or None, got {size}")
        rows = stratified_order(y.round().long(), seed)[:size]
        frame, y = frame.iloc[rows.tolist()], y[rows]
    inputs: list[Any] = frame["sentence"].tolist()
    if "sentence2" in frame:
        inputs = list(zip(inputs, frame["sentence2"], strict=True))
    return SentenceSet([encoding.ids for encoding in tokenizer.encode_batch(inputs)], y)


def _batch(split: SentenceSet, rows: Tensor) -> SentenceBatch:
    return collate_sentences([split[row] for row in rows.tolist()])
