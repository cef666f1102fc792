"""Texts and labelled sentences by name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from leantrain.data.checks import check_labels
from leantrain.data.docstrings import read_docstrings
from leantrain.data.errors import CorruptData, MissingData
from leantrain.data.fetch import folders, locate
from leantrain.data.registry import DATASETS
from leantrain.data.stamps import cached_sha256

__all__ = ["TABLES", "TEXTS", "table", "table_checksums", "text"]

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
    """How the lines of a GLUE task are made.

    Attributes:
        folder: The task's folder.
        head: The first line's columns, of the training file and of the other; None if there is no such line.
        fields: Number of columns, where no first line tells it.
        sentences: Which fields are the sentences.
        label: Which field is the label.
        classes: The labels in the order of their numbers; empty if the label is a score.
        dev: Name of the file of the dev split.
    """

    folder: str
    head: tuple[tuple[str, ...], tuple[str, ...]] | None
    sentences: tuple[int, ...]
    label: int
    classes: tuple[str, ...]
    fields: int = 0
    dev: str = "dev"


def _same(*columns: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return columns, columns


_ENTAILS = ("entailment", "not_entailment")
_MNLI = (
    *("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"),
    *("sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1"),
)
_STSB = ("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score")
_TABLES = {
    "glue/sst2": _Layout("SST-2", _same("sentence", "label"), (0,), 1, ("0", "1")),
    "glue/cola": _Layout("CoLA", None, (3,), 1, ("0", "1"), fields=4),
    "glue/rte": _Layout("RTE", _same("index", "sentence1", "sentence2", "label"), (1, 2), 3, _ENTAILS),
    "glue/mrpc": _Layout("MRPC", _same("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), (3, 4), 0, ("0", "1")),
    "glue/qqp": _Layout(
        "QQP", _same("id", "qid1", "qid2", "question1", "question2", "is_duplicate"), (3, 4), 5, ("0", "1")
    ),
    "glue/qnli": _Layout("QNLI", _same("index", "question", "sentence", "label"), (1, 2), 3, _ENTAILS),
    "glue/mnli": _Layout(
        "MNLI",
        ((*_MNLI, "gold_label"), (*_MNLI, "label2", "label3", "label4", "label5", "gold_label")),
        (8, 9),
        -1,
        ("entailment", "neutral", "contradiction"),
        dev="dev_matched",
    ),
    "glue/stsb": _Layout("STS-B", _same(*_STSB), (7, 8), 9, ()),
}
#: Tables and their number of classes; 1 stands for a score from 0 to 5.
TABLES = {name: len(layout.classes) or 1 for name, layout in _TABLES.items()}


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
            1: not entailment). With files that are laid down by hand, in GLUE's own form: `glue/mrpc` and `glue/qqp`
            (label 1: a paraphrase), `glue/qnli` (label 0: the sentence answers the question), `glue/mnli` (entailment,
            neutral, contradiction; its dev split is the matched one) and `glue/stsb` (a score from 0 to 5).
        split: `train` or `dev`; GLUE's test files have no labels.

    Returns:
        One row for each example, in the file's order, with the columns sentence (text), sentence2 (text, only for
        pairs) and label (int64, or float64 for a score).

    Raises:
        ValueError: If there is no such table or split.
        MissingData: If the set's files are not here; says how to get them.
        CorruptData: If a file is not what it should be; names the file and the line.
    """
    _refuse_unknown("table", name, _TABLES, split, _TABLE_SPLITS)
    layout = _TABLES[name]
    path = _table_files(name)[_TABLE_SPLITS.index(split)]
    # Not splitlines(), which also splits at characters that may stand inside a sentence.
    lines = _read(path).removeprefix("\ufeff").removesuffix("\n").split("\n")
    start, fields = 0, layout.fields
    if layout.head is not None:
        head = layout.head[_TABLE_SPLITS.index(split)]
        if tuple(lines[0].split("\t")) != head:
            raise CorruptData(f"{path.name}: the first line is {lines[0]!r:.80}, expected the columns {head}")
        start, fields = 1, len(head)
    rows = [line.split("\t") for line in lines[start:]]
    labels = []
    for number, row in enumerate(rows, start=start + 1):
        if len(row) != fields:
            raise CorruptData(f"{path.name}: line {number} has {len(row)} fields, expected {fields}")
        labels.append(_label(row[layout.label], layout.classes, f"{path.name}: line {number}"))
    y = np.array(labels, np.int64 if layout.classes else np.float64)
    if layout.classes:
        check_labels(path.name, y, len(layout.classes))
    names = ("sentence", "sentence2")
    columns = {name: [row[place] for row in rows] for name, place in zip(names, layout.sentences, strict=False)}
    return pd.DataFrame({**columns, "label": y})


def table_checksums(name: str) -> dict[str, str]:
    """SHA-256 of the files of a GLUE task, for the record.

    Raises:
        ValueError: If there is no such table.
        MissingData: If the set's files are not here; says how to get them.
        CorruptData: If a file is not what it should be.
    """
    _refuse_unknown("table", name, _TABLES, "train", _TABLE_SPLITS)
    if name in DATASETS:
        return DATASETS[name].checksums
    return {f"glue/{path.parent.name}/{path.name}": cached_sha256(path) for path in _table_files(name)}


def _table_files(name: str) -> tuple[Path, Path]:
    """The files of the training and the dev split. Only those of registered sets have known checksums."""
    layout = _TABLES[name]
    places = [Path("glue", layout.folder, f"{stem}.tsv") for stem in ("train", layout.dev)]
    searched = [locate(name)] if name in DATASETS else folders()
    for folder in searched:
        if all((folder / place).is_file() for place in places):
            return folder / places[0], folder / places[1]
    raise MissingData(
        f"{name} is not complete in {' or '.join(map(str, searched))}. This project does not download it: get it from "
        f"https://gluebenchmark.com/tasks and lay it down as {' and '.join(str(searched[0] / p) for p in places)}. "
        "The environment variable LEANTRAIN_DATA can name another folder."
    )


def _label(text: str, classes: tuple[str, ...], line: str) -> float:
    if classes:
        if text not in classes:
            raise CorruptData(f"{line} has the label {text!r}, not {classes}")
        return classes.index(text)
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    if not 0 <= score <= 5:
        raise CorruptData(f"{line} has the score {text!r}, not a number from 0 to 5")
    return score


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8")


def _refuse_unknown(what: str, name: str, names: Collection[str], split: str, splits: Collection[str]) -> None:
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}; known are {', '.join(names)}")
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; its splits are {', '.join(splits)}")
