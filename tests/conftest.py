"""A small project in a temporary folder, for tests of the machinery around the chapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

from leantrain import paths

PAPERS = """
parts:
  - {slug: first, title: First part, blurb: The first.}
papers:
  - slug: toy
    title: A toy paper
    short: Toy
    authors: [A. Author]
    year: 2023
    venue: arXiv preprint
    arxiv: "2311.03426"
    part: first
    kind: technique
    problem: A problem.
    idea: An idea.
    tests: A test.
    claims:
      - id: toy.answer
        headline: true
        sentence: The answer is about 42.
        metric: answer
        unit: points
        paper: 42
        conditions: all
        stated: abstract
        tested: exact
        how: It is counted.
        min_n: 1
        rule: {reproduced: [{at_least: 41, at_most: 43}], partly: [{at_least: 30, at_most: 50}]}
      - id: toy.large
        sentence: It holds at scale.
        metric: ratio
        unit: x
        paper: 2.0
        conditions: large
        stated: unverified
        tested: scaled
        how: It is measured.
        min_n: 3
        rule: {reproduced: [{side: low, at_least: 1.5}]}
        out_of_reach: {quick: Needs real data.}
  - slug: other
    title: Another paper
    short: Other
    authors: [B. Author]
    year: 2024
    venue: arXiv preprint
    part: first
    kind: emulator
    problem: A problem.
    idea: An idea.
    tests: A test.
    claims:
      - id: other.claim
        headline: true
        sentence: It is faster.
        metric: speed-up
        unit: x
        paper: null
        conditions: all
        stated: abstract
        tested: full-size
        how: It is measured.
        min_n: 5
        rule: {reproduced: [{at_least: 1.1}]}
"""

PARAMETERS = """\
profile: str = "quick"  # scale of the run; one of quick, book, paper
seeds: list[int] = [0, 1]  # one run per seed; each 0 to 100, unique
answer: float = 42.0  # what is measured; 0 to 100
dry_run: bool = False  # two batches of stand-in data"""

SETUP = """\
from leantrain.chapter import Chapter
from leantrain.measure.statistics import Estimate

chapter = Chapter("toy", globals())
chapter.card()"""

MEASURE = """\
chapter.measure("toy.answer", Estimate.exact(answer))
if profile != "quick":
    chapter.measure("toy.large", Estimate(2.0, 1.8, 2.2, n=len(seeds)))"""


def notebook(*cells: str, parameters: str | None = PARAMETERS) -> nbformat.NotebookNode:
    """A chapter with the usual first and last cells and the given code between them."""
    v4 = nbformat.v4
    made = [v4.new_markdown_cell("# Toy")]
    if parameters is not None:
        made.append(v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    made += [v4.new_code_cell(cell) for cell in (SETUP, *cells, MEASURE, "chapter.verdicts()", "chapter.provenance()")]
    book = v4.new_notebook(cells=made)
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return book


class House:
    """Paths of the small project, with what tests do to it again and again."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write_notebook(self, *cells: str, **options: Any) -> Path:
        path = self.root / "notebooks" / "toy.ipynb"
        nbformat.write(notebook(*cells, **options), path)
        return path


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    root = tmp_path / "house"
    for folder in ("book/chapters", "notebooks/profiles/book", "notebooks/profiles/paper", "lib/leantrain", "data"):
        (root / folder).mkdir(parents=True)
    (root / "book" / "papers.yml").write_text(PAPERS)
    (root / "requirements.lock").write_text("torch==2.14.1\n")
    (root / "lib" / "leantrain" / "experiment.py").write_text("LIMIT = 1\n")
    for profile in ("book", "paper"):
        (root / f"notebooks/profiles/{profile}/toy.yml").write_text(f"profile: {profile}\nseeds: [0, 1, 2]\n")
    for name, place in {
        "ROOT": ".",
        "BUILD": "_build",
        "CATALOG": "book/papers.yml",
        "CHAPTERS": "book/chapters",
        "NOTEBOOKS": "notebooks",
        "PROFILES": "notebooks/profiles",
        "DATA": "data",
        "LOCK": "requirements.lock",
    }.items():
        monkeypatch.setattr(paths, name, root / place if place != "." else root)
    monkeypatch.setenv("LEANTRAIN_ROOT", str(root))
    made = House(root)
    made.write_notebook()
    return made
