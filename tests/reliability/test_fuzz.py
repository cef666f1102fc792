"""Whatever stands in a file or on the command line: it is read as meant, or refused in one sentence."""

from __future__ import annotations

import ast
import copy
import json
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from papermill.translators import PythonTranslator

from leantrain import runner
from leantrain.catalog import Catalog, CatalogError, UnknownPaper, load_catalog
from leantrain.parameters import (
    Parameter,
    ParameterError,
    check_parameters,
    parameters_of,
    parse_parameters,
    read_profile,
)
from leantrain.records import IncompleteRun, Record, read_record

# The small project is only read; no example leaves anything in it.
several = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

CELL = """\
profile: str = "quick"  # scale; one of quick, book, paper
seeds: list[int] = [0, 1]  # runs; each 0 to 100, unique
rate: float = 1e-3  # step; 1e-6 to 1
epochs: int = 3  # passes; 1 to 50
arms: list[str] = ["A"]  # arms; each one of A, B
dry_run: bool = False  # a test of the profile
"""
KNOWN = parse_parameters(CELL)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400)])
    | st.just(1).map(
        lambda one: one << 20_000
    )  # longer than Python writes, so that Hypothesis must not write it either
    | st.floats()
    | st.text(max_size=8)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
#: What YAML, Python and the range grammar give a meaning to, so that random texts get beyond the first character.
crumbs = st.sampled_from(
    [*":-#,;='\"[]{}&*!|>%@`\n\t", "  ", "\n", "\n  ", "<<: ", "&a ", "*a", "!!int ",
     "!!bool maybe", "!!timestamp ", "2023-13-45", "0b", "0x", "1e999", "1:60", "nan", "inf", "1 to 5", "; each ",
     "one of ", ", unique", "int", "list[int]", "str", "x: ", "\x00", "\ufeff", "\U0001f600", "\ud7ff", "\u2028"]
)  # fmt: skip
texts = st.lists(crumbs | st.text(max_size=6), max_size=30).map("".join)


def mutated(data, text):
    """The text with up to five pieces cut out, doubled or put in."""
    for _ in range(data.draw(st.integers(1, 5))):
        begin = data.draw(st.integers(0, len(text)))
        end = min(len(text), begin + data.draw(st.integers(0, 30)))
        piece = data.draw(st.sampled_from(["", text[begin:end] * 2]) | crumbs | st.text(max_size=6))
        text = text[:begin] + piece + text[end:]
    return text


def written(content, name="fuzz.yml"):
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return folder, path


def places(node, path=()):
    """The way to every part of nested lists and mappings."""
    yield path
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield from places(value, (*path, key))


def replaced(data, tree):
    """A copy in which one part is gone or is something else."""
    tree = copy.deepcopy(tree)
    *way, last = data.draw(st.sampled_from([place for place in places(tree) if place]))
    node = tree
    for step in way:
        node = node[step]
    if data.draw(st.booleans()):
        node[last] = data.draw(values)
    else:
        del node[last]
    return tree


def dumped(dump, tree):
    try:
        return dump(tree)
    except ValueError:  # Python does not write numbers of more than 4,300 digits
        reject()


# ---------------------------------------------------------------- the catalogue


def reads_or_refuses(content):
    folder, path = written(content)
    with folder:
        try:
            catalog = load_catalog(path)
        except CatalogError as error:
            assert "fuzz.yml" in str(error)
            return None
        assert isinstance(catalog, Catalog)
        return catalog


@given(content=texts | st.binary(max_size=60))
@several
def test_any_file_is_a_catalogue_or_is_refused(content):
    reads_or_refuses(content)


@given(data=st.data())
@several
def test_a_damaged_catalogue_is_read_or_refused(house, data):
    reads_or_refuses(mutated(data, (house.root / "book" / "papers.yml").read_text()))


@given(data=st.data())
@several
def test_a_catalogue_with_one_other_value_is_sound_or_refused(house, data):
    rows = yaml.safe_load((house.root / "book" / "papers.yml").read_text())
    catalog = reads_or_refuses(dumped(yaml.safe_dump, replaced(data, rows)))
    if catalog is not None:
        assert {c.id.partition(".")[0] for p in catalog.papers for c in p.claims} == {p.slug for p in catalog.papers}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("parts: []\npapers: []\nparts: []\n", "'parts' stands twice.*line 3"),
        ("parts:\n- slug: a\n  title: b\n  slug: c\n", "'slug' stands twice.*line 4"),
        ("parts: " + "[" * 3000, "no valid YAML"),
        ("parts: 2023-13-45\n", "no valid YAML"),
        ("parts: !!bool maybe\n", "no valid YAML"),
        ("parts: !!python/object/apply:os.system [exit]\n", "no valid YAML"),
        ("parts: &a [*a]\npapers: []\n", "not sound"),
    ],
)
def test_what_yaml_lets_pass_is_refused(content, says):
    folder, path = written(content)
    with folder, pytest.raises(CatalogError, match=f"(?s){says}"):
        load_catalog(path)


