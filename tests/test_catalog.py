"""The catalogue's checks, and the one place where a verdict is made."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from leantrain import paths
from leantrain.catalog import CatalogError, Condition, Quantity, Rule, UnknownPaper, Verdict, load_catalog

finite = st.floats(-1e6, 1e6)


def quantity(value, half=0.0, n=5):
    return Quantity(value=value, low=value - half, high=value + half, n=n)


@pytest.fixture
def rows(house):
    return yaml.safe_load(paths.CATALOG.read_text())


def save(rows):
    paths.CATALOG.write_text(yaml.safe_dump(rows))


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (42, "reproduced"),
        (41, "reproduced"),
        (43, "reproduced"),
        (43.01, "partly"),
        (30, "partly"),
        (29.99, "not reproduced"),
        (50.01, "not reproduced"),
    ],
)
def test_both_ends_of_a_rule_count(house, value, verdict):
    claim = load_catalog().paper("toy").claim("toy.answer")
    assert str(claim.decide({"main": quantity(value)})) == verdict


def test_a_claim_without_partly_is_reproduced_or_not(house):
    claim = load_catalog().paper("toy").claim("toy.large")
    assert claim.decide({"main": quantity(2.0, 0.4)}).verdict is Verdict.REPRODUCED
    assert claim.decide({"main": quantity(2.0, 0.6)}).verdict is Verdict.NOT_REPRODUCED
    assert claim.decide(None).verdict is Verdict.OUT_OF_REACH


def test_too_few_runs_make_a_verdict_indicative(house):
    claim = load_catalog().paper("toy").claim("toy.large")
    assert claim.decide({"main": quantity(2.0, 0.1, n=2)}) == (Verdict.REPRODUCED, True)
    assert claim.decide({"main": quantity(2.0, 0.1, n=3)}) == (Verdict.REPRODUCED, False)


def test_named_quantities_must_all_be_there(house, rows):
    rows["papers"][0]["claims"][0]["rule"] = {
        "reproduced": [{"of": "half", "at_least": -0.5}, {"of": "half", "side": "low", "at_least": -1.0}],
        "partly": [{"of": "same", "at_least": -0.5}],
    }
    save(rows)
    claim = load_catalog().paper("toy").claim("toy.answer")
    with pytest.raises(ValueError, match=r"needs the measured quantities \['same'\], got \['half'\]"):
        claim.decide({"half": quantity(0)})
    table = [(0, 0.9, -5, "reproduced"), (0, 1.1, 0, "partly"), (-3, 0, -3, "not reproduced")]
    for half, spread, same, verdict in table:
        assert str(claim.decide({"half": quantity(half, spread), "same": quantity(same)})) == verdict


@given(low=finite, width=st.floats(0, 1e3), x=finite)
def test_a_condition_is_an_interval(low, width, x):
    condition = Condition(at_least=low, at_most=low + width)
    assert condition.holds({"main": quantity(x)}) == (low <= x <= low + width)


@pytest.mark.parametrize(
    "fault", [{}, {"at_least": 2, "at_most": 1}, {"at_least": math.nan}, {"at_least": 1, "side": "middle"}]
)
def test_a_faulty_condition_is_refused(fault):
    with pytest.raises(ValidationError):
        Rule(reproduced=(fault,))


@pytest.mark.parametrize("values", [(math.nan, 0, 1), (2, 0, 1), (1, 1, math.inf)])
def test_a_quantity_is_finite_and_inside_its_interval(values):
    value, low, high = values
    with pytest.raises(ValidationError):
        Quantity(value=value, low=low, high=high, n=3)


def _set(path, value):
    def change(rows):
        node = rows
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set(["parts"], [{"slug": "first", "title": "A", "blurb": "B."}] * 2), "part first stands twice"),
        (_set(["papers", 0, "slug"], "Toy!"), "slug"),
        (_set(["papers", 0, "part"], "third"), "part 'third'"),
        (_set(["papers", 0, "arxiv"], 2311.03426), "toy / arxiv"),
        (_set(["papers", 0, "colour"], "red"), "toy / colour"),
        (_set(["papers", 0, "claims", 0, "id"], "other.answer"), "must begin with 'toy.'"),
        (_set(["papers", 0, "claims", 0, "headline"], False), "headline"),
        (_set(["papers", 0, "claims", 0, "stated"], "somewhere"), "toy.answer / stated"),
        (_set(["papers", 0, "claims", 0, "min_n"], 0), "toy.answer / min_n"),
        (_set(["papers", 0, "claims", 0, "rule", "reproduced"], []), "toy.answer / rule / reproduced"),
        (_set(["papers", 0, "claims", 0, "out_of_reach"], {"tiny": "No."}), "out_of_reach"),
        (_set(["papers", 0, "problem"], "no full stop"), "toy / problem"),
        (_set(["papers"], "none"), "papers"),
    ],
)
def test_a_faulty_row_is_named(rows, change, says):
    change(rows)
    save(rows)
    with pytest.raises(CatalogError) as error:
        load_catalog()
    assert says in str(error.value)


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "\x00\x01", "parts: []\n"])
def test_a_broken_file_is_a_clear_error(house, content):
    paths.CATALOG.write_text(content)
    with pytest.raises(CatalogError, match=r"papers\.yml"):
        load_catalog()
    paths.CATALOG.unlink()
    with pytest.raises(CatalogError, match="cannot read"):
        load_catalog()


def test_an_unknown_slug_suggests_the_nearest(house):
    with pytest.raises(UnknownPaper, match="did you mean toy"):
        load_catalog().paper("tyo")


def test_the_rule_is_part_of_a_claims_digest_and_the_prose_is_not(house, rows):
    before = load_catalog().paper("toy").claim("toy.answer").digest
    rows["papers"][0]["claims"][0]["sentence"] = "The answer is near 42."
    save(rows)
    assert load_catalog().paper("toy").claim("toy.answer").digest == before
    rows["papers"][0]["claims"][0]["rule"]["reproduced"][0]["at_least"] = 40
    save(rows)
    assert load_catalog().paper("toy").claim("toy.answer").digest != before


@pytest.mark.parametrize("module", ["leantrain", "leantrain.cli", "leantrain.catalog", "leantrain.records"])
def test_importing_the_command_line_loads_no_heavy_package(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'numpy', 'pandas', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- studies of the book's own


@pytest.fixture
def study(rows):
    """The toy paper's row made into a study's."""
    row = {k: v for k, v in rows["papers"][0].items() if k not in ("authors", "venue", "arxiv", "kind")}
    claim = rows["papers"][0]["claims"][0] | {"id": "own.answer", "paper": None, "stated": "own"}
    rows["studies"] = [row | {"slug": "own", "short": "Own", "claims": [claim]}]
    return rows["studies"][0]


def test_a_study_is_found_like_a_paper_and_not_counted_as_one(rows, study):
    save(rows)
    catalog = load_catalog()
    assert [paper.slug for paper in catalog.papers] == ["toy", "other"]
    assert [entry.slug for entry in catalog.entries] == ["toy", "other", "own"]
    own = catalog.paper("own")
    assert (own.kind, own.authors, own.arxiv, own.room) == ("study", (), None, "studies")
    assert own.module == "leantrain.studies.own"
    assert own.claims[0].paper_text == "the book's own question"
    assert [paper.room for paper in catalog.papers] == ["techniques", "hardware"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set(["studies", 0, "authors"], ["A. Author"]), "own / authors"),
        (_set(["studies", 0, "arxiv"], "2311.03426"), "own / arxiv"),
        (_set(["studies", 0, "slug"], "toy"), "must begin with 'toy.'"),
        (_set(["studies", 0, "claims", 0, "stated"], "abstract"), "are the book's 'own'"),
        (_set(["studies", 0, "claims", 0, "paper"], 42), "have no paper's value"),
        (_set(["papers", 0, "claims", 0, "stated"], "own"), "the claims of a study, and no others"),
        (_set(["papers", 0, "claims"], []), "toy / claims"),
    ],
)
def test_a_study_claims_no_paper_and_a_paper_is_no_study(rows, study, change, says):
    change(rows)
    save(rows)
    with pytest.raises(CatalogError) as error:
        load_catalog()
    assert says in str(error.value)


def test_a_study_among_the_papers_is_refused(rows, study):
    row = rows["studies"].pop()
    rows["papers"].append(row | {"kind": "study", "authors": ["A. Author"], "venue": "here"})
    save(rows)
    with pytest.raises(CatalogError, match="its row belongs under 'studies'"):
        load_catalog()
