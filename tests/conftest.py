"""A small project in a temporary folder, for tests of the machinery around the chapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest

from leantrain import book, paths, records
from leantrain.catalog import load_catalog

PROJECT = Path(__file__).parents[1]

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

    @property
    def chapter(self) -> Path:
        return self.root / "book" / "chapters" / "toy.ipynb"

    @property
    def partial(self) -> Path:
        return self.root / "_build" / "partial" / "book" / "toy.ipynb"

    def write_notebook(self, *cells: str, **options: Any) -> Path:
        path = self.root / "notebooks" / "toy.ipynb"
        nbformat.write(notebook(*cells, **options), path)
        return path


#: A lock in the form of the real one: sphinx is reached by no chapter, sympy through torch.
LOCK = """\
sphinx==7.4.7 # via jupyter-book
sympy==1.14 # via torch
torch==2.14.1 ; sys_platform == 'linux' # via leantrain (pyproject.toml)
"""


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    root = tmp_path / "house"
    for folder in ("book/chapters", "notebooks/profiles/book", "notebooks/profiles/paper", "lib/leantrain", "data"):
        (root / folder).mkdir(parents=True)
    (root / "book" / "papers.yml").write_text(PAPERS)
    (root / "requirements.lock").write_text(LOCK)
    (root / "lib" / "leantrain" / "experiment.py").write_text("import torch\n\nLIMIT = 1\n")
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


@pytest.fixture
def executed(house: House) -> House:
    """The small project with a complete book chapter, made without a kernel."""
    record = {
        "version": 1,
        "slug": "toy",
        "profile": "book",
        "parameters": {"profile": "book", "seeds": [0, 1, 2], "answer": 42.0, "dry_run": False},
        "measurements": {
            "toy.answer": {
                "main": {"value": 42.0, "low": 42.0, "high": 42.0, "n": 1, "level": 0.95, "method": "exact"}
            },
            "toy.large": {"main": {"value": 2.0, "low": 1.8, "high": 2.2, "n": 3, "level": 0.95, "method": "t"}},
        },
        "fingerprint": records.fingerprint(load_catalog().paper("toy")).model_dump(),
        "provenance": {
            "commit": "0" * 40,
            "modified": False,
            "started": "2026-01-02 03:04 UTC",
            "wall_s": 61.5,
            "processor": "A processor",
            "cores": 2,
            "threads": 2,
            "memory_gib": 24.0,
            "accelerator": None,
            "python": "3.11.7",
            "system": "Linux x86_64",
            "packages": {"torch": "2.14.1"},
            "data": {},
            "runs": 6,
            "runs_from_cache": 0,
        },
    }
    book = json.loads(nbformat.writes(nbformat.read(house.root / "notebooks" / "toy.ipynb", as_version=4)))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(code, start=1):
        cell["execution_count"] = count
    output = {"output_type": "display_data", "metadata": {}, "data": {"text/plain": "table", records.MIME: record}}
    code[-2]["outputs"] = [output]
    records.finish(book)
    paths.write_atomically(house.chapter, json.dumps(book))
    return house


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the whole book's pages, rendered once for all tests that look at them."""
    return book.build(tmp_path_factory.mktemp("rendered")).parent


@pytest.fixture
def small_book(executed: House) -> House:
    """The small project with the real pages and configuration around its one chapter."""
    root = executed.root
    shutil.copy(PROJECT / "_config.yml", root)
    shutil.copytree(PROJECT / "book" / "_static", root / "book" / "_static")
    for page in (
        "index.md",
        "how-to-read.md",
        "scoreboard.md",
        "costs.md",
        "scaling.md",
        "networks.json",
        "bibliography.md",
    ):
        shutil.copy(PROJECT / "book" / page, root / "book")
    (root / "book" / "parts").mkdir()
    (root / "book" / "parts" / "first.md").write_text("# Opening\n\n```{paper-list}\n:part: first\n```\n")
    (root / "book" / "glossary.md").write_text("# Glossary\n\n```{glossary}\ntoken\n  A piece of the input.\n```\n")
    (root / "book" / "references.bib").write_text(
        "@misc{toy, title={A toy paper}, author={Author, A.}, year={2023}, howpublished={arXiv}}\n"
    )
    return executed
