"""Texts and tables from tiny files in the official layouts."""

from __future__ import annotations

import numpy as np
import pytest

from leantrain.data import table, text
from leantrain.data.errors import CorruptData, MissingData


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
        table("glue/stsb", "train")
    with pytest.raises(ValueError, match="its splits are train, dev"):
        table("glue/rte", "test")


def test_missing_texts_say_so():
    with pytest.raises(MissingData, match="leantrain data fetch wikitext-2"):
        text("wikitext-2", "train")
    with pytest.raises(MissingData, match="leantrain data fetch glue/cola"):
        table("glue/cola", "train")
