"""Texts and tables from tiny files in the official layouts."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from leantrain.data import table, text
from leantrain.data.errors import CorruptData, MissingData
from leantrain.data.text_sets import table_checksums


def test_shakespeare_is_cut_at_nine_tenths(lay_down):
    whole = "".join(chr(65 + k % 26) for k in range(105))
    lay_down("tinyshakespeare", {"tinyshakespeare/input.txt": whole.encode()})
    assert text("tinyshakespeare", "train") == whole[:94]
    assert text("tinyshakespeare", "train") + text("tinyshakespeare", "val") == whole


def test_wikitext_is_returned_byte_for_byte(lay_down):
    contents = {s: f" \n = {s} = \r\n <unk> caf\u00e9 \u2028 @,@ \n" for s in ("train", "valid", "test")}
    lay_down("wikitext-2", {f"wikitext-2/wiki.{s}.tokens": c.encode() for s, c in contents.items()})
    assert {s: text("wikitext-2", s) for s in contents} == contents


def test_sst2(lay_down):
    content = "sentence\tlabel\nit 's \"good\t1\nbad \u2028 \u0085 film \t0\n"
    lay_down("glue/sst2", {"glue/SST-2/train.tsv": content.encode(), "glue/SST-2/dev.tsv": b"sentence\tlabel\nx\t1\n"})
    frame = table("glue/sst2", "train")
    assert list(frame.columns) == ["sentence", "label"]
    assert frame["sentence"].tolist() == ["it 's \"good", "bad \u2028 \u0085 film "]
    assert frame["label"].tolist() == [1, 0]
    assert frame["label"].dtype == np.int64
    assert len(table("glue/sst2", "dev")) == 1


def test_cola_has_no_head_and_no_last_line_end(lay_down):
    lines = b"gj04\t1\t\tThe sailors rode.\ngj04\t0\t*\tRode sailors the."
    lay_down("glue/cola", {"glue/CoLA/train.tsv": lines, "glue/CoLA/dev.tsv": lines})
    frame = table("glue/cola", "dev")
    assert frame.to_dict("list") == {"sentence": ["The sailors rode.", "Rode sailors the."], "label": [1, 0]}


def test_rte_has_pairs(lay_down):
    lines = b"index\tsentence1\tsentence2\tlabel\n0\tA is.\tB is.\tnot_entailment\n7\tC.\tD.\tentailment\n"
    lay_down("glue/rte", {"glue/RTE/train.tsv": lines, "glue/RTE/dev.tsv": lines})
    assert table("glue/rte", "train").to_dict("list") == {
        "sentence": ["A is.", "C."],
        "sentence2": ["B is.", "D."],
        "label": [1, 0],
    }


def by_hand(project, files):
    """Write files of a set that is laid down by hand."""
    for path, content in files.items():
        (project / "data/glue" / path).parent.mkdir(parents=True, exist_ok=True)
        (project / "data/glue" / path).write_text(content, encoding="utf-8")


def tsv(*rows):
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


MNLI = [
    *("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"),
    *("sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1"),
]
MRPC = ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
QQP = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
QNLI = ["index", "question", "sentence", "label"]
STSB = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"]


@pytest.mark.parametrize(
    ("name", "folder", "head", "row", "other", "labels"),
    [
        (
            "mrpc",
            "MRPC",
            ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
            "1,7,8,A,B",
            "0,7,8,C,D",
            [1, 0],
        ),
        (
            "qqp",
            "QQP",
            ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
            "4,1,2,A,B,0",
            "5,1,2,C,D,1",
            [0, 1],
        ),
        (
            "qnli",
            "QNLI",
            ["index", "question", "sentence", "label"],
            "0,A,B,not_entailment",
            "1,C,D,entailment",
            [1, 0],
        ),
        ("stsb", "STS-B", STSB, "0,g,f,2012,1,s,s,A,B,3.250", "1,g,f,2012,1,s,s,C,D,5.000", [3.25, 5.0]),
    ],
)
def test_tasks_laid_down_by_hand(project, name, folder, head, row, other, labels):
    content = tsv(head, row.split(","), other.split(","))
    by_hand(project, {f"{folder}/train.tsv": content, f"{folder}/dev.tsv": content})
    frame = table(f"glue/{name}", "train")
    assert frame.to_dict("list") == {"sentence": ["A", "C"], "sentence2": ["B", "D"], "label": labels}
    assert frame["label"].dtype == (np.float64 if name == "stsb" else np.int64)
    digest = hashlib.sha256(content.encode()).hexdigest()
    assert table_checksums(f"glue/{name}") == {f"glue/{folder}/{split}.tsv": digest for split in ("train", "dev")}


def test_mnli_has_three_classes_and_a_dev_split_of_its_own_form(project):
    filler = [str(k) for k in range(8)]
    train = tsv([*MNLI, "gold_label"], [*filler, "A", "B", "neutral", "contradiction"])
    dev = tsv(
        [*MNLI, "label2", "label3", "label4", "label5", "gold_label"],
        [*filler, "C", "D", "neutral", "neutral", "entailment", "neutral", "neutral", "entailment"],
        [*filler, "E", "F", *["neutral"] * 6],
    )
    by_hand(project, {"MNLI/train.tsv": train, "MNLI/dev_matched.tsv": dev})
    assert table("glue/mnli", "train").to_dict("list") == {"sentence": ["A"], "sentence2": ["B"], "label": [2]}
    assert table("glue/mnli", "dev")["label"].tolist() == [0, 1]


@pytest.mark.parametrize("score", ["5.1", "-1", "nan", "high", ""])
def test_an_odd_score_is_named(project, score):
    content = tsv(STSB, [*"0123456AB", score])
    by_hand(project, {"STS-B/train.tsv": content, "STS-B/dev.tsv": content})
    with pytest.raises(CorruptData, match=rf"train\.tsv: line 2 has the score '{score}'"):
        table("glue/stsb", "train")


def test_a_set_that_is_not_laid_down_says_where_it_belongs(project):
    by_hand(project, {"QQP/train.tsv": "half of it"})
    for read in (lambda: table("glue/qqp", "train"), lambda: table_checksums("glue/qqp")):
        with pytest.raises(MissingData, match=r"glue/QQP/train\.tsv and .*glue/QQP/dev\.tsv"):
            read()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence\tlabel\nfine\t1\nodd\t2\n", r"train\.tsv: line 3 has the label '2'"),
        ("sentence\tlabel\nno label\n", r"train\.tsv: line 2 has 1 fields, expected 2"),
        ("sentence\tlabel\na\t1\n\n", "line 3 has 1 fields"),
        ("label\tsentence\n1\tfine\n", "the first line is"),
        ("sentence\tlabel\n", "expected a row of labels"),
        ("", "the first line is"),
    ],
)
def test_odd_lines_are_named(lay_down, content, message):
    lay_down("glue/sst2", {"glue/SST-2/train.tsv": content.encode(), "glue/SST-2/dev.tsv": b"x"})
    with pytest.raises(CorruptData, match=message):
        table("glue/sst2", "train")


def test_unknown_names_and_splits_are_refused():
    with pytest.raises(ValueError, match="unknown text 'ptb'; known are docstrings, wikitext-2, tinyshakespeare"):
        text("ptb", "train")
    with pytest.raises(ValueError, match="wikitext-2 has no split 'dev'; its splits are train, valid, test"):
        text("wikitext-2", "dev")
    with pytest.raises(ValueError, match="unknown table"):
        table("glue/wnli", "train")
    with pytest.raises(ValueError, match="its splits are train, dev"):
        table("glue/rte", "test")


def test_missing_texts_say_so():
    with pytest.raises(MissingData, match="leantrain data fetch wikitext-2"):
        text("wikitext-2", "train")
    with pytest.raises(MissingData, match="leantrain data fetch glue/cola"):
        table("glue/cola", "train")
