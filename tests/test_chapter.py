"""What a notebook speaks to: parameters in, verdicts and the record out."""

from __future__ import annotations

import ast

import pytest
from IPython.core import displaypub
from IPython.core.interactiveshell import InteractiveShell

from leantrain import chapter as chapter_module
from leantrain.catalog import CatalogError, Quantity, load_catalog
from leantrain.chapter import Chapter, badge, card_html, claims_html, format_quantity
from leantrain.measure.statistics import Estimate
from leantrain.parameters import ParameterError
from leantrain.records import MIME, Record

VALUES = {"profile": "book", "seeds": [0, 1, 2], "answer": 42.0, "dry_run": False}


@pytest.fixture
def shown(monkeypatch):
    """What a notebook would show: (data, is it an update) in order."""
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    published = []

    def publish(data, metadata=None, *, transient=None, update=False, **_):
        published.append((data, update))

    monkeypatch.setattr(shell, "display_pub", displaypub.DisplayPublisher(parent=shell))
    monkeypatch.setattr(shell.display_pub, "publish", publish)
    yield published
    InteractiveShell.clear_instance()


def begin(**changes):
    namespace = {**VALUES, **changes}
    return Chapter("toy", namespace), namespace


def measure(chapter, answer=42.0):
    chapter.measure("toy.answer", Estimate.exact(answer))
    chapter.measure("toy.large", Estimate(2.0, 1.8, 2.2, n=3))


def test_parameters_are_checked_and_put_back_in_their_types(house):
    chapter, namespace = begin(answer=41, PALETTE=("#000000",))  # an imported constant is no parameter
    assert type(namespace["answer"]) is float
    assert chapter.profile == "book"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answr": 3}, "unknown parameter 'answr'"),
        ({"answer": "1e-3"}, "write 1.0e-3"),
        ({"seeds": []}, "the list is empty"),
        ({"profile": "huge"}, "one of quick, book, paper"),
    ],
)
def test_a_faulty_parameter_stops_the_notebook(house, change, says):
    with pytest.raises(ParameterError, match=says):
        begin(**change)


def test_the_parameters_cell_must_have_run(house):
    with pytest.raises(ParameterError, match="run the parameters cell first: answer"):
        Chapter("toy", {k: v for k, v in VALUES.items() if k != "answer"})


@pytest.mark.parametrize(("answer", "verdict"), [(42.0, "reproduced"), (35.0, "partly"), (99.0, "not reproduced")])
def test_the_verdict_follows_the_measurement(house, shown, answer, verdict):
    chapter, _ = begin()
    measure(chapter, answer)
    assert str(chapter.verdict("toy.answer")) == verdict
    chapter.verdicts()
    data, _ = shown[-1]
    assert f"toy.answer: {verdict}" in data["text/plain"]
    record = Record.model_validate(data[MIME])
    assert record.measurements["toy.answer"]["main"].value == answer


def test_the_card_is_filled_in_by_the_verdict_cell(house, shown):
    chapter, _ = begin()
    chapter.card()
    measure(chapter)
    chapter.verdicts()
    (first, update0), _, (last, update1) = shown
    assert "under test" in first["text/html"]
    assert not update0
    assert "lt-badge--reproduced" in last["text/html"]
    assert update1


def test_a_claim_in_reach_must_be_measured(house, shown):
    chapter, _ = begin()
    chapter.measure("toy.answer", Estimate.exact(42))
    with pytest.raises(ValueError, match=r"not measured: toy\.large"):
        chapter.verdicts()


def test_a_draft_shows_the_table_and_leaves_no_record(house, shown):
    chapter, _ = begin()
    chapter.verdicts(draft=True)
    data, _ = shown[-1]
    assert MIME not in data
    assert "out of reach here" in data["text/plain"]


def test_numbers_from_a_dry_run_decide_nothing(house, shown):
    chapter, _ = begin(dry_run=True)
    measure(chapter)
    chapter.verdicts()
    assert shown[-1][0][MIME]["measurements"] == {}


def test_a_claim_out_of_reach_says_why(house, shown):
    chapter, _ = begin(profile="quick")
    chapter.measure("toy.answer", Estimate.exact(42))
    with pytest.raises(ValueError, match="out of reach at quick"):
        chapter.measure("toy.large", Estimate(2.0, 1.8, 2.2, n=3))
    chapter.verdicts()
    assert "Needs real data." in shown[-1][0]["text/html"]


def test_measure_refuses_what_it_does_not_know(house):
    chapter, _ = begin()
    with pytest.raises(CatalogError, match=r"has no claim 'toy\.nothing'; it has toy\.answer, toy\.large"):
        chapter.measure("toy.nothing", Estimate.exact(1))
    with pytest.raises(ValueError, match=r"needs the quantities \['main'\], got \['half'\]"):
        chapter.measure("toy.answer", half=Estimate.exact(1))
    chapter.measure("toy.answer", Estimate.exact(1))
    with pytest.raises(ValueError, match="measured twice"):
        chapter.measure("toy.answer", Estimate.exact(1))


def test_provenance_names_the_run_and_no_person_or_folder(house, shown):
    import getpass
    import socket

    chapter, _ = begin()
    chapter.used({"cifar10/data_batch_1": "a" * 64})
    chapter.provenance()
    text = shown[-1][0]["text/plain"]
    for word in ("Profile: book", "torch 2.14", "cifar10/data_batch_1 aaaaaaaaaaaa", "answer = 42.0", "cores"):
        assert word in text
    assert str(house.root) not in text
    assert socket.gethostname() not in text
    assert f" {getpass.getuser()} " not in text


def test_source_shows_code_without_docstrings(house, shown):
    chapter, _ = begin()
    chapter.source(chapter_module.badge, Quantity)
    code = shown[-1][0]["text/plain"]
    ast.parse(code)
    assert "def badge" in code
    assert "class Quantity" in code
    assert '"""' not in code


def test_markup_is_escaped_and_words_stand_beside_colours(house):
    paper = load_catalog().paper("toy")
    paper = paper.model_copy(update={"idea": "<script>alert(1)</script>."})
    assert "<script>" not in card_html(paper, None)
    claim = paper.claim("toy.large")
    decision = claim.decide({"main": Quantity(value=2, low=1.8, high=2.2, n=1)})
    assert "reproduced" in badge(decision)
    assert "indicative" in badge(decision)
    table = claims_html([(claim, None, claim.decide(None))], "quick")
    assert "2 x (unverified)" in table
    assert "lower end ≥ 1.5" in table


@pytest.mark.parametrize(
    ("quantity", "text"),
    [
        (Quantity(value=4.0227, low=4.0227, high=4.0227, n=1, method="exact"), "4.023 %"),
        (Quantity(value=1.9321, low=1.881, high=1.97, n=5), "1.93 % [1.88, 1.97], n = 5"),
        (Quantity(value=-0.5, low=-1, high=0, n=3), "-0.5 % [-1, 0], n = 3"),
    ],
)
def test_quantities_read_well(quantity, text):
    assert format_quantity(quantity, "%") == text
