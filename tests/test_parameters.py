"""The parameters cell: what it may say, and what is refused before anything runs."""

from __future__ import annotations

import math

import nbformat
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from leantrain.parameters import (
    Parameter,
    ParameterError,
    check_parameters,
    parameters_of,
    parse_parameters,
    read_profile,
)

CELL = """\
profile: str = "quick"  # scale; one of quick, book, paper
seeds: list[int] = [0, 1]  # runs; each 0 to 100, unique
rate: float = 1e-3  # step; 1e-6 to 1
epochs: int = 3  # passes; 1 to 50
arms: list[str] = ["A"]  # arms; each one of A, B
dry_run: bool = False  # a test; of the profile
"""
KNOWN = parse_parameters(CELL)


def test_reads_type_range_and_meaning():
    assert KNOWN["seeds"] == Parameter("seeds", "list[int]", [0, 1], "runs", 0.0, 100.0, unique=True)
    assert KNOWN["profile"].choices == ("quick", "book", "paper")
    assert KNOWN["rate"].expected == "float, from 1e-06 to 1"
    assert KNOWN["arms"].expected == "list[str], each one of A, B, not empty"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("epochs", 0, "from 1 to 50"),
        ("epochs", 2.0, "expected int"),
        ("epochs", True, "expected int"),
        ("epochs", None, "expected int"),
        ("epochs", 10**9, "from 1 to 50"),
        ("rate", math.nan, "not finite"),
        ("rate", math.inf, "not finite"),
        ("rate", -1.0, "from 1e-06 to 1"),
        ("rate", "1e-3", "write 1.0e-3"),
        ("rate", "fast", "expected float"),
        ("seeds", [], "the list is empty"),
        ("seeds", [1, 1], "stands twice"),
        ("seeds", [1, -1], "each from 0 to 100"),
        ("seeds", 3, "expected list[int]"),
        ("seeds", "0,1", "expected list[int]"),
        ("profile", "huge", "one of quick, book, paper"),
        ("profile", "'); import os #", "one of quick, book, paper"),
        ("arms", ["A", "C"], "each one of A, B"),
        ("dry_run", 1, "expected bool"),
        ("dry_run", "on", "expected bool"),
    ],
)
def test_refuses_a_value_and_says_what_is_expected(name, value, says):
    with pytest.raises(ParameterError) as error:
        check_parameters(KNOWN, {name: value})
    assert name in str(error.value)
    assert says in str(error.value)


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ParameterError, match=r"unknown parameter 'epoch'; this chapter has profile, seeds, rate"):
        check_parameters(KNOWN, {"epoch": 3})


def test_an_int_is_a_float_and_defaults_fill_in():
    values = check_parameters(KNOWN, {"rate": 1})
    assert values["rate"] == 1.0
    assert type(values["rate"]) is float
    assert values["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rate", "1e-3", 1e-3),
        ("epochs", "007", 7),
        ("seeds", "0, 2,5", [0, 2, 5]),
        ("seeds", "[3]", [3]),
        ("arms", "'A', B", ["A", "B"]),
        ("dry_run", "True", True),
    ],
)
def test_command_line_text_becomes_typed(name, text, value):
    assert KNOWN[name].from_text(text) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [("epochs", "1e1"), ("epochs", ""), ("seeds", ""), ("seeds", "0,,1"), ("dry_run", "yes"), ("rate", "nan")],
)
def test_command_line_text_that_does_not_fit_is_refused(name, text):
    with pytest.raises(ParameterError, match=name):
        KNOWN[name].from_text(text)


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), st.lists, max_leaves=5)
)
def test_any_yaml_value_is_valid_or_a_clear_refusal(value):
    for parameter in KNOWN.values():
        try:
            checked = parameter.check(value)
        except ParameterError as error:
            assert parameter.name in str(error)
        else:
            assert parameter.check(checked) == checked


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a = 3", "name: type = value"),
        ("import os", "name: type = value"),
        ("a: int", "name: type = value"),
        ("a: dict = {}  # x; 1 to 2", "has the type dict"),
        ("a: int = f()  # x; 1 to 2", "plain value"),
        ("a: int = 3", "needs a range"),
        ("a: int = 3  # no range", "needs a range"),
        ("a: int = 3  # x; 5 to 1", "needs a range"),
        ("a: str = 'x'  # x; 1 to 5", "needs a range"),
        ("a: int = 9  # x; 1 to 5", "from 1 to 5"),
    ],
)
def test_a_faulty_parameters_cell_is_refused(line, says):
    with pytest.raises(ParameterError, match=says):
        parse_parameters(line)


@pytest.mark.parametrize("count", [0, 2])
def test_a_notebook_needs_exactly_one_parameters_cell(tmp_path, count):
    cells = [nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]}) for _ in range(count)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "x.ipynb")
    with pytest.raises(ParameterError, match=f"it has {count}"):
        parameters_of(tmp_path / "x.ipynb")


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "a: [1", "just text", "1: 2", "\x00"])
def test_a_profile_file_must_be_a_mapping(tmp_path, content):
    (tmp_path / "p.yml").write_text(content)
    with pytest.raises(ParameterError, match=r"p\.yml"):
        read_profile(tmp_path / "p.yml")
    with pytest.raises(ParameterError, match="cannot read"):
        read_profile(tmp_path / "none.yml")


def test_what_yaml_turns_into_something_else_is_refused():
    for line in ("rate: 1e-3", "dry_run: 'on'", "epochs: 0x1000", "seeds: 1"):
        with pytest.raises(ParameterError):
            check_parameters(KNOWN, yaml.safe_load(line))
