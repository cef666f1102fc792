"""A new chapter runs and passes before any content is in it."""

from __future__ import annotations

import runpy

import nbformat
import pytest

from leantrain import runner
from leantrain.catalog import load_catalog
from leantrain.parameters import parameters_of
from leantrain.scaffold import SECTIONS, lay_down


def test_a_new_chapter_has_every_file_and_section(house):
    paper = load_catalog().paper("other")
    written = {str(path.relative_to(house.root)) for path in lay_down(paper)}
    assert written == {
        "lib/leantrain/hardware/other.py",
        "tests/hardware/test_other.py",
        "notebooks/other.ipynb",
        "notebooks/profiles/book/other.yml",
        "notebooks/profiles/paper/other.yml",
    }
    notebook = nbformat.read(house.root / "notebooks/other.ipynb", as_version=4)
    nbformat.validate(notebook)
    headings = [c.source for c in notebook.cells if c.cell_type == "markdown" and c.source.startswith("## ")]
    assert headings == [f"## {section}" for section in SECTIONS]
    assert set(parameters_of(house.root / "notebooks/other.ipynb")) == {"profile", "seeds", "dry_run"}
    module = runpy.run_path(str(house.root / "lib/leantrain/hardware/other.py"))
    assert module["__doc__"].startswith("Other: An idea.")


def test_a_new_chapter_runs_to_its_end_but_is_no_result(house):
    paper = load_catalog().paper("other")
    for path in lay_down(paper):
        if path.suffix == ".ipynb":
            # The module of the small project is not importable; the machinery around it is what is tested.
            path.write_text(path.read_text().replace("leantrain.hardware.other", "leantrain.paths"))
    (outcome,) = runner.run_jobs([runner.plan(paper, "quick")])
    assert outcome.cause == "the notebook holds 0 records; its verdict cell makes one"


def test_nothing_is_overwritten(house):
    paper = load_catalog().paper("other")
    test = house.root / "tests/hardware/test_other.py"
    test.parent.mkdir(parents=True)
    test.write_text("mine")
    with pytest.raises(FileExistsError, match=r"test_other\.py exists already"):
        lay_down(paper)
    assert test.read_text() == "mine"
    assert not paper.notebook_path.exists()
