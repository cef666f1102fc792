"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from leantrain.cli import main


def call(*words):
    return CliRunner().invoke(main, list(words))


def test_list_shows_every_paper(house):
    result = call("list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()[3:5]] == ["toy", "other"]
    assert "built" in result.output
    assert "planned" in result.output


def test_show_prints_claims_verdicts_and_parameters(executed):
    result = call("show", "toy")
    assert result.exit_code == 0
    for word in ("toy.answer", "reproduced", "Result at book: fresh", "answer", "from 0 to 100"):
        assert word in result.output
    assert "No chapter yet" in call("show", "other").output


def test_status_says_what_is_missing_stale_or_fresh(executed):
    lines = [" ".join(line.split()) for line in call("status").output.splitlines() if "toy" in line]
    assert lines == [
        "toy quick, reference outputs incomplete: toy.ipynb is not complete: it has no completion stamp",
        "toy quick, this machine missing",
        "toy book, published fresh",
    ]
    (executed.root / "requirements.lock").write_text("torch==2.15.0\n")
    assert "stale: package sympy" in call("status", "toy").output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "tyo"), "did you mean toy"),
        (("show", "nothing"), "no paper has the slug 'nothing'"),
        (("run", "other"), "has no chapter yet"),
        (("run", "toy", "-p", "sedes=1"), "unknown parameter 'sedes'; this chapter has profile, seeds"),
        (("run", "toy", "-p", "seeds"), "expected NAME=VALUE"),
        (("run", "toy", "-p", "answer=much"), "expected float, from 0 to 100"),
        (("run", "toy", "--seeds", "1,1"), "stands twice"),
        (("run", "toy", "--profile", "book", "--store"), "--store keeps the reference outputs"),
        (("new", "nothing"), "no paper has the slug"),
    ],
)
def test_a_faulty_call_is_one_clear_error_before_anything_runs(house, words, says):
    result = call(*words)
    assert result.exit_code == 1
    assert says in result.output
    assert "Traceback" not in result.output
    assert not (house.root / "_build").exists()


@pytest.mark.parametrize("words", [("run",), ("run", "toy", "--all"), ("run", "toy", "--jobs", "0"), ("data", "fetch")])
def test_a_call_that_makes_no_sense_is_a_usage_error(house, words):
    assert call(*words).exit_code == 2


def test_a_broken_catalogue_is_named(house):
    (house.root / "book/papers.yml").write_text("parts: [")
    result = call("list")
    assert result.exit_code == 1
    assert "papers.yml is no valid YAML" in result.output


def test_run_fails_with_the_cause_and_goes_on(house):
    house.write_notebook("1/0")
    result = call("run", "toy")
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.output
    assert "_build/partial/quick/toy.ipynb (marked incomplete)" in result.output


def test_run_prints_the_verdicts(house):
    result = call("run", "toy", "-p", "answer=45")
    assert result.exit_code == 0, result.output
    assert "The answer is about 42." in result.output
    assert "partly" in result.output


def test_store_keeps_reference_outputs_in_the_source(house):
    result = call("run", "toy", "--store")
    assert result.exit_code == 0, result.output
    text = (house.root / "notebooks/toy.ipynb").read_text()
    assert "lt-badge--reproduced" in text
    assert "injected-parameters" not in text
    assert str(house.root) not in text
