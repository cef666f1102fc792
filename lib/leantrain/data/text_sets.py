"""Texts and labelled sentences by name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from leantrain.data.checks import check_labels
from leantrain.data.docstrings import read_docstrings
from leantrain.data.errors import CorruptData
from leantrain.data.fetch import locate

__all__ = ["TEXTS", "table", "text"]

#: Texts and their splits; the first is trained on, the second is for validation.
TEXTS = {
    "docstrings": ("train", "val"),
    "wikitext-2": ("train", "valid", "test"),
    "tinyshakespeare": ("train", "val"),
}
# Every so many docstrings one goes to the validation split.
_HELD_OUT = 10
_TABLE_SPLITS = ("train", "dev")


@dataclass(frozen=True)
class _Layout:
    """How the lines of a GLUE task are made: the folder, the first line, and which field is what."""

    folder: str
    head: tuple[str, ...] | None
    fields: int
    sentences: tuple[int, ...]
    label: int
    classes: tuple[str, ...]


_TABLES = {
    "glue/sst2": _Layout("SST-2", ("sentence", "label"), 2, (0,), 1, ("0", "1")),
    "glue/cola": _Layout("CoLA", None, 4, (3,), 1, ("0", "1")),
    "glue/rte": _Layout(
        "RTE", ("index", "sentence1", "sentence2", "label"), 4, (1, 2), 3, ("entailment", "not_entailment")
    ),
}


def text(name: str, split: str) -> str:
    """The text of one split.

    Args:
        name: `docstrings` (those of scikit-learn, which are there without a download; split val holds every tenth,
            train the others), `wikitext-2` (splits train, valid and test; words split by spaces, rare ones `<unk>`)
            or `tinyshakespeare` (splits train, the first 90 % of the characters, and val, the rest).
        split: Name of the split.

    Raises:
        ValueError: If there is no such text or split.
        MissingData: If the set's files are not here; says how to get them.
        CorruptData: If a file is not what it should be.
    """
    _refuse_unknown("text", name, TEXTS, split, TEXTS.get(name, ()))
    if name == "docstrings":
        held_out = split == "val"
        chosen = [d for place, d in enumerate(read_docstrings(), 1) if (place % _HELD_OUT == 0) == held_out]
        return "\n\n".join(chosen) + "\n"
    folder = locate(name)
    if name == "wikitext-2":
        return _read(folder / "wikitext-2" / f"wiki.{split}.tokens")
    whole = _read(folder / "tinyshakespeare" / "input.txt")
    cut = len(whole) * 9 // 10
    return whole[:cut] if split == "train" else whole[cut:]


def table(name: str, split: str) -> pd.DataFrame:
    """The labelled sentences of one split of a GLUE task.

    Args:
        name: `glue/sst2` (label 1: positive), `glue/cola` (label 1: acceptable) or `glue/rte` (label 0: entailment,
            1: not entailment).
        split: `train` or `dev`; GLUE's test files have no labels.

    Returns:
        One row for each example, in the file's order, with the columns sentence (text), sentence2 (text, only for
        pairs) and label (int64).

    Raises:
        ValueError: If there is no such table or split.
        MissingData: If the set's files are not here; says how to get them.
        CorruptData: If a file is not what it should be; names the file and the line.
    """
    _refuse_unknown("table", name, _TABLES, split, _TABLE_SPLITS)
    layout = _TABLES[name]
    path = locate(name) / "glue" / layout.folder / f"{split}.tsv"
    # Not splitlines(), which also splits at characters that may stand inside a sentence.
    lines = _read(path).removesuffix("\n").split("\n")
    start = 0
    if layout.head is not None:
        if tuple(lines[0].split("\t")) != layout.head:
            raise CorruptData(f"{path.name}: the first line is {lines[0]!r:.80}, expected the columns {layout.head}")
        start = 1
    rows = [line.split("\t") for line in lines[start:]]
    for number, row in enumerate(rows, start=start + 1):
        if len(row) != layout.fields:
            raise CorruptData(f"{path.name}: line {number} has {len(row)} fields, expected {layout.fields}")
        if row[layout.label] not in layout.classes:
            raise CorruptData(f"{path.name}: line {number} has the label {row[layout.label]!r}, not {layout.classes}")
    labels = np.array([layout.classes.index(row[layout.label]) for row in rows], np.int64)
    check_labels(path.name, labels, len(layout.classes))
    names = ("sentence", "sentence2")
    columns = {name: [row[place] for row in rows] for name, place in zip(names, layout.sentences, strict=False)}
    return pd.DataFrame({**columns, "label": labels})


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8")


def _refuse_unknown(what: str, name: str, names: Collection[str], split: str, splits: Collection[str]) -> None:
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}; known are {', '.join(names)}")
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; its splits are {', '.join(splits)}")