@given(slug=texts | st.sampled_from(["../toy", "/toy", "toy/../toy", "~", "toy.ipynb", "TOY", "toy "]))
@several
def test_a_slug_is_a_known_one_or_is_refused(house, slug):
    catalog = load_catalog()
    if slug not in ("toy", "other"):
        with pytest.raises(UnknownPaper):
            catalog.paper(slug)


# ---------------------------------------------------------------- the parameters cell, profiles, values


@given(data=st.data())
@several
def test_any_parameters_cell_is_read_or_refused(data):
    source = mutated(data, CELL) if data.draw(st.booleans()) else data.draw(texts)
    try:
        found = parse_parameters(source)
    except ParameterError:
        return
    for name, parameter in found.items():
        assert isinstance(parameter, Parameter)
        assert parameter.name == name
        assert parameter.check(parameter.default) == parameter.default


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a: int = 3  # x; 1 to 5\na: int = 4  # x; 1 to 5", "'a' stands twice"),
        ("a: int = (", "no valid Python"),
        ("a: int = 3\x00", "no valid Python"),
        ("  a: int = 3", "no valid Python"),
        ("a: int = " + "-" * 50_000 + "1  # x; 1 to 5", "no valid Python|plain value"),
        ("a: int = {[]}  # x; 1 to 5", "plain value"),
    ],
)
def test_a_cell_that_is_none_is_refused(line, says):
    with pytest.raises(ParameterError, match=says):
        parse_parameters(line)


@given(content=texts | st.binary(max_size=60))
@several
def test_any_profile_file_is_a_mapping_or_is_refused(content):
    folder, path = written(content)
    with folder:
        try:
            found = read_profile(path)
        except ParameterError as error:
            assert "fuzz.yml" in str(error)
        else:
            assert all(isinstance(name, str) for name in found)


def test_a_parameter_given_twice_in_a_profile_is_refused():
    folder, path = written("epochs: 3\nseeds: [0]\nepochs: 30\n")
    with folder, pytest.raises(ParameterError, match=r"(?s)'epochs' stands twice.*line 3"):
        read_profile(path)


@given(given_values=st.dictionaries(st.sampled_from([*KNOWN, "sedes"]), values, max_size=3))
@several
def test_any_values_are_checked_or_refused(given_values):
    try:
        checked = check_parameters(KNOWN, given_values)
    except ParameterError as error:
        assert any(name in str(error) for name in given_values)
    else:
        assert list(checked) == list(KNOWN)
        # What is injected into a notebook is data: the very values, whatever they contain.
        code = PythonTranslator.codify(checked)
        read = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(code).body}
        assert read == checked


@given(text=texts | st.text(max_size=40) | st.sampled_from(["9" * 5000, "-" * 99, "1_0", "[[0]]", "[0", "٣"]))
@several
def test_any_text_on_the_command_line_is_a_value_or_is_refused(text):
    for parameter in KNOWN.values():
        try:
            value = parameter.from_text(text)
        except ParameterError as error:
            assert parameter.name in str(error)
        else:
            assert parameter.check(value) == value


@pytest.mark.parametrize("text", ["'); import os #", '"""', "A', __import__('os').system('exit') or 'A", "{{x}}"])
def test_code_in_a_text_stays_text(text):
    free = Parameter("note", "str", "", "words", choices=(text,))
    (line,) = [line for line in PythonTranslator.codify({"note": free.from_text(text)}).splitlines() if "note" in line]
    assert ast.literal_eval(line.partition("=")[2].strip()) == text


# ---------------------------------------------------------------- notebooks and records


@given(data=st.data())
@several
def test_any_notebook_has_parameters_or_is_refused(house, data):
    notebook = json.loads((house.root / "notebooks" / "toy.ipynb").read_text())
    content = dumped(json.dumps, replaced(data, notebook)) if data.draw(st.booleans()) else data.draw(texts)
    folder, path = written(content, "fuzz.ipynb")
    with folder:
        try:
            assert isinstance(parameters_of(path), dict)
        except ParameterError as error:
            assert str(error)


@given(data=st.data())
@several
def test_a_notebook_with_one_other_value_holds_the_record_or_none(executed, data):
    notebook = json.loads(executed.chapter.read_text())
    true = read_record(executed.chapter)
    folder, path = written(dumped(json.dumps, replaced(data, notebook)), "fuzz.ipynb")
    with folder:
        try:
            found = read_record(path)
        except IncompleteRun as error:
            assert str(error)
        else:
            assert isinstance(found, Record)
            assert found == true, "a record that was changed after the run is refused"


@pytest.mark.parametrize("profile", ["", "quick ", "QUICK", "../quick", "paper/../book"])
def test_an_unknown_profile_is_refused(house, profile):
    with pytest.raises(ValueError, match="profile"):
        runner.plan(load_catalog().paper("toy"), profile)
