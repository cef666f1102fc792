"""Every chapter has the shape that DESIGN asks for: a linter over the source notebooks and their profiles."""

from __future__ import annotations

import ast
import json
import re
import statistics

import pytest

from leantrain import paths
from leantrain.catalog import load_catalog
from leantrain.parameters import parameters_of
from leantrain.records import check_executed, fingerprint, profile_parameters, read_record
from leantrain.scaffold import sections

BUILT = load_catalog().built()
LONGEST_CELL = 25
MEDIAN_CELL = 15
BYTES = 3_000_000

pytestmark = pytest.mark.parametrize("paper", BUILT, ids=lambda paper: paper.slug)


def cells(paper, kind=None):
    notebook = json.loads(paper.notebook_path.read_text(encoding="utf-8"))
    return [c for c in notebook["cells"] if kind in (None, c["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def tags(cell):
    return cell["metadata"].get("tags", [])


def test_it_has_everything_a_slug_stands_for(paper):
    room = paper.room
    name = paper.slug.replace("-", "_")
    assert (paths.ROOT / "lib/leantrain" / room / f"{name}.py").is_file()
    assert (paths.ROOT / "tests" / room / f"test_{name}.py").is_file()
    for profile in ("quick", "book", "paper"):
        values = profile_parameters(paper, profile)
        assert values["profile"] == profile
    assert {"profile", "seeds", "dry_run"} <= set(parameters_of(paper.notebook_path))


def test_its_sections_stand_in_order(paper):
    text = [source(c) for c in cells(paper, "markdown")]
    assert text[0].startswith("# "), "the first cell is the title"
    headings = [line[3:] for t in text for line in t.splitlines() if line.startswith("## ")]
    assert headings == list(sections(paper))
    assert sum(line.startswith("# ") for t in text for line in t.splitlines()) == 1


def test_parameters_and_card_come_first_and_verdicts_are_no_draft(paper):
    code = [source(c) for c in cells(paper, "code")]
    assert "parameters" in tags(cells(paper, "code")[0])
    assert f'Chapter("{paper.slug}", globals())' in code[1]
    whole = "\n".join(code)
    assert "chapter.card()" in whole
    assert re.search(r"chapter\.verdicts\(\)", whole)
    assert "chapter.provenance()" in whole
    assert "chapter.source(" in whole, "section 4 shows the library's own lines"


def test_code_cells_are_short_and_plain(paper):
    code = [source(c) for c in cells(paper, "code")]
    lengths = [len(s.splitlines()) for s in code]
    assert max(lengths) <= LONGEST_CELL, max(code, key=len)
    assert statistics.median(lengths) <= MEDIAN_CELL
    for text in code:
        ast.parse(text)  # no magics, no shell lines
        assert "import *" not in text
    assert not [t for c in cells(paper, "code") for t in tags(c) if t in ("raises-exception", "skip-execution")]


def test_reference_outputs_are_complete_and_from_the_quick_profile(paper):
    record = read_record(paper.notebook_path)
    assert record.profile == "quick"
    check_executed(json.loads(paper.notebook_path.read_text(encoding="utf-8")))
    assert record.fingerprint.claims == fingerprint(paper).claims, "run `leantrain run SLUG --store` again"


def test_exact_claims_and_section_five_are_checked_by_nbval(paper):
    section, marked = "", {}
    for cell in cells(paper):
        if cell["cell_type"] == "markdown":
            for line in source(cell).splitlines():
                section = line[3:] if line.startswith("## ") else section
        elif source(cell).startswith("# NBVAL_CHECK_OUTPUT"):
            assert cell["outputs"], "a check cell must print something"
            marked.setdefault(section, []).append(source(cell))
    assert "Does it work?" in marked
    text = "\n".join(s for group in marked.values() for s in group)
    for claim in paper.claims:
        if claim.tested == "exact" and "quick" not in claim.out_of_reach:
            assert claim.id.removeprefix(f"{paper.slug}.") in text, f"no check cell prints the verdict on {claim.id}"


def test_every_figure_has_alternative_text(paper):
    for cell in cells(paper, "code"):
        pictures = [o for o in cell["outputs"] if any(k.startswith("image/") for k in o.get("data", {}))]
        if pictures:
            alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt) > 40, f"say what the figure shows: {source(cell)[:80]!r}"


def test_exercises_have_folded_solutions_that_run(paper):
    notebook = cells(paper)
    start = next(i for i, c in enumerate(notebook) if source(c).startswith("## Exercises"))
    end = next(i for i, c in enumerate(notebook) if source(c).startswith("## Provenance"))
    folded = [c for c in notebook[start:end] if c["cell_type"] == "code" and {"hide-cell", "hide-input"} & set(tags(c))]
    assert len(folded) >= 2


def test_outputs_carry_nothing_of_a_machine_and_no_debris(paper):
    text = paper.notebook_path.read_text(encoding="utf-8")
    assert len(text) < BYTES
    outputs = json.dumps([c["outputs"] for c in cells(paper, "code")])
    folders = [f"/{folder}/" for folder in ("home", "root", "tmp")]
    for pattern in (*folders, r"site-packages", r"Warning:", r"\d+%\|", r"<script", r"<iframe"):
        assert not re.search(pattern, outputs), pattern


def test_no_measured_number_is_typed_in_the_prose(paper):
    """A result in the text comes from the record (`{result}`): no decimal with a unit stands in section 7."""
    section = ""
    for cell in cells(paper, "markdown"):
        for line in source(cell).splitlines():
            section = line[3:] if line.startswith("## ") else section
            if section.startswith(("What the paper says", "What we asked")):
                assert not re.search(r"\d+\.\d+\s?(%|points|x\b|ms|s\b)", line), line
