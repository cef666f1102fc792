"""Texts as blocks of tokens, with a byte-pair vocabulary of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from leantrain.data.registry import dataset
from leantrain.data.seeded import SeededData, epoch_generator, train_batch_count
from leantrain.data.text_sets import TEXTS, text

__all__ = ["TokenData", "byte_pair_tokenizer", "own_tokens", "tokens"]

# Bytes, without which a byte-level vocabulary cannot write every text.
_BYTES = 256


class TokenData(SeededData):
    """Blocks of a running text as batches; built by :func:`tokens` and :func:`own_tokens`.

    A batch is an int64 tensor ``(B, block)`` of token ids. Every pass over the training blocks is a fresh permutation;
    an epoch is a pass, or a part of one.

    Attributes:
        tokenizer: Turns text into ids and back.
        vocab_size: Number of ids, special ones included.
        block: Tokens in a block.
    """

    def __init__(
        self,
        *,
        name: str,
        tokenizer: Tokenizer,
        block: int,
        checksums: Mapping[str, str],
        batch_size: int,
        sizes: tuple[int, int],
        options: Mapping[str, Any],
        train_batches: Callable[[int, int], Iterator[Tensor]],
        val_batches: Callable[[], Iterator[Tensor]],
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
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        self.block = block


def byte_pair_tokenizer(text: str, vocab_size: int, special: Sequence[str] = ("<unk>",)) -> Tokenizer:
    """A byte-level byte-pair vocabulary, trained on a text.

    Every text can be written in it, and decoding gives the text back to the byte.

    Args:
        text: What to count pairs in.
        vocab_size: Number of ids; the special ones come first, then the 256 bytes, then merged pairs. There are
            fewer if the text has no pair left that occurs twice.
        special: Tokens that are never split; each must be different.

    Raises:
        ValueError: If the vocabulary cannot hold the bytes and the special tokens, or one of these stands twice.
    """
    least = _BYTES + len(special)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size must be at least {least} (256 bytes and {len(special)} special), got {vocab_size}"
        )
    if len(set(special)) < len(special):
        raise ValueError(f"special tokens must be different, got {list(special)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    # By line, so that the trainer can count in parallel; a merge never crosses the end of a word.
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def tokens(
    name: str,
    *,
    vocab_size: int,
    block: int,
    batch_size: int,
    train_blocks: int | None = None,
    val_blocks: int | None = None,
    special: Sequence[str] = ("<unk>",),
    parts: int = 1,
    stand_in: bool = False,
) -> TokenData:
    """A text by its name, cut into blocks of tokens, ready to train on.

    The vocabulary is trained on the whole training text. The ids of a split are one long sequence, cut into blocks that
    do not overlap; what is left at the end is dropped.

    Args:
        name: `docstrings`, `wikitext-2` or `tinyshakespeare`; see :func:`leantrain.data.text`.
        vocab_size: Number of ids, at least 256 and the special tokens.
        block: Tokens in a block, at least 2.
        batch_size: Blocks in a batch, at least 1.
        train_blocks: Use the first so many training blocks; None for all.
        val_blocks: The same for validation.
        special: Tokens that are never split, such as `<unk>` or a mask.
        parts: Epochs that a pass over the training blocks is divided into, so that a long pass is validated more
            often; at least 1, and at most so many that every epoch has a block.
        stand_in: Random ids in two batches of each split, with a vocabulary of the wanted size, without reading any
            file: to try out a run.

    Raises:
        MissingData: If the set's files are not here; says how to get them.
        CorruptData: If a file is not what it should be.
        ValueError: If the name is unknown or a number is out of range.
    """
    if name not in TEXTS:
        raise ValueError(f"unknown text {name!r}; the texts are {', '.join(TEXTS)}")
    for option, value, least in (("block", block, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "block": block,
        "special": list(special),
        "stand_in": stand_in,
    }
    if parts != 1:  # left out of the description where it changes nothing
        options["parts"] = parts
    if stand_in:
        tokenizer = _stand_in_tokenizer(vocab_size, special)
        generator = epoch_generator(0, 0, "stand-in")
        train, val = (torch.randint(0, vocab_size, (2 * batch_size, block), generator=generator) for _ in range(2))
    else:
        tokenizer, train_ids, val_ids = _encoded(name, vocab_size, tuple(special))
        train = _blocks(train_ids, block, train_blocks, "train_blocks")
        val = _blocks(val_ids, block, val_blocks, "val_blocks")

    return _data(name, tokenizer, train, val, batch_size, parts, {} if stand_in else dataset(name).checksums, options)


def own_tokens(
    name: str,
    tokenizer: Tokenizer,
    train: str,
    val: str,
    *,
    block: int,
    batch_size: int,
    train_blocks: int | None = None,
    val_blocks: int | None = None,
    parts: int = 1,
) -> TokenData:
    """Texts of one's own, cut into blocks of tokens as :func:`tokens` does, in a vocabulary that is there already.

    Args:
        name: What to call the data.
        tokenizer: Turns text into ids. It is not changed.
        train: The training text.
        val: The validation text.
        block: Tokens in a block, at least 2.
        batch_size: Blocks in a batch, at least 1.
        train_blocks: Use the first so many training blocks; None for all.
        val_blocks: The same for validation.
        parts: Epochs that a pass over the training blocks is divided into.

    Raises:
        ValueError: If a number is out of range, or a text is shorter than a block.
    """
    for option, value, least in (("block", block, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")
    options: dict[str, Any] = {
        "block": block,
        "parts": parts,
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
    }
    checksums = {
        f"{name}, {split}": hashlib.sha256(t.encode()).hexdigest() for split, t in (("train", train), ("val", val))
    }
    train_rows = _blocks(_encode(tokenizer, train), block, train_blocks, "train_blocks")
    val_rows = _blocks(_encode(tokenizer, val), block, val_blocks, "val_blocks")
    return _data(name, tokenizer, train_rows, val_rows, batch_size, parts, checksums, options)


def _data(
    name: str,
    tokenizer: Tokenizer,
    train: Tensor,
    val: Tensor,
    batch_size: int,
    parts: int,
    checksums: Mapping[str, str],
    options: Mapping[str, Any],
) -> TokenData:
    if not 1 <= parts <= len(train):
        raise ValueError(f"parts must be 1 to {len(train)}, the number of training blocks, got {parts}")
    share = len(train) // parts

    def train_batches(seed: int, epoch: int) -> Iterator[Tensor]:
        whole, part = divmod(epoch, parts)
        order = torch.randperm(len(train), generator=epoch_generator(seed, whole, "order"))
        chosen = order[part * share : (part + 1) * share]
        for rows in chosen[: train_batch_count(share, batch_size) * batch_size].split(batch_size):
            yield train[rows].long()

    def val_batches() -> Iterator[Tensor]:
        for rows in val.split(batch_size):
            yield rows.long()

    return TokenData(
        name=name,
        tokenizer=tokenizer,
        block=train.shape[1],
        checksums=checksums,
        batch_size=batch_size,
        sizes=(share, len(val)),
        options=options,
        train_batches=train_batches,
        val_batches=val_batches,
    )


@lru_cache(maxsize=4)
def _encoded(name: str, vocab_size: int, special: tuple[str, ...]) -> tuple[Tokenizer, Tensor, Tensor]:
    first, second, *_ = TEXTS[name]
    train, val = text(name, first), text(name, second)
    tokenizer = byte_pair_tokenizer(train, vocab_size, special)
    return tokenizer, _encode(tokenizer, train), _encode(tokenizer, val)


def _encode(tokenizer: Tokenizer, whole: str) -> Tensor:
    lines = tokenizer.encode_batch_fast(whole.splitlines(keepends=True), add_special_tokens=False)
    return torch.tensor([i for line in lines for i in line.ids], dtype=torch.int32)


def _blocks(ids: Tensor, block: int, count: int | None, option: str) -> Tensor:
    most = len(ids) // block
    if count is not None and not 1 <= count <= most:
        raise ValueError(f"{option} must be 1 to {most} or None, got {count}")
    if most == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than a block of {block}")
    return ids[: (most if count is None else count) * block].view(-1, block)


def _stand_in_tokenizer(vocab_size: int, special: Sequence[str]) -> Tokenizer:
    if vocab_size < _BYTES + len(special):
        return byte_pair_tokenizer("", vocab_size, special)
    names = [*special, *(f"token {i}" for i in range(vocab_size - len(special)))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.add_special_tokens(list(special))
    return tokenizer
